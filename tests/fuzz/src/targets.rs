//! What is done with a stranger's bytes, one function per parser: beyond not panicking, each holds its result to
//! what the parser promises. The fuzzer and an ordinary test (`tests/tests/fuzz_corpus.rs`) share them.

use std::{
    net::Ipv4Addr,
    path::Path,
    time::{Duration, SystemTime},
};

use http_body_util::Full;
use hyper::{
    Request, Version,
    body::Bytes,
    header::{HeaderMap, HeaderName, HeaderValue},
    http::uri::Authority,
};
use tokio::time::Instant;
use weft_ca::{request, token};
use weft_proto::{
    certificate::{Leaf, claimed},
    spiffe::SpiffeId,
};
use weft_sidecar::{
    config::{Config, Written, document::Mistakes, policy_document},
    detect::{LOOK, Verdict, classify, client_hello},
    discovery::{Directory, VirtualAddresses, consul::answers, dns, is_virtual, mistakes_in},
    http::headers,
    model::{HttpVersion, Policy, Protocol, Registered, ServiceName},
    policy::deadline::{Deadline, parse_grpc_timeout},
    redirect::is_message,
    telemetry::{Propagators, TraceContext},
};

/// Does something with bytes, and panics if a promise is broken.
pub type Target = fn(&[u8]);

/// All targets by name.
pub const TARGETS: &[(&str, Target)] = &[
    ("certificate", certificate),
    ("certificate_request", certificate_request),
    ("client_hello", hello),
    ("deadline", deadline),
    ("detect", detect),
    ("dns", dns_question),
    ("helper_message", helper_message),
    ("policy_document", policy),
    ("registry_agent", registry_agent),
    ("registry_health", registry_health),
    ("registry_policies", registry_policies),
    ("request_head", request_head),
    ("service_document", service),
    ("settings_file", settings),
    ("spiffe_id", spiffe),
    ("token_file", token_file),
    ("trace_headers", trace_headers),
    ("virtual_addresses", virtual_addresses),
];

/// The target that `WEFT_FUZZ_TARGET` names.
#[allow(dead_code, reason = "for the fuzzer only")]
pub fn chosen() -> Target {
    static CHOSEN: std::sync::OnceLock<Target> = std::sync::OnceLock::new();
    *CHOSEN.get_or_init(|| {
        let name = std::env::var("WEFT_FUZZ_TARGET").unwrap_or_default();
        let found = TARGETS.iter().find(|(other, _)| *other == name);
        found.unwrap_or_else(|| panic!("WEFT_FUZZ_TARGET is {name:?}; expected a target")).1
    })
}

/// A verdict is never taken back, and always out in time.
fn detect(bytes: &[u8]) {
    let mut settled = None;
    let step = (bytes.len() / 256).max(1);
    for length in (0..bytes.len()).step_by(step).chain([bytes.len()]) {
        match (classify(&bytes[..length]), settled) {
            (Verdict::NeedMore, None) => assert!(length < LOOK, "no verdict"),
            (Verdict::NeedMore, Some(before)) => panic!("{before} is taken back"),
            (Verdict::Is(protocol), _) => assert_eq!(*settled.get_or_insert(protocol), protocol),
        }
    }
    if settled == Some(Protocol::Opaque) {
        assert!(
            !bytes.starts_with(b"GET / HTTP/1.1\r\n")
                && !bytes.starts_with(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        );
    }
}

/// What follows a hello changes nothing.
fn hello(bytes: &[u8]) {
    let heard = client_hello(bytes);
    if let weft_sidecar::detect::Hello::Parsed { sni, .. } = &heard {
        assert!(sni.as_ref().is_none_or(|name| *name == name.to_ascii_lowercase()));
        assert_eq!(client_hello(&[bytes, b"more"].concat()), heard);
    }
}

/// Lines of `name: value`.
fn header_map(bytes: &[u8]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for line in bytes.split(|byte| *byte == b'\n').take(64) {
        let Some(at) = line.iter().position(|byte| *byte == b':') else { continue };
        let name = HeaderName::from_bytes(&line[..at]);
        if let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(line[at + 1..].trim_ascii())) {
            headers.append(name, value);
        }
    }
    headers
}

/// What is written is read again.
fn trace_headers(bytes: &[u8]) {
    let mut headers = header_map(bytes);
    let all = Propagators::DEFAULT;
    let found = all.extract(&headers);
    let Some(parent) = found.parent else { return };
    assert!(parent.trace_id != 0 && parent.span_id != 0);
    let context = TraceContext {
        trace_id: parent.trace_id,
        span_id: 7,
        parent_id: parent.span_id,
        parent_is_remote: true,
        sampled: true,
        debug: found.debug,
        decided: found.decision.is_some(),
        formats: found.formats,
        undecided: found.undecided,
    };
    all.inject(&context, &mut headers);
    let again = all.extract(&headers);
    let parent_again = again.parent.expect("what we wrote");
    assert_eq!((parent_again.trace_id, parent_again.span_id), (parent.trace_id, 7));
    assert_eq!((again.debug, again.undecided), (found.debug, found.undecided));
}

/// An answer bears the id of its question; what is forwarded is a question; not every answer is ours.
fn dns_question(bytes: &[u8]) {
    let directory = Directory::default();
    match dns::decide(bytes, &directory, dns::Asking::Possible, |_| Some(Ipv4Addr::new(240, 0, 0, 1))) {
        dns::Decision::Answer(answer) => {
            assert_eq!(answer[..2], bytes[..2]);
            assert!(answer[2] & 0x80 != 0, "an answer that says it is a question");
        }
        dns::Decision::Forward => assert!(bytes[2] & 0x80 == 0, "an answer is forwarded"),
        dns::Decision::Ask(_) | dns::Decision::Silence => {}
    }
    // The same bytes as a resolver's answer: only one with our id and question is passed on.
    if dns::answers(QUESTION, bytes) {
        assert!(bytes[..2] == QUESTION[..2] && bytes[2] & 0x80 != 0);
    }
}

/// `example. IN A`, with the id 0x1234.
const QUESTION: &[u8] = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x07example\0\0\x01\0\x01";

fn service(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    for mistake in mistakes_in(text) {
        assert!(!mistake.text.is_empty());
    }
}

/// Without mistakes there is a policy.
fn policy(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let mut mistakes = Mistakes::new(Path::new("policy"));
    let read = policy_document::read(text, &Policy::default(), &mut mistakes);
    let found = mistakes.or_else(());
    assert!(read.is_some() || found.is_err(), "no policy and no mistake");
    assert!(found.err().is_none_or(|mistakes| !mistakes.is_empty()));
}

/// Every address is ours and stands for the name that has it.
fn virtual_addresses(bytes: &[u8]) {
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
    let Ok(table) = VirtualAddresses::from_bytes(bytes, now) else { return };
    let name: ServiceName = "orders".parse().expect("a name");
    if let Some(address) = table.address_of(&name, now) {
        assert!(is_virtual(address.into()));
        assert_eq!(table.name_of(address.into()), Some(name));
    }
}

/// What was read prints as it was read.
fn spiffe(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(id) = text.parse::<SpiffeId>() {
        assert_eq!((id.as_str(), id.to_string().as_str()), (text, text));
        assert!(text.starts_with(&format!("spiffe://{}", id.trust_domain())));
    }
}

fn certificate(bytes: &[u8]) {
    let _ = Leaf::parse(bytes);
    assert!(claimed(bytes).len() < 64 * 1024);
}

fn certificate_request(bytes: &[u8]) {
    if let Ok(request) = request::Request::parse(bytes) {
        assert!(request.public_key.len() < bytes.len());
    }
}

/// A token that is read can be written and read again.
fn token_file(bytes: &[u8]) {
    if let Ok(token) = token::parse(bytes, "0123456789abcdef0123") {
        assert_eq!(token.identity.to_string().parse::<SpiffeId>().as_ref(), Ok(&token.identity));
    }
    token::name_of(&String::from_utf8_lossy(bytes));
}

/// A request that is taken leaves with one host, one length, no header of a connection and none of the mesh.
/// The bytes are a request line, then header lines.
fn request_head(bytes: &[u8]) {
    let (line, fields) = bytes.split_at(bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len()));
    let line = String::from_utf8_lossy(line);
    let mut words = line.split(' ');
    let (method, uri) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let version = match words.next() {
        Some("HTTP/1.0") => Version::HTTP_10,
        Some("HTTP/2.0") => Version::HTTP_2,
        _ => Version::HTTP_11,
    };
    let build = || {
        let body = Full::new(Bytes::from("body"));
        Request::builder().method(method).uri(uri).version(version).body(body)
    };
    for next in [HttpVersion::Http1, HttpVersion::Http2] {
        let Ok(mut request) = build() else { return };
        *request.headers_mut() = header_map(fields);
        let Ok(authority) = headers::check(&request, 100) else { return };
        headers::remove_ours(request.headers_mut());
        headers::remove_per_hop(request.headers_mut());
        let fallback = || Authority::from_static("fallback");
        let absolute = headers::absolute_scheme(&request);
        if headers::frame_for(&mut request, next, authority, absolute, fallback).is_err() {
            continue;
        }
        let count = |name: &str| request.headers().get_all(name).iter().count();
        // In HTTP/2 a Host that is no authority takes its place.
        let says_host = next == HttpVersion::Http1 || request.uri().authority().is_none();
        assert_eq!(count("host"), usize::from(says_host));
        assert!(count("content-length") + count("transfer-encoding") <= 1);
        assert_eq!(count("connection") + count("upgrade") + count("x-weft-deadline"), 0);
        let path = request.uri().path();
        assert!(path.starts_with('/') || path == "*", "{path:?}");
        assert!(!request.uri().authority().is_some_and(|authority| authority.as_str().contains('@')));
    }
}

/// No header sets a longer time than another; what is passed on is read again and not longer.
fn deadline(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let (grpc, weft) = text.split_once('\n').unwrap_or((&text, ""));
    let now = Instant::now();
    let deadline = Deadline::start(Some(Duration::from_secs(60)), Some(grpc), Some(weft), now);
    let left = deadline.remaining(now).expect("a policy's limit");
    assert!(left <= Duration::from_secs(60));
    if let Some(limit) = parse_grpc_timeout(grpc) {
        assert!(left <= limit);
        let next = deadline.grpc_header(Some(grpc), now).expect("a header");
        assert!(parse_grpc_timeout(&next).expect("our own header") <= left);
    }
    let next = deadline.weft_header(now).expect("a header");
    let again = Deadline::start(None, None, Some(&next), now).remaining(now).expect("our own header");
    assert!(again >= left && again < left + Duration::from_millis(1));
}

fn settings(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Err(mistakes) =
        Config::check(&Written::from_text("settings.yaml", text), ([127, 0, 0, 1], 0).into())
    {
        assert!(!mistakes.0.is_empty());
    }
}

fn helper_message(bytes: &[u8]) {
    is_message(bytes);
}

/// Two answers of Consul, one per line: every endpoint can be dialled, and is there once; what is said of them can
/// be printed; the same answer again changes nothing; one without anybody to call takes nothing away.
fn registry_health(bytes: &[u8]) {
    let (first, second) = two_lines(bytes);
    let (name, now) = ("orders".parse().expect("a name"), Instant::now());
    let (alone, mistakes) = answers::service_after(&name, &[first], now);
    let (service, more) = answers::service_after(&name, &[first, second], now);
    for endpoint in &service.endpoints {
        let ip = endpoint.address.ip();
        assert!(
            endpoint.address.port() != 0 && !is_virtual(ip) && !ip.is_unspecified() && !ip.is_multicast()
        );
        assert!((1..=10_000).contains(&endpoint.weight), "{endpoint:?}");
    }
    assert!(service.endpoints.is_sorted_by(|one, next| one.address < next.address));
    assert!(service.endpoints.is_empty() || service.registered == Registered::Yes);
    assert_printable(mistakes.iter().chain(&more).map(String::as_str));
    assert_eq!(answers::service_after(&name, &[first, first], now).0, alone);
    let (other, refused) = answers::service_after(&name, &[second], now);
    if refused.iter().any(|text| text.contains("the answer cannot be read")) {
        assert_eq!(service, alone);
    }
    if other.endpoints.is_empty() {
        assert_eq!(service.endpoints, alone.endpoints, "lost after an outage");
    }
}

/// Two answers of Consul's key-value store, one per line: what is wrong is named; the same answer again changes
/// nothing; one that cannot be read, and one with an index that went back, take nothing away.
fn registry_policies(bytes: &[u8]) {
    let (first, second) = two_lines(bytes);
    let (alone, mistakes) = answers::policies_after(&[(7, first)]);
    assert_eq!(answers::policies_after(&[(7, first), (7, first)]).0, alone);
    let (_, more) = answers::policies_after(&[(7, first), (8, second)]);
    let texts: Vec<String> = mistakes.iter().chain(&more).map(ToString::to_string).collect();
    assert_printable(texts.iter().map(String::as_str));
    let (lost_state, _) = answers::policies_after(&[(7, first), (1, second)]);
    assert!(alone.keys().all(|name| lost_state.contains_key(name)), "lost with the state of Consul");
}

/// What an agent says beside: a status on the first line, then a body. Its words are repeated shortly, and printable.
fn registry_agent(bytes: &[u8]) {
    let (status, body) = two_lines(bytes);
    let status = std::str::from_utf8(status).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(500);
    let refusal = answers::refusal(status, body, "key:read");
    assert_printable(refusal.as_deref().into_iter());
    if let Some(permission) = answers::missing_permission(body) {
        assert!(permission == "more" || permission.contains(':'));
    }
    answers::clock_ahead(&String::from_utf8_lossy(body));
}

fn two_lines(bytes: &[u8]) -> (&[u8], &[u8]) {
    let mut lines = bytes.splitn(2, |byte| *byte == b'\n');
    (lines.next().unwrap_or_default(), lines.next().unwrap_or_default())
}

/// What stands in the log after a stranger's words: short, and without control characters.
fn assert_printable<'a>(texts: impl Iterator<Item = &'a str>) {
    for text in texts {
        assert!(!text.is_empty() && text.len() < 8 * 1024 && !text.chars().any(char::is_control), "{text:?}");
    }
}
