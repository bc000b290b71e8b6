//! What is under way when a peer's certificate ends: a download is cut by the side whose peer it is, and its record says
//! so; bytes and an upgraded connection go on, unless `--expired-peers close` wants them cut too. Who comes back is
//! served with the renewed certificate.

use weft_tests::{Mesh, Pod, Process, Sidecar, can_run, identity, program, until};

use super::scene::{NEEDS, curl, start_app};

const SHORT: [&str; 2] = ["--certificate-lifetime", "10s"];
const DRAIN: [&str; 2] = ["--drain-timeout", "300ms"];

const UPGRADE: &str =
    "GET /upgrade HTTP/1.1\\r\\nHost: orders\\r\\nConnection: upgrade\\r\\nUpgrade: echo\\r\\n\\r\\nheld\\n";

fn certificates(sidecar: &Sidecar) -> usize {
    sidecar.process.log().matches("a certificate was obtained").count()
}

/// The virtual address of `orders` in this pod, once there is one.
fn address(client: &Pod) -> String {
    let mut found = String::new();
    until("orders has an address", || {
        let mut getent = client.command("getent");
        getent.args(["ahostsv4", "orders"]);
        let answer = getent.output().expect("getent").stdout;
        found = String::from_utf8_lossy(&answer).split_whitespace().next().unwrap_or_default().to_owned();
        !found.is_empty()
    });
    format!("{found}:80")
}

/// Connections of three kinds that would stay open, each of which was answered: bytes, an upgraded one, a download.
fn hold(client: &Pod) -> [Process; 3] {
    let address = address(client);
    let say = |text: &str| client.start(program("mesh-peer"), &["say", &address, text]);
    let mut held = [say("held\\n"), say(UPGRADE), say("GET /slow HTTP/1.1\\r\\nHost: orders\\r\\n\\r\\n")];
    for (held, answer) in held.iter_mut().zip(["held", "held", "200 OK"]) {
        held.wait_for_line(answer);
    }
    held
}

/// Whose certificate is short decides who must cut: the other side, whose own is good for a day.
fn the_peer_of_a_short_certificate_cuts(client_is_short: bool, expired_peers: &str) {
    let mesh = Mesh::new();
    let (server, client) = (mesh.network.pod("server"), mesh.network.pod("client"));
    let _app = start_app(&server, &["127.0.0.1:8080"]);
    let expired = ["--expired-peers", expired_peers];
    let flags =
        |short: bool| DRAIN.into_iter().chain(expired).chain(SHORT.into_iter().filter(move |_| short));
    let of_server: Vec<&str> = ["--port", "8080"].into_iter().chain(flags(!client_is_short)).collect();
    let of_client: Vec<&str> = flags(client_is_short).collect();
    let of_server = mesh.sidecar(&server, "orders", &of_server);
    mesh.wait_until_published("orders");
    let of_client = mesh.sidecar(&client, "web", &of_client);
    let (short, cutting, peer) = match client_is_short {
        true => (&of_client, &of_server, identity("web")),
        false => (&of_server, &of_client, identity("orders")),
    };
    let closes = expired_peers == "close";
    let before = certificates(short);
    let mut held = hold(&client);
    until("the certificate is renewed", || certificates(short) > before);
    for held in &mut held {
        assert!(!held.has_ended(), "a renewal ends nothing:\n{}", held.log());
    }
    let [bytes, upgraded, download] = &mut held;
    download.wait();
    if closes {
        bytes.wait();
        upgraded.wait();
    }

    let line = cutting.wait_for_failure("untrusted_peer", &[&peer, "ended"]);
    assert_eq!(line["peer_identity"], *peer, "{line}");
    let mut cut = Vec::new();
    until("all that was cut is in the log", || {
        let log = cutting.access_log();
        cut = log.into_iter().filter(|line| line["failure"] == "untrusted_peer").collect();
        let has = |kind: &str, protocol: &str| {
            cut.iter().any(|line| line["kind"] == kind && line["protocol"] == protocol)
        };
        cut.iter().any(|line| line["path"] == "/slow")
            && (!closes || has("connection", "tcp") && has("connection", "http1"))
    });
    for line in &cut {
        assert!(line["detail"].as_str().is_some_and(|detail| detail.contains(&peer)), "{line}");
        assert_eq!(line["peer_identity"], *peer, "{line}");
    }
    let other = if client_is_short { &of_client } else { &of_server };
    assert!(
        other.access_log().iter().all(|line| line["failure"] != "untrusted_peer"),
        "the other side has no reason to cut: {:?}",
        other.access_log()
    );
    if !closes {
        assert!(!cut.iter().any(|line| line["protocol"] == "tcp"), "{cut:?}");
        for held in [bytes, upgraded] {
            assert!(!held.has_ended(), "it goes on behind the end of the certificate:\n{}", held.log());
        }
    }
    let mut again = client.start(program("mesh-peer"), &["say", &address(&client), "again\\n"]);
    again.wait_for_line("again");
    assert!(curl(&client, &["http://orders/"]).starts_with("HTTP/1.1 200 OK"));
}

#[test]
fn a_server_keeps_bytes_when_its_clients_certificate_ends() {
    if can_run(&NEEDS) {
        the_peer_of_a_short_certificate_cuts(true, "keep");
    }
}

#[test]
fn a_client_keeps_bytes_when_its_servers_certificate_ends() {
    if can_run(&NEEDS) {
        the_peer_of_a_short_certificate_cuts(false, "keep");
    }
}

#[test]
fn a_server_cuts_what_is_under_way_when_its_clients_certificate_ends() {
    if can_run(&NEEDS) {
        the_peer_of_a_short_certificate_cuts(true, "close");
    }
}

#[test]
fn a_client_cuts_what_is_under_way_when_its_servers_certificate_ends() {
    if can_run(&NEEDS) {
        the_peer_of_a_short_certificate_cuts(false, "close");
    }
}
