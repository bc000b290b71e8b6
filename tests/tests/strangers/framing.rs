//! A request that two parsers could read differently is refused, or re-framed so that one reading is left: from
//! an app behind its own sidecar, and from a stranger in plaintext.

use std::{io::Write, net::IpAddr};

use weft_tests::{Mesh, Need, Pod, Sidecar, can_run};

use crate::wire::{
    DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, RST_STREAM, Recorder, dial, exchange, fields, frame, get,
    preface, read_until,
};

/// What becomes of a request.
enum Fate {
    /// The app never hears of it.
    Refused,
    /// The app gets its head, and a body that breaks off; the client is told why.
    Cut,
    /// The app gets it once, with this body.
    Once(&'static str),
}
use Fate::{Cut, Once, Refused};

const INNER: &str = "GET /smuggled HTTP/1.1\r\nHost: orders\r\n\r\n";

/// Fields, body, fate of a POST.
const BODIES: &[(&str, &str, Fate)] = &[
    ("Content-Length: 5\r\n", "hello", Once("hello")),
    ("Content-Length: 5\r\nContent-Length: 5\r\n", "hello", Once("hello")),
    ("Content-Length: 4\r\nTransfer-Encoding: chunked\r\n", "5\r\nhello\r\n0\r\n\r\n", Once("hello")),
    ("Transfer-Encoding: chunked\r\nContent-Length: 4\r\n", "5\r\nhello\r\n0\r\n\r\n", Once("hello")),
    ("Transfer-Encoding: chunked\r\nContent-Length: x\r\n", "5\r\nhello\r\n0\r\n\r\n", Once("hello")),
    ("Content-Length: 40\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n", Once("")),
    ("Transfer-Encoding: chunked\r\nConnection: transfer-encoding\r\n", "0\r\n\r\n", Once("")),
    ("Content-Length: 40\r\nConnection: content-length, host\r\n", INNER, Once(INNER)),
    ("Content-Length: 0\r\nContent-Length: 40\r\n", "", Refused),
    ("Content-Length: 40\r\nContent-Length: 0\r\n", "", Refused),
    ("Content-Length: +5\r\n", "hello", Refused),
    ("Content-Length: -5\r\n", "hello", Refused),
    ("Content-Length: 5, 5\r\n", "hello", Refused),
    ("Content-Length: 5,40\r\n", "hello", Refused),
    ("Content-Length: 0x5\r\n", "hello", Refused),
    ("Content-Length: 5 0\r\n", "hello", Refused),
    ("Content-Length: \r\n", "hello", Refused),
    ("Content-Length: 99999999999999999999999\r\n", "hello", Refused),
    ("Content-Length : 5\r\n", "hello", Refused),
    ("Content-Length\0: 5\r\n", "hello", Refused),
    ("Transfer-Encoding: xchunked\r\n", "0\r\n\r\n", Refused),
    ("Transfer-Encoding: chunked, identity\r\n", "0\r\n\r\n", Refused),
    ("Transfer-Encoding: gzip, chunked\r\n", "0\r\n\r\n", Refused),
    ("Transfer-Encoding: chunked, chunked\r\n", "0\r\n\r\n", Refused),
    ("Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n", Refused),
    ("Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n", "0\r\n\r\n", Refused),
    ("Transfer-Encoding: \x0bchunked\r\n", "0\r\n\r\n", Refused),
    ("Transfer-Encoding : chunked\r\n", "0\r\n\r\n", Refused),
    ("Transfer-Encoding:\r\n chunked\r\n", "0\r\n\r\n", Refused),
    ("X: a\r\n b\r\nContent-Length: 0\r\n", "", Refused),
    (" X: a\r\nContent-Length: 0\r\n", "", Refused),
    ("X: a\rContent-Length: 40\r\n", "", Refused),
    ("X: a\0b\r\nContent-Length: 0\r\n", "", Refused),
    ("X\rY: a\r\nContent-Length: 0\r\n", "", Refused),
    (": a\r\nContent-Length: 0\r\n", "", Refused),
    ("no colon\r\nContent-Length: 0\r\n", "", Refused),
    // A bare LF ends a line for us, as RFC 9112 2.2 allows; the app sees CR LF.
    ("X: a\nContent-Length: 5\n", "hello", Once("hello")),
    ("Transfer-Encoding: chunked\r\n", "5;a=b\r\nhello\r\n0;c\r\n\r\n", Once("hello")),
    ("Transfer-Encoding: chunked\r\n", "005 \r\nhello\r\n0\r\n\r\n", Once("hello")),
    ("Transfer-Encoding: chunked\r\n", "0\r\nContent-Length: 40\r\nHost: evil\r\n\r\n", Once("")),
    ("Transfer-Encoding: chunked\r\n", "0x5\r\nhello\r\n0\r\n\r\n", Cut),
    ("Transfer-Encoding: chunked\r\n", "-5\r\nhello\r\n0\r\n\r\n", Cut),
    ("Transfer-Encoding: chunked\r\n", " 5\r\nhello\r\n0\r\n\r\n", Cut),
    ("Transfer-Encoding: chunked\r\n", "\r\nhello\r\n0\r\n\r\n", Cut),
    ("Transfer-Encoding: chunked\r\n", "5\nhello\r\n0\r\n\r\n", Cut),
    ("Transfer-Encoding: chunked\r\n", "5\rhello\r\n0\r\n\r\n", Cut),
    ("Transfer-Encoding: chunked\r\n", "5;a\nb\r\nhello\r\n0\r\n\r\n", Cut),
    ("Transfer-Encoding: chunked\r\n", "5;a\rb\r\nhello\r\n0\r\n\r\n", Cut),
    ("Transfer-Encoding: chunked\r\n", "5\r\nhello0\r\n\r\n", Cut),
    ("Transfer-Encoding: chunked\r\n", "5\r\nhello\n0\r\n\r\n", Cut),
    ("Transfer-Encoding: chunked\r\n", "10000000000000005\r\nhello\r\n0\r\n\r\n", Cut),
    ("Transfer-Encoding: chunked\r\n", "0\r\nX: a\nContent-Length: 40\r\n\r\n", Cut),
];

/// Heads without a body, and the Host that the app sees; none: refused.
const HEADS: &[(&str, Option<&str>)] = &[
    ("GET /one HTTP/1.1\r\nHost: orders\r\n", Some("orders")),
    ("GET http://orders/one HTTP/1.1\r\nHost: evil\r\n", Some("orders")),
    ("GET http://orders/one HTTP/1.1\r\nHost: evil\r\nConnection: upgrade\r\nUpgrade: x\r\n", Some("orders")),
    ("GET /one HTTP/1.1\r\nHost: orders\r\nConnection: upgrade\r\nUpgrade: h2c\r\n", Some("orders")),
    ("GET http://orders/one#a HTTP/1.1\r\nHost: orders\r\n", Some("orders")),
    ("GET /one HTTP/1.1\r\nHost: orders\r\nX-Weft-Absolute: http\r\n", Some("orders")),
    ("GET /one HTTP/1.1\r\nHost:\r\n", Some("")),
    ("GET /one HTTP/1.1\r\nHost: a<b>\"c`d:80\r\n", Some("a<b>\"c`d:80")),
    ("GET /one HTTP/1.1\r\nHost: caf\u{e9}\r\n", Some("caf\u{e9}")),
    ("GET /one HTTP/1.1\r\nHost: a<b/evil\r\n", None),
    ("GET /one HTTP/1.1\r\nHost: a<b:80:80\r\n", None),
    ("GET /one HTTP/1.1\r\nHost: orders\\evil\r\n", None),
    ("GET /o<ne HTTP/1.1\r\nHost: orders\r\n", None),
    ("GET /one?q=\"a\" HTTP/1.1\r\nHost: orders\r\n", None),
    ("GET /one HTTP/1.1\r\nHost: orders\r\nHost: evil\r\n", None),
    ("GET /one HTTP/1.1\r\nHost: orders\r\nHost: orders\r\n", None),
    ("GET /one HTTP/1.1\r\nHost: orders, evil\r\n", None),
    ("GET /one HTTP/1.1\r\nHost: orders/evil\r\n", None),
    ("GET /one HTTP/1.1\r\nHost: a@orders\r\n", None),
    ("GET /one HTTP/1.1\r\nHost: orders:80:80\r\n", None),
    ("GET /one HTTP/1.1\r\nHost: orders:http\r\n", None),
    ("GET /one HTTP/1.1\r\nHost: orders:99999\r\n", None),
    ("GET http://a@orders/one HTTP/1.1\r\nHost: orders\r\n", None),
    ("GET /one HTTP/1.1\r\n", None),
    ("GET one HTTP/1.1\r\nHost: orders\r\n", None),
    ("GET * HTTP/1.1\r\nHost: orders\r\n", None),
    ("GET /o ne HTTP/1.1\r\nHost: orders\r\n", None),
    ("GET /one\r\nHost: orders\r\n", None),
    ("GET /o\0ne HTTP/1.1\r\nHost: orders\r\n", None),
    ("GET /one HTTP/1.2\r\nHost: orders\r\n", None),
    ("GET /one HTTP/2.0\r\nHost: orders\r\n", None),
    ("GET /one HTTP/11\r\nHost: orders\r\n", None),
    ("GE\0T /one HTTP/1.1\r\nHost: orders\r\n", None),
    ("GET(/one HTTP/1.1\r\nHost: orders\r\n", None),
    ("CONNECT /one HTTP/1.1\r\nHost: orders\r\n", None),
    ("CONNECT orders:80 HTTP/1.1\r\nHost: orders\r\nContent-Length: 40\r\n", None),
    ("POST /one HTTP/1.0\r\nHost: orders\r\nTransfer-Encoding: chunked\r\n", None),
];

fn needs() -> bool {
    can_run(&[Need::Root, Need::Program("curl", "curl")])
}

/// Runs all cases from one pod against one address.
fn cases(from: &Pod, to: IpAddr, port: u16, recorder: &Recorder) {
    let after = "GET /after HTTP/1.1\r\nHost: orders\r\nConnection: close\r\n\r\n";
    let sentinel = || {
        let answer = exchange(from, to, port, after.as_bytes());
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("yes"), "{answer}");
    };
    sentinel();
    recorder.take();
    for (fields, body, fate) in BODIES {
        // The connection ends after a request with both.
        let both = fields.contains("Content-Length") && fields.contains("Transfer-Encoding: chunked\r\n");
        let bytes = format!("POST /one HTTP/1.1\r\nHost: orders\r\n{fields}\r\n{body}{after}");
        let answer = exchange(from, to, port, bytes.as_bytes());
        sentinel();
        let (case, seen) = (format!("{bytes:?} was answered {answer:?}"), recorder.take());
        assert!(!seen.iter().any(|request| request.head.contains("/smuggled")), "{case}: {seen:?}");
        let mut seen = seen.into_iter().filter(|request| request.head.starts_with("POST /one "));
        match (fate, seen.next()) {
            (Refused, None) => assert!(answer.starts_with("HTTP/1.1 400"), "{case}"),
            (Cut, None) => assert!(answer.starts_with("HTTP/1.1 400"), "{case}"),
            (Once(body), Some(request)) => {
                assert!(answer.starts_with("HTTP/1.1 200"), "{case}");
                assert!(!both || answer.matches("HTTP/1.1 ").count() < 2, "{case}");
                assert_eq!(request.body, *body, "{case}");
                assert_eq!(request.trailers, "", "{case}");
            }
            (_, seen) => panic!("{case}: {seen:?}"),
        }
        assert!(seen.next().is_none(), "{case}");
        assert!(answer.matches("HTTP/1.1 ").count() <= 2, "{case}");
    }
    for (head, host) in HEADS {
        let answer = exchange(from, to, port, format!("{head}\r\n{after}").as_bytes());
        sentinel();
        let seen = recorder.take();
        let case = format!("{head:?} was answered {answer:?}: {seen:?}");
        let one = seen.iter().filter(|request| !request.head.contains(" /after ")).collect::<Vec<_>>();
        match host {
            None => {
                assert!(one.is_empty(), "{case}");
                assert!(answer.starts_with("HTTP/1.1 4") || answer.starts_with("HTTP/1.1 505"), "{case}");
            }
            Some(host) => {
                assert_eq!(one.len(), 1, "{case}");
                let line = format!("Host: {host}");
                assert!(one[0].head.split("\r\n").any(|other| other == line), "{case}");
                // A target stays absolute, as for a proxy.
                let target = if head.contains(" http://") { "http://orders/one" } else { "/one" };
                assert!(one[0].head.starts_with(&format!("GET {target} HTTP/1.1\r\n")), "{case}");
                assert!(!one[0].head.to_lowercase().contains("h2c"), "{case}");
            }
        }
    }
    assert_eq!(recorder.broken(), Vec::<String>::new());
}

#[test]
fn an_app_cannot_smuggle_through_two_sidecars() {
    if !needs() {
        return;
    }
    let mesh = Mesh::new();
    let (client, server) = (mesh.network.pod("client"), mesh.network.pod("server"));
    let recorder = Recorder::start(&server, 8080);
    let _to = mesh.sidecar(&server, "orders", &["--port", "8080", "--protocol", "http1"]);
    let from = mesh.sidecar(&client, "web", &[]);
    cases(&client, server.ipv4(), 8080, &recorder);
    nobody_is_said_to_have_gone(&from);
}

#[test]
fn a_stranger_cannot_smuggle_past_a_sidecar() {
    if !needs() {
        return;
    }
    let mesh = Mesh::new();
    let (stranger, server) = (mesh.network.pod("stranger"), mesh.network.pod("server"));
    let recorder = Recorder::start(&server, 8080);
    let to = mesh.sidecar(&server, "orders", &["--port", "8080", "--protocol", "http1"]);
    cases(&stranger, server.ipv4(), 8080, &recorder);
    nobody_is_said_to_have_gone(&to);
    // What cannot be read is named.
    to.wait_for_failure("bad_request", &["/o<ne"]);
    // A query may hold secrets.
    to.wait_for_failure("bad_request", &["/one", "in its query"]);
    assert!(!to.process.log().contains("q="), "{}", to.process.log());
    to.wait_for_failure("bad_request", &["Host", "a<b/evil"]);
}

/// All these clients stayed until they were answered.
fn nobody_is_said_to_have_gone(sidecar: &Sidecar) {
    sidecar.wait_for_failure("bad_request", &["the body is malformed"]);
    let gone: Vec<_> =
        sidecar.access_log().into_iter().filter(|line| line["failure"] == "client_gone").collect();
    assert!(gone.is_empty(), "{gone:#?}");
}

#[test]
fn a_target_with_a_control_character_is_refused_where_the_protocol_is_detected() {
    if !needs() {
        return;
    }
    let mesh = Mesh::new();
    let (stranger, server) = (mesh.network.pod("stranger"), mesh.network.pod("server"));
    let recorder = Recorder::start(&server, 8080);
    let _to = mesh.sidecar(&server, "orders", &["--port", "8080"]);
    for target in ["/o\0ne", "/o\x01ne", "\0/one"] {
        let bytes = format!("GET {target} HTTP/1.1\r\nHost: orders\r\nConnection: close\r\n\r\n");
        let answer = exchange(&stranger, server.ipv4(), 8080, bytes.as_bytes());
        assert!(answer.starts_with("HTTP/1.1 400"), "{target:?}: {answer}");
    }
    assert_eq!((recorder.take(), recorder.broken()), (vec![], vec![]));
}

#[test]
fn a_request_line_in_two_pieces_is_http_all_the_same() {
    if !needs() {
        return;
    }
    let mesh = Mesh::new();
    let (stranger, server) = (mesh.network.pod("stranger"), mesh.network.pod("server"));
    let recorder = Recorder::start(&server, 8080);
    let _to = mesh.sidecar(&server, "orders", &["--port", "8080"]);
    let mut stream = dial(&stranger, server.ipv4(), 8080);
    stream.write_all(b"GE").unwrap();
    for _ in 0..10 {
        // well over the time after which a silent client is taken for one that waits for the server
        weft_tests::pause();
    }
    stream
        .write_all(b"T /one HTTP/1.1\r\nHost: orders\r\nConnection: close\r\nX-Weft-Deadline: 1\r\n\r\n")
        .unwrap();
    crate::wire::read_to_close(&mut stream);
    let seen = recorder.take();
    assert_eq!(seen.len(), 1);
    let head = seen[0].head.to_lowercase();
    assert!(!head.contains("traceparent") && !head.contains("x-weft"), "{head}");
}

#[test]
fn malformed_requests_of_http2_are_refused() {
    if !needs() {
        return;
    }
    let mesh = Mesh::new();
    let (stranger, server) = (mesh.network.pod("stranger"), mesh.network.pod("server"));
    // an app that never gets a request: whatever reaches it, it records as broken
    let recorder = Recorder::start(&server, 8080);
    let _to = mesh.sidecar(&server, "orders", &["--port", "8080", "--protocol", "http2"]);
    let pseudo = |path, authority| {
        fields(&[(":method", "GET"), (":scheme", "http"), (":path", path), (":authority", authority)])
    };
    let cases = [
        ("connection", get(&[("connection", "close")])),
        ("transfer-encoding", get(&[("transfer-encoding", "chunked")])),
        ("upgrade", get(&[("upgrade", "websocket")])),
        ("te", get(&[("te", "gzip")])),
        ("a line break in a value", get(&[("x", "a\r\nHost: evil")])),
        ("a NUL in a value", get(&[("x", "a\0b")])),
        ("a line break in a name", get(&[("x\r\ny", "a")])),
        ("an upper case name", get(&[("Host", "orders")])),
        ("a colon in a name", get(&[("x: y", "a")])),
        ("another host", get(&[("host", "evil")])),
        ("two hosts", get(&[("host", "orders"), ("host", "orders")])),
        ("a length that is not kept", get(&[("content-length", "5")])),
        ("two lengths", get(&[("content-length", "0"), ("content-length", "40")])),
        ("a list of lengths", get(&[("content-length", "0, 0")])),
        ("a signed length", get(&[("content-length", "+0")])),
        ("a pseudo-header after a header", get(&[("x", "a"), (":path", "/two")])),
        ("a pseudo-header twice", get(&[(":path", "/two")])),
        ("an unknown pseudo-header", get(&[(":x", "/two")])),
        ("a line break in the path", pseudo("/ HTTP/1.1\r\nHost: evil\r\n\r\n", "orders")),
        ("a space in the path", pseudo("/a b", "orders")),
        ("a path without a slash", pseudo("one", "orders")),
        ("an absolute path", pseudo("http://evil/", "orders")),
        ("an empty path", pseudo("", "orders")),
        ("a star", pseudo("*", "orders")),
        ("user information", pseudo("/", "a@orders")),
        ("a port that is none", pseudo("/", "orders:x")),
        ("a slash in the authority", pseudo("/", "orders/evil")),
        ("no method", fields(&[(":scheme", "http"), (":path", "/"), (":authority", "orders")])),
        ("a method that is none", fields(&[(":method", "GET /"), (":scheme", "http"), (":path", "/")])),
        ("CONNECT", fields(&[(":method", "CONNECT"), (":authority", "orders:80")])),
    ];
    for (what, block) in cases {
        let mut stream = dial(&stranger, server.ipv4(), 8080);
        let head = frame(HEADERS, END_HEADERS | END_STREAM, 1, &block);
        stream.write_all(&[preface(), head].concat()).unwrap();
        let first = read_until(&mut stream, |kind, id| {
            kind == GOAWAY || id == 1 && [HEADERS, RST_STREAM].contains(&kind)
        });
        match first {
            // 0x88 would be `:status: 200`, 0x8c is `:status: 400` (RFC 7541 A)
            Some((HEADERS, _, block)) => assert_eq!(block.first(), Some(&0x8c), "{what}: {block:?}"),
            Some((RST_STREAM | GOAWAY, ..)) => {}
            other => panic!("{what}: {other:?}"),
        }
        assert_eq!(recorder.broken(), Vec::<String>::new(), "{what}");
        assert_eq!(recorder.take(), [], "{what}");
    }
    // more data than the length says
    let mut stream = dial(&stranger, server.ipv4(), 8080);
    let head = frame(HEADERS, END_HEADERS, 1, &get(&[("content-length", "1")]));
    let data = frame(DATA, END_STREAM, 1, b"hello");
    stream.write_all(&[preface(), head, data].concat()).unwrap();
    let ended = read_until(&mut stream, |kind, id| kind == GOAWAY || id == 1 && kind == RST_STREAM);
    assert!(ended.is_some());
}
