//! A registry that answers nonsense: an error that names service and field, and the last good state stays.

use std::fs;

use serde_json::{Value, json};
use weft_tests::{Consul, Mesh, Pod, Process, Sidecar, can_run, until};

use super::world::{app, get, sidecar};

/// Answers every question with the file `answer` (head and body) in its folder, and counts questions there.
fn registry(pod: &Pod, folder: &str) -> Process {
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
    with open(folder + '/asked', 'ab') as log:
        log.write(data.split(b'\\r\\n')[0] + b'\\n')
    with open(folder + '/answer', 'rb') as file:
        client.sendall(file.read())
    client.close()
listener = socket.create_server(('0.0.0.0', 8500), backlog=100)
print('serving', flush=True)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
";
    let mut process = pod.start("python3", &["-c", PROGRAM, folder]);
    process.wait_for_line("serving");
    process
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
    let folder = mesh.network.folder().join("registry");
    fs::create_dir(&folder).unwrap();
    let say = |text: &str| {
        let aside = folder.join("aside");
        fs::write(&aside, text).unwrap();
        fs::rename(aside, folder.join("answer")).unwrap();
    };
    let address = server.ipv4().to_string();
    let good = json!([instance("one", &address, json!(8080))]).to_string();
    say(&answer("200 OK", "application/json", 7, &good));
    let _registry = registry(&pod, &folder.display().to_string());
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
        (answer("200 OK", json, 8, &wrong_type), &["service `orders`", "`[0].Service.Port`", "string"]),
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
        say(&text);
        wait_for_words(&sidecar, words);
        assert_eq!(get(&client, "http://orders/"), "200 one", "{words:?}");
        say(&answer("200 OK", json, 9, &good));
        let before = fs::read_to_string(folder.join("asked")).unwrap().lines().count();
        until("it is asked again", || {
            fs::read_to_string(folder.join("asked")).unwrap().lines().count() > before + 1
        });
        assert!(sidecar.process.log().len() < 200_000, "the log repeats what came");
    }
}
