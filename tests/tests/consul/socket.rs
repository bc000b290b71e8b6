//! An agent at a Unix socket: asked and registered with there, as over TCP, with tags and version.

use serde_json::json;
use weft_tests::{Consul, Mesh, can_run, until};

use super::world::{app, get, sidecar};

#[test]
fn an_agent_at_a_unix_socket_serves_as_well() {
    if !can_run(&Consul::NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let (client, server) = (mesh.network.pod("client"), mesh.network.pod("server"));
    let registry = mesh.network.pod("registry");
    let path = mesh.network.folder().join("consul.sock");
    let address = format!("unix://{}", path.display());
    let settings =
        format!("addresses {{ http = \"127.0.0.1 {address}\" }} unix_sockets {{ mode = \"0777\" }}");
    let mut consul = Consul::dev(&registry, &settings);
    let _app = app(&server, "one", 8080);
    let flags = ["--port", "8080", "--publish", "true", "--instance", "a", "--app-version", "1.2"];
    let tags = ["--tag", "blue", "--tag", "of the shop"];
    let _orders = sidecar(&mesh, &server, "orders", &address, &[&flags[..], &tags[..]].concat());
    let registered =
        |consul: &Consul<'_>| consul.passing("orders") == [format!("orders-a {}:8080", server.ipv4())];
    until("it is registered", || registered(&consul));
    let service = consul.ask("GET", "/v1/health/service/orders", None).unwrap()[0]["Service"].clone();
    assert_eq!(service["Tags"], json!(["blue", "of the shop"]));
    assert_eq!(service["Meta"]["weft-version"], "1.2");

    let web = sidecar(&mesh, &client, "web", &address, &[]);
    assert_eq!(get(&client, "http://orders/"), "200 one");
    consul.stop();
    until("the log says where", || web.process.log().contains(&format!("Consul at {address}: ")));
    assert_eq!(get(&client, "http://orders/"), "200 one");
    consul.start();
    until("it is registered again", || registered(&consul));
    until("the log says that it is back", || web.process.log().contains("answers again"));
    assert_eq!(get(&client, "http://orders/"), "200 one");
}
