//! Three servers and an agent, three services of four instances each: all register themselves, are found by name
//! and called. One that is killed costs no call and leaves the registry; a new one is called at once.

use std::{collections::BTreeSet, time::Duration};

use nix::sys::signal::Signal;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use weft_tests::{Consul, Mesh, Pod, Process, Sidecar, can_run, until};

use super::{
    load::Load,
    world::{Cluster, app, sidecar, start_sidecar},
};

const SERVICES: [&str; 3] = ["cart", "orders", "stock"];
const INSTANCES: usize = 4;
const TTL: Duration = Duration::from_secs(6);
/// What an instance said last it said before it was killed, so its time to live is over within that time of it. The
/// agent's timer, its way to the servers and their disks may take a moment more.
const MOST_UNTIL_OUT: f64 = 6.0 + 1.0;
/// From the registration of a new instance to its first call, in seconds; of three the middle one, for the machine may
/// be busy with other tests.
const MOST_UNTIL_CALLED: f64 = 1.0;

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

/// When a line with these words was logged for the last time, in seconds of the machine's clock.
fn logged_at(process: &Process, words: &str) -> Option<f64> {
    let log = process.log();
    let line = log.lines().rfind(|line| line.contains(words))?;
    let time = line.split_whitespace().next().unwrap_or_default();
    Some(seconds(OffsetDateTime::parse(time, &Rfc3339).expect("a line begins with its time")))
}

fn seconds(time: OffsetDateTime) -> f64 {
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
    let kill = seconds(OffsetDateTime::now_utc());
    killed.sidecar.process.signal(Signal::SIGKILL);
    killed.app.signal(Signal::SIGKILL);
    killed.sidecar.process.wait();
    killed.app.wait();
    until("it is out of the registry", || agent.passing(service).len() < INSTANCES);
    // By the agent's clock: when the servers had it from the agent.
    let synced = format!("Synced check: check=service:{service}-{busiest}");
    let mut gone = None;
    until("the agent says so", || {
        gone = logged_at(agent.process(), &synced).map(|at| at - kill).filter(|gone| *gone > 0.0);
        gone.is_some()
    });
    let gone = gone.unwrap_or_default();
    load.more(100);

    // New ones, and so many calls of their service that each soon has its turn.
    let calls = Load::start(&client, &["cart"]);
    let new = ["new-1", "new-2", "new-3"].map(|instance| (instance, mesh.network.pod(instance)));
    let mut called = new.each_ref().map(|(instance, pod)| {
        workloads.push(start(&mesh, pod, "cart", instance, agent));
        let mut first = None;
        until("the new one is called", || {
            first = calls.answers().into_iter().find(|answer| answer.said == format!("200 {instance}"));
            first.is_some()
        });
        let process = &workloads[workloads.len() - 1].sidecar.process;
        let registered = logged_at(process, "registered in Consul").expect("it is registered");
        first.map_or(0.0, |answer| answer.at - registered)
    });
    called.sort_by(f64::total_cmp);
    let ((count, longest), (more, _)) = (load.all_well(), calls.all_well());
    println!("{:#?}", load.tally());
    println!(
        "{} GETs, none failed, the longest took {longest:.3} s; {busiest}, which was killed, was out after {gone:.3} s \
         (time to live {TTL:?}); new ones were called {called:.3?} s after their registration",
        count + more
    );
    assert!(gone <= MOST_UNTIL_OUT, "out of the registry {gone:.3} s after it was killed");
    assert!(called[1] <= MOST_UNTIL_CALLED, "called only {called:.3?} s after their registration");
    let metrics = web.metrics(&client);
    assert!(metrics.contains("weft_registry_requests_total{result=\"ok\"}"), "{metrics}");
}
