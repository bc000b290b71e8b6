//! Peers with wrong certificates, or none: each is refused before the app hears of it, or, as a server, before it
//! is sent a byte; and the log says who met whom, and why.

use std::path::Path;

use weft_tests::{Forged, Forger, Mesh, TRUST_DOMAIN, can_run, identity, program};

use super::scene::{NEEDS, Scene, curl, peer, start_app};

/// A word that only a request would carry.
const MARKER: &str = "marker-of-the-request";
const TEXT: &str = "GET /marker-of-the-request HTTP/1.1\\r\\nHost: orders\\r\\nConnection: close\\r\\n\\r\\n";
const STRANGE_ID: &str = "spiffe://other.test/ns/default/sa/web";

#[test]
fn a_strict_sidecar_takes_nobody_but_peers_of_the_mesh() {
    if !can_run(&NEEDS) {
        return;
    }
    // failures are logged by default; said here because the other tests log everything
    let scene = Scene::new(Mesh::new(), &["--mtls", "strict", "--access-log", "failures"]);
    let thief = Forger::of_mesh(&scene.mesh);
    let other = Forger::of_stranger("other.test", scene.mesh.network.folder());
    let impostor = Forger::of_stranger(TRUST_DOMAIN, scene.mesh.network.folder());
    let (web, admin) = (identity("web"), identity("admin"));
    let good = thief.leaf("good", &Forged::of(&web));
    let other_domain = other.leaf("other", &Forged::of(STRANGE_ID));
    let our_root_other_domain = thief.leaf("other-name", &Forged::of(STRANGE_ID));
    let unknown_root = impostor.leaf("impostor", &Forged::of(&web));
    let expired = thief.leaf("expired", &Forged { ends_in: -60, ..Forged::of(&web) });
    let two_names = thief.leaf("two", &Forged { uris: vec![web.clone(), admin.clone()], ends_in: 3600 });
    let no_name = thief.leaf("none", &Forged { uris: Vec::new(), ends_in: 3600 });

    let refused = "untrusted_peer";
    let foreign = "plaintext_refused";
    // the certificate, the protocol it asks for, the failure, and words of the line: its claim, and the reason
    let cases: [(Option<&Path>, &str, &str, &[&str]); 10] = [
        (Some(&other_domain), "weft-h1", refused, &[STRANGE_ID, "another trust domain"]),
        (Some(&our_root_other_domain), "weft-h1", refused, &[STRANGE_ID, "another trust domain"]),
        (Some(&unknown_root), "weft-tcp", refused, &[&web, "unknown root"]),
        (Some(&expired), "weft-h2", refused, &[&web, "expired"]),
        (Some(&two_names), "weft-h1", refused, &[&web, &admin, "URI"]),
        (Some(&no_name), "weft-h1", refused, &["a certificate without an identity", "no URI name"]),
        (None, "weft-h1", refused, &["no certificate"]),
        (Some(&good), "weft-new", foreign, &["foreign ALPN"]),
        (Some(&good), "h2", foreign, &["no identity", "TLS that is not the mesh's"]),
        (None, "none", foreign, &["no identity", "TLS that is not the mesh's"]),
    ];
    let address = scene.address(8080);
    for (certificate, alpn, failure, words) in cases {
        let certificate = certificate.map_or("none".to_owned(), |file| file.display().to_string());
        let said = peer(&scene.stranger, &["tls-client", &address, &certificate, alpn, TEXT]);
        assert!(said.contains("connected") && !said.contains("answer"), "{certificate} {alpn}: {said}");
        let line = scene.sidecar.wait_for_failure(failure, words);
        assert_eq!(line["own_identity"], identity("orders"), "{line}");
        assert_eq!(line["peer_identity"], serde_json::Value::Null, "{line}");
        assert_eq!(line["direction"], "inbound", "{line}");
    }
    let said = peer(&scene.stranger, &["say", &address, TEXT]);
    assert!(!said.contains("answer"), "{said}");
    let line = scene.sidecar.wait_for_failure(foreign, &["no identity", "plaintext"]);
    assert_eq!(line["own_identity"], identity("orders"), "{line}");
    assert_eq!(scene.accepted(), 0, "{}", scene.app.log());

    // the same hostile client is taken where its certificate is good
    let good = good.display().to_string();
    let said = peer(&scene.stranger, &["tls-client", &address, &good, "weft-h1", TEXT]);
    assert!(said.contains("200 OK") && said.contains(MARKER), "{said}");
    assert_eq!(scene.accepted(), 1, "{}", scene.app.log());
}

#[test]
fn a_server_with_a_wrong_certificate_is_not_sent_a_byte() {
    if !can_run(&NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let (client, rogue) = (mesh.network.pod("client"), mesh.network.pod("rogue"));
    let thief = Forger::of_mesh(&mesh);
    let other = Forger::of_stranger("other.test", mesh.network.folder());
    let impostor = Forger::of_stranger(TRUST_DOMAIN, mesh.network.folder());
    let (orders, billing) = (identity("orders"), identity("billing"));
    let both = vec![orders.clone(), billing.clone()];
    let every = "weft-h2,weft-h1,weft-tcp";
    let expired = Forged { ends_in: -60, ..Forged::of(&orders) };
    let two = Forged { uris: both, ends_in: 3600 };
    let cases: [(&str, _, &str, &str, &[&str]); 7] = [
        ("other", other.leaf("other", &Forged::of(STRANGE_ID)), every, "untrusted_peer", &[STRANGE_ID]),
        (
            "impostor",
            impostor.leaf("impostor", &Forged::of(&orders)),
            every,
            "untrusted_peer",
            &[&orders, "root"],
        ),
        ("expired", thief.leaf("expired", &expired), every, "untrusted_peer", &[&orders, "expired"]),
        ("two", thief.leaf("two", &two), every, "untrusted_peer", &[&orders, &billing, "URI"]),
        (
            "billing",
            thief.leaf("billing", &Forged::of(&billing)),
            every,
            "wrong_identity",
            &[&orders, &billing],
        ),
        (
            "alpn",
            thief.leaf("alpn", &Forged::of(&orders)),
            "h2,http/1.1",
            "handshake",
            &["NoApplicationProtocol"],
        ),
        ("noalpn", thief.leaf("noalpn", &Forged::of(&orders)), "none", "handshake", &["ALPN"]),
    ];
    let mut servers = Vec::new();
    for (at, (name, file, alpn, ..)) in cases.iter().enumerate() {
        let listen = format!("{}:{}", rogue.ipv4(), 8001 + at);
        let file = file.display().to_string();
        let mut server = rogue.start(program("mesh-peer"), &["tls-server", &listen, &file, alpn]);
        server.wait_for_line("serving");
        servers.push(server);
        let body = |cluster: u16| {
            format!(
                "identities: ['{orders}']\naddresses: ['10.99.0.{at}:{cluster}']\nendpoints: [{{address: '{listen}'}}]\n"
            )
        };
        mesh.write_service(name, &body(80));
        mesh.write_service(&format!("{name}-tcp"), &format!("protocol: tcp\n{}", body(9000)));
    }
    let sidecar = mesh.sidecar(&client, "web", &["--access-log", "failures"]);
    for (at, (name, _, _, failure, words)) in cases.iter().enumerate() {
        let seen = curl(&client, &["-d", MARKER, &format!("http://{name}/")]).to_lowercase();
        assert!(
            seen.contains("503") && seen.contains(&format!("x-weft-failure: {failure}")),
            "{name}: {seen}"
        );
        let line = sidecar.wait_for_failure(failure, words);
        assert_eq!(line["own_identity"], identity("web"), "{line}");
        assert_eq!(line["peer_identity"], serde_json::Value::Null, "{line}");
        let said = peer(&client, &["say", &format!("10.99.0.{at}:9000"), MARKER]);
        assert!(!said.contains("answer"), "{name}: {said}");
        let log = servers[at].log();
        assert!(log.contains("accepted") && !log.contains("heard"), "{name}: {log}");
    }

    // the same server is spoken to where its certificate is good
    let good = thief.leaf("good", &Forged::of(&orders)).display().to_string();
    let listen = format!("{}:9999", rogue.ipv4());
    let mut server = rogue.start(program("mesh-peer"), &["tls-server", &listen, &good, every]);
    server.wait_for_line("serving");
    mesh.write_service(
        "good",
        &format!("protocol: tcp\nidentities: ['{orders}']\naddresses: ['10.99.1.1:9000']\nendpoints: [{{address: '{listen}'}}]\n"),
    );
    weft_tests::until("the sidecar knows the new service", || {
        // resets before
        let mut say = client.command("timeout");
        say.arg("3").arg(program("mesh-peer")).args(["say", "10.99.1.1:9000", MARKER]);
        let _ = say.output();
        server.log().contains(MARKER)
    });
}

#[test]
fn a_service_with_identities_is_never_called_in_plaintext() {
    if !can_run(&NEEDS) {
        return;
    }
    let mut mesh = Mesh::new();
    let (client, other) = (mesh.network.pod("client"), mesh.network.pod("other"));
    let app = start_app(&other, &[&format!("{}:8080", other.ipv4())]);
    let orders = identity("orders");
    mesh.write_service(
        "orders",
        &format!(
            "identities: ['{orders}']\naddresses: ['10.99.0.1:80']\nendpoints: [{{address: '{}:8080'}}]\n",
            other.ipv4()
        ),
    );
    let address = "http://10.99.0.1/marker-of-the-request";

    // the authority is away: there is no certificate, and there was none
    mesh.stop_authority();
    let mut young = mesh.start_sidecar(&client, "web", &[], &[]);
    young.process.wait_for_line("started");
    let mut seen = String::new();
    weft_tests::until("the service is known", || {
        seen = curl(&client, &[address]).to_lowercase();
        seen.contains("x-weft-failure: no_identity")
    });
    assert!(seen.contains("http/1.1 503"), "{seen}");
    let line = young.wait_for_failure("no_identity", &["no valid certificate"]);
    assert_eq!(line["own_identity"], serde_json::Value::Null, "{line}");
    drop(young);

    mesh.start_authority("24h");
    let sidecar = mesh.sidecar(&client, "web", &[]);
    let seen = curl(&client, &[address]).to_lowercase();
    assert!(seen.contains("http/1.1 503") && seen.contains("x-weft-failure: handshake"), "{seen}");
    sidecar.wait_for_failure("handshake", &[&identity("web"), "is a sidecar there?"]);
    // it heard a hello of TLS at most
    assert!(!app.log().contains(MARKER) && !app.log().contains("HTTP/1.1"), "{}", app.log());
}
