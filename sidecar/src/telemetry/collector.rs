//! The way to the collector: OTLP over gRPC, or over HTTP with protobuf or JSON, in plaintext, and what is tried
//! again ([OTLP](https://opentelemetry.io/docs/specs/otlp/), "OTLP/gRPC" and "OTLP/HTTP").
//!
//! One client of hyper-util keeps the connection, for either; tonic frames gRPC. What the collector says about
//! spans that it refused within a request that it took is not looked at.

use std::{error::Error, time::Duration};

use anyhow::{Context, anyhow, bail};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Request, StatusCode, Uri,
    http::{
        HeaderMap, HeaderName, HeaderValue,
        header::{CONTENT_TYPE, RETRY_AFTER, USER_AGENT},
        uri::PathAndQuery,
    },
};
use hyper_util::{
    client::legacy::{self, Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use prost::Message;
use tokio::time::{Instant, sleep_until, timeout_at};
use tonic::{Code, Status, body::Body, client::Grpc, metadata::MetadataMap};
use tonic_prost::ProstCodec;
use tonic_types::StatusExt;

use super::{
    otlp::ExportRequest,
    settings::{ExportSettings, OtlpProtocol},
};

/// Takes batches.
pub(super) struct Collector {
    client: Client<HttpConnector, Body>,
    protocol: OtlpProtocol,
    endpoint: Uri,
    headers: HeaderMap,
    timeout: Duration,
}

/// Why a batch was not taken.
#[derive(Debug)]
struct Refused {
    why: String,
    /// Try again after this long at the least; none: not again.
    again: Option<Duration>,
}

const EXPORT: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
/// Attempts for one batch.
const ATTEMPTS: u32 = 4;
/// The pause after the first attempt; the next ones are twice as long each.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// A collector that is silent while a batch waits for its answer is asked whether it lives.
const PING_AFTER: Duration = Duration::from_secs(5);
const PING_TIMEOUT: Duration = Duration::from_secs(4);
/// Of a gRPC status, for the log.
const MESSAGE_CHARACTERS: usize = 300;
/// More of an answer is not read: the connection is closed instead.
const ANSWER_BYTES: usize = 64 * 1024;

impl Collector {
    /// Makes the client; nothing is sent yet. Fails where a header or the endpoint cannot be used.
    pub fn new(settings: &ExportSettings) -> anyhow::Result<Collector> {
        let endpoint: Uri = settings
            .endpoint
            .parse()
            .with_context(|| format!("cannot export spans to {}", settings.endpoint))?;
        let is_grpc = settings.protocol == OtlpProtocol::Grpc;
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let client = Client::builder(TokioExecutor::new())
            .http2_only(is_grpc)
            .http2_keep_alive_interval(PING_AFTER)
            .http2_keep_alive_timeout(PING_TIMEOUT)
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .build(connector);
        let headers = headers(&settings.headers)?;
        Ok(Collector { client, protocol: settings.protocol, endpoint, headers, timeout: settings.timeout })
    }

    /// Sends a batch, a few times where that may help, but not for longer than the timeout. The error says why
    /// it was not taken.
    pub async fn send(&self, request: &ExportRequest) -> Result<(), String> {
        let deadline = Instant::now() + self.timeout;
        let mut attempt = 1;
        loop {
            let sent = async {
                match self.protocol {
                    OtlpProtocol::Grpc => self.call(request).await,
                    OtlpProtocol::HttpProtobuf | OtlpProtocol::HttpJson => self.post(request).await,
                }
            };
            let refused = match timeout_at(deadline, sent).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(refused)) => refused,
                Err(_) => return Err(format!("no answer within {:?}", self.timeout)),
            };
            let Some(least) = refused.again.filter(|_| attempt < ATTEMPTS) else { return Err(refused.why) };
            // Nothing that a collector says makes it longer than the timeout, past which nothing is tried.
            let pause = pause(attempt, least.min(self.timeout), &mut fastrand::Rng::new());
            let next = Instant::now() + pause;
            if next >= deadline {
                return Err(refused.why);
            }
            sleep_until(next).await;
            attempt += 1;
        }
    }

    async fn call(&self, request: &ExportRequest) -> Result<(), Refused> {
        let mut origin = self.endpoint.clone().into_parts();
        origin.path_and_query = Some(PathAndQuery::from_static("/"));
        let origin = Uri::from_parts(origin).map_err(|error| Refused::for_good(error.to_string()))?;
        let mut grpc = Grpc::with_origin(self.client.clone(), origin);
        grpc.ready().await.map_err(|error| unreachable(&error))?;
        let mut request = tonic::Request::new(request.clone());
        *request.metadata_mut() = MetadataMap::from_headers(self.headers.clone());
        let codec = ProstCodec::<ExportRequest, ()>::default();
        let answer = grpc.unary(request, PathAndQuery::from_static(EXPORT), codec).await;
        answer.map(drop).map_err(|status| refused_by_grpc(&status))
    }

    async fn post(&self, request: &ExportRequest) -> Result<(), Refused> {
        let (body, content_type) = match self.protocol {
            OtlpProtocol::HttpJson => {
                (request.json().map_err(|error| Refused::for_good(error.to_string()))?, "application/json")
            }
            _ => (request.encode_to_vec(), "application/x-protobuf"),
        };
        let mut request = Request::new(Body::new(Full::from(body)));
        *request.method_mut() = hyper::Method::POST;
        *request.uri_mut() = self.endpoint.clone();
        *request.headers_mut() = self.headers.clone();
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
        let answer = self.client.request(request).await.map_err(|error| unreachable(&error))?;
        let (head, body) = answer.into_parts();
        // Read to its end, so that the connection can be used again.
        let _ = Limited::new(body, ANSWER_BYTES).collect().await;
        match head.status.is_success() {
            true => Ok(()),
            false => Err(refused_by_http(head.status, &head.headers)),
        }
    }
}

impl Refused {
    fn for_good(why: String) -> Refused {
        Refused { why, again: None }
    }
}

/// The pause after this many attempts (1 or more): `least` or longer, and partly random.
fn pause(attempts: u32, least: Duration, random: &mut fastrand::Rng) -> Duration {
    let doubled = FIRST_PAUSE * (1 << attempts.saturating_sub(1).min(ATTEMPTS));
    doubled.max(least) + FIRST_PAUSE.mul_f64(random.f64())
}

fn unreachable(error: &legacy::Error) -> Refused {
    Refused { why: with_causes(error), again: Some(Duration::ZERO) }
}

fn refused_by_http(status: StatusCode, headers: &HeaderMap) -> Refused {
    let why = format!("it answers {status}");
    // A date instead of seconds counts as absent.
    let wait = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.trim().parse().ok());
    match status.as_u16() {
        429 | 502 | 503 | 504 => {
            Refused { why, again: Some(wait.map_or(Duration::ZERO, Duration::from_secs)) }
        }
        _ => Refused::for_good(why),
    }
}

fn refused_by_grpc(status: &Status) -> Refused {
    let transport = status.source().and_then(|source| source.downcast_ref::<legacy::Error>());
    if let Some(error) = transport {
        return unreachable(error);
    }
    let message: String = status.message().chars().take(MESSAGE_CHARACTERS).collect();
    let why = format!("it answers {:?}: {message}", status.code());
    let wait = status.get_details_retry_info().and_then(|details| details.retry_delay);
    let again = match status.code() {
        // May be tried again only where the collector says when.
        Code::ResourceExhausted => wait,
        Code::Unavailable
        | Code::Cancelled
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::OutOfRange
        | Code::DataLoss => Some(wait.unwrap_or(Duration::ZERO)),
        _ => None,
    };
    Refused { why, again }
}

fn with_causes(error: &dyn Error) -> String {
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    causes.fold(error.to_string(), |words, cause| format!("{words}: {cause}"))
}

/// What is sent with each batch. A header that is not valid is refused; its value may be secret.
fn headers(pairs: &[(String, String)]) -> anyhow::Result<HeaderMap> {
    let mut map = HeaderMap::new();
    let agent = concat!("weft-sidecar/", env!("CARGO_PKG_VERSION"));
    map.insert(USER_AGENT, HeaderValue::from_static(agent));
    for (name, value) in pairs {
        let refused = || anyhow!("OTEL_EXPORTER_OTLP_HEADERS: {name:?} is not a header with a valid value");
        let Ok(name) = HeaderName::from_bytes(name.to_ascii_lowercase().as_bytes()) else { bail!(refused()) };
        map.insert(name, HeaderValue::from_str(value).map_err(|_| refused())?);
    }
    Ok(map)
}

#[cfg(test)]
mod tests {
    use tonic_types::ErrorDetails;

    use super::*;

    const NOW: Option<Duration> = Some(Duration::ZERO);

    #[test]
    fn pauses_grow_and_are_no_shorter_than_the_collector_wants() {
        let mut random = fastrand::Rng::with_seed(7);
        let mut within = |attempts, least, from, to| {
            let paused = pause(attempts, Duration::from_millis(least), &mut random).as_millis();
            assert!((from..=to).contains(&paused), "{attempts}, {least}: {paused}");
        };
        for _ in 0..100 {
            within(1, 0, 100, 200);
            within(3, 0, 400, 500);
            within(1, 3000, 3000, 3100);
            within(u32::MAX, 0, 1600, 1700);
        }
    }

    #[test]
    fn what_may_pass_is_tried_again() {
        let http = |status: u16, retry_after: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, HeaderValue::from_static(retry_after));
            refused_by_http(StatusCode::from_u16(status).unwrap(), &headers).again
        };
        assert_eq!(http(503, " 7 "), Some(Duration::from_secs(7)));
        for no_number in ["", "-1", "Fri, 31 Dec 1999 23:59:59 GMT", "99999999999999999999999"] {
            assert_eq!(http(429, no_number), NOW, "{no_number}");
        }
        assert_eq!((http(502, ""), http(504, "")), (NOW, NOW));
        assert_eq!((http(400, "1"), http(500, "1"), http(301, "1")), (None, None, None));

        let grpc = |code| refused_by_grpc(&Status::new(code, "no")).again;
        assert_eq!((grpc(Code::Unavailable), grpc(Code::Aborted)), (NOW, NOW));
        assert_eq!((grpc(Code::InvalidArgument), grpc(Code::Unknown)), (None, None));
        assert_eq!(grpc(Code::ResourceExhausted), None);
        let wait = Duration::from_secs(2);
        let details = ErrorDetails::with_retry_info(Some(wait));
        let exhausted = Status::with_error_details(Code::ResourceExhausted, "later", details);
        assert_eq!(refused_by_grpc(&exhausted).again, Some(wait));
    }

    #[tokio::test]
    async fn a_collector_that_is_not_there_is_tried_again() {
        // Bound, and nobody listens.
        let held = tokio::net::TcpSocket::new_v4().unwrap();
        held.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let mut settings = ExportSettings {
            protocol: OtlpProtocol::Grpc,
            endpoint: format!("http://{}/v1/traces", held.local_addr().unwrap()),
            headers: Vec::new(),
            timeout: Duration::from_secs(60),
            queue: 2,
            batch: 1,
            delay: Duration::from_secs(60),
        };
        let over_grpc = Collector::new(&settings).unwrap().call(&ExportRequest::default()).await;
        settings.protocol = OtlpProtocol::HttpProtobuf;
        let over_http = Collector::new(&settings).unwrap().post(&ExportRequest::default()).await;
        for refused in [over_grpc.unwrap_err(), over_http.unwrap_err()] {
            assert_eq!(refused.again, NOW);
            assert!(refused.why.contains("Connection refused"), "{}", refused.why);
        }
    }

    #[test]
    fn a_header_that_is_not_valid_is_named_without_its_value() {
        let pair = |name: &str, value: &str| [(name.to_owned(), value.to_owned())];
        assert_eq!(headers(&pair("User-Agent", "mine")).unwrap()[USER_AGENT], "mine");
        for wrong in [pair("a b", "secret"), pair("token", "secret\n")] {
            let error = headers(&wrong).unwrap_err().to_string();
            assert!(error.contains(&format!("{:?}", wrong[0].0)) && !error.contains("secret"), "{error}");
        }
    }
}
