//! Micro benchmarks of the pure steps that a request goes through, with the sidecar's public API:
//! `cargo bench -p weft-tests --bench steps [PART OF A NAME]`.
//!
//! They tell which step a change made slower, not what a request costs: that is `tests/bench/instructions` and
//! `tests/bench/run`. Nothing here asserts a time.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use divan::{Bencher, black_box};
use http_body_util::Empty;
use hyper::{Request, http::HeaderMap, http::uri::Authority};
use tokio::time::Instant;
use weft_sidecar::{
    balance::{Balancer, Condition},
    config::AccessLogMode,
    detect,
    discovery::{Directory, VirtualAddresses},
    http::headers,
    model::{Breaker, Budget, Endpoint, HttpVersion, Protocol, Registered, Retries, Service},
    policy::{budget::Bucket, deadline::Deadline, retry},
    telemetry::{
        AccessLog, AccessLogTarget, Cut, Direction, Incoming, Metrics, Propagators, Record, Sampler,
        ServiceMetrics, SpanExport, Telemetry, TraceContext, TraceSettings,
    },
};

/// 20,000 iterations of each: enough for steps of nanoseconds, and few enough for the queue of spans below.
const SAMPLES: u32 = 100;
const SAMPLE_SIZE: u32 = 200;

fn main() {
    divan::Divan::default().sample_count(SAMPLES).sample_size(SAMPLE_SIZE).config_with_args().main();
}

const MOST_FIELDS: usize = 100;
const APP: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 40_000);

/// What a browser behind a traced app sends.
fn request() -> Request<Empty<Bytes>> {
    Request::get("/v1/items?page=2")
        .header("host", "orders.default.svc:8080")
        .header("connection", "keep-alive")
        .header("accept", "application/json")
        .header("user-agent", "shop/3.1")
        .header("cookie", "session=0123456789abcdef")
        .header("x-request-id", "8d1b6f5e-9f0e-4f0f-8f57-3c8e8a3e7d2c")
        .header("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00")
        .header("tracestate", "shop=1")
        .body(Empty::new())
        .expect("a request")
}

// --- trace context ----------------------------------------------------------------------------------------------

/// The headers of callers: without a trace, of the W3C, B3 in several headers.
fn trace_headers(kind: &str) -> HeaderMap {
    let mut request = request();
    let headers = request.headers_mut();
    if kind != "w3c" {
        headers.remove("traceparent");
        headers.remove("tracestate");
    }
    if kind == "b3multi" {
        for (name, value) in [
            ("x-b3-traceid", "0af7651916cd43dd8448eb211c80319c"),
            ("x-b3-spanid", "b7ad6b7169203331"),
            ("x-b3-sampled", "0"),
        ] {
            headers.insert(name, value.parse().expect("a header value"));
        }
    }
    headers.clone()
}

#[divan::bench(args = ["none", "w3c", "b3multi"])]
fn trace_extract(bencher: Bencher, kind: &str) {
    let headers = trace_headers(kind);
    bencher.bench_local(|| Propagators::DEFAULT.extract(black_box(&headers)));
}

#[divan::bench(args = ["none", "w3c", "b3multi"])]
fn trace_inject(bencher: Bencher, kind: &str) {
    let headers = trace_headers(kind);
    let incoming: Incoming = Propagators::DEFAULT.extract(&headers);
    let context = TraceContext::begin(&incoming, &Sampler::DEFAULT, &mut fastrand::Rng::with_seed(1));
    let fresh = || headers.clone();
    bencher
        .with_inputs(fresh)
        .bench_local_refs(|headers| Propagators::DEFAULT.inject(black_box(&context), headers));
}

// --- headers between hops ---------------------------------------------------------------------------------------

#[divan::bench]
fn headers_check(bencher: Bencher) {
    let request = request();
    bencher.bench_local(|| headers::check(black_box(&request), MOST_FIELDS));
}

#[divan::bench]
fn headers_remove_per_hop(bencher: Bencher) {
    bencher.with_inputs(request).bench_local_refs(|request| headers::remove_per_hop(request.headers_mut()));
}

#[divan::bench]
fn headers_remove_ours(bencher: Bencher) {
    bencher.with_inputs(request).bench_local_refs(|request| headers::remove_ours(request.headers_mut()));
}

#[divan::bench(args = [HttpVersion::Http1, HttpVersion::Http2])]
fn headers_frame_for(bencher: Bencher, version: HttpVersion) {
    let checked = || {
        let mut request = request();
        let authority = headers::check(&request, MOST_FIELDS).expect("a good request");
        headers::remove_per_hop(request.headers_mut());
        (request, authority)
    };
    let fallback = || Authority::from_static("orders");
    bencher.with_inputs(checked).bench_local_refs(|(request, host)| {
        headers::frame_for(request, version, host.take(), None, fallback)
    });
}

// --- who is meant, and who takes it -----------------------------------------------------------------------------

fn endpoints(first: u32, count: u32) -> Vec<Endpoint> {
    let address = |number: u32| SocketAddr::new(Ipv4Addr::from_bits(0x0a00_0000 + number).into(), 8080);
    (first..first + count).map(|number| Endpoint::at(address(number))).collect()
}

/// 1,000 services with 10 endpoints each.
fn directory() -> Directory {
    let service = |number: u32| Service {
        is_identity_unreadable: false,
        name: format!("service-{number}").parse().expect("a name"),
        protocol: None,
        identities: Vec::new(),
        addresses: vec![SocketAddr::new(Ipv4Addr::from_bits(0xac10_0000 + number).into(), 80)],
        endpoints: endpoints(number * 10, 10),
        registered: Registered::Yes,
    };
    Directory::new((0..1_000).map(service).collect())
}

#[divan::bench(args = ["virtual", "service", "endpoint", "unknown"])]
fn directory_lookup(bencher: Bencher, destination: &str) {
    let (directory, virtuals) = (directory(), VirtualAddresses::in_memory());
    virtuals.follow(&directory, SystemTime::UNIX_EPOCH);
    let service = directory.service(&"service-500".parse().expect("a name")).expect("the service");
    let destination = match destination {
        "virtual" => {
            let address = virtuals.address_of(&service.name, SystemTime::UNIX_EPOCH).expect("an address");
            SocketAddr::new(address.into(), 80)
        }
        "service" => service.addresses[0],
        "endpoint" => service.endpoints[5].address,
        _ => SocketAddr::from(([192, 0, 2, 1], 80)),
    };
    bencher.bench_local(|| directory.lookup(black_box(destination), &virtuals));
}

/// A whole attempt: chosen, answered, done.
#[divan::bench(args = [3, 100, 10_000])]
fn balancer_attempt(bencher: Bencher, count: u32) {
    let balancer = Balancer::new(Breaker::default(), 1);
    balancer.update(service_of(endpoints(0, count)));
    let mut now = Instant::now();
    bencher.bench_local(|| {
        let mut picked = balancer.pick(&[], now).expect("an endpoint");
        now += Duration::from_micros(100);
        picked.answered(now);
        picked.completed(now);
    });
}

fn service_of(endpoints: Vec<Endpoint>) -> Arc<Service> {
    Arc::new(Service { endpoints, ..Service::named("orders".parse().expect("a name")) })
}

/// What the first call of a service takes; of one with many endpoints, beside the worker.
#[divan::bench(args = [100, 10_000], sample_size = 1)]
fn balancer_begin(bencher: Bencher, count: u32) {
    let service = service_of(endpoints(0, count));
    bencher.bench_local(|| {
        let balancer = Balancer::new(Breaker::default(), 1);
        balancer.update(service.clone());
        balancer
    });
}

/// What the control thread does when one endpoint has changed; a worker that wants to choose waits for a part of it.
#[divan::bench(args = [100, 10_000], sample_size = 1)]
fn balancer_update(bencher: Bencher, count: u32) {
    let before = service_of(endpoints(0, count));
    let after = service_of(endpoints(1, count));
    let balancer = Balancer::new(Breaker::default(), 1);
    bencher.bench_local(|| {
        balancer.update(before.clone());
        balancer.update(after.clone());
    });
}

/// An attempt that fails while nearly all endpoints are out.
#[divan::bench(args = [100, 10_000], sample_size = 10)]
fn balancer_outage(bencher: Bencher, count: u32) {
    let policy = Breaker { max_ejected_percent: 100, ..Breaker::default() };
    let balancer = Balancer::new(policy, 1);
    let endpoints = endpoints(0, count);
    let now = Instant::now();
    balancer.update(service_of(endpoints.clone()));
    for endpoint in &endpoints {
        while balancer.pick_only(endpoint.address, now).expect("an endpoint").failed(now).is_none() {
            if balancer.conditions(now).iter().filter(|one| **one != Condition::Ejected).count() < 2 {
                break;
            }
        }
    }
    bencher.bench_local(|| balancer.pick(&[], now).expect("an endpoint").failed(now));
}

// --- decisions --------------------------------------------------------------------------------------------------

#[divan::bench]
fn retry_budget_deposit(bencher: Bencher) {
    let (budget, mut now) = (Budget::default(), Instant::now());
    let mut bucket = Bucket::new(&budget, now);
    bencher.bench_local(|| {
        now += Duration::from_micros(100);
        bucket.deposit(&budget, now);
    });
}

#[divan::bench]
fn retry_budget_take(bencher: Bencher) {
    let (budget, mut now) = (Budget::default(), Instant::now());
    let mut bucket = Bucket::new(&budget, now);
    bencher.bench_local(|| {
        now += Duration::from_millis(100);
        bucket.take(&budget, now)
    });
}

/// The verdict over an answer that needs no retry, as nearly all.
#[divan::bench]
fn retry_decide(bencher: Bencher) {
    let (policy, now) = (Retries { statuses: vec![502, 503], ..Retries::default() }, Instant::now());
    let mut bucket = Bucket::new(&policy.budget, now);
    let mut random = fastrand::Rng::with_seed(1);
    let outcome = retry::Outcome::Answered { status: 200, retry_after: None, pushback: None };
    let attempt = retry::Attempt { number: 1, method: "GET", outcome, replayable: true, remaining: None };
    bencher.bench_local(|| {
        let attempt = black_box(&attempt);
        retry::decide(&policy, attempt, &mut bucket, &mut random, now, SystemTime::UNIX_EPOCH)
    });
}

/// From the headers of a call to those for the next hop.
#[divan::bench]
fn deadline() -> (Option<String>, Option<String>) {
    let (start, limit) = (black_box(Instant::now()), Some(Duration::from_secs(5)));
    let deadline = Deadline::start(limit, black_box(Some("2500m")), black_box(Some("3000")), start);
    (deadline.weft_header(start), deadline.grpc_header(Some("2500m"), start))
}

// --- telemetry --------------------------------------------------------------------------------------------------

/// Records of requests as a worker makes them.
struct Recorder {
    telemetry: Arc<Telemetry>,
    handles: Arc<ServiceMetrics>,
    cut: Cut,
    /// Kept so that the queue of spans stays open; nobody empties it.
    _export: Option<SpanExport>,
}

/// Room for all spans of a run: one that is dropped is cheap.
const SPANS: usize = 1 << 20;

impl Recorder {
    fn new(traced: f64, log: AccessLogMode) -> Recorder {
        let variable = |name: &str| match name {
            "OTEL_TRACES_SAMPLER" => Some("parentbased_traceidratio".to_owned()),
            "OTEL_TRACES_SAMPLER_ARG" => Some(traced.to_string()),
            "OTEL_TRACES_EXPORTER" => Some(if traced == 0.0 { "none" } else { "otlp" }.to_owned()),
            "OTEL_EXPORTER_OTLP_ENDPOINT" => Some("http://127.0.0.1:4318".to_owned()),
            _ => None,
        };
        let (mut settings, problems) = TraceSettings::read(variable, "shop");
        assert!(problems.is_empty(), "{problems:?}");
        if let Some(export) = &mut settings.export {
            export.queue = SPANS;
        }
        let metrics = Arc::new(Metrics::new());
        let nowhere = AccessLogTarget::File("/dev/null".into());
        let log = AccessLog::open(log, &nowhere, &metrics).expect("an access log");
        let (telemetry, _export) = Telemetry::new(&settings, log, Arc::clone(&metrics));
        let handles = metrics.service(Direction::Outbound, "orders", "");
        Recorder { telemetry, handles, cut: Cut::default(), _export }
    }

    /// A request with one attempt that is answered.
    fn record(&self, request: &Request<Empty<Bytes>>) -> Record {
        let telemetry = &self.telemetry;
        let mut record = telemetry.begin(&self.handles, Protocol::Http1, APP, request, &self.cut);
        record.attempt(APP, None);
        record.attempt_answered(200);
        record.status(200);
        record.add_response_bytes(100);
        record.complete();
        record
    }

    fn bench(&self, bencher: Bencher) {
        let mut request = request();
        request.headers_mut().remove("traceparent");
        bencher.bench_local(|| drop(self.record(black_box(&request))));
    }
}

/// Begin to end with metrics and a log of failures, as by default; so much of it traced.
#[divan::bench(args = [0.0, 0.01, 1.0])]
fn record_traced(bencher: Bencher, share: f64) {
    Recorder::new(share, AccessLogMode::Failures).bench(bencher);
}

/// The same without tracing, and with a line for every request.
#[divan::bench]
fn record_logged(bencher: Bencher) {
    Recorder::new(0.0, AccessLogMode::All).bench(bencher);
}

#[divan::bench]
fn metrics_attempt(bencher: Bencher) {
    let handles = Metrics::new().service(Direction::Outbound, "orders", "");
    bencher.bench_local(|| handles.attempt(black_box(None)));
}

// --- what a client speaks ---------------------------------------------------------------------------------------

/// What a client of TLS sends first.
fn hello() -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions of TLS")
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let name = "orders.default.svc".try_into().expect("a name");
    let mut connection = rustls::ClientConnection::new(Arc::new(config), name).expect("a client");
    let mut bytes = Vec::new();
    connection.write_tls(&mut bytes).expect("a hello");
    bytes
}

#[divan::bench(args = ["http1", "http2", "tls", "tcp"])]
fn detect_classify(bencher: Bencher, spoken: &str) {
    let bytes = match spoken {
        "http1" => b"GET /v1/items?page=2 HTTP/1.1\r\nhost: orders\r\n\r\n".to_vec(),
        "http2" => b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec(),
        "tls" => hello(),
        _ => b"*1\r\n$4\r\nPING\r\n".to_vec(),
    };
    bencher.bench_local(|| detect::classify(black_box(&bytes)));
}

#[divan::bench]
fn detect_client_hello(bencher: Bencher) {
    let bytes = hello();
    bencher.bench_local(|| detect::client_hello(black_box(&bytes)));
}
