//! Workloads that register themselves: found, called with the identity they registered, out when they die, back
//! when Consul forgot them, and gone first in a drain.

use std::{fs, time::Duration};

use nix::sys::signal::Signal;
use tokio::time::Instant;
use weft_tests::{Consul, Mesh, Pod, Sidecar, can_run, identity, output_of, pause, program, until};

use super::world::{app, get, sidecar, time_until};

fn registered(mesh: &Mesh, pod: &Pod, consul: &Consul<'_>, instance: &str) -> Sidecar {
    let flags = ["--port", "8080", "--instance", instance, "--publish", "true", "--consul-ttl", "3s"];
    sidecar(mesh, pod, "orders", &consul.address(), &[&flags[..], &["--probe-interval", "200ms"]].concat())
}

/// What Consul answered to it so far.
fn answers(sidecar: &Sidecar, pod: &Pod) -> u32 {
    let metrics = sidecar.metrics(pod);
    let mut lines = metrics.lines();
    let count = lines.find_map(|line| line.strip_prefix("weft_registry_requests_total{result=\"ok\"} "));
    count.and_then(|count| count.parse().ok()).unwrap_or_default()
}

#[test]
fn a_workload_registers_itself_and_stays_true() {
    if !can_run(&Consul::NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let (client, one, two) = (mesh.network.pod("client"), mesh.network.pod("one"), mesh.network.pod("two"));
    let registry = mesh.network.pod("registry");
    let mut consul = Consul::dev(&registry, "");
    let first_app = app(&one, "one", 8080);
    let first = registered(&mesh, &one, &consul, "one");
    let web = sidecar(&mesh, &client, "web", &consul.address(), &[]);
    until("it is registered", || consul.passing("orders") == [format!("orders-one {}:8080", one.ipv4())]);
    assert_eq!(get(&client, "http://orders/"), "200 one");
    let endpoint = &consul.ask("GET", "/v1/health/service/orders", None).unwrap()[0];
    assert_eq!(endpoint["Service"]["Meta"]["weft-identity"], identity("orders"));
    until("the call had an identity", || {
        web.access_log().iter().any(|line| line["service"] == "orders" && line["failure"].is_null())
    });

    // Its word repeats, and wakes nobody.
    let index = || {
        consul.ask("GET", "/v1/health/service/orders", None).unwrap()[0]["Checks"][1]["ModifyIndex"].clone()
    };
    let before = index();
    let words = || answers(&first, &one);
    let said = words();
    until("it has said its word some times", || words() > said + 3);
    assert_eq!(index(), before, "a word that says the same was written into the registry");

    // A second instance is called, and killed with its app.
    let mut second_app = app(&two, "two", 8080);
    let mut second = registered(&mesh, &two, &consul, "two");
    until("the second instance answers", || get(&client, "http://orders/") == "200 two");
    second.process.signal(Signal::SIGKILL);
    second_app.signal(Signal::SIGKILL);
    second.process.wait();
    second_app.wait();
    for _ in 0..30 {
        assert_eq!(get(&client, "http://orders/"), "200 one");
    }
    until("it is out of the registry", || consul.passing("orders").len() == 1);

    // Somebody registers over it, without its identity.
    let ours = consul.passing("orders");
    consul.register("orders", "orders-one", &one.ipv4().to_string(), 9, serde_json::json!({}));
    assert_ne!(consul.passing("orders"), ours);
    until("the registration is mended", || consul.passing("orders") == ours);
    let endpoint = &consul.ask("GET", "/v1/health/service/orders", None).unwrap()[0];
    assert_eq!(endpoint["Service"]["Meta"]["weft-identity"], identity("orders"));
    assert!(first.process.log().contains("`Port` is 9, not 8080"), "{}", first.process.log());
    assert!(first.metrics(&one).contains("weft_registration_overwritten_total 1\n"));
    assert_eq!(get(&client, "http://orders/"), "200 one");

    // The app goes and comes.
    drop(first_app);
    until("the registry says that the app is down", || consul.passing("orders").is_empty());
    let _first_app = app(&one, "one", 8080);
    until("the registry says that it is back", || consul.passing("orders").len() == 1);

    // Consul forgets everything.
    consul.stop();
    assert_eq!(get(&client, "http://orders/"), "200 one");
    consul.start();
    until("it is registered again", || consul.passing("orders").len() == 1);
    assert_eq!(get(&client, "http://orders/"), "200 one");

    // A drain begins with leaving the registry.
    first.process.signal(Signal::SIGTERM);
    until("it has left the registry", || {
        consul.ask("GET", "/v1/health/service/orders", None).unwrap() == serde_json::json!([])
    });
}

/// Callers go on to call until they hear of the drain, which takes nothing of the time that their requests have.
#[test]
fn an_agent_that_hangs_costs_no_request_of_a_drain() {
    if !can_run(&Consul::NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let (client, pod, registry) =
        (mesh.network.pod("client"), mesh.network.pod("one"), mesh.network.pod("registry"));
    let consul = Consul::dev(&registry, "");
    let app = app(&pod, "one", 8080);
    let times = ["--settle-time", "500ms", "--drain-timeout", "5s"];
    let flags = [&["--port", "8080", "--publish", "true"][..], &times].concat();
    let mut sidecar = sidecar(&mesh, &pod, "orders", &consul.address(), &flags);
    until("it is registered", || consul.passing("orders").len() == 1);

    consul.process().signal(Signal::SIGSTOP);
    // One every 200 ms, until long after the drain has begun.
    let calls = "for n in $(seq 30); do \
        curl -s -o /dev/null -m 20 -w \"/slow/$n %{http_code}\\n\" http://$1:8080/slow/$n & sleep 0.2; done; wait";
    let mut calls = client.start("sh", &["-c", calls, "sh", &pod.ipv4().to_string()]);
    until("one is under way", || app.log().contains("/slow/2\n"));
    sidecar.process.signal(Signal::SIGTERM);
    assert_eq!(sidecar.process.wait().code(), Some(0), "{}", sidecar.process.log());
    calls.wait();
    consul.process().signal(Signal::SIGCONT);

    let (begun, answers) = (app.log(), calls.log());
    let begun: Vec<&str> = begun.lines().filter(|line| line.starts_with("/slow/")).collect();
    for call in &begun {
        assert!(answers.contains(&format!("{call} 200\n")), "{call} was cut:\n{answers}");
    }
    assert!((2..30).contains(&begun.len()), "the drain has begun meanwhile: {begun:?}");
}

/// Two agents that know nothing of each other: what one has does not come from the other.
#[test]
fn a_registration_is_with_one_agent_and_moves_as_a_whole() {
    if !can_run(&Consul::NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let pod = mesh.network.pod("one");
    let (first, second) = (mesh.network.pod("first"), mesh.network.pod("second"));
    let (first, second) = (Consul::dev(&first, ""), Consul::dev(&second, ""));
    let _app = app(&pod, "one", 8080);
    let (address, next) = (first.address(), second.address());
    let flags = ["--port", "8080", "--publish", "true", "--consul-ttl", "3s"];
    let flags = [&flags[..], &["--consul", &address, "--consul", &next]].concat();
    let sidecar = sidecar(&mesh, &pod, "orders", &address, &flags);
    let at =
        |consul: &Consul<'_>| consul.ask("GET", "/v1/agent/services", None).unwrap() != serde_json::json!({});
    until("the first agent has it", || first.passing("orders").len() == 1);
    assert!(!at(&second));

    first.process().signal(Signal::SIGSTOP);
    until("the second agent has it", || second.passing("orders").len() == 1);
    first.process().signal(Signal::SIGCONT);
    until("the first one has it no more", || !at(&first));
    let words = || answers(&sidecar, &pod);
    let said = words();
    until("it has said its word some times", || {
        assert!(second.passing("orders").len() == 1 && !at(&first), "it went to and fro");
        words() > said + 3
    });

    sidecar.process.signal(Signal::SIGTERM);
    until("it has left the registry", || !at(&second));
}

#[test]
fn what_a_probe_asks_decides_who_is_called() {
    if !can_run(&Consul::NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let (asked, trusted) = (mesh.network.pod("asked"), mesh.network.pod("trusted"));
    let registry = mesh.network.pod("registry");
    let consul = Consul::dev(&registry, "");
    let folder = mesh.network.folder().join("pages");
    fs::create_dir(&folder).unwrap();
    let page = folder.join("well");
    fs::write(&page, "").unwrap();
    let pages = ["-m", "http.server", "8080", "--directory", &folder.display().to_string()];
    let mut app = asked.start("python3", &pages);
    let flags = |service, probe| {
        let flags = ["--port", "8080", "--instance", service, "--publish", "true", "--probe", probe];
        [&flags[..], &["--probe-interval", "200ms"]].concat()
    };
    let address = consul.address();
    let _asked = sidecar(&mesh, &asked, "asked", &address, &flags("asked", "http:/well"));
    until("it is well", || consul.passing("asked").len() == 1);
    fs::remove_file(&page).unwrap();
    until("a status of 404 is heard", || consul.passing("asked").is_empty());
    fs::write(&page, "").unwrap();
    until("it is well again", || consul.passing("asked").len() == 1);
    app.signal(Signal::SIGKILL);
    app.wait();
    until("an app that is gone is heard", || consul.passing("asked").is_empty());

    // Nobody listens there, and nobody asks.
    let _trusted = sidecar(&mesh, &trusted, "trusted", &address, &flags("trusted", "none"));
    until("it is called well", || consul.passing("trusted").len() == 1);
}

#[test]
fn who_leaves_is_out_and_stays_out_and_goes_on_serving() {
    if !can_run(&Consul::NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let (client, one) = (mesh.network.pod("client"), mesh.network.pod("one"));
    let registry = mesh.network.pod("registry");
    let consul = Consul::dev(&registry, "");
    let flags = ["--port", "8080", "--instance", "one", "--publish", "true", "--consul-ttl", "3s"];
    let orders = sidecar(&mesh, &one, "orders", &consul.address(), &flags);
    // Nobody can find it while its app is not there, and everybody once it is.
    assert_eq!(status(&one, "/registered"), "503");
    let _app = app(&one, "one", 8080);
    until("it says that it is registered", || status(&one, "/registered") == "200");
    assert_eq!(consul.passing("orders"), [format!("orders-one {}:8080", one.ipv4())]);
    let _web = sidecar(&mesh, &client, "web", &consul.address(), &[]);
    assert_eq!(get(&client, "http://orders/"), "200 one");

    let leave = || {
        let mut leave = one.command(program("weft-sidecar").display().to_string());
        leave.arg("leave").arg("--admin-socket").arg(orders.socket());
        assert!(output_of(leave).contains("true"));
    };
    leave();
    assert!(consul.passing("orders").is_empty(), "it is still in the registry");
    leave();
    // Longer than its word would take to come again.
    let end = Instant::now() + Duration::from_secs(4);
    while Instant::now() < end {
        assert!(consul.passing("orders").is_empty(), "it came back");
        pause();
    }
    let direct = format!("http://{}:8080/", one.ipv4());
    assert_eq!(get(&one, &direct), "200 one");
    assert_eq!(status(&one, "/ready"), "200");
}

#[test]
fn a_registry_that_is_away_stops_no_rollout() {
    if !can_run(&Consul::NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let (one, registry) = (mesh.network.pod("one"), mesh.network.pod("registry"));
    let mut consul = Consul::dev(&registry, "");
    let flags = ["--port", "8080", "--instance", "one", "--publish", "true", "--consul-ttl", "3s"];
    let _orders = sidecar(&mesh, &one, "orders", &consul.address(), &flags);
    consul.stop();
    let _app = app(&one, "one", 8080);
    assert_eq!(status(&one, "/registered"), "503");
    let took = time_until("it says yes all the same", Duration::from_secs(40), || {
        status(&one, "/registered") == "200"
    });
    assert!(took > Duration::from_secs(5), "at once: {took:?}");
}

/// What 15020 answers.
fn status(pod: &Pod, path: &str) -> String {
    let mut curl = pod.command("curl");
    curl.args(["-s", "-o", "/dev/null", "-w", "%{http_code}", "-m", "5"]);
    curl.arg(format!("http://{}:15020{path}", pod.ipv4()));
    output_of(curl)
}
