//! Where the app listens: on one loopback only, or on the address of its pod only. It is reached there all the same, by
//! HTTP, bytes and upgrades, in a pod and under `exec`.

use std::net::{IpAddr, SocketAddr};

use weft_tests::{Mesh, Need, Pod, Process, output_of, program, program_for_everyone, until};

use super::pair::{CURL, NGINX, PYTHON, Pair, ROOT, can_run, say, start_nginx};

/// Starts the app of `mesh-peer`: HTTP, an upgrade at `/upgrade`, and any other line given back.
fn start(pod: &Pod, address: &str) -> Process {
    let mut app = pod.start(program("mesh-peer"), &["app", address]);
    app.wait_for_line("serving");
    app
}

const UPGRADE: &str =
    r"GET /upgrade HTTP/1.1\r\nHost: orders\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n";

fn is_reached(from: &Pod, to: IpAddr, port: u16) -> bool {
    let url = format!("http://{}/", SocketAddr::new(to, port));
    let mut curl = from.command("curl");
    curl.args(["-s", "-f", "-g", "-m", "5", "-o", "/dev/null", &url])
        .status()
        .is_ok_and(|status| status.success())
}

/// A request, opaque bytes and an upgrade all reach the app.
fn assert_reached(from: &Pod, to: IpAddr, app: &str) {
    until(&format!("{app} is reached"), || is_reached(from, to, 8080));
    let host = to.to_string();
    let bytes = say(from, &host, 8080, &["--half-close", r"\x20bytes\n"]);
    assert_eq!(bytes, " bytes\n", "{app}");
    let upgraded = say(from, &host, 8080, &["--half-close", UPGRADE, "?101", r"back\n"]);
    assert!(upgraded.ends_with("\r\n\r\nback\n"), "{app}: {upgraded}");
}

#[test]
fn an_app_is_reached_wherever_it_listens_in_its_pod() {
    if !can_run(&[ROOT, CURL, PYTHON]) {
        return;
    }
    let mesh = Mesh::new();
    let (client, server, stranger) =
        (mesh.network.pod("client"), mesh.network.pod("server"), mesh.network.pod("stranger"));
    let to = mesh.sidecar(&server, "orders", &["--port", "8080"]);
    let _from = mesh.sidecar(&client, "web", &[]);
    mesh.wait_until_published("orders");
    let dialled = format!("{}:8080", server.ipv4());
    // One after the other: what was remembered of the last must not stand in the way of the next.
    for app in ["127.0.0.1:8080", "[::1]:8080", &dialled, "[::1]:8080", "0.0.0.0:8080"] {
        let _app = start(&server, app);
        assert_reached(&client, server.ipv4(), app);
        assert_reached(&stranger, server.ipv4(), app);
        if app != dialled {
            assert_reached(&stranger, server.ipv6(), app);
        }
    }
    assert!(!is_reached(&stranger, server.ipv4(), 8080));
    let refused = to.wait_for_failure("app_refused", &["127.0.0.1:8080", "[::1]:8080", &dialled]);
    assert_eq!(refused["failure"], "app_refused");
    // What is not registered stays where it is.
    let private = start(&server, "[::1]:9999");
    assert!(!is_reached(&stranger, server.ipv4(), 9999));
    assert!(!private.log().contains("accepted"), "{}", private.log());
}

#[test]
fn an_app_under_exec_is_reached_wherever_it_listens() {
    if !can_run(&[ROOT, CURL, PYTHON]) {
        return;
    }
    let mesh = Mesh::new();
    let client = mesh.network.pod("client");
    let _from = mesh.sidecar(&client, "web", &[]);
    let (_folder, peer) = program_for_everyone(&program("mesh-peer"));
    for own in [false, true] {
        let server = mesh.network.pod(if own { "own" } else { "six" });
        let app = if own { format!("{}:8080", server.ipv4()) } else { "[::1]:8080".to_owned() };
        let command = [peer.to_str().unwrap(), "app", &app];
        let _exec = mesh.exec(&server, "orders", &["--port", "8080"], &command);
        assert_reached(&client, server.ipv4(), &app);
    }
}

/// The app of many images: nginx with one `listen` line.
#[test]
fn nginx_on_ipv6_alone_is_reached_by_name() {
    if !can_run(&[ROOT, CURL, NGINX, Need::Program("ss", "iproute2")]) {
        return;
    }
    let mut pair = Pair::direct(&["orders"]);
    let folder = pair.folder("nginx");
    let nginx = "server { listen [::1]:8080; location / { return 200 here; } }";
    let _nginx = start_nginx(&pair.server, &folder, nginx, 8080);
    pair.weave(&[("orders", 8080)]);
    for version in ["--http1.1", "--http1.0"] {
        let mut curl = pair.client.command("curl");
        curl.args(["-s", "-S", "-f", "-m", "10", version, "http://orders/"]);
        assert_eq!(output_of(curl), "here");
    }
    pair.assert_secured();
}
