//! Whom a connection reaches: callers without a sidecar, calls to itself, one endpoint, an explicit upstream, and
//! destinations that are no service.

use std::collections::BTreeSet;

use weft_tests::{Mesh, Need, Pod, Sidecar, identity, output_of, until};

use super::pair::{CURL, PYTHON, ROOT, can_run, curl, say, start_app};

/// A pod with the app that tells its name, and a sidecar of that service.
fn serving(mesh: &Mesh, service: &str, name: &str, flags: &[&str]) -> (Pod, weft_tests::Process, Sidecar) {
    let pod = mesh.network.pod(name);
    let app = start_app(&pod, "python3", "http_app.py", 8080, &[name]);
    let sidecar = mesh.sidecar(&pod, service, &[&["--port", "8080"], flags].concat());
    (pod, app, sidecar)
}

/// The name of the app that answers; panics if none does.
fn who(pod: &Pod, url: &str) -> String {
    let mut curl = pod.command("curl");
    curl.args(["-s", "-S", "-f", "-g", "-m", "10", url]);
    let told: serde_json::Value = serde_json::from_str(&output_of(curl)).expect("what the app tells");
    told["name"].as_str().unwrap().to_owned()
}

fn wait_until_reachable(pod: &Pod, url: &str) {
    until(&format!("{url} answers"), || {
        pod.command("curl")
            .args(["-s", "-f", "-g", "-m", "5", "-o", "/dev/null", url])
            .status()
            .is_ok_and(|s| s.success())
    });
}

/// The identities of the callers in a server's access log.
fn callers(sidecar: &Sidecar) -> BTreeSet<String> {
    let inbound = sidecar.access_log().into_iter().filter(|line| line["direction"] == "inbound");
    inbound.map(|line| line["peer_identity"].as_str().unwrap_or("none").to_owned()).collect()
}

#[test]
fn a_caller_without_a_sidecar_reaches_a_permissive_service_and_no_strict_one() {
    if !can_run(&[ROOT, CURL, PYTHON]) {
        return;
    }
    let mesh = Mesh::new();
    let (open, _open_app, open_sidecar) = serving(&mesh, "orders", "open", &[]);
    let (closed, _closed_app, closed_sidecar) = serving(&mesh, "vault", "closed", &["--mtls", "strict"]);
    let stranger = mesh.network.pod("stranger");
    let client = mesh.network.pod("client");
    let _from = mesh.sidecar(&client, "web", &[]);
    let url = |pod: &Pod| format!("http://{}:8080/", pod.ipv4());
    assert_eq!(who(&stranger, &url(&open)), "open");
    assert_eq!(callers(&open_sidecar), BTreeSet::from(["none".to_owned()]));
    let refused = curl(&stranger, mesh.network.folder(), &[&url(&closed)]);
    assert!(refused.outcome.starts_with("000 "), "{refused:?}");
    let address = closed.ipv4().to_string();
    let bytes = say(&stranger, &address, 8080, &["--half-close", r"\x00\x01\x02"]);
    assert!(bytes.is_empty() || bytes == "[reset]", "{bytes}");
    let strict =
        || closed_sidecar.access_log().into_iter().filter(|line| line["failure"] == "plaintext_refused");
    until("both refusals are logged", || strict().count() == 2);
    assert!(
        strict().all(|line| line["peer_address"].as_str().unwrap().starts_with(&stranger.ipv4().to_string()))
    );
    // while a caller of the mesh reaches both
    wait_until_reachable(&client, "http://vault/");
    assert_eq!(who(&client, "http://vault/"), "closed");
    assert_eq!(who(&client, "http://orders/"), "open");
    assert!(callers(&closed_sidecar).contains(&identity("web")));
}

#[test]
fn an_app_calls_itself_by_name_and_by_address() {
    if !can_run(&[ROOT, CURL, PYTHON]) {
        return;
    }
    let mesh = Mesh::new();
    let (pod, _app, sidecar) = serving(&mesh, "orders", "self", &["--mtls", "strict"]);
    wait_until_reachable(&pod, "http://orders/");
    assert_eq!(who(&pod, "http://orders/"), "self");
    assert_eq!(who(&pod, "http://orders:8080/"), "self");
    assert_eq!(who(&pod, &format!("http://{}:8080/", pod.ipv4())), "self");
    assert_eq!(who(&pod, "http://localhost:8080/"), "self");
    assert_eq!(callers(&sidecar), BTreeSet::from([identity("orders")]));
    // bytes that are no HTTP, and an upgrade
    let shout = r"GET / HTTP/1.1\r\nHost: orders\r\nConnection: Upgrade\r\nUpgrade: shout\r\n\r\n";
    let told = say(&pod, "orders", 8080, &["--half-close", shout, "?101", "hello"]);
    assert!(told.ends_with("HELLOBYE"), "{told}");
    let address = pod.ipv4().to_string();
    let told = say(&pod, &address, 8080, &["--half-close", shout, "?101", "hello"]);
    assert!(told.ends_with("HELLOBYE"), "{told}");
}

#[test]
fn the_address_of_an_endpoint_means_that_endpoint_and_a_name_means_any() {
    if !can_run(&[ROOT, CURL, PYTHON]) {
        return;
    }
    let mesh = Mesh::new();
    let (first, _first_app, first_sidecar) = serving(&mesh, "orders", "first", &[]);
    let (second, _second_app, _second_sidecar) = serving(&mesh, "orders", "second", &[]);
    let client = mesh.network.pod("client");
    let _from = mesh.sidecar(&client, "web", &["--upstream", "127.0.0.1:9000=orders"]);
    let told =
        |url: &str, times: usize| -> BTreeSet<String> { (0..times).map(|_| who(&client, url)).collect() };
    let both = BTreeSet::from(["first".to_owned(), "second".to_owned()]);
    wait_until_reachable(&client, "http://orders/");
    until("both instances are known", || told("http://orders/", 4) == both);
    for (pod, name) in [(&first, "first"), (&second, "second")] {
        let url = format!("http://{}:8080/", pod.ipv4());
        assert_eq!(told(&url, 6), BTreeSet::from([name.to_owned()]), "{url}");
    }
    // an explicit upstream on localhost means the service
    until("the explicit upstream reaches both", || told("http://127.0.0.1:9000/", 4) == both);
    assert_eq!(callers(&first_sidecar), BTreeSet::from([identity("web")]));
    // and the name in the Host header decides nothing
    let url = format!("http://{}:8080/", first.ipv4());
    let mut elsewhere = client.command("curl");
    elsewhere.args(["-s", "-f", "-m", "10", "-H", "Host: other", &url]);
    assert!(output_of(elsewhere).contains("\"first\""));
}

#[test]
fn a_destination_outside_the_mesh_is_passed_through_or_refused() {
    if !can_run(&[ROOT, CURL, PYTHON, Need::Program("redis-cli", "redis-tools")]) {
        return;
    }
    let mesh = Mesh::new();
    let outside = mesh.network.pod("outside");
    let _app = start_app(&outside, "python3", "http_app.py", 8080, &["outside"]);
    let _bytes = start_app(&outside, "python3", "tcp_app.py", 9000, &[]);
    let (open, strict) = (mesh.network.pod("open"), mesh.network.pod("registry"));
    let open_sidecar = mesh.sidecar(&open, "web", &[]);
    let strict_sidecar = mesh.sidecar(&strict, "batch", &["--mode", "registry-only"]);
    let address = outside.ipv4().to_string();
    for address in [&address, &format!("[{}]", outside.ipv6())] {
        assert_eq!(who(&open, &format!("http://{address}:8080/")), "outside");
    }
    // untouched: the app sees no header of ours
    let mut told = open.command("curl");
    told.args(["-s", "-f", "-m", "10", &format!("http://{address}:8080/")]);
    let told = output_of(told).to_lowercase();
    assert!(!told.contains("traceparent") && !told.contains("x-weft"), "{told}");
    assert!(say(&open, &address, 9000, &["--half-close", r"\x00bytes"]).starts_with("6 "));
    // a refusal stays one
    let refused = curl(&open, mesh.network.folder(), &[&format!("http://{address}:8081/")]);
    assert!(refused.outcome.starts_with("000 "), "{refused:?}");
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let url = format!("http://{address}:8080/");
        let refused = curl(&strict, mesh.network.folder(), &[version, &url]);
        assert!(refused.outcome.starts_with("502 "), "{refused:?}");
        let label = ("x-weft-failure".to_owned(), "unknown_destination".to_owned());
        assert!(refused.headers.contains(&label), "{refused:?}");
    }
    // not `--half-close`: a reset is to be told from an end
    assert_eq!(say(&strict, &address, 9000, &[r"\x00bytes"]), "[reset]");
    let redis = strict.command("redis-cli").args(["-h", &address, "-p", "9000", "PING"]).output().unwrap();
    let redis = String::from_utf8_lossy(&[redis.stdout, redis.stderr].concat()).into_owned();
    assert!(redis.contains("reset by peer") || redis.contains("closed the connection"), "{redis}");
    let failed = |sidecar: &Sidecar, label: &str| {
        sidecar.access_log().iter().filter(|line| line["failure"] == label).count()
    };
    until("the refusals are logged", || failed(&strict_sidecar, "unknown_destination") == 4);
    assert_eq!(failed(&open_sidecar, "unknown_destination"), 0);
}
