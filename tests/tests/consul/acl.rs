//! ACLs that deny by default: the policies of docs/consul.md suffice, and a token that lacks something is told
//! what, while what is known stays in use.

use std::{fs, path::Path};

use serde_json::json;
use weft_tests::{Consul, Mesh, can_run, until};

use super::world::{self, app, endpoints, get, sidecar};

/// The policy that docs/consul.md gives to sidecars that only read.
fn documented(heading: &str) -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/consul.md");
    let text = fs::read_to_string(file).expect("docs/consul.md");
    let (_, section) = text.split_once(heading).expect("the heading");
    let (_, rest) = section.split_once("```hcl\n").expect("a policy");
    rest.split_once("```").expect("its end").0.to_owned()
}

#[test]
fn the_documented_policy_suffices_and_a_wrong_token_is_told() {
    if !can_run(&Consul::NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let (client, server) = (mesh.network.pod("client"), mesh.network.pod("server"));
    let registry = mesh.network.pod("registry");
    let consul = Consul::with_acls(&registry);
    let _app = app(&server, "one", 8080);
    consul.register("orders", "one", &server.ipv4().to_string(), 8080, json!({}));
    consul.put("weft/policies/orders", "retries: {attempts: 7}");
    let reading = consul.token("weft-sidecar", &documented("### A sidecar that reads"));
    let other = consul.token("other", "node_prefix \"\" { policy = \"read\" }");
    let file = mesh.network.folder().join("token");
    let write = |token: &str| {
        let aside = file.with_extension("new");
        fs::write(&aside, token).expect("the token");
        fs::rename(&aside, &file).expect("its place");
    };
    write(&reading);
    let token_file = file.display().to_string();
    let flags = ["--consul-token-file", &token_file];
    let sidecar = sidecar(&mesh, &client, "web", &consul.address(), &flags);
    assert_eq!(get(&client, "http://orders/"), "200 one");
    assert_eq!(endpoints(&client, &sidecar)["orders"]["policy"]["retries"]["attempts"], 7);

    // Who may only read cannot register, and is told why; who may write the own service can.
    let own = mesh.network.folder().join("own-token");
    fs::write(&own, &reading).expect("the token");
    let own_file = own.display().to_string();
    let cart_pod = mesh.network.pod("cart");
    let _cart_app = app(&cart_pod, "cart", 8080);
    let flags = ["--consul-token-file", &own_file, "--port", "8080", "--publish", "true"];
    let cart = world::sidecar(&mesh, &cart_pod, "cart", &consul.address(), &flags);
    until("the log says what is missing", || {
        cart.process.log().contains("the token needs service:write on `cart`")
    });
    let rules = documented("### A sidecar that registers").replace("orders", "cart");
    let writing = consul.token("weft-cart", &rules);
    fs::write(&own, &writing).expect("the token");
    until("it is registered", || consul.passing("cart").len() == 1);

    // A token that does not exist: Consul refuses it. What is known stays.
    write("00000000-0000-4000-8000-000000000000");
    consul.register("orders", "one", &server.ipv4().to_string(), 8080, json!({"Tags": ["changed"]}));
    let permission = "the token needs service:read on `orders` and node:read";
    until("the log says what is missing", || sidecar.process.log().contains(permission));
    assert_eq!(get(&client, "http://orders/"), "200 one");

    // A token that may not read services: Consul answers with an empty list, which is not believed.
    write(&other);
    until("the log says what is hidden", || {
        sidecar.process.log().contains("hides it; the token needs service:read")
    });
    assert_eq!(get(&client, "http://orders/"), "200 one");
    assert_eq!(get(&client, "http://others.weft/"), "503 weft: registry_unavailable");

    // The right one again, without a restart.
    write(&reading);
    until("it is believed again", || get(&client, "http://others.weft/") == "503 weft: not_registered");
    assert!(!sidecar.process.log().contains(&reading), "the token stands in the log");
}
