//! The agent of a host is cut off from the servers, which take its node for dead, and with it all that registered
//! there. What runs on the host goes on, and so do those elsewhere that call it.

use std::time::Duration;

use weft_tests::{Mesh, Pod, Process, Sidecar, can_run, until};

use super::{
    load::Load,
    questions::Questions,
    world::{Cluster, app, sidecar, start_sidecar, time_until},
};

const SERVICES: [&str; 2] = ["cart", "orders"];
const INSTANCES: usize = 2;
/// How long the agent stays cut off after its node is out.
const OUT: Duration = Duration::from_secs(20);
/// How long what follows its return is watched.
const SETTLE: Duration = Duration::from_secs(10);
/// A node that is reached again is believed after some seconds.
const MOST_UNTIL: Duration = Duration::from_secs(60);
/// Questions of the sidecars at this agent within any second, for each of them.
const MOST_PER_SECOND: usize = 4;

/// Cuts a pod off from others, or heals it (`-D`).
fn cut(pod: &Pod, others: &[Pod], flag: &str) {
    for other in others {
        let address = other.ipv4();
        pod.shell(&format!(
            "iptables -w {flag} INPUT -s {address} -j DROP; iptables -w {flag} OUTPUT -d {address} -j DROP"
        ));
    }
}

#[test]
fn an_agent_without_its_servers_costs_no_call() {
    if !can_run(&Questions::needs()) {
        return;
    }
    let mesh = Mesh::new();
    let servers: Vec<Pod> = ["s1", "s2", "s3"].map(|label| mesh.network.pod(label)).into();
    let (host, near, far) = (mesh.network.pod("host"), mesh.network.pod("near"), mesh.network.pod("far"));
    let cluster = Cluster::start(&servers, &host);
    let (agent, server) = (&cluster.agent, &cluster.servers[0]);

    let services: Vec<&str> = SERVICES.into_iter().flat_map(|service| [service; INSTANCES]).collect();
    let label = |(at, service): (usize, &&str)| mesh.network.pod(&format!("{service}-{at}"));
    let pods: Vec<Pod> = services.iter().enumerate().map(label).collect();
    let _apps: Vec<Process> = pods.iter().map(|pod| app(pod, "an-app", 8080)).collect();
    let flags = ["--port", "8080", "--publish", "true"];
    let mut sidecars: Vec<Sidecar> = services
        .iter()
        .zip(&pods)
        .map(|(service, pod)| start_sidecar(&mesh, pod, service, &agent.address(), &flags))
        .collect();
    // One asks the agent that is cut off, one asks a server.
    sidecars.push(sidecar(&mesh, &near, "web", &agent.address(), &[]));
    sidecars.push(sidecar(&mesh, &far, "far", &server.address(), &[]));
    let registered = || SERVICES.into_iter().all(|service| server.passing(service).len() == INSTANCES);
    until("all are registered", registered);
    let loads = [Load::start(&near, &SERVICES), Load::start(&far, &SERVICES)];
    let more = || loads.iter().for_each(|load| load.more(50));
    more();

    let questions = Questions::at(&host);
    cut(&host, &servers, "-A");
    let out = time_until("the servers take the node for dead", MOST_UNTIL, || {
        SERVICES.into_iter().all(|service| server.passing(service).is_empty())
    });
    let begin = tokio::time::Instant::now();
    time_until("it has lasted long enough", OUT * 2, || begin.elapsed() >= OUT);
    more();
    cut(&host, &servers, "-D");
    let back = time_until("all are seen again", MOST_UNTIL, registered);
    let begin = tokio::time::Instant::now();
    time_until("everything has settled", OUT * 2, || begin.elapsed() >= SETTLE);
    more();

    let questions = questions.count();
    let (count, longest) = loads
        .iter()
        .map(Load::all_well)
        .fold((0, 0.0_f64), |(count, longest), one| (count + one.0, longest.max(one.1)));
    println!(
        "{count} GETs, none failed, the longest took {longest:.3} s; the node was out {out:.1?} after the cut and back \
         {back:.1?} after its end; questions at the agent since the cut: {questions}"
    );
    let askers = sidecars.len() - 1;
    assert!(questions.all > askers, "too few to be true: {questions}");
    assert!(questions.busiest <= MOST_PER_SECOND * askers, "a herd: {questions}");
    for sidecar in &mut sidecars {
        assert!(!sidecar.process.has_ended(), "a sidecar ended");
        let registrations = sidecar.process.log().matches("registered in Consul").count();
        assert!(registrations <= 1, "a registration was lost");
    }
}
