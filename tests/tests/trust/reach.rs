//! What nobody reaches from another host: what the app keeps to its loopback, the explicit upstreams, and the
//! sidecar's own ports; over IPv4 and IPv6, as a stranger and as a peer, in a pod and with `exec`.

use std::os::unix::fs::PermissionsExt;

use weft_tests::{Forged, Forger, Mesh, can_run, identity, output_of, program, program_for_everyone, until};

use super::scene::{NEEDS, Scene, curl, peer, start_app};

/// The app listens there on loopback, and nobody registered it.
const PRIVATE: u16 = 9999;
const UPSTREAM: u16 = 7777;
const OUTBOUND: u16 = 15001;
const INBOUND: u16 = 15006;
const DNS: u16 = 15053;
const WORD: &str = "knock\\n";
/// Somebody whom the machine does not know.
const USER: u32 = 54_321;

#[test]
fn nobody_reaches_what_a_pod_keeps_to_itself() {
    if !can_run(&NEEDS) {
        return;
    }
    let scene = Scene::new(Mesh::new(), &["--upstream", "127.0.0.1:7777=orders"]);
    let private = start_app(&scene.server, &["127.0.0.1:9999", "[::1]:9999"]);
    let good = Forger::of_mesh(&scene.mesh).leaf("good", &Forged::of(&identity("web")));
    let good = good.display().to_string();
    let targets = [
        (PRIVATE, "app_refused"),
        (UPSTREAM, "app_refused"),
        (OUTBOUND, "loop"),
        (INBOUND, "loop"),
        (DNS, "loop"),
    ];
    for (port, failure) in targets {
        for address in [scene.address(port), scene.ipv6_address(port)] {
            let said = peer(&scene.stranger, &["say", &address, WORD]);
            assert!(!said.contains("answer"), "{address}: {said}");
            let said = peer(&scene.stranger, &["tls-client", &address, &good, "weft-tcp", WORD]);
            assert!(!said.contains("answer"), "{address} as a peer: {said}");
            scene.sidecar.wait_for_failure(failure, &[&port.to_string()]);
        }
    }
    // a name is not asked there either
    for server in [scene.server.ipv4(), scene.server.ipv6()] {
        let mut ask = scene.stranger.command(program("redirect-peer"));
        let from = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let to = std::net::SocketAddr::new(server, DNS).to_string();
        ask.args(["ask", from, &to, "orders?"]);
        let asked = ask.output().unwrap();
        assert!(!asked.status.success(), "{asked:?}");
    }
    assert!(!private.log().contains("accepted"), "{}", private.log());
    assert_eq!(scene.accepted(), 0, "{}", scene.app.log());

    // the registered port is reached by both, so it is no accident of the wire
    for address in [scene.address(8080), scene.ipv6_address(8080)] {
        let said = peer(
            &scene.stranger,
            &["say", &address, "GET / HTTP/1.1\\r\\nHost: a\\r\\nConnection: close\\r\\n\\r\\n"],
        );
        assert!(said.contains("200 OK"), "{address}: {said}");
    }
}

#[test]
fn a_foreign_destination_is_not_ours() {
    if !can_run(&NEEDS) {
        return;
    }
    let scene = Scene::new(Mesh::new(), &[]);
    // the kernel takes it, and the sidecar was not told of it: it is no address of the workload
    scene.server.shell("ip address add 10.77.0.200/24 dev eth0");
    let said = peer(&scene.stranger, &["say", "10.77.0.200:8080", WORD]);
    assert!(!said.contains("answer"), "{said}");
    scene.sidecar.wait_for_failure("not_ours", &["10.77.0.200:8080"]);
    assert_eq!(scene.accepted(), 0, "{}", scene.app.log());
}

#[test]
fn an_app_cannot_borrow_the_ports_of_its_sidecar() {
    if !can_run(&NEEDS) {
        return;
    }
    let scene = Scene::new(Mesh::new(), &[]);
    for (url, failure) in [("http://127.0.0.1:15001/", "loop"), ("http://[::1]:15001/", "loop")] {
        let seen = curl(&scene.server, &["-g", url]);
        assert!(seen.to_lowercase().contains(&format!("x-weft-failure: {failure}")), "{url}: {seen}");
    }
    for address in ["127.0.0.1:15006", "[::1]:15006", &scene.address(INBOUND)] {
        let said = peer(&scene.server, &["say", address, WORD]);
        assert!(!said.contains("answer"), "{address}: {said}");
        scene.sidecar.wait_for_failure("loop", &["15006"]);
    }
    assert_eq!(scene.accepted(), 0, "{}", scene.app.log());
}

#[test]
fn the_admin_socket_is_for_the_sidecars_user_alone() {
    if !can_run(&NEEDS) {
        return;
    }
    let scene = Scene::new(Mesh::new(), &[]);
    let socket = scene.sidecar.socket();
    assert_eq!(socket.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let (_folder, sidecar) = program_for_everyone(&program("weft-sidecar"));
    let show = |user| {
        let mut show = scene.server.command_as(user, &sidecar);
        show.args(["show", "config", "--admin-socket"]).arg(&socket);
        show
    };
    assert!(output_of(show(weft_proto::names::SIDECAR_UID)).contains("orders"));
    let refused = show(USER).output().unwrap();
    assert!(!refused.status.success(), "{refused:?}");

    // the public port knows nothing of it
    for path in ["config", "endpoints", "certificate", "status", "drain", "log", "quit"] {
        let url = format!("http://{}/{path}", scene.address(15020));
        for method in ["GET", "POST", "PUT"] {
            let seen = curl(&scene.stranger, &["-X", method, &url]);
            assert!(seen.starts_with("HTTP/1.1 40"), "{method} {path}: {seen}");
        }
    }
}

#[test]
fn of_a_command_under_exec_only_the_registered_port_is_reached() {
    if !can_run(&NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let (server, stranger) = (mesh.network.pod("server"), mesh.network.pod("stranger"));
    let (_peer_folder, peer_program) = program_for_everyone(&program("mesh-peer"));
    let exec = mesh.exec(
        &server,
        "orders",
        &["--port", "8080", "--upstream", "127.0.0.1:7777=orders"],
        &[&peer_program.display().to_string(), "app", "127.0.0.1:8080", "0.0.0.0:9999"],
    );
    let address = |port: u16| format!("{}:{port}", server.ipv4());
    until("the registered port answers", || {
        peer(
            &stranger,
            &["say", &address(8080), "GET / HTTP/1.1\\r\\nHost: a\\r\\nConnection: close\\r\\n\\r\\n"],
        )
        .contains("200 OK")
    });
    let accepted = |log: &str| log.lines().filter(|line| *line == "accepted").count();
    let before = accepted(&exec.process.log());
    for port in [PRIVATE, UPSTREAM, OUTBOUND, INBOUND, DNS] {
        for host in [server.ipv4(), server.ipv6()] {
            let said = peer(&stranger, &["say", &std::net::SocketAddr::new(host, port).to_string(), WORD]);
            assert!(said.contains("refused") && !said.contains("connected"), "{host} {port}: {said}");
        }
    }
    assert_eq!(accepted(&exec.process.log()), before, "{}", exec.process.log());
    assert_eq!(exec.socket().metadata().unwrap().permissions().mode() & 0o777, 0o600);
}
