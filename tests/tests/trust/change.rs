//! A change of trust cuts: a connection ends when its peer's root is removed or its certificate expires, and no
//! other does.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use weft_tests::{
    Forged, Forger, Mesh, Pod, Process, TRUST_DOMAIN, can_run, identity, pause, program, until,
};

use super::scene::{NEEDS, Scene, curl};

/// Writes the authority's bundle as docs/identity.md says: aside, and renamed.
fn write_roots(mesh: &Mesh, pem: &str) {
    let (aside, place) =
        (mesh.network.folder().join("ca/.roots"), mesh.network.folder().join("ca/roots.pem"));
    fs::write(&aside, pem).unwrap();
    fs::set_permissions(&aside, fs::Permissions::from_mode(0o600)).unwrap();
    fs::rename(aside, place).unwrap();
}

/// A connection of bytes that stays open after it was answered.
fn hold(pod: &Pod, address: &str, certificate: &Path) -> Process {
    let certificate = certificate.display().to_string();
    pod.start(program("mesh-peer"), &["tls-client", address, &certificate, "weft-tcp", "held\\n"])
}

#[test]
fn connections_of_a_removed_root_are_closed_and_no_others() {
    if !can_run(&NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let own = fs::read_to_string(mesh.network.folder().join("ca/roots.pem")).unwrap();
    let second = Forger::of_stranger(TRUST_DOMAIN, mesh.network.folder());
    write_roots(&mesh, &format!("{own}{}", second.certificate()));
    let (old, new) = (
        Forger::of_mesh(&mesh).leaf("old", &Forged::of(&identity("old"))),
        second.leaf("new", &Forged::of(&identity("new"))),
    );
    let scene = Scene::new(mesh, &[]);
    let address = scene.address(8080);
    let mut stays = hold(&scene.stranger, &address, &old);
    stays.wait_for_line("answer");
    // the authority looks at its file every two seconds
    let mut goes = hold(&scene.stranger, &address, &new);
    until("the second root is believed", || {
        if goes.has_ended() {
            goes = hold(&scene.stranger, &address, &new);
        }
        goes.log().contains("answer")
    });
    assert!(!goes.has_ended());

    write_roots(&scene.mesh, &own);
    goes.wait();
    let line = scene.sidecar.wait_for_failure("untrusted_peer", &["the trust in", &identity("new")]);
    assert_eq!(line["peer_identity"], identity("new"), "{line}");
    assert_eq!(line["own_identity"], identity("orders"), "{line}");
    assert!(!stays.has_ended(), "{}", stays.log());
    let mut refused = hold(&scene.stranger, &address, &new);
    refused.wait();
    assert!(!refused.log().contains("answer"), "{}", refused.log());
}

#[test]
fn a_client_leaves_a_server_whose_root_is_removed() {
    if !can_run(&NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let own = fs::read_to_string(mesh.network.folder().join("ca/roots.pem")).unwrap();
    let second = Forger::of_stranger(TRUST_DOMAIN, mesh.network.folder());
    write_roots(&mesh, &format!("{own}{}", second.certificate()));
    let (client, rogue) = (mesh.network.pod("client"), mesh.network.pod("rogue"));
    let certificate = second.leaf("orders", &Forged::of(&identity("orders"))).display().to_string();
    let listen = format!("{}:8080", rogue.ipv4());
    let mut server = rogue.start(program("mesh-peer"), &["tls-server", &listen, &certificate, "weft-tcp"]);
    server.wait_for_line("serving");
    mesh.write_service(
        "orders",
        &format!(
            "protocol: tcp\nidentities: ['{}']\naddresses: ['10.99.0.1:9000']\nendpoints: [{{address: '{listen}'}}]\n",
            identity("orders")
        ),
    );
    let sidecar = mesh.sidecar(&client, "web", &[]);
    let say = || client.start(program("mesh-peer"), &["say", "10.99.0.1:9000", "held\\n"]);
    let mut held = say();
    until("the second root is believed", || {
        if held.has_ended() {
            held = say();
        }
        held.log().contains("answer")
    });
    write_roots(&mesh, &own);
    held.wait();
    sidecar.wait_for_failure("untrusted_peer", &["the trust in", &identity("orders")]);
}

#[test]
fn a_connection_ends_with_the_certificate_of_its_peer() {
    if !can_run(&NEEDS) {
        return;
    }
    let scene = Scene::new(Mesh::new(), &["--expired-peers", "close"]);
    let thief = Forger::of_mesh(&scene.mesh);
    let short = thief.leaf("short", &Forged { ends_in: 3, ..Forged::of(&identity("short")) });
    let long = thief.leaf("long", &Forged::of(&identity("long")));
    let address = scene.address(8080);
    let mut stays = hold(&scene.stranger, &address, &long);
    let mut goes = hold(&scene.stranger, &address, &short);
    stays.wait_for_line("answer");
    goes.wait_for_line("answer");
    // an idle HTTP connection of the same peer is drained
    let short = short.display().to_string();
    let text = "GET / HTTP/1.1\\r\\nHost: orders\\r\\n\\r\\n";
    let mut http =
        scene.stranger.start(program("mesh-peer"), &["tls-client", &address, &short, "weft-h1", text]);
    http.wait_for_line("200 OK");
    goes.wait();
    http.wait();
    scene.sidecar.wait_for_failure("untrusted_peer", &["the trust in", &identity("short")]);
    assert!(!stays.has_ended(), "{}", stays.log());
}

#[test]
fn bytes_go_on_behind_the_end_of_a_certificate_until_its_root_is_removed() {
    if !can_run(&NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let own = fs::read_to_string(mesh.network.folder().join("ca/roots.pem")).unwrap();
    let second = Forger::of_stranger(TRUST_DOMAIN, mesh.network.folder());
    write_roots(&mesh, &format!("{own}{}", second.certificate()));
    let scene = Scene::new(mesh, &["--drain-timeout", "300ms"]);
    let address = scene.address(8080);
    let mut number = 0;
    let (mut held, mut short) = (None, String::new());
    until("the second root is believed", || {
        number += 1;
        let forged = Forged { ends_in: 4, ..Forged::of(&identity("short")) };
        let leaf = second.leaf(&format!("short-{number}"), &forged);
        short = leaf.display().to_string();
        let mut tried = hold(&scene.stranger, &address, &leaf);
        until("it is answered or ends", || tried.log().contains("answer") || tried.has_ended());
        let is_held = tried.log().contains("answer");
        held = Some(tried);
        is_held
    });
    let mut held = held.unwrap();
    // HTTP of the same peer ends with its certificate.
    let text = "GET / HTTP/1.1\\r\\nHost: orders\\r\\n\\r\\n";
    let http = ["tls-client", &address, &short, "weft-h1", text];
    let mut http = scene.stranger.start(program("mesh-peer"), &http);
    http.wait();
    assert!(!held.has_ended(), "{}", held.log());
    write_roots(&scene.mesh, &own);
    held.wait();
    scene.sidecar.wait_for_failure("untrusted_peer", &["the trust in", &identity("short")]);
}

#[test]
fn a_policy_that_turns_strict_ends_plaintext_and_nothing_else() {
    if !can_run(&NEEDS) {
        return;
    }
    let scene = Scene::new(Mesh::new(), &["--drain-timeout", "300ms"]);
    let address = scene.address(8080);
    let good = Forger::of_mesh(&scene.mesh).leaf("good", &Forged::of(&identity("web")));
    let mut stays = hold(&scene.stranger, &address, &good);
    stays.wait_for_line("answer");
    let say = |text: &str| scene.stranger.start(program("mesh-peer"), &["say", &address, text]);
    // bytes, an idle HTTP connection, and an answer that does not end
    let mut held = [
        say("held\\n"),
        say("GET / HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n"),
        say("GET /slow HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n"),
    ];
    held.iter_mut().for_each(|held| drop(held.wait_for_line("answer")));
    // neither this client nor the app says anything: the app is connected, and both are waited for
    let of_app =
        || scene.server.shell("ss -Htn state established dst 127.0.0.1:8080 | wc -l").trim().parse::<usize>();
    let before = of_app().unwrap();
    let mut silent = say("");
    until("the app is connected for a silent client", || of_app().is_ok_and(|now| now > before));
    let write = |policy: &str| {
        let (aside, place) =
            (scene.mesh.policies().join(".orders"), scene.mesh.policies().join("orders.yaml"));
        fs::write(&aside, policy).unwrap();
        fs::rename(aside, place).unwrap();
    };
    write("mutual_tls: strict\n");
    for held in &mut held {
        held.wait();
    }
    silent.wait();
    assert!(silent.log().contains("reset"), "{}", silent.log());
    scene.sidecar.wait_for_failure("plaintext_refused", &["since its policy changed"]);
    until("the request that was cut says why", || {
        let log = scene.sidecar.access_log();
        log.iter().any(|line| line["path"] == "/slow" && line["failure"] == "plaintext_refused")
    });
    let mut late = say("held\\n");
    late.wait();
    assert!(!late.log().contains("answer"), "{}", late.log());
    scene.sidecar.wait_for_failure("plaintext_refused", &["no identity", "plaintext"]);
    assert!(!stays.has_ended(), "{}", stays.log());

    write("mutual_tls: permissive\n");
    until("plaintext is taken again", || {
        let mut again = say("GET / HTTP/1.1\\r\\nHost: a\\r\\nConnection: close\\r\\n\\r\\n");
        again.wait();
        again.log().contains("200 OK")
    });
}

#[test]
fn renewed_certificates_go_on_where_the_first_ones_have_expired() {
    if !can_run(&NEEDS) {
        return;
    }
    let scene = Scene::new(Mesh::with_lifetime("6s"), &[]);
    let client = scene.mesh.network.pod("client");
    scene.mesh.wait_until_published("orders");
    let sidecar = scene.mesh.sidecar(&client, "web", &[]);
    let expiry = |metrics: &str| {
        metrics
            .lines()
            .find_map(|line| line.strip_prefix("weft_certificate_expiry_seconds ")?.parse::<f64>().ok())
    };
    let first = expiry(&sidecar.metrics(&client)).unwrap();
    // until the third certificate: the first has expired then
    until("the certificates were renewed twice", || {
        let seen = curl(&client, &["http://orders/"]);
        assert!(seen.starts_with("HTTP/1.1 200 OK"), "{seen}\n{}", sidecar.process.log());
        pause();
        expiry(&sidecar.metrics(&client)).unwrap() >= first + 6.0
    });
    for line in scene.sidecar.access_log().iter().chain(&sidecar.access_log()) {
        assert_eq!(line["failure"], serde_json::Value::Null, "{line}");
    }
}
