//! What callers may claim: nothing, unless they are sidecars that proved who they are; and where an app is talked
//! into calling an address outside, it borrows nothing of ours.

use weft_tests::{Forged, Forger, Mesh, can_run, identity};

use super::scene::{NEEDS, Scene, curl, peer, start_app};

#[test]
fn a_host_header_that_names_a_service_lends_no_identity_to_a_foreign_address() {
    if !can_run(&NEEDS) {
        return;
    }
    let scene = Scene::new(Mesh::new(), &[]);
    let client = scene.mesh.network.pod("client");
    let foreign = start_app(&scene.stranger, &[&format!("{}:8080", scene.stranger.ipv4())]);
    scene.mesh.wait_until_published("orders");
    let sidecar = scene.mesh.sidecar(&client, "web", &[]);
    let address = format!("http://{}:8080/foreign", scene.stranger.ipv4());
    let seen = curl(&client, &["-H", "Host: orders", "-H", "X-Mine: as sent", &address]);
    assert!(seen.contains("200 OK"), "{seen}");
    let heard = foreign.log();
    assert!(heard.contains(r#"heard "GET /foreign HTTP/1.1\r\nHost: orders\r\n"#), "{heard}");
    assert!(heard.contains("X-Mine: as sent") && !heard.to_lowercase().contains("x-weft"), "{heard}");
    assert!(!heard.contains("traceparent"), "an outside address is passed through untouched: {heard}");
    assert_eq!(scene.accepted(), 0, "{}", scene.app.log());
    drop(sidecar);
}

#[test]
fn x_weft_headers_of_apps_and_strangers_are_removed_and_not_believed() {
    if !can_run(&NEEDS) {
        return;
    }
    let scene = Scene::new(Mesh::new(), &[]);
    let client = scene.mesh.network.pod("client");
    scene.mesh.wait_until_published("orders");
    let _sidecar = scene.mesh.sidecar(&client, "web", &[]);
    // The app answers /late after longer than a millisecond, and speaks no HTTP/2.
    let claims = ["-H", "x-weft-deadline: 1", "-H", "X-Weft-Protocol: h2", "-H", "x-weft-anything: else"];
    let direct = format!("http://{}/late", scene.address(8080));
    for (pod, url) in [(&client, "http://orders/late"), (&scene.stranger, &direct)] {
        let seen = curl(pod, &[&claims[..], &[url]].concat());
        assert!(seen.starts_with("HTTP/1.1 200 OK"), "{url}: {seen}");
        assert!(!seen.to_lowercase().contains("x-weft"), "{url}: {seen}");
    }
    assert!(!scene.app.log().to_lowercase().contains("x-weft"), "{}", scene.app.log());

    // a peer with an identity is believed
    let good = Forger::of_mesh(&scene.mesh).leaf("good", &Forged::of(&identity("web")));
    let text =
        "GET /late HTTP/1.1\\r\\nHost: orders\\r\\nx-weft-deadline: 1\\r\\nConnection: close\\r\\n\\r\\n";
    let address = scene.address(8080);
    let said = peer(&scene.stranger, &["tls-client", &address, &good.display().to_string(), "weft-h1", text]);
    assert!(said.to_lowercase().contains("x-weft-failure: request_timeout"), "{said}");
}

#[test]
fn x_weft_headers_of_a_server_outside_the_mesh_do_not_reach_the_app() {
    if !can_run(&NEEDS) {
        return;
    }
    let scene = Scene::new(Mesh::new(), &[]);
    let client = scene.mesh.network.pod("client");
    let _outside = start_app(&scene.stranger, &[&format!("{}:8080", scene.stranger.ipv4())]);
    let endpoints = format!("endpoints: [{{address: '{}:8080'}}]\n", scene.stranger.ipv4());
    scene.mesh.write_service("outside", &endpoints);
    let _sidecar = scene.mesh.sidecar(&client, "web", &[]);
    // "/lie" answers 200 with `x-weft-failure: app_refused`
    let seen = curl(&client, &["http://outside/lie"]);
    assert!(seen.starts_with("HTTP/1.1 200 OK") && !seen.to_lowercase().contains("x-weft"), "{seen}");
}
