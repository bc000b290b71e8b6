use std::{any::Any, collections::HashMap, time::Duration};

use opentelemetry_proto::tonic::{
    common::v1::any_value,
    trace::v1::{Span, SpanFlags, span::SpanKind, status::StatusCode},
};
use prost::Message;
use serde_json::Value;

use super::super::{AccessLog, AccessLogTarget, Metrics, Security, SpanExport, Telemetry, TraceSettings};
use super::*;
use crate::config::AccessLogMode;

const CALLER: &str = "spiffe://mesh.local/ns/shop/sa/web";
const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// A telemetry whose lines and spans can be read back.
struct Seen {
    telemetry: Arc<Telemetry>,
    export: Option<SpanExport>,
    folder: tempfile::TempDir,
}

impl Seen {
    fn new(mode: AccessLogMode, variables: &[(&str, &str)]) -> Seen {
        let variables: HashMap<_, _> = variables.iter().copied().collect();
        let read = |name: &str| variables.get(name).map(|value| (*value).to_owned());
        let (settings, problems) = TraceSettings::read(read, "orders");
        assert!(problems.is_empty(), "{problems:?}");
        let folder = tempfile::tempdir().unwrap();
        let metrics = Arc::new(Metrics::new());
        let target = AccessLogTarget::File(folder.path().join("log"));
        let log = AccessLog::open(mode, &target, &metrics).unwrap();
        let (telemetry, export) = Telemetry::new(&settings, log, metrics);
        telemetry.set_identity(&"spiffe://mesh.local/ns/shop/sa/orders".parse().unwrap());
        Seen { telemetry, export, folder }
    }

    fn exporting(mode: AccessLogMode) -> Seen {
        // Only what a caller sampled, so that nothing here hangs on chance.
        let sampler = ("OTEL_TRACES_SAMPLER", "parentbased_always_off");
        Seen::new(mode, &[sampler, ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")])
    }

    fn begin(&self, direction: Direction, headers: &[(&str, &str)]) -> Record {
        let handles = self.telemetry.metrics().service(direction, "orders", "items");
        let mut request = Request::get("/v1/items?token=secret").header("host", "orders:8080");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let from = "10.0.0.7:40000".parse().unwrap();
        self.telemetry.begin(&handles, Protocol::Http1, from, &request.body(()).unwrap(), &Cut::default())
    }

    async fn lines(&self) -> Vec<Value> {
        self.telemetry.access_log.flush(Duration::from_secs(60)).await;
        let text = std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn spans(&mut self) -> Vec<Span> {
        let spans = self.export.as_mut().unwrap().waiting();
        spans.iter().map(|span| Span::decode(span.as_slice()).unwrap()).collect()
    }

    fn counted(&self, line: &str) -> bool {
        self.telemetry.metrics().expose(false).contains(line)
    }
}

fn attribute(span: &Span, name: &str) -> Option<String> {
    let found = span.attributes.iter().find(|attribute| attribute.key == name)?;
    match found.value.as_ref()?.value.as_ref()? {
        any_value::Value::StringValue(text) => Some(text.clone()),
        any_value::Value::IntValue(number) => Some(number.to_string()),
        other => panic!("{name} is {other:?}"),
    }
}

fn hex(id: &[u8]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn endpoint() -> SocketAddr {
    "10.1.0.9:8080".parse().unwrap()
}

#[tokio::test]
async fn a_request_that_went_well_is_written_once() {
    let mut seen = Seen::exporting(AccessLogMode::All);
    let mut record = seen.begin(Direction::Inbound, &[("traceparent", PARENT)]);
    record.peer(Some(&CALLER.parse().unwrap()));
    record.request_body().add(12);
    record.status(200);
    record.add_response_bytes(300);
    record.complete();
    assert!(seen.spans().is_empty(), "nothing is written before the end");
    drop(record);

    let [line] = &seen.lines().await[..] else { panic!("one line") };
    for (field, expected) in [
        ("kind", Value::from("request")),
        ("direction", "inbound".into()),
        ("service", "orders".into()),
        ("route", "items".into()),
        ("method", "GET".into()),
        ("authority", "orders:8080".into()),
        ("path", "/v1/items".into()),
        ("status", 200.into()),
        ("failure", Value::Null),
        ("peer_address", "10.0.0.7:40000".into()),
        ("peer_identity", CALLER.into()),
        ("own_identity", "spiffe://mesh.local/ns/shop/sa/orders".into()),
        ("request_bytes", 12.into()),
        ("response_bytes", 300.into()),
        ("trace_id", "0af7651916cd43dd8448eb211c80319c".into()),
    ] {
        assert_eq!(line[field], expected, "{field} in {line}");
    }
    let [span] = &seen.spans()[..] else { panic!("one span") };
    assert_eq!(span.kind(), SpanKind::Server);
    assert_eq!(hex(&span.trace_id), "0af7651916cd43dd8448eb211c80319c");
    assert_eq!(hex(&span.parent_span_id), "b7ad6b7169203331");
    let remote = SpanFlags::ContextHasIsRemoteMask as u32 | SpanFlags::ContextIsRemoteMask as u32;
    assert_eq!(span.flags, 1 | remote);
    assert_eq!((span.name.as_str(), &span.status), ("GET orders", &None));
    for (name, expected) in [
        ("http.request.method", "GET"),
        ("http.response.status_code", "200"),
        ("url.path", "/v1/items"),
        ("server.address", "orders"),
        ("server.port", "8080"),
        ("network.peer.address", "10.0.0.7"),
        ("weft.service", "orders"),
        ("weft.route", "items"),
        ("weft.peer.identity", CALLER),
        ("weft.tls.version", "1.3"),
    ] {
        assert_eq!(attribute(span, name).as_deref(), Some(expected), "{name}");
    }
    assert!(seen.counted(&format!("peer=\"{CALLER}\",protocol=\"http1\",code=\"200\",failure=\"\"}} 1")));
}

#[tokio::test]
async fn each_attempt_is_a_span_below_the_client_span() {
    let mut seen = Seen::exporting(AccessLogMode::Failures);
    let mut record = seen.begin(Direction::Outbound, &[("b3", "0000000000000001-0000000000000002-1")]);
    let first = record.attempt(endpoint(), None);
    record.attempt_failed(&Failed::new(Failure::ConnectRefused, "10.1.0.9:8080 refused"));
    let second = record.attempt("[fd00::9]:8080".parse().unwrap(), Some("connect_refused"));
    assert_ne!(first.span_id, second.span_id);
    let mut headers = HeaderMap::new();
    record.inject(&second, &mut headers);
    assert_eq!(headers["b3"], format!("0000000000000001-{:016x}-1", second.span_id).as_str());
    assert!(headers.contains_key("traceparent"));
    record.attempt_answered(503);
    record.status(503);
    record.complete();
    drop(record);

    let [failed, answered, client] = &seen.spans()[..] else { panic!("three spans") };
    assert_eq!(hex(&client.parent_span_id), "0000000000000002");
    let [ipv4, ipv6] = [["10.1.0.9", "10.1.0.9:8080"], ["fd00::9", "[fd00::9]:8080"]];
    for (span, [address, endpoint]) in [(failed, ipv4), (answered, ipv6)] {
        assert_eq!(span.parent_span_id, client.span_id);
        assert_eq!(span.kind(), SpanKind::Client);
        assert_eq!(span.flags, 1 | SpanFlags::ContextHasIsRemoteMask as u32);
        assert_eq!(attribute(span, "weft.endpoint").as_deref(), Some(endpoint));
        assert_eq!(attribute(span, "network.peer.address").as_deref(), Some(address));
        assert_eq!(attribute(span, "network.peer.port").as_deref(), Some("8080"));
    }
    assert_eq!(attribute(failed, "error.type").as_deref(), Some("connect_refused"));
    assert_eq!(attribute(failed, "weft.retry.reason"), None);
    assert_eq!(attribute(answered, "weft.attempt").as_deref(), Some("2"));
    assert_eq!(attribute(answered, "weft.retry.reason").as_deref(), Some("connect_refused"));
    assert_eq!(attribute(client, "http.request.resend_count").as_deref(), Some("1"));
    assert_eq!(attribute(client, "error.type").as_deref(), Some("503"));
    assert_eq!(client.status.as_ref().unwrap().code(), StatusCode::Error);
    let refused = failed.status.as_ref().unwrap();
    assert_eq!((refused.code(), refused.message.as_str()), (StatusCode::Error, "10.1.0.9:8080 refused"));
    assert!(seen.lines().await.is_empty(), "an app's own 503 is no failure of the mesh");
    assert!(seen.counted("outcome=\"first\",reason=\"\"} 1"));
    assert!(seen.counted("outcome=\"retry\",reason=\"connect_refused\"} 1"));
}

#[tokio::test]
async fn a_dropped_record_means_that_the_client_went_away() {
    let mut seen = Seen::exporting(AccessLogMode::Failures);
    let mut cut = seen.begin(Direction::Outbound, &[("traceparent", PARENT)]);
    cut.attempt(endpoint(), None);
    cut.status(200);
    drop(cut);
    drop(seen.begin(Direction::Outbound, &[]));
    let mut failed = seen.begin(Direction::Outbound, &[]);
    failed.fail(Failed::new(Failure::NoEndpoint, "orders has no endpoint"));
    failed.status(503);
    failed.complete();
    drop(failed);

    let lines = seen.lines().await;
    let seen_failures: Vec<_> = lines.iter().map(|line| (&line["failure"], &line["status"])).collect();
    let (gone, none) = (Value::from("client_gone"), Value::from("no_endpoint"));
    assert_eq!(seen_failures, [(&gone, &200.into()), (&gone, &Value::Null), (&none, &503.into())]);
    assert_eq!(lines[2]["detail"], "orders has no endpoint");
    assert_eq!(lines[0]["attempts"], 1);
    assert!(seen.counted("code=\"200\",failure=\"client_gone\"} 1"));
    assert!(seen.counted("code=\"499\",failure=\"client_gone\"} 1"));
    assert!(seen.counted("code=\"503\",failure=\"no_endpoint\"} 1"));
    let spans = seen.spans();
    assert_eq!(spans.len(), 2, "the attempt and the request of the only sampled trace");
    assert!(spans.iter().all(|span| attribute(span, "weft.failure").as_deref() == Some("client_gone")));
}

#[tokio::test]
async fn a_record_on_a_connection_that_we_cut_says_why() {
    let mut seen = Seen::exporting(AccessLogMode::Failures);
    let (mut dropped, mut failed, mut other) = (
        seen.begin(Direction::Inbound, &[("traceparent", PARENT)]),
        seen.begin(Direction::Inbound, &[]),
        seen.begin(Direction::Inbound, &[]),
    );
    dropped.attempt(endpoint(), None);
    for record in [&dropped, &failed, &other] {
        record.cut().because(Failed::new(Failure::Draining, "the drain took too long"));
        record.cut().because(Failed::new(Failure::Internal, "a second reason"));
    }
    other.fail(Failed::new(Failure::AppReset, "the app is gone"));
    failed.fail(Failed::new(Failure::ClientGone, "the request's body broke off"));
    drop((dropped, failed, other));
    let lines = seen.lines().await;
    let told: Vec<_> = lines.iter().map(|line| (&line["failure"], &line["detail"])).collect();
    let (cut, words) = (Value::from("draining"), Value::from("the drain took too long"));
    assert_eq!(told, [(&cut, &words), (&cut, &words), (&"app_reset".into(), &"the app is gone".into())]);
    let spans = seen.spans();
    assert_eq!(spans.len(), 2);
    assert!(spans.iter().all(|span| attribute(span, "weft.failure").as_deref() == Some("draining")));
}

#[tokio::test]
async fn what_is_not_sampled_leaves_no_span_and_remembers_no_words() {
    let mut seen = Seen::exporting(AccessLogMode::Off);
    let mut record = seen.begin(Direction::Inbound, &[("b3", "0")]);
    assert!(!record.trace().sampled && record.inner.words.is_none());
    record.attempt(endpoint(), None);
    record.complete();
    drop(record);
    assert!(seen.spans().is_empty());
    let record = Seen::new(AccessLogMode::Off, &[]).begin(Direction::Inbound, &[("traceparent", PARENT)]);
    assert!(record.inner.words.is_none(), "without a collector nothing is kept");
}

#[tokio::test]
async fn who_exports_nothing_decides_nothing_and_passes_on_what_came() {
    let open = "0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331";
    let table: [&[(&str, &str)]; 8] = [
        &[],
        &[("traceparent", PARENT), ("tracestate", "a=1")],
        &[("traceparent", &PARENT.replace("-01", "-00"))],
        &[("traceparent", "what is this"), ("tracestate", "a=1")],
        &[("b3", open)],
        &[("b3", "0")],
        &[("x-b3-traceid", "8448eb211c80319c"), ("x-b3-spanid", "b7ad6b7169203331"), ("x-b3-flags", "1")],
        &[("uber-trace-id", "1:2:0:0"), ("baggage", "k=v"), ("b3", "1-2-1")],
    ];
    // With every reason to write that there could be.
    let always = ("OTEL_TRACES_SAMPLER", "always_on");
    let b3 = ("OTEL_PROPAGATORS", "b3,jaeger");
    let off = ("OTEL_SDK_DISABLED", "true");
    let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9");
    for variables in [&[always][..], &[b3], &[always, endpoint, off]] {
        for mode in [AccessLogMode::Off, AccessLogMode::All] {
            let seen = Seen::new(mode, variables);
            for lines in table {
                let came: HeaderMap = lines
                    .iter()
                    .map(|(name, value)| {
                        let name = hyper::http::HeaderName::from_bytes(name.as_bytes()).unwrap();
                        (name, HeaderValue::from_str(value).unwrap())
                    })
                    .collect();
                let mut record = seen.begin(Direction::Outbound, lines);
                let attempt = record.attempt("10.1.0.9:8080".parse().unwrap(), None);
                for trace in [*record.trace(), attempt] {
                    let mut passed_on = came.clone();
                    record.inject(&trace, &mut passed_on);
                    assert_eq!(passed_on, came, "{variables:?}");
                }
                record.complete();
            }
        }
    }
    // The access log shows what the caller said, and no trace that exists nowhere else.
    let seen = Seen::new(AccessLogMode::All, &[]);
    for headers in [&[][..], &[("traceparent", PARENT)], &[("b3", open)]] {
        seen.begin(Direction::Inbound, headers).complete();
    }
    let lines = seen.lines().await;
    let told: Vec<_> =
        lines.iter().map(|line| (&line["trace_id"], &line["span_id"], &line["sampled"])).collect();
    let (trace, span) = (&"0af7651916cd43dd8448eb211c80319c".into(), &"b7ad6b7169203331".into());
    let none = &Value::Null;
    assert_eq!(told, [(none, none, none), (trace, span, &true.into()), (trace, span, &false.into())]);
}

#[tokio::test]
async fn the_peer_is_named_wherever_it_was_proven() {
    let mut seen = Seen::exporting(AccessLogMode::Failures);
    let mut record = seen.begin(Direction::Outbound, &[("traceparent", PARENT)]);
    record.attempt(endpoint(), None);
    record.peer(Some(&CALLER.parse().unwrap()));
    record.attempt_failed(&Failed::new(Failure::Reset, "10.1.0.9:8080 reset"));
    record.attempt(endpoint(), Some("reset"));
    record.attempt_failed(&Failed::new(Failure::ConnectRefused, "10.1.0.9:8080 refused"));
    record.attempt(endpoint(), Some("connect_refused"));
    record.peer(Some(&CALLER.parse().unwrap()));
    record.attempt_failed(&Failed::new(Failure::Reset, "10.1.0.9:8080 reset"));
    record.fail(Failed::new(Failure::Reset, "10.1.0.9:8080 reset"));
    drop(record);
    let peers: Vec<_> = seen
        .spans()
        .iter()
        .map(|span| (attribute(span, "weft.peer.identity"), attribute(span, "weft.tls.version")))
        .collect();
    let proven = (Some(CALLER.to_owned()), Some("1.3".to_owned()));
    assert_eq!(peers, [proven.clone(), (None, None), proven.clone(), proven]);
    let mut plain = seen.telemetry.connection(Direction::Inbound, "10.0.0.7:1".parse().unwrap());
    plain.fail(Failed::new(Failure::Reset, "reset"));
    drop(plain);
    let mut secured = seen.telemetry.connection(Direction::Inbound, "10.0.0.7:1".parse().unwrap());
    secured.peer(Some(&CALLER.parse().unwrap()));
    secured.fail(Failed::new(Failure::Reset, "reset"));
    drop(secured);
    let lines = seen.lines().await;
    let told: Vec<_> = lines.iter().map(|line| (&line["peer_identity"], &line["tls_version"])).collect();
    let (yes, no) = ((&CALLER.into(), &"1.3".into()), (&Value::Null, &Value::Null));
    assert_eq!(told, [yes, no, yes]);
}

#[tokio::test]
async fn a_grpc_status_is_an_error_for_whom_the_conventions_say() {
    let mut seen = Seen::exporting(AccessLogMode::Off);
    for status in 0..=16 {
        for direction in [Direction::Inbound, Direction::Outbound] {
            let mut record = seen.begin(direction, &[("traceparent", PARENT)]);
            if direction == Direction::Outbound {
                record.attempt(endpoint(), None);
                record.attempt_answered(200);
            }
            record.status(200);
            // From the trailers, so after the head.
            record.grpc_status(status);
            record.complete();
        }
    }
    // A retried answer that had trailers only.
    let mut record = seen.begin(Direction::Outbound, &[("traceparent", PARENT)]);
    record.attempt(endpoint(), None);
    record.attempt_answered(200);
    record.attempt_grpc_status(14);
    record.attempt(endpoint(), Some("503"));
    record.status(200);
    record.grpc_status(0);
    record.complete();
    drop(record);
    let spans = seen.spans();
    let (each, last) = spans.split_at(17 * 3);
    for (status, spans) in each.chunks(3).enumerate() {
        for span in spans {
            let is_error = match span.kind() {
                SpanKind::Server => [2, 4, 12, 13, 14, 15].contains(&status),
                _ => status != 0,
            };
            let marked = span.status.as_ref().is_some_and(|status| status.code() == StatusCode::Error);
            assert_eq!(marked, is_error, "{status} {:?}", span.kind());
            let code = Some(status.to_string());
            assert_eq!(attribute(span, "rpc.grpc.status_code"), code);
            assert_eq!(attribute(span, "error.type"), code.filter(|_| is_error));
        }
    }
    let marked: Vec<_> = last.iter().map(|span| span.status.is_some()).collect();
    assert_eq!(marked, [true, false, false], "{last:#?}");
}

#[tokio::test]
async fn a_panic_is_a_failure_of_ours() {
    let seen = Seen::exporting(AccessLogMode::Failures);
    let record = seen.begin(Direction::Inbound, &[]);
    let task = tokio::spawn(async move {
        let _record = record;
        panic!("a bug, made on purpose");
    });
    assert!(task.await.is_err());
    assert_eq!(seen.lines().await[0]["failure"], "internal");
}

#[tokio::test]
async fn a_full_queue_drops_spans_and_counts_them() {
    let variables = [("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9"), ("OTEL_BSP_MAX_QUEUE_SIZE", "2")];
    let mut seen = Seen::new(AccessLogMode::Off, &variables);
    (0..5).for_each(|_| drop(seen.begin(Direction::Inbound, &[("traceparent", PARENT)])));
    assert_eq!(seen.spans().len(), 2);
    assert!(seen.counted("weft_spans_dropped_total{reason=\"queue_full\"} 3"));
}

#[tokio::test]
async fn opaque_connections_and_refusals_have_lines() {
    let seen = Seen::exporting(AccessLogMode::All);
    let from = "10.0.0.7:40000".parse().unwrap();
    let handles = seen.telemetry.metrics().service(Direction::Inbound, "db", "");
    let mut opaque = seen.telemetry.connection(Direction::Inbound, from);
    opaque.peer(Some(&CALLER.parse().unwrap()));
    opaque.opened(Security::MutualTls, Protocol::Opaque);
    opaque.service(&handles);
    opaque.endpoint(endpoint());
    opaque.sent(10);
    opaque.received(1500);
    opaque.received(500);
    assert!(
        seen.counted("weft_tcp_bytes_total{direction=\"inbound\",service=\"db\",flow=\"received\"} 2000"),
        "counted while it is open"
    );
    assert!(
        seen.counted("weft_connections_active{direction=\"inbound\",security=\"mtls\",protocol=\"tcp\"} 1")
    );
    drop(opaque);
    let mut refused = seen.telemetry.connection(Direction::Inbound, from);
    refused.fail(Failed::new(Failure::UntrustedPeer, "the certificate is expired"));
    drop(refused);
    let mut http = seen.telemetry.connection(Direction::Inbound, from);
    http.opened(Security::Plaintext, Protocol::Http1);
    drop(http);

    let [opaque, refused] = &seen.lines().await[..] else { panic!("two lines") };
    assert_eq!((&opaque["protocol"], &opaque["security"]), (&"tcp".into(), &"mtls".into()));
    assert_eq!((&opaque["request_bytes"], &opaque["response_bytes"]), (&10.into(), &2000.into()));
    assert_eq!((&opaque["service"], &opaque["peer_identity"]), (&"db".into(), &CALLER.into()));
    assert_eq!(refused["failure"], "untrusted_peer");
    assert!(refused.as_object().unwrap().contains_key("peer_identity") && refused["peer_identity"].is_null());
    assert_eq!(refused["own_identity"], "spiffe://mesh.local/ns/shop/sa/orders");
    assert!(
        seen.counted("weft_connections_active{direction=\"inbound\",security=\"mtls\",protocol=\"tcp\"} 0")
    );
    assert!(
        seen.counted("weft_tcp_bytes_total{direction=\"inbound\",service=\"db\",flow=\"received\"} 2000")
    );
    assert!(
        seen.counted("weft_connection_failures_total{direction=\"inbound\",failure=\"untrusted_peer\"} 1")
    );
    assert!(seen.counted("weft_plaintext_callers_total{address=\"10.0.0.7\"} 1"));
}

#[tokio::test]
async fn a_permit_is_released_when_record_and_body_are_gone_whichever_goes_last() {
    let seen = Seen::exporting(AccessLogMode::All);
    let permits = Arc::new(tokio::sync::Semaphore::new(1));
    let begin = || {
        let mut record = seen.begin(Direction::Inbound, &[]);
        record.keep(permits.clone().try_acquire_owned().unwrap());
        record
    };
    let record = begin();
    assert_eq!(permits.available_permits(), 0);
    drop(record);
    assert_eq!(permits.available_permits(), 1, "a request without a body");
    for body_goes_last in [true, false] {
        let mut record = begin();
        let body = record.request_body();
        let (first, last): (Box<dyn Any>, Box<dyn Any>) = if body_goes_last {
            (Box::new(record), Box::new(body))
        } else {
            (Box::new(body), Box::new(record))
        };
        drop(first);
        assert_eq!(permits.available_permits(), 0, "the body goes last: {body_goes_last}");
        drop(last);
        assert_eq!(permits.available_permits(), 1);
    }
}
