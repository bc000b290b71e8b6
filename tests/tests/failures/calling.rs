//! Failures of what an app calls, shown by its own sidecar. The servers are outside the mesh.

use std::fs;

use weft_sidecar::model::Failure;
use weft_tests::{Mesh, Pod, Process, can_run, output_of};

use super::{
    Test,
    bench::{NEEDS, Shown, curl, peer, start_app},
};

/// A mesh in which `orders` is the app of `mesh-peer` in a pod without a sidecar.
fn mesh_with_orders() -> (Mesh, Pod, Pod, Process) {
    let mesh = Mesh::new();
    let (client, server) = (mesh.network.pod("client"), mesh.network.pod("server"));
    let app = start_app(&server, &format!("{}:8080", server.ipv4()));
    service(&mesh, "orders", &format!("{}:8080", server.ipv4()));
    (mesh, client, server, app)
}

fn service(mesh: &Mesh, name: &str, endpoint: &str) {
    mesh.write_service(name, &format!("endpoints: [{{address: '{endpoint}'}}]\n"));
}

/// The virtual address that the sidecar gives out.
fn address_of_orders(client: &Pod) -> String {
    let mut getent = client.command("getent");
    getent.args(["ahostsv4", "orders"]);
    let answer = output_of(getent);
    format!("{}:80", answer.split_whitespace().next().unwrap_or_default())
}

pub const WHAT_THE_APP_SENDS: Test = (
    "what_the_app_sends",
    &[
        Failure::BadRequest,
        Failure::HeadersTooLarge,
        Failure::ClientTimeout,
        Failure::ClientGone,
        Failure::Loop,
    ],
);

#[test]
fn what_the_app_sends() {
    if !can_run(&NEEDS) {
        return;
    }
    let (mesh, client, _server, _app) = mesh_with_orders();
    let sidecar = mesh.sidecar(&client, "web", &["--header-timeout", "500ms"]);
    let mut shown = Shown::by(WHAT_THE_APP_SENDS, &sidecar, &client);

    let seen = curl(&client, &["-H", "Host: a@b", "http://orders/"]);
    shown.answered(Failure::BadRequest, &seen);

    // hyper answers this one itself, so without our header
    let fields: Vec<String> = (0..120).map(|number| format!("-Hx-{number}: y")).collect();
    let mut arguments: Vec<&str> = fields.iter().map(String::as_str).collect();
    arguments.push("http://orders/");
    let seen = curl(&client, &arguments);
    assert!(seen.contains(" 431 "), "{seen}");
    shown.without_answer(Failure::HeadersTooLarge);

    let address = address_of_orders(&client);
    let mut half = peer(&client, &["say", &address, "GET / HTTP/1.1\\r\\nHost:"]);
    half.wait();
    assert!(!half.log().contains("200"), "{}", half.log());
    shown.without_answer(Failure::ClientTimeout);

    let seen = curl(&client, &["-m", "0.3", "http://orders/stall"]);
    assert!(seen.contains("curl failed 28"), "{seen}");
    shown.without_answer(Failure::ClientGone);
    let lines = sidecar.access_log();
    let gone: Vec<_> = lines.iter().filter(|line| line["failure"] == "client_gone").collect();
    assert!(matches!(gone[..], [line] if line["kind"] == "request"), "one client left once: {gone:#?}");

    let seen = curl(&client, &["http://127.0.0.1:15001/"]);
    shown.answered(Failure::Loop, &seen[..]);
    shown.complete();
}

pub const WHERE_IT_SENDS_IT: Test = (
    "where_it_sends_it",
    &[
        Failure::UnknownDestination,
        Failure::UnknownVirtualAddress,
        Failure::NoEndpoint,
        Failure::ConnectRefused,
        Failure::ConnectTimeout,
        Failure::ConnectUnreachable,
        Failure::PlaintextForbidden,
    ],
);

#[test]
fn where_it_sends_it() {
    if !can_run(&NEEDS) {
        return;
    }
    let (mesh, client, server, _app) = mesh_with_orders();
    let server_port = |port: u16| format!("{}:{port}", server.ipv4());
    mesh.write_service("empty", "");
    service(&mesh, "closed", &server_port(8081));
    service(&mesh, "silent", &server_port(8082));
    server.shell("iptables -A INPUT -p tcp --dport 8082 -j DROP");
    service(&mesh, "nowhere", "203.0.113.1:80");
    client.shell("ip route add unreachable 203.0.113.0/24");
    service(&mesh, "secret", &server_port(8080));
    fs::write(mesh.policies().join("secret.yaml"), "outbound_mutual_tls: strict\n").unwrap();
    let flags = ["--mode", "registry-only", "--connect-timeout", "300ms"];
    let sidecar = mesh.sidecar(&client, "web", &flags);
    let mut shown = Shown::by(WHERE_IT_SENDS_IT, &sidecar, &client);

    let seen = curl(&client, &[&format!("http://{}/", server_port(9000))]);
    shown.answered(Failure::UnknownDestination, &seen);

    let seen = curl(&client, &["http://240.0.0.99/"]);
    assert!(seen.contains("curl failed 56"), "not reset: {seen}");
    shown.without_answer(Failure::UnknownVirtualAddress);

    for (name, failure) in [
        ("empty", Failure::NoEndpoint),
        ("closed", Failure::ConnectRefused),
        ("silent", Failure::ConnectTimeout),
        ("nowhere", Failure::ConnectUnreachable),
        ("secret", Failure::PlaintextForbidden),
    ] {
        let seen = curl(&client, &[&format!("http://{name}/")]);
        shown.answered(failure, &seen);
    }
    // A client that opens its connection before it needs it is listened to while a server is dialled for it.
    let late = "exec 3<>/dev/tcp/silent/80; sleep 0.1; printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3";
    let mut bash = client.command("bash");
    bash.args(["-c", late]);
    shown.answered(Failure::ConnectTimeout, &output_of(bash));
    shown.complete();
}

pub const WHAT_THE_SERVER_ANSWERS: Test = (
    "what_the_server_answers",
    &[
        Failure::Reset,
        Failure::BadResponse,
        Failure::ResponseHeadersTooLarge,
        Failure::BodyCut,
        Failure::AttemptTimeout,
        Failure::RequestTimeout,
    ],
);

#[test]
fn what_the_server_answers() {
    if !can_run(&NEEDS) {
        return;
    }
    let (mesh, client, server, _app) = mesh_with_orders();
    let endpoint = format!("{}:8080", server.ipv4());
    for (name, policy) in [
        ("hasty", "timeouts:\n  attempt: 200ms\nretries:\n  attempts: 0\n"),
        ("limited", "timeouts:\n  request: 200ms\n"),
    ] {
        service(&mesh, name, &endpoint);
        fs::write(mesh.policies().join(format!("{name}.yaml")), policy).unwrap();
    }
    let sidecar = mesh.sidecar(&client, "web", &[]);
    let mut shown = Shown::by(WHAT_THE_SERVER_ANSWERS, &sidecar, &client);
    for (url, failure) in [
        ("http://orders/reset", Failure::Reset),
        ("http://orders/garbage", Failure::BadResponse),
        ("http://orders/fields/1001", Failure::ResponseHeadersTooLarge),
        ("http://hasty/stall", Failure::AttemptTimeout),
        ("http://limited/stall", Failure::RequestTimeout),
    ] {
        let seen = curl(&client, &[url]);
        shown.answered(failure, &seen);
    }
    // The answer has begun: its status stands, and it must not end as if it were whole (18: a part, 56: a reset).
    let seen = curl(&client, &["http://orders/cut"]);
    assert!(
        seen.contains(" 200 OK")
            && seen.contains("but ten.")
            && ["curl failed 18", "curl failed 56"].iter().any(|end| seen.contains(end)),
        "{seen}"
    );
    shown.without_answer(Failure::BodyCut);
    // Too late in its middle is a cut too.
    let seen = curl(&client, &["http://limited/slow"]);
    assert!(seen.contains(" 200 OK"), "{seen}");
    sidecar.wait_for_failure("body_cut", &["deadline"]);
    let lines = sidecar.access_log();
    let gone: Vec<_> = lines.iter().filter(|line| line["failure"] == "client_gone").collect();
    assert!(gone.is_empty(), "the client did not leave: {gone:#?}");
    shown.complete();
}

pub const TOO_MUCH_AT_A_TIME: Test = ("too_much_at_a_time", &[Failure::Overloaded]);

#[test]
fn too_much_at_a_time() {
    if !can_run(&NEEDS) {
        return;
    }
    let (mesh, client, _server, mut app) = mesh_with_orders();
    let sidecar = mesh.sidecar(&client, "web", &["--max-requests", "1", "--max-connections", "2"]);
    let mut shown = Shown::by(TOO_MUCH_AT_A_TIME, &sidecar, &client);
    let _one = client.start("curl", &["-s", "http://orders/stall"]);
    app.wait_for_line("/stall");
    let seen = curl(&client, &["http://orders/"]);
    shown.answered(Failure::Overloaded, &seen);
    // The second connection has a place, the third has none.
    let address = address_of_orders(&client);
    let mut held = peer(&client, &["say", &address, "not http\\n"]);
    held.wait_for_line("answer");
    let mut third = peer(&client, &["say", &address, "not http\\n"]);
    third.wait();
    assert!(!third.log().contains("answer"), "{}", third.log());
    let line = sidecar.wait_for_failure("overloaded", &["connections"]);
    assert_eq!(line["kind"], "connection", "{line}");
    shown.without_answer(Failure::Overloaded);
    shown.complete();
}
