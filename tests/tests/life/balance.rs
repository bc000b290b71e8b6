//! Endpoints that come, go and fall ill: an update cuts nothing, a breaker lets one probe through, and a budget keeps
//! retries a small part of the traffic.

use std::fs;

use tokio::time::Instant;
use weft_tests::{Pod, Process, Sidecar, identity, until};

use super::world::{Instance, World, assert_all_answered, can_run_here};

/// The value of a metric with these labels; 0 where it has none.
fn metric(world: &World, name: &str, labels: &[&str]) -> u64 {
    let metrics = world.sidecar.metrics(&world.client);
    let fits = |line: &&str| line.starts_with(name) && labels.iter().all(|label| line.contains(label));
    let values = metrics.lines().filter(fits).map(|line| line.rsplit(' ').next().unwrap_or_default());
    values.map(|value| value.parse::<f64>().unwrap_or_else(|_| panic!("{value}")) as u64).sum()
}

fn endpoints_in(world: &World, state: &str) -> u64 {
    metric(world, "weft_endpoints{", &["service=\"orders\"", &format!("state=\"{state}\"")])
}

fn requests_of(load: &str) -> u64 {
    let line = load.lines().find(|line| line.starts_with("requests: ")).unwrap_or_else(|| panic!("{load}"));
    line.split(' ').nth(1).and_then(|total| total.parse().ok()).unwrap_or_else(|| panic!("{line}"))
}

#[test]
fn retries_under_load_stay_within_their_share() {
    if !can_run_here() {
        return;
    }
    let world = World::new();
    let instances = [world.instance("one", &[]), world.instance("two", &[])];
    // All attempts go out: no endpoint is spared for its failures.
    fs::write(world.mesh.policies().join("orders.yaml"), "breaker: {consecutive_failures: 0}\n").unwrap();
    let attempts = |outcome: &str| {
        metric(&world, "weft_attempts_total{", &["service=\"orders\"", &format!("outcome=\"{outcome}\"")])
    };
    let (first_before, again_before) = (attempts("first"), attempts("retry"));
    let start = Instant::now();
    let mut load = world.load(4, &["http://orders/die"]);
    load.wait();
    let seconds = start.elapsed().as_secs() + 1;
    let requests = requests_of(&load.log());
    let (first, again) = (attempts("first") - first_before, attempts("retry") - again_before);
    let seen: usize = instances.iter().map(|instance| instance.app.log().matches("GET /die").count()).sum();
    println!("{requests} requests, {first} first attempts, {again} retries, {seen} seen in {seconds} s");
    assert!(requests > 400 && first >= requests, "{requests} requests, {first} first attempts");
    // A fifth, one a second, and what ten quiet seconds before were worth, with the first calls in them.
    let allowed = (first_before + first).div_ceil(5) + seconds + 10;
    assert!(again <= allowed, "{again} retries of {first} requests in {seconds} s");
    assert!(again >= first / 10, "there were retries: {again}");
    // The app's sidecar repeats a GET that met a kept connection: those left from before the load.
    assert!(seen as u64 <= first + again + 10, "{seen} reached the apps");
    let refused = metric(&world, "weft_retries_refused_total{", &["service=\"orders\"", "reason=\"budget\""]);
    assert!(refused > first / 2, "{refused} were refused for the budget");
}

/// What the client's sidecar says of an endpoint.
fn condition(world: &World, instance: &Instance) -> String {
    let shown: serde_json::Value = serde_json::from_str(&world.endpoints()).unwrap();
    let address = format!("{}:8080", instance.pod.ipv4());
    let endpoints = shown["orders"]["endpoints"].as_array().unwrap();
    let endpoint = endpoints.iter().find(|endpoint| endpoint["address"] == address);
    endpoint.unwrap_or_else(|| panic!("{shown}"))["condition"].as_str().unwrap().to_owned()
}

#[test]
fn an_app_that_dies_is_put_out_probed_and_taken_back() {
    if !can_run_here() {
        return;
    }
    let world = World::new();
    let (mut dies, stays) = (world.instance("dies", &[]), world.instance("stays", &[]));
    // Less a random part of up to a quarter. The metric counts endpoints every two seconds.
    let policy = "breaker: {consecutive_failures: 2, ejection: 5s, ejection_max: 5s}\n";
    fs::write(world.mesh.policies().join("orders.yaml"), policy).unwrap();
    let call = || assert_eq!(world.call(&["http://orders/"]).1, 200, "another endpoint answers");
    let ejections = || metric(&world, "weft_ejections_total{", &["service=\"orders\""]);
    let before = stays.app.log().matches("GET").count();
    until("both are called", || {
        call();
        dies.app.log().contains("GET") && stays.app.log().matches("GET").count() > before
    });
    dies.app.signal(nix::sys::signal::Signal::SIGKILL);
    dies.app.wait();
    until("it is put out", || {
        call();
        condition(&world, &dies) == "ejected"
    });
    assert_eq!(ejections(), 1);
    until("the metric says so", || endpoints_in(&world, "ejected") == 1);
    until("its time is over", || condition(&world, &dies) == "half_open");
    until("the metric says so", || endpoints_in(&world, "probing") == 1);
    // The probe fails: that request goes elsewhere, and the endpoint is out again.
    until("a probe has failed", || {
        call();
        condition(&world, &dies) == "ejected"
    });
    assert_eq!(ejections(), 2);
    dies.app = world.start_app(&dies.pod, "dies");
    until("its time is over again", || condition(&world, &dies) == "half_open");
    assert!(!dies.app.log().contains("GET"), "nobody asks an endpoint that is out");
    until("a probe has succeeded", || {
        call();
        condition(&world, &dies) == "closed"
    });
    assert!(dies.app.log().contains("GET"));
    until("the metric says so", || endpoints_in(&world, "ready") == 2);
    assert_eq!(ejections(), 2);
}

#[test]
fn an_endpoint_that_breaks_off_its_answers_is_put_out() {
    if !can_run_here() {
        return;
    }
    let world = World::new();
    // Read long before the calls: the sidecars of the instances start after it.
    fs::write(world.mesh.policies().join("orders.yaml"), "breaker: {ejection: 1m}\n").unwrap();
    let (cuts, _stays) = (world.instance("cuts", &[]), world.instance("stays", &[]));
    // Heads that come sooner than those of the other make it attractive. curl says 0 for an answer that is whole.
    let url = "http://orders/cut?by=cuts&number=[1-100]";
    let mut calls = world.curl(&["-w", "%{exitcode}\n", "-o", "/dev/null", url]);
    let ended = String::from_utf8(calls.output().unwrap().stdout).unwrap();
    let cut = ended.lines().filter(|exit| *exit != "0").count();
    assert_eq!(ended.lines().count(), 100, "{ended}");
    // As many as put it out. One whose end came together with its head was asked elsewhere, and was whole.
    assert!((1..=5).contains(&cut), "{cut} of 100 were cut");
    assert_eq!(condition(&world, &cuts), "ejected");
    assert_eq!(metric(&world, "weft_ejections_total{", &["service=\"orders\""]), 1);
}

/// Echoes over one connection before a file appears and after; the address is that of a service of bytes.
const HOLD: &str = "
import os, socket, sys, time
held = socket.create_connection((sys.argv[1], 80), timeout=20)
def echo(text):
    held.sendall(text)
    assert held.recv(100) == text
    print('echoed', text.decode().strip(), flush=True)
echo(b'before\\n')
while not os.path.exists(sys.argv[2]):
    time.sleep(0.02)
echo(b'after\\n')
";

/// An app that gives bytes back.
const ECHO: &str = "
import socketserver
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(100):
            self.request.sendall(data)
socketserver.ThreadingTCPServer.allow_reuse_address = True
server = socketserver.ThreadingTCPServer(('127.0.0.1', 8081), Echo)
print('listening', flush=True)
server.serve_forever()
";

/// A pod with both apps and a sidecar that publishes nothing: the test writes the service files.
fn unpublished(world: &World, name: &str) -> (Process, Process, Sidecar, Pod) {
    let pod = world.mesh.network.pod(name);
    let app = world.start_app(&pod, name);
    let mut echo = pod.start("python3", &["-c", ECHO]);
    echo.wait_for_line("listening");
    let flags = ["--port", "8080", "--port", "8081", "--publish", "false"];
    let sidecar = world.mesh.sidecar(&pod, "orders", &flags);
    (app, echo, sidecar, pod)
}

#[test]
fn an_update_of_endpoints_cuts_nothing() {
    if !can_run_here() {
        return;
    }
    let world = World::new();
    let (one, two) = (unpublished(&world, "one"), unpublished(&world, "two"));
    let publish = |endpoints: &[(&Pod, u32)]| {
        for (service, port) in [("orders", 8080), ("echo", 8081)] {
            let mut text = format!("identities: ['{}']\nendpoints:\n", identity("orders"));
            for (pod, weight) in endpoints {
                text += &format!("- {{address: '{}:{port}', weight: {weight}}}\n", pod.ipv4());
            }
            world.mesh.write_service(service, &text);
        }
    };
    publish(&[(&one.3, 100)]);
    until("the service is known", || world.call(&["http://orders/"]) == ("one".to_owned(), 200));
    let (go, body) = (world.mesh.network.folder().join("go"), world.mesh.network.folder().join("slow"));
    let (go_shown, body_shown) = (go.display().to_string(), body.display().to_string());
    let mut held = world.client.start("python3", &["-c", HOLD, "echo", &go_shown]);
    held.wait_for_line("echoed before");
    let slow = "http://orders/slow?bytes=100000&seconds=5";
    let mut download =
        Process::start("curl", world.curl(&["-w", "%{http_code} %{size_download}", "-o", &body_shown, slow]));
    until("the download is under way", || one.0.log().contains("/slow"));
    let load = world.load(4, &["http://orders/"]);
    let known = |weight: u32, pod: &Pod, is: bool| {
        let shown: serde_json::Value = serde_json::from_str(&world.endpoints()).unwrap();
        let has = |endpoint: &serde_json::Value| {
            endpoint["address"] == format!("{}:8080", pod.ipv4()) && endpoint["weight"] == weight
        };
        shown["orders"]["endpoints"].as_array().unwrap().iter().any(has) == is
    };

    publish(&[(&one.3, 7)]);
    until("the weight has changed", || known(7, &one.3, true));
    publish(&[(&one.3, 7), (&two.3, 100)]);
    until("an endpoint was added", || known(100, &two.3, true));
    until("and is called", || two.0.log().contains("GET"));
    publish(&[(&two.3, 100)]);
    until("the first endpoint is gone", || known(7, &one.3, false));
    assert!(!download.has_ended(), "still under way:\n{}", download.log());
    fs::write(&go, "").unwrap();
    held.wait_for_line("echoed after");
    assert!(download.wait().success(), "{}", download.log());
    assert_eq!(download.log(), "200 100000");
    assert!(assert_all_answered(load) > 400);
    assert_eq!(world.call(&["http://orders/"]), ("two".to_owned(), 200));
    let mut again = world.client.start("python3", &["-c", HOLD, "echo", &go_shown]);
    again.wait_for_line("echoed after");
    for sidecar in [&world.sidecar, &one.2, &two.2] {
        for line in sidecar.access_log() {
            // The load leaves in the middle of its last requests, and nobody else does.
            assert!(line["failure"].is_null() || line["failure"] == "client_gone", "{line}");
        }
    }
}
