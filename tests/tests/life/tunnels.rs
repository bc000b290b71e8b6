//! Connections that are bytes, and requests that become bytes: they are tried again as requests are, elsewhere and
//! within the budget, and an app that is down behind a living sidecar takes no traffic.

use std::fs;

use nix::sys::signal::Signal;
use weft_tests::{Pod, Process, Sidecar, output_of, program, until};

use super::world::{World, can_run_here};

/// Calls of each test.
const CALLS: usize = 40;

/// An instance of `orders` whose app answers HTTP, agrees to upgrades and gives other bytes back.
struct Echo {
    app: Process,
    _sidecar: Sidecar,
    pod: Pod,
}

fn echo(world: &World, name: &str) -> Echo {
    let pod = world.mesh.network.pod(name);
    let mut app = pod.start(program("mesh-peer"), &["app", "127.0.0.1:8080"]);
    app.wait_for_line("serving");
    let sidecar = world.mesh.sidecar(&pod, "orders", &["--port", "8080", "--instance", name]);
    let document = world.document("orders", name);
    until("the workload is published", || document.exists());
    until("the client knows the instance", || {
        world.call(&["http://orders/"]);
        world.endpoints().contains(&format!("{}:8080", pod.ipv4()))
    });
    Echo { app, _sidecar: sidecar, pod }
}

/// Says so many digits and these bytes on connections to a service, one after the other, and gives the first line of each
/// answer.
fn say(world: &World, service: &str, digits: usize, bytes: &str) -> Vec<String> {
    const SAY: &str = r#"
import codecs, socket, sys
host, times, said = sys.argv[1], int(sys.argv[2]), codecs.decode(sys.argv[4], "unicode_escape").encode("latin-1")
said = b"0" * int(sys.argv[3]) + said
for _ in range(times):
    answer = b""
    with socket.create_connection((host, 80), timeout=10) as connection:
        try:
            connection.sendall(said)
            while b"\n" not in answer and (data := connection.recv(4096)):
                answer += data
        except OSError as error:
            answer = type(error).__name__.encode() + b"\n"
    print(answer.split(b"\n")[0].decode(errors="replace"))
"#;
    let mut python = world.client.command("python3");
    python.args(["-c", SAY, service, &CALLS.to_string(), &digits.to_string(), bytes]);
    output_of(python).lines().map(|line| line.trim().to_owned()).collect()
}

const UPGRADE: &str =
    r"GET /upgrade HTTP/1.1\r\nHost: orders\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n";

/// A service of two endpoints where nobody listens, with this policy; its breaker is off.
fn dead_service(world: &World, policy: &str) -> Pod {
    let pod = world.mesh.network.pod("nobody");
    let text = format!("breaker: {{consecutive_failures: 0}}\n{policy}");
    fs::write(world.mesh.policies().join("dead.yaml"), text).unwrap();
    let endpoint = |port: u16| format!("{{address: '{}:{port}'}}", pod.ipv4());
    world.mesh.write_service("dead", &format!("endpoints: [{}, {}]\n", endpoint(8081), endpoint(8082)));
    until("the policy applies", || {
        world.client.shell("getent ahostsv4 dead || true");
        world.call(&["http://dead/"]).1 == 503
    });
    pod
}

/// The sum of the samples of a metric with these labels.
fn metric(world: &World, name: &str, labels: &[&str]) -> f64 {
    let metrics = world.sidecar.metrics(&world.client);
    let fits = |line: &&str| line.starts_with(name) && labels.iter().all(|label| line.contains(label));
    metrics.lines().filter(fits).filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// Retries of `dead` that were made, and those that the budget refused.
fn retries(world: &World) -> (f64, f64) {
    let of_dead = "service=\"dead\"";
    let made = metric(world, "weft_attempts_total{", &[of_dead, "outcome=\"retry\""]);
    (made, metric(world, "weft_retries_refused_total{", &[of_dead, "reason=\"budget\""]))
}

/// With `percent: 0` and `per_second: 1` ten retries are there, and one more each second.
const BUDGET: &str = "retries: {attempts: 2, budget: {percent: 0, per_second: 1}}\n";

#[test]
fn upgrades_to_a_dead_service_keep_to_the_budget_of_retries() {
    if !can_run_here() {
        return;
    }
    let world = World::new();
    let _nobody = dead_service(&world, BUDGET);
    let before = retries(&world);
    let statuses = say(&world, "dead", 0, UPGRADE);
    assert!(statuses.iter().all(|status| status.starts_with("HTTP/1.1 503")), "{statuses:?}");
    let after = retries(&world);
    let (made, refused) = (after.0 - before.0, after.1 - before.1);
    assert!(made < CALLS as f64 && refused > 0.0, "{made} retries, {refused} refused");
}

#[test]
fn upgrades_go_elsewhere_where_an_app_is_down_behind_a_living_sidecar() {
    if !can_run_here() {
        return;
    }
    let world = World::new();
    let (mut down, _up) = (echo(&world, "down"), echo(&world, "up"));
    down.app.signal(Signal::SIGKILL);
    down.app.wait();
    let statuses = say(&world, "orders", 0, UPGRADE);
    assert!(statuses.iter().all(|status| status.starts_with("HTTP/1.1 101")), "{statuses:?}");
}

#[test]
fn opaque_connections_to_a_dead_service_keep_to_the_budget_and_the_deadline() {
    if !can_run_here() {
        return;
    }
    let world = World::new();
    let slow = "timeouts: {request: 300ms}\nretries: {attempts: 9, backoff: 100ms, budget: {percent: 0, per_second: 1}}\n";
    let _nobody = dead_service(&world, slow);
    let before = retries(&world);
    let answers = say(&world, "dead", 0, r"\x00 bytes\n");
    assert!(answers.iter().all(|answer| answer == "ConnectionResetError"), "{answers:?}");
    let after = retries(&world);
    let (made, refused) = (after.0 - before.0, after.1 - before.1);
    assert!(made < CALLS as f64 && refused > 0.0, "{made} retries, {refused} refused by the budget");
    let at_deadline =
        metric(&world, "weft_retries_refused_total{", &["service=\"dead\"", "reason=\"deadline\""]);
    assert!(at_deadline > 0.0, "a pause that would outlast the deadline is not made");
}

#[test]
fn bytes_go_elsewhere_where_an_app_is_down_behind_a_living_sidecar() {
    if !can_run_here() {
        return;
    }
    let world = World::new();
    let (mut down, _up) = (echo(&world, "down"), echo(&world, "up"));
    down.app.signal(Signal::SIGKILL);
    down.app.wait();
    // More than what is sent before the word of the other sidecar is there, and all of it comes back in order.
    let answers = say(&world, "orders", 200_000, r"\n");
    let lengths: Vec<usize> = answers.iter().map(String::len).collect();
    assert_eq!(lengths, [200_000; CALLS]);
    // A client that is silent at first, and one that shuts down its side at once.
    for (word, pause) in [("late", "sleep 0.3"), ("at once", "true")] {
        for _ in 0..10 {
            let line = format!(
                "({pause}; echo {word}) | timeout 10 bash -c 'exec 3<>/dev/tcp/orders/80; cat >&3; head -1 <&3'"
            );
            assert_eq!(world.client.shell(&line).trim(), word);
        }
    }
    let down = format!("{}:8080", down.pod.ipv4());
    let ejections = metric(&world, "weft_ejections_total{", &["service=\"orders\""]);
    assert!(ejections > 0.0, "{down} is put out: {}", world.endpoints());
    let failures = world.sidecar.access_log();
    let failures = failures.iter().filter(|line| !line["failure"].is_null() && line["protocol"] == "tcp");
    assert_eq!(failures.count(), 0);
}

#[test]
fn bytes_are_counted_while_their_connection_is_open_and_when_it_is_cut() {
    if !can_run_here() {
        return;
    }
    let world = World::new();
    let mut one = echo(&world, "one");
    let address = world.client.shell("getent ahostsv4 orders | head -1 | cut -d' ' -f1");
    let address = format!("{}:80", address.trim());
    let mut held = world.client.start(program("mesh-peer"), &["say", &address, "held\\n"]);
    held.wait_for_line("held");
    for flow in ["sent", "received"] {
        let labels = ["direction=\"outbound\"", "service=\"orders\"", &format!("flow=\"{flow}\"")];
        until("the bytes are counted", || metric(&world, "weft_tcp_bytes_total{", &labels) >= 5.0);
    }
    one.app.signal(Signal::SIGKILL);
    one.app.wait();
    held.wait();
    let lines = world.sidecar.access_log();
    let line =
        lines.iter().find(|line| line["kind"] == "connection" && line["protocol"] == "tcp").expect("a line");
    assert_eq!((&line["request_bytes"], &line["response_bytes"]), (&5.into(), &5.into()), "{line}");
}
