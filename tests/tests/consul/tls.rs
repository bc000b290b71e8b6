//! Consul behind TLS: its certificate is checked, ours is shown, everything goes over one connection, and of
//! several agents the next one is asked.

use std::fs;

use serde_json::json;
use weft_tests::{Consul, Mesh, can_run, output_of, until};

use super::world::{app, get, sidecar};

#[test]
fn one_http2_connection_carries_all_and_the_next_agent_takes_over() {
    if !can_run(&Consul::NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let (client, server) = (mesh.network.pod("client"), mesh.network.pod("server"));
    let registry = mesh.network.pod("registry");
    let folder = mesh.network.folder().join("tls");
    fs::create_dir(&folder).unwrap();
    let folder = folder.display().to_string();
    // Certificates as Consul's own command makes them, and readable for the sidecar.
    registry.shell(&format!(
        "cd {folder} && consul tls ca create && consul tls cert create -server -dc dc1 && \
         consul tls cert create -client -dc dc1 && chmod 644 *"
    ));
    let settings = format!(
        "ports {{ https = 8501 }} verify_incoming_https = true ca_file = \"{folder}/consul-agent-ca.pem\"
         cert_file = \"{folder}/dc1-server-consul-0.pem\" key_file = \"{folder}/dc1-server-consul-0-key.pem\""
    );
    let consul = Consul::dev(&registry, &settings);
    let _app = app(&server, "one", 8080);
    for number in 0..40 {
        consul.register(
            &format!("s{number}"),
            &format!("s{number}"),
            &server.ipv4().to_string(),
            8080,
            json!({}),
        );
    }
    let path = |name: &str| format!("{folder}/{name}");
    let (ca, certificate, key) =
        (path("consul-agent-ca.pem"), path("dc1-client-consul-0.pem"), path("dc1-client-consul-0-key.pem"));
    // Nobody answers at the first address.
    let dead = format!("https://{}:8502", registry.ipv4());
    let address = format!("https://{}:8501", registry.ipv4());
    let flags = ["--consul", &address, "--consul-ca-file", &ca, "--consul-server-name", "server.dc1.consul"];
    let proof = ["--consul-certificate", &certificate, "--consul-key", &key];
    let all = [&flags[..], &proof[..]].concat();
    let right = sidecar(&mesh, &client, "web", &address, &[&["--consul", &dead][..], &all[..]].concat());
    for number in 0..40 {
        assert_eq!(get(&client, &format!("http://s{number}.weft/")), "200 one", "s{number}");
    }
    let connections = || client.shell(&format!("ss -Htn state established dst {}", registry.ipv4()));
    until("one connection is left", || connections().lines().count() == 1);
    consul.deregister("s39");
    until("a change is seen", || get(&client, "http://s39.weft/") == "503 weft: not_registered");
    drop(right);

    // Without a certificate of ours, and with roots that are not Consul's: it says what to do.
    let other = mesh.network.pod("other");
    let unproven = sidecar(&mesh, &other, "other", &address, &flags);
    assert_eq!(get(&other, "http://s1.weft/"), "503 weft: registry_unavailable");
    let log = unproven.process.log();
    assert!(log.contains("--consul-certificate") || log.contains("broke"), "{log}");
    drop(unproven);
    let third = mesh.network.pod("third");
    output_of({
        let mut make = third.command("sh");
        make.args([
            "-c",
            &format!("cd {folder} && mkdir -p foreign && cd foreign && consul tls ca create && chmod 644 *"),
        ]);
        make
    });
    let foreign = path("foreign/consul-agent-ca.pem");
    let misled = sidecar(
        &mesh,
        &third,
        "third",
        &address,
        &[&["--consul-ca-file", &foreign][..], &proof[..]].concat(),
    );
    assert_eq!(get(&third, "http://s1.weft/"), "503 weft: registry_unavailable");
    assert!(misled.process.log().contains("see --consul-ca-file"), "{}", misled.process.log());
}
