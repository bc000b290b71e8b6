//! Spans of the sidecar, read back from real OTLP receivers: gRPC, HTTP with protobuf, HTTP with JSON. Each test
//! runs on one single-threaded runtime, as the sidecar's control work does.

use std::{
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming, header::HeaderMap, service::service_fn};
use hyper_util::rt::TokioIo;
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    trace::v1::{ResourceSpans, Span},
};
use prost::Message;
use tokio::{
    net::TcpListener,
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    task::JoinHandle,
    time::timeout,
};
use tokio_stream::wrappers::TcpListenerStream;
use weft_sidecar::{
    config::AccessLogMode,
    model::{Failed, Failure, Protocol},
    telemetry::{AccessLog, AccessLogTarget, Cut, Direction, Metrics, Telemetry, TraceSettings},
};

const PATIENCE: Duration = Duration::from_secs(30);
const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const TRACE_ID: &str = "0af7651916cd43dd8448eb211c80319c";

/// A telemetry of a service `orders` with these variables, its export running.
fn telemetry(variables: &[(&str, &str)]) -> (Arc<Telemetry>, JoinHandle<anyhow::Result<()>>) {
    let read = |name: &str| {
        variables.iter().find(|(variable, _)| *variable == name).map(|(_, value)| (*value).to_owned())
    };
    let (settings, problems) = TraceSettings::read(read, "orders");
    assert!(problems.is_empty(), "{problems:?}");
    let metrics = Arc::new(Metrics::new());
    let log = AccessLog::open(AccessLogMode::Off, &AccessLogTarget::Stdout, &metrics).unwrap();
    let (telemetry, export) = Telemetry::new(&settings, log, metrics);
    (telemetry, tokio::spawn(export.expect("an endpoint is given").run()))
}

/// An outbound request with a retry: three spans.
fn call(telemetry: &Arc<Telemetry>) {
    let handles = telemetry.metrics().service(Direction::Outbound, "stock", "");
    let request =
        Request::get("http://stock:8080/items?secret").header("traceparent", PARENT).body(()).unwrap();
    let from = SocketAddr::from((Ipv4Addr::LOCALHOST, 40_000));
    let endpoint = SocketAddr::from(([10, 1, 0, 9], 8080));
    let mut record = telemetry.begin(&handles, Protocol::Http1, from, &request, &Cut::default());
    record.attempt(endpoint, None);
    record.attempt_failed(&Failed::new(Failure::ConnectRefused, "10.1.0.9:8080 refused"));
    record.attempt(endpoint, Some(Failure::ConnectRefused.label()));
    record.attempt_answered(200);
    record.status(200);
    record.complete();
}

fn counted(telemetry: &Telemetry, line: &str) -> bool {
    telemetry.metrics().expose(false).contains(line)
}

async fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    (listener, url)
}

/// What a gRPC collector got, metadata and message, and what it answers with, the last one first; then it agrees.
#[derive(Clone)]
struct Collector(UnboundedSender<(HeaderMap, ExportTraceServiceRequest)>, Arc<Mutex<Vec<tonic::Status>>>);

impl Collector {
    fn serve(
        listener: TcpListener,
        refusals: Vec<tonic::Status>,
    ) -> UnboundedReceiver<(HeaderMap, ExportTraceServiceRequest)> {
        let (sender, got) = unbounded_channel();
        let service = TraceServiceServer::new(Collector(sender, Arc::new(Mutex::new(refusals))));
        let server = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        got
    }
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        let headers = request.metadata().clone().into_headers();
        let _ = self.0.send((headers, request.into_inner()));
        match self.1.lock().unwrap().pop() {
            Some(refusal) => Err(refusal),
            None => Ok(tonic::Response::new(ExportTraceServiceResponse::default())),
        }
    }
}

/// An HTTP collector that answers with `status`, with 429 that it needs half of eternity; what it got: path, headers,
/// body.
fn http_collector(
    listener: TcpListener,
    status: Arc<Mutex<u16>>,
) -> UnboundedReceiver<(String, HeaderMap, Bytes)> {
    let (sender, receiver) = unbounded_channel();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (sender, status) = (sender.clone(), status.clone());
            let answer = service_fn(move |request: Request<Incoming>| {
                let (sender, status) = (sender.clone(), *status.lock().unwrap());
                async move {
                    let (head, body) = request.into_parts();
                    let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
                    let _ = sender.send((head.uri.path().to_owned(), head.headers, body));
                    let answer = Response::builder().status(status);
                    let answer = match status {
                        429 => answer.header("retry-after", u64::MAX),
                        _ => answer,
                    };
                    let answer = answer.body(Full::<Bytes>::default());
                    Ok::<_, Infallible>(answer.unwrap())
                }
            });
            let serve =
                hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), answer);
            tokio::spawn(serve);
        }
    });
    receiver
}

fn text(span: &Span, name: &str) -> Option<String> {
    use opentelemetry_proto::tonic::common::v1::any_value::Value;
    let value = span.attributes.iter().find(|attribute| attribute.key == name)?.value.clone()?.value?;
    match value {
        Value::StringValue(text) => Some(text),
        Value::IntValue(number) => Some(number.to_string()),
        other => Some(format!("{other:?}")),
    }
}

/// The three spans of [`call`] as one tree below the caller's span, from a service `shop`.
fn check(resources: &[ResourceSpans]) {
    let service = resources[0].resource.as_ref().unwrap().attributes.iter().find(|a| a.key == "service.name");
    assert!(format!("{service:?}").contains("\"shop\""), "{service:?}");
    check_spans(resources);
}

fn check_spans(resources: &[ResourceSpans]) {
    let [resource] = resources else { panic!("one resource: {resources:?}") };
    let spans: Vec<&Span> = resource.scope_spans.iter().flat_map(|scope| &scope.spans).collect();
    let [refused, answered, client] = spans[..] else { panic!("three spans: {spans:?}") };
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert!(spans.iter().all(|span| hex(&span.trace_id) == TRACE_ID));
    assert_eq!(hex(&client.parent_span_id), "b7ad6b7169203331");
    assert_eq!((&refused.parent_span_id, &answered.parent_span_id), (&client.span_id, &client.span_id));
    assert_eq!(text(refused, "error.type").as_deref(), Some("connect_refused"));
    assert_eq!(text(answered, "weft.attempt").as_deref(), Some("2"));
    assert_eq!(text(client, "url.path").as_deref(), Some("/items"));
    assert!(client.end_time_unix_nano >= client.start_time_unix_nano && client.start_time_unix_nano > 0);
    assert!(!format!("{spans:?}").contains("secret"));
}

#[tokio::test]
async fn spans_arrive_over_grpc() {
    let (listener, url) = listen().await;
    let mut got = Collector::serve(listener, Vec::new());
    let (telemetry, export) = telemetry(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &url),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "Authorization=Bearer%20abc"),
        ("OTEL_SERVICE_NAME", "shop"),
    ]);
    call(&telemetry);
    telemetry.flush(PATIENCE).await;
    let (headers, request) = got.try_recv().expect("a flush waits until the spans have arrived");
    assert_eq!(headers["authorization"], "Bearer abc");
    check(&request.resource_spans);
    assert!(counted(&telemetry, "weft_spans_exported_total 3"));
    drop(telemetry);
    timeout(PATIENCE, export).await.expect("the export ends with its telemetry").unwrap().unwrap();
}

#[tokio::test]
async fn spans_arrive_over_http_with_protobuf() {
    let (listener, url) = listen().await;
    let mut got = http_collector(listener, Arc::new(Mutex::new(200)));
    let (telemetry, _export) = telemetry(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &url),
        ("OTEL_EXPORTER_OTLP_HEADERS", "tenant=a"),
        ("OTEL_RESOURCE_ATTRIBUTES", "service.name=shop"),
    ]);
    call(&telemetry);
    telemetry.flush(PATIENCE).await;
    let (path, headers, body) = got.try_recv().unwrap();
    assert_eq!(
        (path.as_str(), &headers["content-type"]),
        ("/v1/traces", &"application/x-protobuf".parse().unwrap())
    );
    assert_eq!(headers["tenant"], "a");
    check(&ExportTraceServiceRequest::decode(body).unwrap().resource_spans);
}

#[tokio::test]
async fn spans_arrive_over_http_with_json() {
    let (listener, url) = listen().await;
    let mut got = http_collector(listener, Arc::new(Mutex::new(200)));
    let (telemetry, _export) = telemetry(&[
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", &format!("{url}/own/path")),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
    ]);
    call(&telemetry);
    telemetry.flush(PATIENCE).await;
    let (path, headers, body) = got.try_recv().unwrap();
    assert_eq!(
        (path.as_str(), &headers["content-type"]),
        ("/own/path", &"application/json".parse().unwrap())
    );
    let json: serde_json::Value = serde_json::from_slice(&body).unwrap();
    let spans = json["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array().unwrap();
    assert_eq!(spans.len(), 3);
    // OTLP/JSON writes ids in hexadecimal, not in base64.
    assert!(spans.iter().all(|span| span["traceId"] == TRACE_ID), "{json}");
    assert_eq!(spans[2]["parentSpanId"], "b7ad6b7169203331");
    assert_eq!((&spans[1]["parentSpanId"], &spans[2]["name"]), (&spans[2]["spanId"], &"GET stock".into()));
}

#[tokio::test]
async fn a_batch_goes_out_by_itself_when_full_or_old() {
    let (listener, url) = listen().await;
    let mut got = http_collector(listener, Arc::new(Mutex::new(200)));
    let (telemetry, _export) = telemetry(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &url),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2"),
        ("OTEL_BSP_SCHEDULE_DELAY", "50"),
    ]);
    call(&telemetry);
    for expected in [2, 1] {
        let (_, _, body) = timeout(PATIENCE, got.recv()).await.unwrap().unwrap();
        let request = ExportTraceServiceRequest::decode(body).unwrap();
        assert_eq!(request.resource_spans[0].scope_spans[0].spans.len(), expected);
    }
}

#[tokio::test]
async fn a_collector_that_refuses_or_is_away_costs_spans_only() {
    let (listener, url) = listen().await;
    let status = Arc::new(Mutex::new(400));
    let mut got = http_collector(listener, status.clone());
    let (telemetry_a, export) = telemetry(&[("OTEL_EXPORTER_OTLP_ENDPOINT", &url)]);
    call(&telemetry_a);
    telemetry_a.flush(PATIENCE).await;
    assert!(counted(&telemetry_a, "weft_spans_dropped_total{reason=\"export_failed\"} 3"));
    *status.lock().unwrap() = 200;
    call(&telemetry_a);
    telemetry_a.flush(PATIENCE).await;
    assert!(counted(&telemetry_a, "weft_spans_exported_total 3"));
    assert!(got.try_recv().is_ok() && got.try_recv().is_ok());
    drop(telemetry_a);
    timeout(PATIENCE, export).await.unwrap().unwrap().unwrap();

    let (listener, url) = listen().await;
    drop(listener);
    for protocol in ["grpc", "http/protobuf"] {
        let (telemetry, _export) = telemetry(&[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &url),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", protocol),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "300"),
        ]);
        call(&telemetry);
        telemetry.flush(PATIENCE).await;
        assert!(counted(&telemetry, "weft_spans_dropped_total{reason=\"export_failed\"} 3"), "{protocol}");
    }
}

#[tokio::test]
async fn what_a_collector_refuses_for_now_is_sent_again() {
    let (listener, url) = listen().await;
    let status = Arc::new(Mutex::new(503));
    let mut got = http_collector(listener, status.clone());
    let (telemetry_a, _export) = telemetry(&[("OTEL_EXPORTER_OTLP_ENDPOINT", &url)]);
    call(&telemetry_a);
    let again = async {
        let (_, _, first) = got.recv().await.unwrap();
        *status.lock().unwrap() = 200;
        let (_, _, second) = got.recv().await.unwrap();
        assert_eq!(first, second);
    };
    tokio::join!(timeout(PATIENCE, again), telemetry_a.flush(PATIENCE)).0.unwrap();
    assert!(counted(&telemetry_a, "weft_spans_exported_total 3"));
    // Later than the timeout is never.
    *status.lock().unwrap() = 429;
    call(&telemetry_a);
    telemetry_a.flush(PATIENCE).await;
    assert!(counted(&telemetry_a, "weft_spans_dropped_total{reason=\"export_failed\"} 3"));
    assert!(got.try_recv().is_ok() && got.try_recv().is_err());

    let (listener, url) = listen().await;
    let refusals = vec![tonic::Status::unavailable("soon"), tonic::Status::unavailable("not yet")];
    let mut got = Collector::serve(listener, refusals);
    let (telemetry_b, _export) =
        telemetry(&[("OTEL_EXPORTER_OTLP_ENDPOINT", &url), ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")]);
    call(&telemetry_b);
    telemetry_b.flush(PATIENCE).await;
    assert!(counted(&telemetry_b, "weft_spans_exported_total 3"));
    for _ in 0..3 {
        check_spans(&got.try_recv().unwrap().1.resource_spans);
    }
}
