//! Three servers and an agent: the leader dies under load, then all of Consul, which comes back with nothing. No GET
//! fails, nothing is restarted, and the registrations return.

use std::collections::BTreeMap;

use weft_tests::{Consul, Mesh, Pod, Process, Sidecar, can_run, pause, until};

use super::world::{app, get, sidecar};

/// An endless row of GETs, one line of status each.
fn load(pod: &Pod, url: &str) -> Process {
    let line = format!(
        "while :; do curl -s -o /dev/null -m 5 -w '%{{http_code}}\\n' {url} || true; sleep 0.02; done"
    );
    pod.start("sh", &["-c", &line])
}

/// All answers so far, by status.
fn answers(load: &Process) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    load.log().lines().for_each(|line| *counts.entry(line.to_owned()).or_default() += 1);
    counts
}

fn leader(agent: &Consul<'_>) -> Option<String> {
    let leader = agent.ask("GET", "/v1/status/leader", None)?;
    leader.as_str()?.split_once(':').map(|(address, _)| address.to_owned())
}

#[test]
fn neither_a_dead_leader_nor_a_lost_consul_costs_a_call() {
    if !can_run(&Consul::NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let pods: Vec<Pod> = ["s1", "s2", "s3"].map(|label| mesh.network.pod(label)).into();
    let servers: Vec<&Pod> = pods.iter().collect();
    let mut cluster: Vec<Consul<'_>> = servers.iter().map(|pod| Consul::server(pod, &servers, "")).collect();
    let host = mesh.network.pod("host");
    let mut agent = Consul::agent(&host, &servers, "log_level = \"debug\"");
    until("there is a leader", || leader(&agent).is_some());

    let client = mesh.network.pod("client");
    let workloads: Vec<Pod> = ["one", "two"].map(|label| mesh.network.pod(label)).into();
    let _apps: Vec<Process> = workloads.iter().map(|pod| app(pod, "an app", 8080)).collect();
    let flags = ["--port", "8080", "--publish", "true", "--consul-ttl", "6s"];
    let _sidecars: Vec<Sidecar> =
        workloads.iter().map(|pod| sidecar(&mesh, pod, "orders", &agent.address(), &flags)).collect();
    let web = sidecar(&mesh, &client, "web", &agent.address(), &[]);
    until("both are registered", || agent.passing("orders").len() == 2);
    assert_eq!(get(&client, "http://orders/"), "200 an app");
    let load = load(&client, "http://orders/");
    let more = |count: usize| {
        let before = load.log().len();
        until("more calls are made", || load.log().len() > before + count * 4);
    };
    more(20);

    let first = leader(&agent).expect("a leader");
    let at =
        servers.iter().position(|pod| pod.ipv4().to_string() == first).expect("the leader is one of them");
    cluster[at].stop();
    until("another leads", || leader(&agent).is_some_and(|now| now != first));
    more(20);

    // All of it goes, and its state.
    cluster.iter_mut().for_each(Consul::stop);
    agent.stop();
    more(100);
    until("it is missed", || web.process.log().contains("what is known stays in use"));
    for consul in cluster.iter_mut().chain([&mut agent]) {
        consul.wipe();
    }
    cluster.iter_mut().for_each(Consul::start);
    agent.start();
    until("there is a leader again", || leader(&agent).is_some());
    until("both are registered again", || agent.passing("orders").len() == 2);
    until("the watch goes on", || web.process.log().contains("answers again"));
    more(50);
    pause();
    let answers = answers(&load);
    assert_eq!(answers.keys().collect::<Vec<_>>(), ["200"], "{answers:?}");
    // What came in the busiest second after its return: 3 sidecars with one watched service each.
    let busiest = busiest_second(&agent.process().log());
    println!("{answers:?}; requests at the agent in its busiest second: {busiest}");
}

/// The most requests from outside the agent's pod that it finished within a second of its clock.
fn busiest_second(log: &str) -> usize {
    let mut seconds: BTreeMap<&str, usize> = BTreeMap::new();
    for line in
        log.lines().filter(|line| line.contains("Request finished") && !line.contains("from=127.0.0.1"))
    {
        let time = line.trim_start().get(..19).unwrap_or_default();
        *seconds.entry(time).or_default() += 1;
    }
    seconds.values().copied().max().unwrap_or_default()
}
