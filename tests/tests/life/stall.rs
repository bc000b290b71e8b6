//! A hundred downloads that nobody reads and a hundred uploads that nobody takes, between two sidecars that others
//! use at the same time.

use weft_tests::{Process, Sidecar, until};

use super::world::{World, assert_all_answered, can_run_here};

/// Opens a hundred of each and keeps them; a reader that never reads, a writer whose bytes are never taken.
const STALLED: &str = r#"
import socket, threading, time
def stall(request, body):
    connection = socket.create_connection(("orders", 80))
    connection.sendall(request)
    try:
        while body:
            connection.sendall(b"x" * 65536)
    except OSError as error:
        print("broke off", error, flush=True)
    time.sleep(60)
download = b"GET /slow?bytes=20000000&seconds=0 HTTP/1.1\r\nHost: orders\r\n\r\n"
upload = b"POST /never-read HTTP/1.1\r\nHost: orders\r\nContent-Length: 100000000\r\n\r\n"
for _ in range(100):
    threading.Thread(target=stall, args=(download, False), daemon=True).start()
    threading.Thread(target=stall, args=(upload, True), daemon=True).start()
print("stalled", flush=True)
time.sleep(60)
"#;
/// As many equal readings of memory, 20 ms apart, mean that nothing moves any more.
const STEADY: usize = 25;
/// Two hundred streams of 256 KiB each, and what hyper, h2 and TLS hold before and behind those windows.
const MOST_KIB: u64 = 220 * 1024;

fn resident_kib(sidecar: &Sidecar) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", sidecar.process.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn stalled_bodies_delay_nobody_and_cost_bounded_memory() {
    if !can_run_here() {
        return;
    }
    let world = World::new();
    let instance = world.instance("one", &[]);
    let mut stalled = world.client.command("python3");
    stalled.args(["-c", STALLED]);
    let stalled = Process::start("stalled", stalled);
    until("all have begun", || {
        let log = instance.app.log();
        log.matches("/slow").count() == 100 && log.matches("/never-read").count() == 100
    });
    let sidecars = [&world.sidecar, &instance.sidecar];
    let mut sizes = Vec::new();
    until("all are stalled: memory grows no more", || {
        sizes.push(sidecars.map(resident_kib));
        let settled =
            sizes.len() > STEADY && sizes[sizes.len() - STEADY..].windows(2).all(|two| two[0] == two[1]);
        settled || sizes.len() == 250
    });
    // A request that waited for a stalled body would wait for a minute.
    assert!(assert_all_answered(world.load(3, &["http://orders/"])) > 100);
    for sidecar in sidecars {
        let kib = resident_kib(sidecar);
        println!("{kib} KiB resident");
        assert!(kib < MOST_KIB, "{kib} KiB");
    }
    assert!(!stalled.log().contains("broke off"), "{}", stalled.log());
}
