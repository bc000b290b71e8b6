//! A sidecar that dials more services than it may have blocking queries: all are found and followed, over few
//! connections.

use serde_json::json;
use weft_tests::{Consul, Mesh, can_run, until};

use super::world::{app, get, sidecar};

/// More than the 31 that are watched by blocking queries at a time.
const SERVICES: usize = 50;
/// What docs/consul.md promises, and a few for what does not block.
const MOST_CONNECTIONS: usize = 40;

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
