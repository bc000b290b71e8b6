//! Services that others registered are found, followed, and kept while Consul is away.

use std::collections::BTreeSet;

use serde_json::json;
use weft_tests::{Consul, Mesh, can_run, until};

use super::world::{app, endpoints, get, sidecar};

#[test]
fn a_service_is_found_followed_and_kept_while_consul_is_away() {
    if !can_run(&Consul::NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let (client, one, two) = (mesh.network.pod("client"), mesh.network.pod("one"), mesh.network.pod("two"));
    let registry = mesh.network.pod("registry");
    let mut consul = Consul::dev(&registry, "");
    let _one = app(&one, "one", 8080);
    let _two = app(&two, "two", 8080);
    consul.register("orders", "one", &one.ipv4().to_string(), 8080, json!({}));
    consul.register("orders_shop", "shop", &two.ipv4().to_string(), 8080, json!({}));
    let sidecar = sidecar(&mesh, &client, "web", &consul.address(), &["--upstream", "127.0.0.1:9000=orders"]);

    for url in ["orders", "orders.weft", "orders.default", "orders.service.consul", "127.0.0.1:9000"] {
        // Two labels without a suffix are asked for only where the service is known already.
        assert_eq!(get(&client, &format!("http://{url}/")), "200 one", "{url}");
    }
    assert_eq!(get(&client, "http://orders.shop.weft/"), "200 two");
    assert_eq!(get(&client, "http://orders_shop.service.consul/"), "200 two");

    // A new instance gets traffic; one that leaves gets no more.
    consul.register("orders", "two", &two.ipv4().to_string(), 8080, json!({}));
    let mut seen = BTreeSet::new();
    until("both instances answer", || {
        seen.insert(get(&client, "http://orders/"));
        seen.len() == 2
    });
    consul.deregister("one");
    until("the old instance is gone", || (0..5).all(|_| get(&client, "http://orders/") == "200 two"));

    // An instance that cannot be used is told, and harms nobody.
    consul.register("orders", "bad", &one.ipv4().to_string(), 0, json!({}));
    until("the log names it", || {
        sidecar.process.log().contains("instance `bad`")
            && sidecar.process.log().contains("`Service.Port` is 0")
    });
    assert_eq!(get(&client, "http://orders/"), "200 two");

    // Nobody registered it: a clear answer, which heals.
    assert_eq!(get(&client, "http://later.weft/"), "503 weft: not_registered");
    consul.register("later", "later", &one.ipv4().to_string(), 8080, json!({}));
    until("it is found", || get(&client, "http://later.weft/") == "200 one");

    consul.stop();
    for _ in 0..20 {
        assert_eq!(get(&client, "http://orders/"), "200 two");
    }
    assert_eq!(get(&client, "http://unknown.weft/"), "503 weft: registry_unavailable");
    until("the log says so once", || sidecar.process.log().contains("what is known stays in use"));

    // It comes back with nothing: what was known stays.
    consul.start();
    until("it is asked again", || sidecar.process.log().contains("answers again"));
    for _ in 0..20 {
        assert_eq!(get(&client, "http://orders/"), "200 two");
    }
}

#[test]
fn a_service_whose_identities_consul_lost_is_not_called_in_plaintext() {
    if !can_run(&Consul::NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let (client, one, two) = (mesh.network.pod("client"), mesh.network.pod("one"), mesh.network.pod("two"));
    let registry = mesh.network.pod("registry");
    let mut consul = Consul::dev(&registry, "");
    let _two = app(&two, "two", 8080);
    // Its check is critical until somebody says otherwise.
    let identity = json!({"weft-identity": weft_tests::identity("orders")});
    let critical = json!({"Meta": identity, "Check": {"TTL": "1h"}});
    consul.register("orders", "one", &one.ipv4().to_string(), 8080, critical);
    let sidecar = sidecar(&mesh, &client, "web", &consul.address(), &[]);
    assert_eq!(get(&client, "http://orders/"), "503 weft: no_endpoint");
    consul.stop();
    consul.wipe();
    consul.start();
    consul.register("orders", "two", &two.ipv4().to_string(), 8080, json!({}));
    let address = format!("{}:8080", two.ipv4());
    until("the new instance is known", || endpoints(&client, &sidecar).to_string().contains(&address));
    assert_eq!(get(&client, "http://orders/"), "503 weft: handshake");
}
