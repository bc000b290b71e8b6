//! Each signal for each way to run a sidecar: those that ask for the end begin a drain, the others reach the command of
//! `exec` and leave `run` as it is. And every wait of a drain has an end.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use nix::sys::signal::Signal;
use socket2::{Domain, Socket, Type};
use weft_tests::{Mesh, Need, can_run, pause, until};

const NEEDS: [Need; 4] = [
    Need::Root,
    Need::Program("ip", "iproute2"),
    Need::Program("curl", "curl"),
    Need::Program("bash", "bash"),
];
const PASSED_ON: [Signal; 4] = [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGWINCH];

/// Tells of every signal, and ends after those that ask for it.
const SCRIPT: &str = "for name in HUP USR1 USR2 WINCH QUIT; do trap \"echo got SIG$name\" $name; done; \
    trap 'echo got SIGINT; exit 3' INT; trap 'echo got SIGTERM; exit 4' TERM; \
    echo up; while :; do sleep 0.05; done";

#[test]
fn signals_reach_the_command_of_exec() {
    if !can_run(&NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    for (end, reached, code) in
        [(Signal::SIGINT, "SIGINT", 3), (Signal::SIGQUIT, "SIGTERM", 4), (Signal::SIGTERM, "SIGTERM", 4)]
    {
        let pod = mesh.network.pod(&format!("pod-{}", end.as_str().to_lowercase()));
        let mut exec = mesh.exec(&pod, "batch", &["--port", "8080"], &["bash", "-c", SCRIPT]);
        exec.process.wait_for_line("up");
        mesh.wait_until_published("batch");
        for signal in PASSED_ON {
            exec.process.signal(signal);
            exec.process.wait_for_line(&format!("got {signal}"));
        }
        assert!(!exec.process.log().contains("asked to stop"), "{}", exec.process.log());
        exec.process.signal(end);
        assert_eq!(exec.process.wait().code(), Some(code), "{end}:\n{}", exec.process.log());
        let log = exec.process.log();
        assert!(log.contains("draining: ") && log.contains(&format!("got {reached}\n")), "{end}:\n{log}");
        assert!(!exec.socket().exists());
        assert_eq!(std::fs::read_dir(mesh.services()).expect("the services").count(), 0);
    }
}

/// Runs a command in a terminal of its own, and types Ctrl-C there once it says `up`.
const TERMINAL: &str = r#"
import os, pty, sys
process, terminal = pty.fork()
if process == 0:
    os.execvp(sys.argv[1], sys.argv[1:])
seen, typed = b"", False
while True:
    try:
        piece = os.read(terminal, 4096)
    except OSError:
        break
    if not piece:
        break
    os.write(1, piece)
    seen += piece
    if not typed and b"\nup\r" in seen:
        typed = os.write(terminal, b"\x03") == 1
sys.exit(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"#;

#[test]
fn one_ctrl_c_is_one_for_the_command() {
    if !can_run(&NEEDS) || !can_run(&[Need::Program("python3", "python3")]) {
        return;
    }
    let mesh = Mesh::new();
    let pod = mesh.network.pod("terminal");
    // To this one a second Ctrl-C means: now.
    let script = "trap 'echo got SIGINT; trap \"exit 9\" INT' INT; trap 'echo got SIGTERM; exit 4' TERM; \
        echo up; while :; do sleep 0.05; done";
    // By its path: the first of the PATH may be one that only root may run.
    let wrapper = ["/usr/bin/python3", "-c", TERMINAL];
    let mut exec =
        mesh.start_exec_under(&wrapper, &pod, "batch", &["--port", "8080"], &["bash", "-c", script]);
    assert_eq!(exec.process.wait().code(), Some(4), "{}", exec.process.log());
    let log = exec.process.log();
    assert_eq!(log.matches("got SIGINT").count(), 1, "{log}");
    assert!(log.contains("asked to stop") && log.contains("got SIGTERM"), "{log}");
}

#[test]
fn signals_do_not_end_run_but_in_a_drain() {
    if !can_run(&NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    for end in [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM] {
        let pod = mesh.network.pod(&format!("pod-{}", end.as_str().to_lowercase()));
        let mut run = mesh.sidecar(&pod, "orders", &["--port", "8080"]);
        mesh.wait_until_published("orders");
        for signal in PASSED_ON {
            run.process.signal(signal);
            (0..5).for_each(|_| pause());
            assert!(!run.process.has_ended(), "{signal}:\n{}", run.process.log());
        }
        run.wait_until_ready(&pod);
        run.process.signal(end);
        assert_eq!(run.process.wait().code(), Some(0), "{end}:\n{}", run.process.log());
        assert!(run.process.log().contains("draining: All"), "{end}:\n{}", run.process.log());
        assert_eq!(std::fs::read_dir(mesh.services()).expect("the services").count(), 0);
    }
}

#[test]
fn an_app_that_takes_no_connection_does_not_hold_a_drain() {
    if !can_run(&NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let pod = mesh.network.pod("server");
    let address = SocketAddr::from(([127, 0, 0, 1], 8080));
    let (_app, waiting) = pod.inside(|| {
        let app = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        app.bind(&address.into()).expect("the address");
        app.listen(0).expect("a listener");
        let dial = || TcpStream::connect_timeout(&address, Duration::from_millis(300));
        // Until the queue of the listener is full.
        let waiting: Vec<_> = (0..8).map_while(|_| dial().ok()).collect();
        (app, waiting)
    });
    assert!((1..8).contains(&waiting.len()), "{} wait", waiting.len());
    let mut run = mesh.sidecar(&pod, "orders", &["--port", "8080", "--drain-timeout", "2s"]);
    run.process.signal(Signal::SIGTERM);
    assert_eq!(run.process.wait().code(), Some(0), "{}", run.process.log());
}

/// Its last calls go out, so the sidecar stays as long as its app is there.
#[test]
fn a_drain_waits_for_an_app_wherever_it_listens() {
    if !can_run(&NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let places = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
    for (number, place) in places.into_iter().map(Some).chain([None]).enumerate() {
        let pod = mesh.network.pod(&format!("pod-{number}"));
        let address = SocketAddr::new(place.unwrap_or_else(|| pod.ipv4()), 8080);
        let app = pod.inside(|| TcpListener::bind(address).expect("the app's port"));
        let mut run = mesh.sidecar(&pod, "orders", &["--port", "8080"]);
        run.process.signal(Signal::SIGTERM);
        run.process.wait_for_line("draining");
        (0..5).for_each(|_| pause());
        assert!(!run.process.has_ended(), "{address}:\n{}", run.process.log());
        drop(app);
        assert_eq!(run.process.wait().code(), Some(0), "{address}:\n{}", run.process.log());
    }
}

#[test]
fn exec_ends_where_its_command_was_never_started() {
    if !can_run(&NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    for (signal, code) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130)] {
        let pod = mesh.network.pod(&format!("pod-{}", signal.as_str().to_lowercase()));
        // Nobody there gives a certificate, so it does not become ready.
        let flags = ["--authority", "127.0.0.1:9"];
        let mut exec = mesh.start_exec_under(&[], &pod, "batch", &flags, &["echo", "ran"]);
        exec.process.wait_for_line("started");
        exec.process.signal(Signal::SIGHUP);
        exec.process.signal(signal);
        assert_eq!(exec.process.wait().code(), Some(code), "{}", exec.process.log());
        assert!(!exec.process.log().lines().any(|line| line == "ran"), "{}", exec.process.log());
        until("the socket is gone", || !exec.socket().exists());
    }
}
