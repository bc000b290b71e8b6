//! Policies in Consul's key-value store: they apply without a restart, a bad one is refused, and none is lost.

use serde_json::json;
use weft_tests::{Consul, Mesh, can_run, until};

use super::world::{app, endpoints, get, sidecar};

#[test]
fn policies_are_followed_and_the_last_good_one_stays() {
    if !can_run(&Consul::NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let (client, server) = (mesh.network.pod("client"), mesh.network.pod("server"));
    let registry = mesh.network.pod("registry");
    let mut consul = Consul::dev(&registry, "");
    let _app = app(&server, "one", 8080);
    consul.register("orders", "one", &server.ipv4().to_string(), 8080, json!({}));
    consul.put("weft/policies/orders", "retries: {attempts: 7}");
    let web = sidecar(&mesh, &client, "web", &consul.address(), &[]);
    assert_eq!(get(&client, "http://orders/"), "200 one");
    let attempts = || endpoints(&client, &web)["orders"]["policy"]["retries"]["attempts"].clone();
    assert_eq!(attempts(), 7);
    consul.put("weft/policies/orders", "retries: {attempts: 4}");
    until("the change applies", || attempts() == 4);
    consul.put("weft/policies/orders", "retries: {attempts: 99}");
    until("the mistake is told", || {
        web.process.log().contains("consul:weft/policies/orders:1: `retries.attempts` is 99")
    });
    assert_eq!(attempts(), 4);

    // Strict for the workload itself: plaintext from outside is refused from then on.
    let web_app = app(&client, "web", 8081);
    let url = format!("http://{}:8081/", client.ipv4());
    assert_eq!(get(&server, &url), "200 web");
    consul.put("weft/policies/web", "mutual_tls: strict");
    until("plaintext is refused", || get(&server, &url) != "200 web");

    // Consul goes, and comes back with nothing: what holds, holds on.
    consul.stop();
    consul.start();
    until("the loss is told", || {
        web.process.log().contains("consul:weft/policies/web: is gone after an outage")
    });
    assert_eq!(attempts(), 4);
    assert_ne!(get(&server, &url), "200 web");
    consul.put("weft/policies/web", "mutual_tls: permissive");
    until("a new document counts", || get(&server, &url) == "200 web");
    drop(web_app);
}
