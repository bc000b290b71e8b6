//! Calls that are made again, and those that must not be: stale connections of an app, apps that refuse, apps that
//! break off, a budget that ends, policies and service files that change under way.

use std::fs;

use nix::sys::signal::Signal;
use weft_tests::until;

use super::world::{Instance, World, assert_all_answered, can_run_here};

fn count(instance: &Instance, line: &str) -> usize {
    instance.app.log().matches(line).count()
}

#[test]
fn an_app_that_closes_kept_connections_fails_no_get() {
    if !can_run_here() {
        return;
    }
    let world = World::new();
    let _instance = world.instance("one", &[]);
    assert!(assert_all_answered(world.load(2, &["http://orders/stale"])) > 100);
}

#[test]
fn what_nothing_processed_goes_elsewhere_and_what_may_have_does_not() {
    if !can_run_here() {
        return;
    }
    let world = World::new();
    let (mut refuses, stays) = (world.instance("refuses", &[]), world.instance("stays", &[]));
    // The app has read the request when it breaks off: a POST is not repeated, a GET is.
    let before = count(&refuses, "/die") + count(&stays, "/die");
    assert_eq!(world.call(&["-o", "/dev/null", "-d", "body", "http://orders/die"]).1, 502);
    assert_eq!(count(&refuses, "/die") + count(&stays, "/die") - before, 1);
    assert_eq!(world.call(&["-o", "/dev/null", "http://orders/die"]).1, 502);
    // Two attempts more; and a sidecar repeats a GET itself that broke off on a kept connection of the app.
    let seen = count(&refuses, "/die") + count(&stays, "/die") - before - 1;
    assert!((3..=6).contains(&seen), "{seen} times");
    // An app that refuses connections has processed nothing: its sidecar refuses the stream.
    refuses.app.signal(Signal::SIGKILL);
    refuses.app.wait();
    for _ in 0..20 {
        assert_eq!(world.call(&["-d", "body", "http://orders/"]), ("stays".to_owned(), 200));
    }
    // Its breaker has put it out; when it is back, it is asked again.
    let endpoint = format!("{}:8080", refuses.pod.ipv4());
    until("the instance is out", || {
        let (body, _) = world.call(&["http://orders/"]);
        assert_eq!(body, "stays");
        condition(&world, &endpoint) == "ejected"
    });
    refuses.app = world.start_app(&refuses.pod, "refuses");
    until("the instance is asked again", || {
        world.call(&["http://orders/"]);
        condition(&world, &endpoint) == "closed" && count(&refuses, "GET") > 0
    });
}

fn condition(world: &World, endpoint: &str) -> String {
    let shown: serde_json::Value = serde_json::from_str(&world.endpoints()).unwrap();
    find(&shown, endpoint).unwrap_or_else(|| panic!("no {endpoint} in {shown}"))
}

/// The condition in the object that names the endpoint.
fn find(value: &serde_json::Value, endpoint: &str) -> Option<String> {
    match value {
        serde_json::Value::Object(map) => {
            let named = map.get("address").is_some_and(|address| address == endpoint);
            match map.get("condition") {
                Some(condition) if named => condition.as_str().map(str::to_owned),
                _ => map.values().find_map(|value| find(value, endpoint)),
            }
        }
        serde_json::Value::Array(values) => values.iter().find_map(|value| find(value, endpoint)),
        _ => None,
    }
}

#[test]
fn the_budget_ends_retries_and_a_policy_applies_at_once() {
    if !can_run_here() {
        return;
    }
    let world = World::new();
    let instance = world.instance("one", &[]);
    let policy = world.mesh.policies().join("orders.yaml");
    let attempts = || {
        let before = count(&instance, "/status");
        assert_eq!(world.call(&["-o", "/dev/null", "http://orders/status?code=503"]).1, 503);
        count(&instance, "/status") - before
    };
    assert_eq!(attempts(), 1, "no status is repeated by default");
    // `percent: 0` and `per_second: 1` leave ten retries
    const BREAKER: &str = "breaker: {consecutive_failures: 0}\n";
    let text = "retries: {attempts: 1, statuses: [503], budget: {percent: 0, per_second: 1}}\n";
    fs::write(&policy, format!("{text}{BREAKER}")).unwrap();
    until("the policy applies", || attempts() == 2);
    fs::write(&policy, "retries: {attempts: 9, colour: red}\n").unwrap();
    until("the bad document is counted", || {
        let metrics = world.sidecar.metrics(&world.client);
        metrics
            .lines()
            .any(|line| line.contains("refused") && line.contains("reload") && !line.ends_with(" 0"))
    });
    let total: usize = (0..40).map(|_| attempts()).sum();
    assert!(
        (41..=60).contains(&total),
        "the last good policy and its budget: {total} attempts for 40 requests"
    );
}
