//! Calls that shall not go out in plaintext, whatever the registry says: a registry that takes the identities of a
//! service away takes the calls away, and not their protection.

use std::fs;

use weft_tests::{Mesh, Pod, Process, can_run, identity, output_of, program, until};

use super::scene::{NEEDS, Scene, curl, start_app};

/// The label of an answer that the sidecar made.
fn label(seen: &str) -> Option<String> {
    let seen = seen.to_lowercase();
    seen.lines().find_map(|line| Some(line.strip_prefix("x-weft-failure: ")?.to_owned()))
}

fn plaintext_callers(scene: &Scene) -> usize {
    let metrics = scene.sidecar.metrics(&scene.server);
    metrics.lines().filter(|line| line.starts_with("weft_plaintext_callers_total{")).count()
}

/// Some bytes that are no HTTP, on a connection that stays open.
fn say(pod: &Pod, name: &str) -> Process {
    let mut getent = pod.command("getent");
    getent.args(["ahostsv4", name]);
    let answer = output_of(getent);
    let address = format!("{}:80", answer.split_whitespace().next().unwrap_or_default());
    pod.start(program("mesh-peer"), &["say", &address, "held\\n"])
}

#[test]
fn a_service_whose_identities_are_taken_away_is_not_called() {
    if !can_run(&NEEDS) {
        return;
    }
    let scene = Scene::new(Mesh::new(), &[]);
    let (mesh, client) = (&scene.mesh, scene.mesh.network.pod("client"));
    let endpoints = format!("endpoints: [{{address: '{}'}}]\n", scene.address(8080));
    let whole = format!("identities: ['{}']\n{endpoints}", identity("orders"));
    mesh.write_service("cart", &whole);
    let sidecar = mesh.sidecar(&client, "web", &["--outbound-mtls", "strict"]);
    let http = || curl(&client, &["http://cart/"]);
    assert!(http().starts_with("HTTP/1.1 200"), "{}", http());
    say(&client, "cart").wait_for_line("answer");

    mesh.write_service("cart", &endpoints);
    let forbidden = Some("plaintext_forbidden".to_owned());
    until("HTTP is refused", || label(&http()) == forbidden);
    let seen = http();
    assert!(seen.starts_with("HTTP/1.1 503"), "{seen}");
    let upgrade = ["-H", "Connection: Upgrade", "-H", "Upgrade: websocket", "http://cart/"];
    let seen = curl(&client, &upgrade);
    assert_eq!(label(&seen), forbidden, "{seen}");
    let mut bytes = say(&client, "cart");
    bytes.wait();
    assert!(!bytes.log().contains("answer"), "{}", bytes.log());
    until("bytes are refused by that name", || {
        let log = sidecar.access_log();
        log.iter().any(|line| line["kind"] == "connection" && line["failure"] == "plaintext_forbidden")
    });
    sidecar.wait_for_failure("plaintext_forbidden", &["nobody says which identity", "--outbound-mtls"]);
    assert_eq!(plaintext_callers(&scene), 0, "something came in plaintext");

    // An address that is no service is no call of the mesh: it passes as it always did.
    let _outside = start_app(&scene.stranger, &[&format!("{}:9000", scene.stranger.ipv4())]);
    let seen = curl(&client, &[&format!("http://{}:9000/", scene.stranger.ipv4())]);
    assert!(seen.starts_with("HTTP/1.1 200"), "{seen}");

    // Who knows better says so where the registry's writers cannot.
    fs::write(mesh.policies().join("cart.yaml"), "outbound_mutual_tls: permissive\n").unwrap();
    until("the policy lets it pass", || http().starts_with("HTTP/1.1 200"));
    assert_eq!(plaintext_callers(&scene), 1);
    fs::write(mesh.policies().join("cart.yaml"), "outbound_mutual_tls: strict\n").unwrap();
    until("the policy forbids it", || label(&http()) == forbidden);
    mesh.write_service("cart", &whole);
    until("it is called again", || http().starts_with("HTTP/1.1 200"));
}
