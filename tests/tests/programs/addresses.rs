//! Names and addresses: DNS, virtual addresses that outlive a sidecar, IPv6.

use std::fs;

use nix::{sys::signal::Signal, unistd::chown};
use weft_proto::names::SIDECAR_UID;
use weft_tests::{Mesh, Pod, identity, output_of, until};

use super::pair::{CURL, PYTHON, Pair, ROOT, can_run, curl, start_app};

/// The addresses of a name as the C library finds them.
fn resolve(pod: &Pod, name: &str) -> Vec<String> {
    let output = pod.command("getent").args(["ahosts", name]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut found: Vec<String> =
        text.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect();
    found.dedup();
    found
}

#[test]
fn names_have_virtual_addresses_that_outlive_the_sidecar() {
    if !can_run(&[ROOT, CURL, PYTHON]) {
        return;
    }
    let mesh = Mesh::new();
    let (client, server) = (mesh.network.pod("client"), mesh.network.pod("server"));
    let _app = start_app(&server, "python3", "http_app.py", 8080, &[]);
    let _to = mesh.sidecar(&server, "orders_shop", &["--port", "8080"]);
    let state = mesh.network.folder().join("state");
    fs::create_dir(&state).unwrap();
    chown(&state, Some(SIDECAR_UID.into()), Some(SIDECAR_UID.into())).unwrap();
    let shown = state.display().to_string();
    let from = mesh.sidecar(&client, "web", &["--state-dir", &shown]);
    until("the name has an address", || !resolve(&client, "orders.shop").is_empty());
    let addresses = resolve(&client, "orders.shop");
    assert_eq!(addresses.len(), 1, "{addresses:?}");
    let address: std::net::Ipv4Addr = addresses[0].parse().unwrap();
    assert!(address.octets()[0] >= 240, "{address}");
    for name in ["orders.shop.weft", "ORDERS.SHOP"] {
        assert_eq!(resolve(&client, name), addresses, "{name}");
    }
    assert!(resolve(&client, "none.weft").is_empty());
    let ask = || curl(&client, mesh.network.folder(), &[&format!("http://{address}/")]).outcome;
    assert!(ask().starts_with("200 "), "{}", ask());
    from.process.signal(Signal::SIGTERM);
    let mut from = from;
    from.process.wait();
    // nobody asks for the name again: an app keeps an address for long
    let from = mesh.sidecar(&client, "web", &["--state-dir", &shown]);
    until("the service is known again", || ask().starts_with("200 "));
    assert_eq!(resolve(&client, "orders.shop"), addresses);
    drop(from);
    // without what was kept the address stands for nothing, and is reset
    let _from = mesh.sidecar(&client, "web", &[]);
    let reset = ask();
    assert!(reset.starts_with("000 ") && reset.contains("reset"), "{reset}");
}

#[test]
fn an_unknown_virtual_address_is_reset_and_never_passed_through() {
    if !can_run(&[ROOT, CURL, PYTHON]) {
        return;
    }
    let mesh = Mesh::new();
    let (client, server) = (mesh.network.pod("client"), mesh.network.pod("server"));
    // somebody answers at such an address, and there is a way to it
    server.shell("ip address add 240.0.0.99/32 dev eth0");
    client.shell(&format!("ip route add 240.0.0.0/4 via {}", server.ipv4()));
    let app = start_app(&server, "python3", "http_app.py", 8080, &[]);
    let sidecar = mesh.sidecar(&client, "web", &["--mode", "allow-any"]);
    let past_the_sidecar = |url: &str| {
        let mut curl = client.command_as(SIDECAR_UID, "curl");
        curl.args(["-s", "-m", "10", "-o", "/dev/null", "-w", "%{http_code}", url]);
        output_of(curl)
    };
    assert_eq!(past_the_sidecar("http://240.0.0.99:8080/control"), "200", "the test's own way there");
    let passed = curl(&client, mesh.network.folder(), &[&format!("http://{}:8080/", server.ipv4())]).outcome;
    assert!(passed.starts_with("200 "), "the mode passes other addresses through: {passed}");
    let heard = app.log();
    let url = "http://240.0.0.99:8080/";
    for arguments in [&[url][..], &["--http2-prior-knowledge", url], &["telnet://240.0.0.99:8080"]] {
        let outcome = curl(&client, mesh.network.folder(), arguments).outcome;
        assert!(outcome.starts_with("000 ") && outcome.contains("reset"), "{arguments:?}: {outcome}");
    }
    for port in [80, 443, 15001, 8080] {
        // bytes, and a client that says nothing
        for send in ["s.sendall(b'hello')", "pass"] {
            let code = format!(
                "import socket\ns = socket.create_connection(('240.0.0.99', {port}), 10)\n{send}\n\
                 try:\n    print(s.recv(10))\nexcept ConnectionResetError:\n    print('reset')"
            );
            let mut python = client.command("python3");
            python.args(["-c", &code]);
            assert_eq!(output_of(python).trim(), "reset", "port {port}, {send}");
        }
    }
    assert_eq!(app.log(), heard, "nothing came through");
    let line = sidecar.wait_for_failure("unknown_virtual_address", &["240.0.0.99"]);
    assert_eq!(line["peer_identity"], serde_json::Value::Null);
}

#[test]
fn a_service_on_ipv6_is_reached_by_name_and_by_address() {
    if !can_run(&[ROOT, CURL, PYTHON]) {
        return;
    }
    let mut pair = Pair::direct(&["orders"]);
    let _app = pair.start_app("http_app.py", 8080);
    let address = format!("[{}]:8080", pair.server.ipv6());
    pair.weave(&[("orders", 8080)]);
    pair.publish("orders6", &address);
    pair.wait_for_name("orders6");
    for url in [format!("http://{address}/by-address"), "http://orders6/by-name".to_owned()] {
        let mut curl = pair.client.command("curl");
        curl.args(["-s", "-S", "-f", "-g", "-m", "10", &url]);
        output_of(curl);
    }
    pair.assert_secured();
    let log = pair.to.as_ref().unwrap().access_log();
    for path in ["/by-address", "/by-name"] {
        let line = log.iter().find(|line| line["path"] == path).unwrap_or_else(|| panic!("{path}: {log:?}"));
        assert_eq!(line["peer_identity"], identity("web"));
        assert!(
            line["peer_address"].as_str().unwrap().starts_with(&format!("[{}]", pair.client.ipv6())),
            "{line}"
        );
    }
}
