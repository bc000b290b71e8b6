//! Three servers and an agent: the leader dies under load, then all of Consul for a whole minute, and comes back
//! with nothing. No GET fails, nothing is restarted, the registrations return, and nobody comes in a herd.

use std::time::Duration;

use weft_tests::{Consul, Mesh, Pod, Process, Sidecar, can_run, until};

use super::{
    load::Load,
    questions::Questions,
    world::{Cluster, app, leader, sidecar, start_sidecar, time_until},
};

const SERVICES: [&str; 3] = ["cart", "orders", "stock"];
const INSTANCES: usize = 2;
/// How long all of Consul is away.
const OUTAGE: Duration = Duration::from_secs(60);
/// A registration is tried again every five seconds at least; then the servers must elect a leader.
const MOST_UNTIL_BACK: Duration = Duration::from_secs(40);
/// A watch that failed asks again after at most thirty seconds.
const MOST_UNTIL_WATCHED: Duration = Duration::from_secs(60);
/// How long what follows is watched.
const SETTLE: Duration = Duration::from_secs(10);
/// Questions of the sidecars within any second, for each of them. Where the dead leader is the server of the agent, all
/// that waits fails at once: seven for policies, each asked again with a look at the ACLs, and five for services. They
/// are asked again at random within some two seconds; more than 28 in one of them come once in a thousand runs.
const MOST_PER_SECOND: usize = 5;
/// What a sidecar says of a Consul that it misses, and of one that is back.
const MISSED: &str = "what is known stays in use";
const FOUND: &str = "answers again";

#[test]
fn neither_a_dead_leader_nor_a_lost_consul_costs_a_call() {
    if !can_run(&Questions::needs()) {
        return;
    }
    let mesh = Mesh::new();
    let servers: Vec<Pod> = ["s1", "s2", "s3"].map(|label| mesh.network.pod(label)).into();
    let (host, client) = (mesh.network.pod("host"), mesh.network.pod("client"));
    let mut cluster = Cluster::start(&servers, &host);
    let address = cluster.agent.address();

    let services: Vec<&str> = SERVICES.into_iter().flat_map(|service| [service; INSTANCES]).collect();
    let label = |(at, service): (usize, &&str)| mesh.network.pod(&format!("{service}-{at}"));
    let pods: Vec<Pod> = services.iter().enumerate().map(label).collect();
    let _apps: Vec<Process> = pods.iter().map(|pod| app(pod, "an-app", 8080)).collect();
    let flags = ["--port", "8080", "--publish", "true"];
    let mut sidecars: Vec<Sidecar> = services
        .iter()
        .zip(&pods)
        .map(|(service, pod)| start_sidecar(&mesh, pod, service, &address, &flags))
        .collect();
    sidecars.push(sidecar(&mesh, &client, "web", &address, &[]));
    let registered =
        |agent: &Consul<'_>| SERVICES.into_iter().all(|service| agent.passing(service).len() == INSTANCES);
    until("all are registered", || registered(&cluster.agent));
    // The app beside one of them calls the others too.
    let loads = [Load::start(&client, &SERVICES), Load::start(&pods[0], &SERVICES[1..])];
    let more = || loads.iter().for_each(|load| load.more(50));
    more();

    let questions = Questions::at(&host);
    let first = leader(&cluster.agent).expect("a leader");
    let at = servers.iter().position(|pod| pod.ipv4().to_string() == first).expect("it is one of them");
    cluster.servers[at].stop();
    until("another leads", || leader(&cluster.agent).is_some_and(|now| now != first));
    more();

    // Whoever missed the leader has found the next one: from here on each log tells of the loss alone.
    let times = |log: &str, words: &str| log.matches(words).count();
    until("nobody misses the leader", || {
        let logs = sidecars.iter().map(|sidecar| sidecar.process.log());
        logs.into_iter().all(|log| times(&log, MISSED) == times(&log, FOUND))
    });
    let before: Vec<usize> = sidecars.iter().map(|sidecar| sidecar.process.log().len()).collect();
    let told = |words: &str| {
        let logs =
            sidecars.iter().zip(&before).map(|(sidecar, from)| sidecar.process.log()[*from..].to_owned());
        logs.filter(|log| log.contains(words)).count()
    };

    // All of it goes, and its state.
    cluster.lose();
    let begin = tokio::time::Instant::now();
    time_until("the outage is over", OUTAGE * 2, || begin.elapsed() >= OUTAGE);
    assert!(told(MISSED) >= loads.len(), "it is missed");
    more();
    cluster.restart();
    let back = time_until("all are registered again", MOST_UNTIL_BACK, || registered(&cluster.agent));
    let watched = time_until("all watches go on", MOST_UNTIL_WATCHED, || told(FOUND) >= loads.len());
    let begin = tokio::time::Instant::now();
    time_until("everything has settled", SETTLE * 2, || begin.elapsed() >= SETTLE);
    more();

    let questions = questions.count();
    let (count, longest) = loads
        .iter()
        .map(Load::all_well)
        .fold((0, 0.0_f64), |(count, longest), one| (count + one.0, longest.max(one.1)));
    println!(
        "{count} GETs, none failed, the longest took {longest:.3} s; all {} registrations were back {back:.1?} after \
         the agent answered, the watches another {watched:.1?} later; questions of {} sidecars since the leader \
         was killed: {questions}",
        services.len(),
        sidecars.len()
    );
    assert!(questions.all > sidecars.len(), "too few to be true: {questions}");
    assert!(questions.busiest <= MOST_PER_SECOND * sidecars.len(), "a herd: {questions}");
    for sidecar in &mut sidecars {
        assert!(!sidecar.process.has_ended(), "a sidecar ended");
    }
}
