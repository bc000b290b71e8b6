//! Failures of what reaches an app, shown by the app's own sidecar.

use nix::sys::signal::Signal;
use weft_sidecar::model::Failure;
use weft_tests::{Mesh, can_run, program, program_for_everyone, until};

use super::{
    Test,
    bench::{NEEDS, Shown, curl, peer, start_app},
};

pub const WHAT_REACHES_THE_APP: Test = (
    "what_reaches_the_app",
    &[Failure::PlaintextRefused, Failure::NotOurs, Failure::AppRefused, Failure::AppReset],
);

#[test]
fn what_reaches_the_app() {
    if !can_run(&NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let (server, stranger) = (mesh.network.pod("server"), mesh.network.pod("stranger"));
    let app = start_app(&server, "127.0.0.1:8080");
    let flags = ["--port", "8080", "--port", "8081", "--port", "8082", "--mtls-port", "8082=strict"];
    let sidecar = mesh.sidecar(&server, "orders", &flags);
    let mut shown = Shown::by(WHAT_REACHES_THE_APP, &sidecar, &server);
    let url = |port: u16, path: &str| format!("http://{}:{port}/{path}", server.ipv4());

    let seen = curl(&stranger, &[&url(8080, "reset")]);
    shown.answered(Failure::AppReset, &seen);
    let seen = curl(&stranger, &[&url(8081, "")]);
    shown.answered(Failure::AppRefused, &seen);

    // no answer for those who have no business here
    let seen = curl(&stranger, &[&url(8082, "")]);
    assert!(seen.starts_with("curl failed"), "{seen}");
    shown.without_answer(Failure::PlaintextRefused);
    server.shell("ip address add 10.77.0.200/24 dev eth0");
    let seen = curl(&stranger, &["http://10.77.0.200:8080/"]);
    assert!(seen.starts_with("curl failed"), "{seen}");
    shown.without_answer(Failure::NotOurs);
    assert_eq!(app.log().matches("accepted").count(), 1, "{}", app.log());
    shown.complete();
}

pub const TOO_LONG_IN_FLIGHT: Test = ("too_long_in_flight", &[Failure::Draining]);

#[test]
fn too_long_in_flight() {
    if !can_run(&NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let (server, stranger) = (mesh.network.pod("server"), mesh.network.pod("stranger"));
    let (_folder, peer_program) = program_for_everyone(&program("mesh-peer"));
    // an app that does not stop when it is told to: the sidecar can still be asked
    let app = format!("trap '' TERM; {} app 127.0.0.1:8080", peer_program.display());
    let flags = ["--port", "8080", "--drain-timeout", "300ms"];
    let sidecar = mesh.exec(&server, "orders", &flags, &["sh", "-c", &app]);
    let mut shown = Shown::by(TOO_LONG_IN_FLIGHT, &sidecar, &server);
    let text = "GET /slow HTTP/1.1\\r\\nHost: orders\\r\\n\\r\\n";
    until("the app listens", || sidecar.process.log().contains("serving"));
    let mut held = peer(&stranger, &["say", &format!("{}:8080", server.ipv4()), text]);
    held.wait_for_line("200 OK");
    sidecar.process.signal(Signal::SIGTERM);
    held.wait();
    shown.without_answer(Failure::Draining);
    shown.complete();
}
