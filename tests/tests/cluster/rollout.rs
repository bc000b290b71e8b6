//! A rollout under load: callers know a new pod before an old one goes, and an old one goes from the registry first.

use weft_tests::Cluster;

use crate::joining::{ENABLED, client, server};

/// Requests, and those that failed, as wrk counts them.
fn counted(report: &str) -> (u64, u64) {
    let number =
        |text: &str| text.trim_matches(|character: char| !character.is_ascii_digit()).parse::<u64>().ok();
    let line = |part: &str| report.lines().find(|line| line.contains(part));
    let requests = line("requests in").and_then(|line| number(line.split_whitespace().next()?)).unwrap_or(0);
    let refused = line("Non-2xx").and_then(|line| number(line.rsplit(':').next()?)).unwrap_or(0);
    let errors = line("Socket errors")
        .map_or(0, |line| line.split(',').filter_map(|part| number(part.rsplit(' ').next()?)).sum::<u64>());
    (requests, refused + errors)
}

#[test]
fn a_rollout_of_one_replica_under_load_fails_no_request() {
    let Some(cluster) = Cluster::shared() else { return };
    cluster.namespace("rollout", &[ENABLED]);
    let rest = "          readinessProbe: {httpGet: {path: /, port: http}, periodSeconds: 1}\n      \
                terminationGracePeriodSeconds: 8\n";
    cluster.apply(&server("rollout", "orders", rest).replace("replicas: 2", "replicas: 1"));
    cluster.apply(&client("rollout", "load").replace("local.test/tools:1", "local.test/weft-load:1"));
    cluster.wait("rollout", "deployment/orders", "condition=Available");
    cluster.wait("rollout", "pod/load", "condition=Ready");
    let report = std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let url = "http://orders.rollout.weft:8080/";
            cluster.exec(
                "rollout",
                "load",
                &["wrk", "-t", "1", "-c", "4", "-d", "25s", "--timeout", "10s", url],
            )
        });
        for _ in 0..2 {
            cluster.kubectl(&["-n", "rollout", "rollout", "restart", "deployment/orders"]);
            cluster.kubectl(&["-n", "rollout", "rollout", "status", "deployment/orders", "--timeout=120s"]);
        }
        load.join().expect("the load").text
    });
    let (requests, failed) = counted(&report);
    assert!(requests > 1000, "too few requests to say anything:\n{report}");
    assert_eq!(failed, 0, "{report}");
}

#[test]
fn a_report_of_wrk_is_read() {
    let report = "  4400 requests in 25.03s, 1.13MB read\n  Socket errors: connect 0, read 3, write 0, timeout 1\n  \
                  Non-2xx or 3xx responses: 12\n";
    assert_eq!(counted(report), (4400, 16));
    assert_eq!(counted("  4400 requests in 25.03s, 1.13MB read\n"), (4400, 0));
}
