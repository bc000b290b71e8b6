//! The controller: what it makes of Services and pods in Consul, and what happens when its leader dies.

use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;
use weft_tests::{Cluster, pause};

use crate::joining::{ENABLED, call, client, server};

/// A pod is ready for as long as it has no such file.
const BREAKABLE: &str = r#"
          readinessProbe: {exec: {command: [test, "!", -e, /tmp/broken]}, periodSeconds: 1, failureThreshold: 1}
"#;

/// What Consul knows of a service.
fn instances(cluster: &Cluster, service: &str) -> Vec<Value> {
    let path =
        format!("/api/v1/namespaces/weft-system/services/consul:8500/proxy/v1/health/service/{service}");
    let answer = cluster.kubectl(&["get", "--raw", &path]);
    serde_json::from_str(&answer).expect("a list of instances")
}

/// The status of each instance's own check, by pod.
fn statuses(cluster: &Cluster, service: &str) -> Vec<(String, String)> {
    let mut statuses: Vec<(String, String)> = instances(cluster, service)
        .iter()
        .map(|instance| {
            let pod = instance["Service"]["Meta"]["weft-pod"].as_str().unwrap_or("none").to_owned();
            (pod, instance["Checks"][0]["Status"].as_str().unwrap_or("none").to_owned())
        })
        .collect();
    statuses.sort();
    statuses
}

fn passing(cluster: &Cluster, service: &str) -> usize {
    statuses(cluster, service).iter().filter(|(_, status)| status == "passing").count()
}

/// How long something takes to hold.
#[track_caller]
fn within(limit: Duration, what: &str, holds: impl Fn() -> bool) -> Duration {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < limit, "{what}: not within {limit:?}");
        pause();
    }
    println!("{what}: after {:?}", start.elapsed());
    start.elapsed()
}

#[test]
fn a_service_of_the_cluster_is_a_service_of_the_mesh_and_follows_its_pods() {
    let Some(cluster) = Cluster::shared() else { return };
    cluster.namespace("mirrored", &[ENABLED]);
    cluster.apply(&server("mirrored", "orders", BREAKABLE));
    cluster.apply(&client("mirrored", "web"));
    cluster.wait("mirrored", "deployment/orders", "condition=Available");
    cluster.wait("mirrored", "pod/web", "condition=Ready");
    within(Duration::from_secs(10), "both pods are registered", || passing(cluster, "orders_mirrored") == 2);

    // Once each, with all that sidecars read.
    let pods = cluster.get("mirrored", "pods");
    let pods = pods["items"].as_array().unwrap();
    for instance in instances(cluster, "orders_mirrored") {
        let (service, node) = (&instance["Service"], &instance["Node"]);
        let pod = pods.iter().find(|pod| pod["metadata"]["name"] == service["Meta"]["weft-pod"]).unwrap();
        assert_eq!(service["Address"], pod["status"]["podIP"]);
        assert_eq!(service["Port"], 8080);
        assert_eq!(service["Meta"]["weft-identity"], "spiffe://weft.local/ns/mirrored/sa/default");
        assert_eq!(service["Meta"]["weft-protocol"], "http1");
        assert_eq!(service["Meta"]["weft-namespace"], "mirrored");
        assert_eq!(service["Meta"]["weft-zone"], "zone-a", "{service}");
        let name = pod["spec"]["nodeName"].as_str().unwrap();
        assert_eq!(
            (node["Node"].as_str(), &node["Address"]),
            (Some(&*format!("k8s-{name}")), &pod["status"]["hostIP"])
        );
    }
    // The pod without a Service is nobody's endpoint.
    assert_eq!(instances(cluster, "web_mirrored"), [Value::Null; 0]);
    // The app takes nothing but mutual TLS.
    call(cluster, "mirrored", "web", "http://orders.mirrored.weft:8080/").unwrap();

    // Out at deletion, long before the container has ended.
    cluster.kubectl(&["-n", "mirrored", "scale", "deployment/orders", "--replicas=1"]);
    within(Duration::from_secs(2), "one pod less is one instance less", || {
        instances(cluster, "orders_mirrored").len() == 1
    });

    let (pod, _) = statuses(cluster, "orders_mirrored").remove(0);
    // The other pod is called again while this one is not ready, until it has ended: it still serves.
    let status =
        |expected: &str| statuses(cluster, "orders_mirrored").contains(&(pod.clone(), expected.to_owned()));
    assert!(cluster.exec("mirrored", &pod, &["touch", "/tmp/broken"]).done);
    within(Duration::from_secs(10), "a pod that is not ready is critical", || status("critical"));
    assert!(cluster.exec("mirrored", &pod, &["rm", "/tmp/broken"]).done);
    within(Duration::from_secs(10), "ready again, it is passing", || status("passing"));
    call(cluster, "mirrored", "web", "http://orders.mirrored.weft:8080/").unwrap();

    cluster.kubectl(&["-n", "mirrored", "delete", "service", "orders"]);
    within(Duration::from_secs(2), "without its Service it is out", || {
        instances(cluster, "orders_mirrored").is_empty()
    });
}

#[test]
fn another_replica_takes_over_when_the_leader_dies_and_removes_what_died_meanwhile() {
    let Some(cluster) = Cluster::alone() else { return };
    cluster.namespace("led", &[ENABLED]);
    cluster.apply(&server("led", "orders", ""));
    cluster.apply(&client("led", "web"));
    cluster.wait("led", "deployment/orders", "condition=Available");
    cluster.wait("led", "pod/web", "condition=Ready");
    within(Duration::from_secs(10), "both pods are registered", || passing(cluster, "orders_led") == 2);

    let leader = || {
        let lease = cluster.get("weft-system", "lease/weft-controller");
        lease["spec"]["holderIdentity"].as_str().unwrap_or_default().to_owned()
    };
    let first = leader();
    assert!(first.starts_with("weft-injector-"), "{first}");
    // Stopped, it cannot give its Lease back when it is asked to end.
    let script = format!(
        "for process in /proc/[0-9]*; do
             if tr '\\0' '\\n' <$process/environ 2>/dev/null | grep -qx HOSTNAME={first}; then
                 kill -STOP ${{process#/proc/}} && stopped=yes
             fi
         done; test -n \"$stopped\""
    );
    let stopped = cluster.in_node(&["sh", "-c", &script]);
    assert!(stopped.done, "{}", stopped.text);
    cluster.kubectl(&["-n", "weft-system", "delete", "pod", &first, "--grace-period=0", "--force"]);
    cluster.kubectl(&["-n", "led", "scale", "deployment/orders", "--replicas=1"]);
    within(Duration::from_secs(30), "another replica leads", || {
        let now = leader();
        !now.is_empty() && now != first
    });
    within(Duration::from_secs(30), "what died meanwhile is gone", || {
        instances(cluster, "orders_led").len() == 1 && passing(cluster, "orders_led") == 1
    });
    call(cluster, "led", "web", "http://orders.led.weft:8080/").unwrap();
    cluster.wait("weft-system", "deployment/weft-injector", "condition=Available");
}
