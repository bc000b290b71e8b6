use std::{
    io::Write,
    process::{Command, Stdio},
    time::{Duration, UNIX_EPOCH},
};

use super::super::RequestKey;
use super::*;

fn finished(code: u16) -> RequestKey {
    let peer = "spiffe://mesh.local/ns/shop/sa/web".parse().ok();
    RequestKey { peer, protocol: Protocol::Http2, code, failure: None }
}

/// One of everything.
fn busy() -> Metrics {
    let metrics = Metrics::new();
    let orders = metrics.service(Direction::Inbound, "orders", "all");
    orders.finished(finished(200), Duration::from_millis(3), 10, 200);
    orders.finished(finished(200), Duration::from_millis(4), 10, 200);
    let failed = RequestKey { failure: Some(Failure::AppReset), ..finished(502) };
    orders.finished(failed, Duration::from_millis(3), 0, 0);
    orders.attempt(None);
    orders.attempt(Some("connect_refused"));
    orders.retry_refused("budget");
    let [sent, received] = orders.tcp_bytes();
    sent.inc_by(7);
    received.inc_by(9);
    drop(metrics.connection(Direction::Inbound, Security::MutualTls, Protocol::Http2));
    std::mem::forget(metrics.connection(Direction::Outbound, Security::Plaintext, Protocol::Opaque));
    metrics.connection_failed(Direction::Inbound, Failure::Handshake);
    metrics.endpoints("orders", "ready", 3);
    metrics.ejected("orders");
    let _pooled = metrics.pool_connection(Protocol::Http2);
    metrics.detected(Protocol::Tls);
    metrics.plaintext_caller("::ffff:10.0.0.7".parse().unwrap());
    metrics.dns_query("virtual");
    metrics.certificate_expires(Some(UNIX_EPOCH + Duration::from_secs(1_800_000_000)));
    metrics.identity_renewed("ok", 3);
    metrics.config_reloaded("refused");
    metrics.spans_sent(4);
    metrics.spans_dropped("queue_full", 2);
    metrics.log_lines_dropped("own").inc();
    metrics
}

#[test]
fn what_was_counted_is_exposed() {
    let text = busy().expose(false);
    let peer = "peer=\"spiffe://mesh.local/ns/shop/sa/web\"";
    for line in [
        &format!(
            "weft_requests_total{{direction=\"inbound\",service=\"orders\",route=\"all\",{peer},\
             protocol=\"http2\",code=\"200\",failure=\"\"}} 2"
        ),
        "code=\"502\",failure=\"app_reset\"} 1",
        "weft_request_duration_seconds_count{direction=\"inbound\",service=\"orders\",route=\"all\"} 3",
        "weft_response_bytes_total{direction=\"inbound\",service=\"orders\",route=\"all\"} 400",
        "weft_attempts_total{direction=\"inbound\",service=\"orders\",outcome=\"retry\",reason=\"connect_refused\"} 1",
        "weft_retries_refused_total{service=\"orders\",reason=\"budget\"} 1",
        "weft_tcp_bytes_total{direction=\"inbound\",service=\"orders\",flow=\"received\"} 9",
        "weft_connections_active{direction=\"inbound\",security=\"mtls\",protocol=\"http2\"} 0",
        "weft_connections_active{direction=\"outbound\",security=\"plaintext\",protocol=\"tcp\"} 1",
        "weft_connection_failures_total{direction=\"inbound\",failure=\"handshake\"} 1",
        "weft_endpoints{service=\"orders\",state=\"ready\"} 3",
        "weft_plaintext_callers_total{address=\"10.0.0.7\"} 1",
        "weft_certificate_expiry_seconds 1800000000",
        "weft_identity_renewals_total{result=\"ok\"} 3",
        "weft_identity_renewals_total{result=\"failed\"} 0",
        "weft_spans_dropped_total{reason=\"queue_full\"} 2",
        "weft_build_info{version=",
        "process_resident_memory_bytes ",
        "process_cpu_seconds_total ",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
}

#[test]
fn openmetrics_ends_with_its_mark() {
    let text = busy().expose(true);
    assert!(text.ends_with("# EOF\n"));
    assert!(text.contains("# TYPE weft_requests counter\n"));
}

/// `promtool` is part of the Debian package `prometheus`, which `tests/run` installs.
#[test]
fn promtool_finds_no_fault() {
    let tool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut tool = tool.expect("promtool cannot be started; install the package `prometheus`");
    tool.stdin.take().unwrap().write_all(busy().expose(false).as_bytes()).unwrap();
    let output = tool.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.trim().is_empty(), "{said}");
}

#[test]
fn many_peers_do_not_grow_the_metrics_without_end() {
    let metrics = Metrics::new();
    let orders = metrics.service(Direction::Inbound, "orders", "");
    for caller in 0..3000 {
        let peer = format!("spiffe://mesh.local/ns/shop/sa/caller-{caller}").parse().ok();
        orders.finished(RequestKey { peer, ..finished(200) }, Duration::ZERO, 0, 0);
        metrics.plaintext_caller(IpAddr::from([10, 0, (caller / 256) as u8, (caller % 256) as u8]));
    }
    let text = metrics.expose(false);
    let series = |name: &str| text.lines().filter(|line| line.starts_with(name)).count();
    assert_eq!(series("weft_requests_total{"), 1001);
    assert_eq!(series("weft_plaintext_callers_total{"), 101);
    assert!(text.contains("weft_plaintext_callers_total{address=\"other\"} 2900"));
    assert!(text.contains("weft_metrics_overflow_total{metric=\"requests\"} 2000"));
}
