//! Heads that are as large as they may be, through two sidecars: what each of them adds leaves them as large as they
//! may be.

use weft_tests::{Mesh, Need, Pod, Process, Sidecar, can_run, program};

use crate::wire::{dial, exchange, read_until_text};

/// A client and the app of `mesh-peer` behind sidecars of their own.
struct Pair {
    client: Pod,
    server: Pod,
    far: Sidecar,
    _near: Sidecar,
    _app: Process,
    _mesh: Mesh,
}

fn pair() -> Option<Pair> {
    if !can_run(&[Need::Root, Need::Program("curl", "curl")]) {
        return None;
    }
    let mesh = Mesh::new();
    let (client, server) = (mesh.network.pod("client"), mesh.network.pod("server"));
    let mut app = server.start(program("mesh-peer"), &["app", "127.0.0.1:8080"]);
    app.wait_for_line("serving");
    let far = mesh.sidecar(&server, "orders", &["--port", "8080"]);
    let near = mesh.sidecar(&client, "web", &[]);
    Some(Pair { client, server, far, _near: near, _app: app, _mesh: mesh })
}

impl Pair {
    /// The answer to a GET with these fields, besides Host and Connection.
    fn get(&self, path: &str, fields: &str) -> String {
        let head = format!("GET {path} HTTP/1.1\r\nHost: orders\r\n{fields}Connection: close\r\n\r\n");
        exchange(&self.client, self.server.ipv4(), 8080, head.as_bytes())
    }
}

#[test]
fn an_answer_of_many_fields_arrives_and_one_of_too_many_is_called_that() {
    let Some(pair) = pair() else { return };
    for fields in [99, 100, 101, 500, 1000] {
        let answer = pair.get(&format!("/fields/{fields}"), "");
        let head = answer.split("\r\n\r\n").next().unwrap_or_default();
        assert!(head.starts_with("HTTP/1.1 200 "), "{fields}: {head}");
        assert_eq!(head.matches("\r\nX-").count(), fields - 1, "{head}");
    }
    let answer = pair.get("/fields/1001", "");
    assert!(answer.starts_with("HTTP/1.1 502 "), "{answer}");
    assert!(answer.to_lowercase().contains("x-weft-failure: response_headers_too_large"), "{answer}");
    let line = pair.far.wait_for_failure("response_headers_too_large", &[]);
    assert_eq!(line["kind"], "request", "{line}");
}

#[test]
fn an_upgrade_may_have_as_many_fields_as_any_request() {
    let Some(pair) = pair() else { return };
    let fields = |count: usize| "X: y\r\n".repeat(count);
    // beside these there are Host and Connection, and in an upgrade Upgrade
    assert!(pair.get("/", &fields(98)).starts_with("HTTP/1.1 200 "));
    assert!(pair.get("/", &fields(99)).starts_with("HTTP/1.1 431 "));
    let upgrade = |fields: &str| {
        let mut stream = dial(&pair.client, pair.server.ipv4(), 8080);
        let head = format!(
            "GET /upgrade HTTP/1.1\r\nHost: orders\r\nConnection: upgrade\r\nUpgrade: echo\r\n{fields}\r\n"
        );
        std::io::Write::write_all(&mut stream, head.as_bytes()).unwrap();
        read_until_text(&mut stream, "\r\n\r\n")
    };
    let answer = upgrade(&fields(97));
    assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    let answer = upgrade(&fields(98));
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    // as many bytes as there may be, too
    let large = |beside: usize| {
        let value = "y".repeat(65_536 - beside);
        let answer = upgrade(&format!("X: {value}\r\n"));
        answer.lines().next().unwrap_or_default().to_owned()
    };
    assert_eq!(large(200), "HTTP/1.1 101 Switching Protocols");
    assert!(large(0).starts_with("HTTP/1.1 431 "), "more than there may be");
}
