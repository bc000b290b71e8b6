//! Many sidecars, many services, many endpoints: one sidecar that dials more services than it may have blocking queries,
//! ten of them on one agent at its default limits, and a registry that holds far more than is dialled. What this
//! costs is measured by `tests/bench/registry`.

use std::fs;

use serde_json::{Value, json};
use weft_tests::{Consul, Mesh, Network, Pod, Process, Sidecar, can_run, output_of, program, until};

use super::world::{app, get, sidecar};

/// More than the 31 that are watched by blocking queries at a time.
const SERVICES: usize = 50;
/// What docs/consul.md promises, and a few for what does not block.
const MOST_CONNECTIONS: usize = 40;
/// On one agent, which takes 200 connections of one address.
const SIDECARS: usize = 10;
/// Of the registry that holds far more than is dialled.
const REGISTERED: usize = 5_000;
const DIALLED: usize = 10;
/// How much more memory a sidecar may have there; knowing all of them takes some 4 MB.
const MORE_KIB: u64 = 1024;
/// Operations that Consul takes in one transaction.
const TRANSACTION: usize = 64;
/// Endpoints of one service.
const ENDPOINTS: usize = 10_000;

#[test]
fn more_services_than_blocking_queries_are_all_followed() {
    if !can_run(&Consul::NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let (client, one, two) = (mesh.network.pod("client"), mesh.network.pod("one"), mesh.network.pod("two"));
    let registry = mesh.network.pod("registry");
    let consul = Consul::dev(&registry, "");
    let (_one, _two) = (app(&one, "one", 8080), app(&two, "two", 8080));
    let register = |number: usize, address: &str| {
        let name = format!("s{number}");
        consul.register(&name, &name, address, 8080, json!({}));
    };
    (0..SERVICES).for_each(|number| register(number, &one.ipv4().to_string()));
    let web = sidecar(&mesh, &client, "web", &consul.address(), &[]);
    let url = |number: usize| format!("http://s{number}.weft/");
    for number in 0..SERVICES {
        assert_eq!(get(&client, &url(number)), "200 one", "s{number}");
    }
    let connections = client.shell(&format!("ss -Htn state established dst {}:8500", registry.ipv4()));
    let open = connections.lines().count();
    assert!(open <= MOST_CONNECTIONS, "{open} connections to Consul");
    // Every one of them moves, those too that have no blocking query of their own.
    (0..SERVICES).for_each(|number| register(number, &two.ipv4().to_string()));
    for number in 0..SERVICES {
        until("the change is seen", || get(&client, &url(number)) == "200 two");
    }
    let refused = "weft_registry_requests_total{result=\"unreachable\"}";
    assert!(!web.metrics(&client).contains(refused), "Consul refused connections");
}

#[test]
fn ten_sidecars_share_one_agent_at_its_default_limits() {
    if !can_run(&Consul::NEEDS) {
        return;
    }
    let network = Network::new();
    let host = network.pod("host");
    let consul = Consul::dev(&host, "");
    let (_one, _two) = (app(&host, "one", 8080), app(&host, "two", 8081));
    let instances = |port| (0..SERVICES).map(move |at| (format!("s{at}"), "1".to_owned(), "127.0.0.1", port));
    register(&consul, instances(8080));
    let _sidecars: Vec<Process> = (0..SIDECARS).map(|number| beside(&network, &host, number)).collect();
    (0..SIDECARS)
        .for_each(|number| until("it calls all services", || calls(&host, number) == "one".repeat(SERVICES)));
    let connections = host.shell("ss -Htn state established dst 127.0.0.1:8500");
    let open = connections.lines().count();
    assert!(open < 200, "{open} connections to Consul");
    register(&consul, instances(8081));
    for number in 0..SIDECARS {
        until("the change is seen", || calls(&host, number) == "two".repeat(SERVICES));
        let metrics = host.shell(&format!("curl -s -f -m 5 127.0.0.1:{}/metrics", 23000 + number));
        let refused = "weft_registry_requests_total{result=\"unreachable\"}";
        assert!(!metrics.contains(refused), "Consul refused connections");
    }
}

#[test]
fn a_sidecar_that_dials_few_of_many_services_knows_only_those() {
    if !can_run(&Consul::NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let (before, after) = (mesh.network.pod("before"), mesh.network.pod("after"));
    let (server, registry) = (mesh.network.pod("server"), mesh.network.pod("registry"));
    let consul = Consul::dev(&registry, "");
    let _app = app(&server, "app", 8080);
    let address = server.ipv4().to_string();
    let instances = |numbers: std::ops::Range<usize>| {
        numbers.map(|at| (format!("s{at}"), "1".to_owned(), address.as_str(), 8080))
    };
    register(&consul, instances(0..DIALLED));
    let dial = |pod: &Pod, name: &str| {
        let sidecar = sidecar(&mesh, pod, name, &consul.address(), &[]);
        for number in 0..DIALLED {
            assert_eq!(get(pod, &format!("http://s{number}.weft/")), "200 app", "s{number}");
        }
        sidecar
    };
    let in_few = dial(&before, "in-few");
    let (memory_in_few, bytes_in_few) = (memory_kib(&in_few), bytes_from(&before, &registry));
    register(&consul, instances(DIALLED..REGISTERED));
    let all = consul.ask("GET", "/v1/catalog/services", None).unwrap_or_default();
    assert!(all.as_object().is_some_and(|all| all.len() > REGISTERED), "the services are not registered");
    let in_many = dial(&after, "in-many");
    let (memory_in_many, bytes_in_many) = (memory_kib(&in_many), bytes_from(&after, &registry));
    println!(
        "memory: {memory_in_few} KiB where {DIALLED} are registered, {memory_in_many} KiB where {REGISTERED} are"
    );
    println!("from Consul: {bytes_in_few} and {bytes_in_many} bytes");
    assert!(memory_in_many < memory_in_few + MORE_KIB, "{memory_in_many} KiB instead of {memory_in_few}");
    assert!(bytes_in_many < bytes_in_few * 3 / 2, "{bytes_in_many} bytes instead of {bytes_in_few}");
    // Nor did it wake the one that was there before.
    let bytes_before = bytes_from(&before, &registry);
    assert!(
        bytes_before < bytes_in_few * 2,
        "{bytes_before} bytes, {bytes_in_few} of them for what is dialled"
    );
}

#[test]
fn a_service_may_have_ten_thousand_endpoints() {
    if !can_run(&Consul::NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let (client, registry) = (mesh.network.pod("client"), mesh.network.pod("registry"));
    let (one, two) = (mesh.network.pod("one"), mesh.network.pod("two"));
    let consul = Consul::dev(&registry, "");
    // All of 127.0.0.0/8 is the sidecar's own host; so each endpoint is a port that leads to one of two apps.
    let (_one, _two) = (app(&one, "one", 80), app(&two, "two", 80));
    for (pod, protocol) in [(&one, "iptables"), (&two, "iptables")] {
        pod.shell(&format!(
            "{protocol} -t nat -A PREROUTING -p tcp --dport 10000:29999 -j REDIRECT --to-ports 80"
        ));
    }
    let all = |pod: &Pod| {
        let address = pod.ipv4().to_string();
        let instances = (0..ENDPOINTS).map(move |at| (at.to_string(), 10_000 + at as u16));
        instances.map(move |(id, port)| ("big".to_owned(), id, address.clone(), port)).collect::<Vec<_>>()
    };
    let set = |pod: &Pod| {
        let all = all(pod);
        register(
            &consul,
            all.iter().map(|(name, id, address, port)| (name.clone(), id.clone(), address.as_str(), *port)),
        );
    };
    set(&one);
    let web = sidecar(&mesh, &client, "web", &consul.address(), &[]);
    assert_eq!(get(&client, "http://big/"), "200 one");
    let count = format!("weft_endpoints{{service=\"big\",state=\"ready\"}} {ENDPOINTS}");
    until("all endpoints are counted", || web.metrics(&client).contains(&count));
    set(&two);
    until("all endpoints have moved", || (0..20).all(|_| get(&client, "http://big/") == "200 two"));
}

/// Registers instances (service, id, address, port), many at a time.
fn register<'a>(consul: &Consul<'_>, instances: impl Iterator<Item = (String, String, &'a str, u16)>) {
    let node = json!({"Node": "apps", "Address": "127.0.0.1"});
    consul.ask("PUT", "/v1/catalog/register", Some(&node)).expect("a node");
    let operation = |(service, id, address, port): (String, String, &str, u16)| {
        let id = format!("{service}-{id}");
        let service = json!({"Service": service, "ID": id, "Address": address, "Port": port});
        json!({"Service": {"Verb": "set", "Node": "apps", "Service": service}})
    };
    let operations: Vec<Value> = instances.map(operation).collect();
    for some in operations.chunks(TRANSACTION) {
        consul.ask("PUT", "/v1/txn", Some(&json!(some))).expect("Consul takes the transaction");
    }
}

/// One of several sidecars on a host, without redirect: an address of loopback for each, a port for each service.
fn beside(network: &Network, host: &Pod, number: usize) -> Process {
    let socket = network.folder().join(format!("{number}.sock")).display().to_string();
    let mut run = host.command(program("weft-sidecar"));
    run.args(["run", "--service", &format!("web-{number}"), "--publish", "false", "--admin-socket", &socket]);
    run.args(["--consul", "127.0.0.1:8500", "--advertise", &host.ipv4().to_string()]);
    for (flag, port) in [("--outbound-port", 20000), ("--inbound-port", 21000), ("--dns-port", 22000)] {
        run.args([flag, &(port + number).to_string()]);
    }
    run.args(["--admin", &format!("127.0.0.1:{}", 23000 + number)]);
    for service in 0..SERVICES {
        run.args(["--upstream", &format!("127.0.1.{}:{}=s{service}", number + 1, 24000 + service)]);
    }
    Process::start(&format!("sidecar {number}"), run)
}

/// What all services answer, one after the other, through this sidecar.
fn calls(host: &Pod, number: usize) -> String {
    let mut curl = host.command("curl");
    curl.args(["-s", "-m", "20"]);
    curl.args((0..SERVICES).map(|service| format!("http://127.0.1.{}:{}/", number + 1, 24000 + service)));
    String::from_utf8_lossy(&curl.output().expect("curl").stdout).into_owned()
}

/// What a sidecar has allocated; the program itself, which is mapped, does not count.
fn memory_kib(sidecar: &Sidecar) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", sidecar.process.id())).expect("its status");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("RssAnon");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// What came from Consul over the connections that a pod has to it now.
fn bytes_from(pod: &Pod, registry: &Pod) -> u64 {
    let mut ss = pod.command("ss");
    ss.args(["-Htin", "state", "established", "dst", &format!("{}:8500", registry.ipv4())]);
    let text = output_of(ss);
    let counts = text.split_whitespace().filter_map(|word| word.strip_prefix("bytes_received:"));
    counts.filter_map(|count| count.parse::<u64>().ok()).sum()
}
