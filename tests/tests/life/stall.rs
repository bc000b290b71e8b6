//! Downloads that nobody reads and uploads that nobody takes, between two sidecars that others use at the same time:
//! `stall.py` asks on while they fill and stand, and lets them go at the end.

use std::fs;

use weft_tests::{Process, Sidecar, until};

use super::world::{World, can_run_here};

/// As many equal readings of memory, 20 ms apart, mean that nothing moves any more.
const STEADY: usize = 25;

/// Bytes of a stream's window, on both sides (`connect::pool`, `http::server`).
const WINDOW: u64 = 256 * 1024;
/// Bytes of a body that wait for the stream's window.
const SEND_BUFFER: u64 = 128 * 1024;
/// A buffer of HTTP/1 towards the app that is called, and towards the app that calls.
const TO_SERVER: u64 = 128 * 1024;
const TO_CLIENT: u64 = 64 * 1024;
/// One DATA frame.
const FRAME: u64 = 16 * 1024;
/// A sidecar without traffic, and what buffers take beyond their bytes: a quarter.
const IDLE: u64 = 32 * 1024 * 1024;
fn with_slack(bytes: u64) -> u64 {
    IDLE + bytes + bytes / 4
}

/// What a body that goes from HTTP/2 to HTTP/1 leaves in a sidecar: its window is full, and so is the write buffer,
/// with a frame that made it so.
fn to_http1(buffer: u64) -> u64 {
    WINDOW + buffer + FRAME
}

/// The other way: the send buffer is full, with the piece that made it so; one piece waits in hyper's channel, one
/// was read behind it.
fn to_http2(buffer: u64) -> u64 {
    SEND_BUFFER + 3 * buffer
}

fn resident(sidecar: &Sidecar) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", sidecar.process.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// Stalls so many downloads and as many uploads, and lets them go in the end.
fn stall(bodies: u64, while_stalled: impl FnOnce(&World)) {
    let world = World::new();
    let instance = world.instance("one", &[]);
    let folder = world.mesh.network.folder();
    let [script, settled, release] = ["stall.py", "settled", "release"].map(|name| folder.join(name));
    fs::write(&script, include_str!("stall.py")).unwrap();
    let mut stalled = world.client.command("python3");
    stalled.arg(script).arg(bodies.to_string()).args([&settled, &release]);
    let mut stalled = Process::start("stalled", stalled);
    until("all have begun", || {
        let log = instance.app.log();
        let begun = |path| log.matches(path).count() as u64;
        assert!(!stalled.has_ended(), "{}", stalled.log());
        begun("/slow") == bodies && begun("/hold") == bodies
    });
    let sidecars = [&world.sidecar, &instance.sidecar];
    let mut sizes = Vec::new();
    until("all are stalled: memory grows no more", || {
        sizes.push(sidecars.map(resident));
        let settled =
            sizes.len() > STEADY && sizes[sizes.len() - STEADY..].windows(2).all(|two| two[0] == two[1]);
        settled || sizes.len() == 250
    });
    fs::write(settled, "").unwrap();
    let [calls, is_called] = sidecars.map(resident);
    println!("{bodies} of each: {calls} bytes resident at the client, {is_called} at the server");
    let most = with_slack(bodies * (to_http1(TO_CLIENT) + to_http2(TO_CLIENT)));
    assert!(calls < most, "{calls} of {most}");
    let most = with_slack(bodies * (to_http1(TO_SERVER) + to_http2(TO_SERVER)));
    assert!(is_called < most, "{is_called} of {most}");
    while_stalled(&world);
    assert!(stalled.wait().success(), "{}", stalled.log());
    println!("{}", stalled.log());
}

#[test]
fn a_hundred_stalled_bodies_each_way_delay_nobody_and_cost_bounded_memory() {
    if can_run_here() {
        stall(100, |_| {});
    }
}

#[test]
fn stalled_bodies_delay_nobody_on_their_own_connection() {
    if !can_run_here() {
        return;
    }
    stall(45, |world| {
        let metrics = world.sidecar.metrics(&world.client);
        assert!(metrics.contains("weft_pool_connections{protocol=\"http2\"} 1\n"), "{metrics}");
    });
}

/// Begins so many uploads, one when the one before was answered, and goes on with all until it is ended.
const UPLOADS: &str = r#"
import socket, sys, time
HEAD = b"POST /early HTTP/1.1\r\nHost: orders\r\nTransfer-Encoding: chunked\r\n\r\n"
uploads = [socket.create_connection(("orders", 80), timeout=20) for _ in range(int(sys.argv[1]))]
for upload in uploads:
    upload.sendall(HEAD + b"5\r\nhello\r\n")
    answer = b""
    while not answer.endswith(b"\r\n\r\nno"):
        piece = upload.recv(1000)
        assert piece, answer
        answer += piece
    assert answer.startswith(b"HTTP/1.1 404 "), answer
print("answered", flush=True)
while True:
    for upload in uploads:
        upload.sendall(b"1\r\n.\r\n")
    time.sleep(0.5)
"#;

#[test]
fn uploads_that_were_answered_early_delay_nobody() {
    if !can_run_here() {
        return;
    }
    let world = World::new();
    let _instance = world.instance("one", &[]);
    // More than a connection between sidecars takes at a time.
    let mut uploads = world.client.start("python3", &["-c", UPLOADS, "129"]);
    uploads.wait_for_line("answered");
    for _ in 0..10 {
        assert_eq!(world.call(&["-m", "5", "http://orders/"]), ("one".to_owned(), 200));
    }
    assert!(!uploads.has_ended(), "they still send:\n{}", uploads.log());
    let metrics = world.sidecar.metrics(&world.client);
    assert!(metrics.contains("weft_pool_connections{protocol=\"http2\"} 2\n"), "{metrics}");
}
