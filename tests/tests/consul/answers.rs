//! A registry that answers nonsense: an error that names service and field, and the last good state stays.

use std::{fs, path::PathBuf};

use serde_json::{Value, json};
use weft_tests::{Consul, Mesh, Pod, Process, Sidecar, can_run, until};

use super::world::{app, endpoints, get, sidecar};

/// A registry that says what a test has put into its folder, to each question at once.
struct Registry {
    folder: PathBuf,
    _process: Process,
}

/// The file with the answer (head and body) about policies, and that about all else.
const POLICIES: &str = "policies";
const OTHERS: &str = "others";

impl Registry {
    fn start(mesh: &Mesh, pod: &Pod) -> Registry {
        const PROGRAM: &str = "
import sys, socket, threading
folder = sys.argv[1]
def serve(client):
    data = b''
    while b'\\r\\n\\r\\n' not in data:
        more = client.recv(65536)
        if not more:
            return
        data += more
    name = 'policies' if b' /v1/kv/' in data else 'others'
    with open(folder + '/asked', 'ab') as log:
        log.write(name.encode() + b'\\n')
    with open(folder + '/' + name, 'rb') as file:
        client.sendall(file.read())
    client.close()
listener = socket.create_server(('0.0.0.0', 8500), backlog=100)
print('serving', flush=True)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
";
        let folder = mesh.network.folder().join("registry");
        fs::create_dir(&folder).unwrap();
        let mut process = pod.start("python3", &["-c", PROGRAM, &folder.display().to_string()]);
        process.wait_for_line("serving");
        Registry { folder, _process: process }
    }

    fn say(&self, name: &str, text: &str) {
        let aside = self.folder.join("aside");
        fs::write(&aside, text).unwrap();
        fs::rename(aside, self.folder.join(name)).unwrap();
    }

    /// Waits for a question that is answered with what stands there now.
    fn wait_for_question(&self, name: &str) {
        let count = || {
            let asked = fs::read_to_string(self.folder.join("asked")).unwrap();
            asked.lines().filter(|line| *line == name).count()
        };
        let before = count();
        // The first may have been answered with what stood there before.
        until("it is asked again", || count() > before + 1);
    }
}

fn answer(status: &str, kind: &str, index: u64, body: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nX-Consul-Index: {index}\r\nConnection: close\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn instance(id: &str, address: &str, port: Value) -> Value {
    json!({
        "Node": {"Node": "n1", "Address": address},
        "Service": {"ID": id, "Service": "orders", "Address": address, "Port": port},
        "Checks": [],
    })
}

fn wait_for_words(sidecar: &Sidecar, words: &[&str]) {
    until(&format!("a line of the log says {words:?}"), || {
        let log = sidecar.process.log();
        log.lines().any(|line| words.iter().all(|word| line.contains(word)))
    });
}

#[test]
fn nonsense_is_named_and_the_last_good_state_stays() {
    if !can_run(&Consul::NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let (client, server) = (mesh.network.pod("client"), mesh.network.pod("server"));
    let pod = mesh.network.pod("registry");
    let registry = Registry::start(&mesh, &pod);
    registry.say(POLICIES, &answer("404 Not Found", "application/json", 7, ""));
    let address = server.ipv4().to_string();
    let good = json!([instance("one", &address, json!(8080))]).to_string();
    registry.say(OTHERS, &answer("200 OK", "application/json", 7, &good));
    let _app = app(&server, "one", 8080);
    let consul = format!("http://{}:8500", pod.ipv4());
    let sidecar = sidecar(&mesh, &client, "web", &consul, &[]);
    assert_eq!(get(&client, "http://orders/"), "200 one");

    let port_0 = json!([instance("one", &address, json!(0))]).to_string();
    let wrong_type = json!([instance("one", &address, json!("8080"))]).to_string();
    let long = json!([instance(&"x".repeat(5_000_000), "web.local", json!(80))]).to_string();
    let json = "application/json";
    // Between two bad answers a good one, so that pauses stay short.
    for (text, words) in [
        (
            answer("200 OK", json, 8, &port_0),
            &["service `orders`, instance `one`", "`Service.Port` is 0"][..],
        ),
        (
            answer("200 OK", json, 8, &wrong_type),
            &["service `orders`, instance `one` on node `n1`", "`Service.Port`", "string"],
        ),
        (answer("200 OK", json, 8, &good[..good.len() - 20]), &["service `orders`", "ends too early"]),
        (answer("200 OK", json, 8, &long), &["service `orders`, instance `xxx", "web.local"]),
        (answer("200 OK", "text/html", 8, "<html>Hello"), &["service `orders`", "a web page", "proxy"]),
        (
            answer("403 Forbidden", json, 8, "Permission denied"),
            &["service `orders`", "needs service:read on `orders`"],
        ),
        (answer("429 Too Many Requests", json, 8, "slow down"), &["service `orders`", "too many requests"]),
        (answer("500 Oops", json, 8, "No cluster leader"), &["Consul", "no leader"]),
        (answer("200 OK", json, 8, "[]").replace("Length: 2", "Length: 9"), &["Consul", "broke off"]),
    ] {
        registry.say(OTHERS, &text);
        wait_for_words(&sidecar, words);
        assert_eq!(get(&client, "http://orders/"), "200 one", "{words:?}");
        registry.say(OTHERS, &answer("200 OK", json, 9, &good));
        registry.wait_for_question(OTHERS);
        assert!(sidecar.process.log().len() < 200_000, "the log repeats what came");
    }
}

/// A newer Consul leaves out a port of 0, and has instances at sockets: they cost nobody but themselves.
#[test]
fn an_instance_that_cannot_be_read_costs_that_instance_alone() {
    if !can_run(&Consul::NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let (client, pod) = (mesh.network.pod("client"), mesh.network.pod("registry"));
    let (one, two) = (mesh.network.pod("one"), mesh.network.pod("two"));
    let (_first, _second) = (app(&one, "one", 8080), app(&two, "two", 8080));
    let registry = Registry::start(&mesh, &pod);
    registry.say(POLICIES, &answer("404 Not Found", "application/json", 7, ""));
    let mut without = instance("without", "10.9.9.1", json!(0));
    without["Service"].as_object_mut().unwrap().remove("Port");
    let mut socket = without.clone();
    socket["Service"]["ID"] = "socket".into();
    socket["Service"]["SocketPath"] = "/run/orders.sock".into();
    let odd = instance("odd", "10.9.9.2", json!("8080"));
    let with = |good: &Pod, index| {
        let good = instance("good", &good.ipv4().to_string(), json!(8080));
        let all = json!([without, socket, good, odd, 7]).to_string();
        answer("200 OK", "application/json", index, &all)
    };
    registry.say(OTHERS, &with(&one, 7));
    let consul = format!("http://{}:8500", pod.ipv4());
    // A sidecar that knows nothing yet reads the others.
    let sidecar = sidecar(&mesh, &client, "web", &consul, &[]);
    assert_eq!(get(&client, "http://orders/"), "200 one");
    for words in [
        ["instance `without` on node `n1`", "`Service.Port` is 0 or missing"],
        ["instance `socket` on node `n1`", "`Service.SocketPath` is \"/run/orders.sock\""],
        ["instance `odd` on node `n1`", "`Service.Port`: invalid type: string"],
        ["entry 5 of the answer", "invalid type: integer"],
    ] {
        wait_for_words(&sidecar, &words);
    }
    let metrics = sidecar.metrics(&client);
    assert!(metrics.contains("\nweft_registry_unreadable_instances 4\n"), "{metrics}");
    // And one that runs follows what changes among the others.
    registry.say(OTHERS, &with(&two, 8));
    until("the other instance is called", || get(&client, "http://orders/") == "200 two");
    let log = sidecar.process.log();
    assert_eq!(log.matches("instance `without`").count(), 1, "{log}");
}

/// `retries: {attempts: 7}` and `retries: {attempts: 4}`, as Consul gives them.
const SEVEN: &str = "cmV0cmllczoge2F0dGVtcHRzOiA3fQ==";
const FOUR: &str = "cmV0cmllczoge2F0dGVtcHRzOiA0fQ==";

#[test]
fn nonsense_about_policies_is_named_and_the_last_good_ones_stay() {
    if !can_run(&Consul::NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let (client, server) = (mesh.network.pod("client"), mesh.network.pod("server"));
    let pod = mesh.network.pod("registry");
    let registry = Registry::start(&mesh, &pod);
    let document = |key: Value, value: &str, index: u64| {
        json!([{"Key": key, "Value": value, "Flags": 0, "CreateIndex": 7, "ModifyIndex": index}]).to_string()
    };
    let (json, key) = ("application/json", json!("weft/policies/orders"));
    let good = document(key.clone(), SEVEN, 7);
    let service = json!([instance("one", &server.ipv4().to_string(), json!(8080))]).to_string();
    registry.say(OTHERS, &answer("200 OK", json, 7, &service));
    registry.say(POLICIES, &answer("200 OK", json, 7, &good));
    let _app = app(&server, "one", 8080);
    let sidecar = sidecar(&mesh, &client, "web", &format!("http://{}:8500", pod.ipv4()), &[]);
    assert_eq!(get(&client, "http://orders/"), "200 one");
    let attempts = || endpoints(&client, &sidecar)["orders"]["policy"]["retries"]["attempts"].clone();
    assert_eq!(attempts(), 7);

    let all = "consul:weft/policies/: ";
    let one = "consul:weft/policies/orders: ";
    let wrong_type = document(json!(7), FOUR, 8);
    let no_base64 = document(key.clone(), "?", 8);
    let long = document(key.clone(), &"A".repeat(5_000_000), 8);
    // Between two bad answers a good one, so that pauses stay short.
    for (text, words) in [
        (answer("200 OK", json, 8, &good[..good.len() - 20]), [all, "ends too early"]),
        (answer("200 OK", "text/html", 8, "<html>Hello"), [all, "a web page came"]),
        (answer("200 OK", json, 8, "<html>Hello"), [all, "it begins <html>Hello"]),
        (answer("200 OK", json, 8, &wrong_type), [all, "`[0].Key`"]),
        (answer("200 OK", json, 8, "{}"), [all, "expected a sequence"]),
        (answer("200 OK", json, 8, "[]").replace("Length: 2", "Length: 9"), [all, "broke off"]),
        (answer("403 Forbidden", json, 8, "no"), [all, "needs key:read on `weft/policies/`"]),
        (answer("200 OK", json, 8, &no_base64), [one, "is no base64"]),
        (answer("200 OK", json, 8, &long), [one, "is longer than"]),
    ] {
        registry.say(POLICIES, &text);
        wait_for_words(&sidecar, &words);
        assert_eq!(attempts(), 7, "{words:?}");
        assert_eq!(get(&client, "http://orders/"), "200 one", "{words:?}");
        registry.say(POLICIES, &answer("200 OK", json, 9, &good));
        registry.wait_for_question(POLICIES);
        assert!(sidecar.process.log().len() < 200_000, "the log repeats what came");
    }
    registry.say(POLICIES, &answer("200 OK", json, 10, &document(key, FOUR, 10)));
    until("the next good one counts", || attempts() == 4);
}
