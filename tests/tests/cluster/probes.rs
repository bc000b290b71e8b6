//! The kubelet's probes in strict mode: they ask the app, by way of the sidecar.

use std::time::Duration;

use tokio::time::Instant;
use weft_tests::Cluster;

use crate::joining::{ENABLED, server};

const HTTP: &str = r#"
          readinessProbe: {httpGet: {path: /, port: http}, periodSeconds: 1}
          livenessProbe: {tcpSocket: {port: http}, periodSeconds: 1, failureThreshold: 2}
          startupProbe: {httpGet: {path: /index.html, port: 8080}, periodSeconds: 1}
"#;

#[test]
fn http_and_tcp_probes_reach_a_strict_app() {
    let Some(cluster) = Cluster::shared() else { return };
    cluster.namespace("probed", &[ENABLED]);
    cluster.apply(&server("probed", "orders", HTTP));
    cluster.wait("probed", "deployment/orders", "condition=Available");
    let pods = cluster.get("probed", "pods");
    for pod in pods["items"].as_array().unwrap() {
        for status in pod["status"]["containerStatuses"].as_array().unwrap() {
            assert_eq!(status["restartCount"], 0, "{status}");
        }
    }
}

#[test]
fn a_tcp_probe_fails_where_no_app_listens() {
    let Some(cluster) = Cluster::shared() else { return };
    cluster.namespace("deaf", &[ENABLED]);
    let rest = r#"
          readinessProbe: {tcpSocket: {port: 9999}, periodSeconds: 1}
"#;
    cluster.apply(&server("deaf", "orders", rest));
    cluster.until("the containers run", || {
        let pods = cluster.get("deaf", "pods");
        let items = pods["items"].as_array().unwrap();
        items.len() == 2
            && items.iter().all(|pod| pod["status"]["containerStatuses"][0]["state"]["running"].is_object())
    });
    let end = Instant::now() + Duration::from_secs(4);
    while Instant::now() < end {
        let deployment = cluster.get("deaf", "deployment/orders");
        assert!(deployment["status"]["availableReplicas"].is_null(), "{deployment}");
    }
    let events = cluster.kubectl(&["-n", "deaf", "get", "events"]);
    assert!(events.contains("Readiness probe failed"), "{events}");
}
