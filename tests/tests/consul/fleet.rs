//! Three servers and an agent, three services of four instances each: all register themselves, are found by name
//! and called. One that is killed costs no call and leaves the registry; a new one is called at once.

use std::{collections::BTreeSet, time::Duration};

use nix::sys::signal::Signal;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use weft_tests::{Consul, Mesh, Pod, Process, Sidecar, can_run, until};

use super::{
    load::Load,
    world::{Cluster, app, sidecar, start_sidecar, time_until},
};

const SERVICES: [&str; 3] = ["cart", "orders", "stock"];
const INSTANCES: usize = 4;
const TTL: Duration = Duration::from_secs(6);
/// Consul passes the news on, on a machine that is busy with other tests.
const SLACK: Duration = Duration::from_secs(5);
/// A new instance has its first call within a second, in seconds; more where other tests run too.
const MOST_UNTIL_CALLED: f64 = 5.0;

/// A workload: its app, and its sidecar.
struct Workload {
    app: Process,
    sidecar: Sidecar,
}

fn start(mesh: &Mesh, pod: &Pod, service: &str, instance: &str, agent: &Consul<'_>) -> Workload {
    let app = app(pod, instance, 8080);
    let ttl = format!("{}s", TTL.as_secs());
    let flags = ["--port", "8080", "--instance", instance, "--publish", "true", "--consul-ttl", &ttl];
    Workload { app, sidecar: start_sidecar(mesh, pod, service, &agent.address(), &flags) }
}

/// When the agent took the registration, by the clock of the machine.
fn registered_at(sidecar: &Sidecar) -> f64 {
    let log = sidecar.process.log();
    let line = log.lines().find(|line| line.contains("registered in Consul")).expect("it is registered");
    let time = line.split_whitespace().next().unwrap_or_default();
    let time = OffsetDateTime::parse(time, &Rfc3339).expect("a line begins with its time");
    time.unix_timestamp_nanos() as f64 / 1e9
}

#[test]
fn a_fleet_is_found_called_and_followed() {
    if !can_run(&Consul::NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let servers: Vec<Pod> = ["s1", "s2", "s3"].map(|label| mesh.network.pod(label)).into();
    let (host, client) = (mesh.network.pod("host"), mesh.network.pod("client"));
    let cluster = Cluster::start(&servers, &host);
    let agent = &cluster.agent;
    let web = sidecar(&mesh, &client, "web", &agent.address(), &[]);

    let names: Vec<(&str, String)> = SERVICES
        .into_iter()
        .flat_map(|service| (1..=INSTANCES).map(move |at| (service, format!("{service}-{at}"))))
        .collect();
    let pods: Vec<Pod> = names.iter().map(|(_, instance)| mesh.network.pod(instance)).collect();
    let mut workloads: Vec<Workload> = names
        .iter()
        .zip(&pods)
        .map(|((service, instance), pod)| start(&mesh, pod, service, instance, agent))
        .collect();
    for service in SERVICES {
        until("all instances are registered", || agent.passing(service).len() == INSTANCES);
    }
    let load = Load::start(&client, &SERVICES);
    until("all instances answer", || {
        let seen: BTreeSet<String> = load.answers().into_iter().map(|answer| answer.said).collect();
        names.iter().all(|(_, instance)| seen.contains(&format!("200 {instance}")))
    });

    // The one that is called most is killed, its app with it.
    load.more(200);
    let busiest = load.busiest();
    let at = names.iter().position(|(_, instance)| *instance == busiest).expect("one of them");
    let service = names[at].0;
    let mut killed = workloads.swap_remove(at);
    killed.sidecar.process.signal(Signal::SIGKILL);
    killed.app.signal(Signal::SIGKILL);
    killed.sidecar.process.wait();
    killed.app.wait();
    let gone =
        time_until("it is out of the registry", TTL + SLACK, || agent.passing(service).len() < INSTANCES);
    load.more(100);

    // A new one.
    let pod = mesh.network.pod("cart-new");
    let new = start(&mesh, &pod, "cart", "cart-new", agent);
    let mut called = None;
    until("the new one is called", || {
        called = load.answers().into_iter().find(|answer| answer.said == "200 cart-new");
        called.is_some()
    });
    let called = called.map(|answer| answer.at).unwrap_or_default() - registered_at(&new.sidecar);
    let (count, longest) = load.all_well();
    println!("{:#?}", load.tally());
    println!(
        "{count} GETs, none failed, the longest took {longest:.3} s; {busiest}, which was killed, was out after {gone:.1?} \
         (time to live {TTL:?}); the new one was called {called:.3} s after its registration"
    );
    assert!(called <= MOST_UNTIL_CALLED, "called only {called:.3} s after its registration");
    let calls = web.metrics(&client);
    assert!(calls.contains("weft_registry_requests_total{result=\"ok\"}"), "{calls}");
}
