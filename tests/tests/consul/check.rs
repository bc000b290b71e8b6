//! `check` names what is wrong with Consul, each with the next step.

use std::fs;

use serde_json::Value;
use weft_tests::{Consul, Mesh, Pod, Process, can_run, program, until};

use super::world::{app, get, sidecar};

/// What `check` says of these subjects: outcome and detail.
fn check(mesh: &Mesh, pod: &Pod, flags: &[&str]) -> Vec<(String, String)> {
    let mut command = pod.command(program("weft-sidecar"));
    let socket = mesh.network.folder().join(pod.netns().name()).join("admin.sock");
    command
        .args(["check", "-o", "json", "--service", "orders", "--port", "8080", "--admin-socket"])
        .arg(socket);
    let output = command.args(flags).output().expect("weft-sidecar check");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let findings: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    let of = |finding: &Value| {
        let word = |key: &str| finding[key].as_str().unwrap_or_default().to_owned();
        (word("outcome"), format!("{}: {}", word("subject"), word("detail")))
    };
    findings.as_array().into_iter().flatten().map(of).collect()
}

/// A relay to Consul at 127.0.0.1:8501 in this pod, on whose answers it is the year 2100.
fn from_the_future(pod: &Pod, consul: &Consul) -> Process {
    const PROGRAM: &str = "
import re, socket, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
host, port = sys.argv[1].removeprefix('http://').split(':')
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        with socket.create_connection((host, int(port)), timeout=10) as consul:
            head = f'{self.command} {self.path} HTTP/1.1\\r\\nHost: consul\\r\\nConnection: close\\r\\n'
            consul.sendall(f'{head}Content-Length: {len(body)}\\r\\n\\r\\n'.encode() + body)
            answer = b''.join(iter(lambda: consul.recv(65536), b''))
        self.wfile.write(re.sub(rb'\\r\\nDate: [^\\r]*', b'\\r\\nDate: Fri, 01 Jan 2100 00:00:00 GMT', answer, count=1))
        self.close_connection = True
    do_PUT = do_POST = do_GET
    def log_message(self, *_):
        pass
server = ThreadingHTTPServer(('127.0.0.1', 8501), Handler)
print('serving', flush=True)
server.serve_forever()
";
    let mut relay = pod.start("python3", &["-c", PROGRAM, &consul.address()]);
    relay.wait_for_line("serving");
    relay
}

fn expect(findings: &[(String, String)], outcome: &str, words: &[&str]) {
    let found =
        findings.iter().any(|(was, text)| was == outcome && words.iter().all(|word| text.contains(word)));
    assert!(found, "{outcome} {words:?} is not among {findings:#?}");
}

#[test]
fn every_mistake_with_consul_is_named_with_the_next_step() {
    if !can_run(&Consul::NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let (open, guarded) = (mesh.network.pod("open"), mesh.network.pod("guarded"));
    let (server, lonely) = (mesh.network.pod("server"), mesh.network.pod("lonely"));

    let dead = check(&mesh, &server, &["--consul", "127.0.0.1:8500"]);
    expect(
        &dead,
        "wrong",
        &["Consul at http://127.0.0.1:8500", "Connection refused", "is the agent running?"],
    );

    // A server that waits for two more.
    let alone = Consul::server(&lonely, &[&lonely, &open, &guarded], "");
    let led_by_none = check(&mesh, &server, &["--consul", &alone.address()]);
    expect(&led_by_none, "wrong", &["there is no leader", "are the servers running"]);
    drop(alone);

    let consul = Consul::dev(&open, "");
    let unguarded = check(&mesh, &server, &["--consul", &consul.address()]);
    expect(&unguarded, "shown", &["Consul: ", " leads"]);
    expect(&unguarded, "wrong", &["whoever reaches Consul may register as `orders`", "default_policy"]);
    expect(&unguarded, "shown", &["clock: it agrees"]);
    expect(&unguarded, "unknown", &["registration of `orders`", "no sidecar with these settings runs"]);

    expect(&unguarded, "shown", &["services in Consul: 1 of 1 read, without a mistake"]);
    consul.ask("PUT", "/v1/agent/service/register", Some(&serde_json::json!({"Name": "cart"}))).unwrap();
    until("the instance without a port is named", || {
        let found = check(&mesh, &server, &["--consul", &consul.address()]);
        let words = ["service `cart`, instance `cart`", "`Service.Port` is 0 or missing", "leave it out"];
        found.iter().any(|(was, text)| was == "wrong" && words.iter().all(|word| text.contains(word)))
    });

    let _relay = from_the_future(&server, &consul);
    let late = check(&mesh, &server, &["--consul", "127.0.0.1:8501"]);
    expect(&late, "wrong", &["clock: Consul's is ", " seconds ahead of ours", "NTP"]);

    let consul = Consul::with_acls(&guarded);
    let token = mesh.network.folder().join("check-token");
    let file = token.display().to_string();
    fs::write(&token, consul.token("nodes", "node_prefix \"\" { policy = \"read\" }")).unwrap();
    let flags = ["--consul", &consul.address(), "--consul-token-file", &file];
    let poor = check(&mesh, &server, &flags);
    expect(&poor, "shown", &["nobody registers as `orders` without a token"]);
    expect(
        &poor,
        "wrong",
        &["missing: service:read on everything, key:read on weft/policies/, service:write on orders"],
    );

    let rules = "service \"orders\" { policy = \"write\" } service_prefix \"\" { policy = \"read\" }
        node_prefix \"\" { policy = \"read\" } key_prefix \"weft/policies/\" { policy = \"read\" }";
    fs::write(&token, consul.token("orders", rules)).unwrap();
    let _app = app(&server, "one", 8080);
    let running = ["--consul-token-file", &file, "--port", "8080", "--publish", "true", "--instance", "one"];
    let _sidecar = sidecar(&mesh, &server, "orders", &consul.address(), &running);
    until("it is registered", || consul.passing("orders").len() == 1);
    let good = check(&mesh, &server, &flags);
    expect(&good, "shown", &["all that a sidecar needs is allowed"]);
    expect(&good, "shown", &["registration of `orders`", "`orders-one` is registered as spiffe://"]);
    expect(&good, "shown", &["strict mutual TLS", "met no plaintext caller"]);

    assert_eq!(get(&open, &format!("http://{}:8080/", server.ipv4())), "200 one");
    let caller = format!("it would refuse {}", open.ipv4());
    expect(&check(&mesh, &server, &flags), "unknown", &["strict mutual TLS", &caller]);

    // Somebody registers another identity over it.
    let meta = serde_json::json!({"Meta": {"weft-identity": "spiffe://weft.test/ns/default/sa/other"}});
    consul.register("orders", "orders-one", &server.ipv4().to_string(), 8080, meta);
    until("the mismatch is named", || {
        let found = check(&mesh, &server, &flags);
        found.iter().any(|(outcome, text)| {
            outcome == "wrong"
                && text.contains("sa/orders, but the registry spiffe://weft.test/ns/default/sa/other")
        })
    });
}
