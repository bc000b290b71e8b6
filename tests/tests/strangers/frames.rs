//! Frames of HTTP/2 (RFC 9113) that an app may send, through two sidecars to an app that tells what it got: carried as
//! they were meant, or refused before the other app hears a whole request.

use std::{
    io::Write,
    net::TcpListener,
    sync::{Arc, Mutex},
    thread,
};

use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use weft_tests::{Mesh, Need, Pod, can_run, until};

use crate::wire::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, RST_STREAM, SETTINGS, dial, fields, frame,
    frames, get, preface,
};

const PADDED: u8 = 8;
/// `:status: 200` in the table of RFC 7541 A.
const OK: u8 = 0x88;

/// An app that answers with what it got, a line each: fields, body, trailers.
fn telling_app(pod: &Pod, port: u16) {
    let listener = pod.inside(|| TcpListener::bind(("127.0.0.1", port))).expect("a listener");
    listener.set_nonblocking(true).expect("not blocking");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    thread::spawn(move || {
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
            while let Ok((stream, _)) = listener.accept().await {
                let serving = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), service_fn(tell));
                tokio::spawn(serving);
            }
        });
    });
}

async fn tell(request: Request<Incoming>) -> Result<Response<Full<bytes::Bytes>>, hyper::Error> {
    let (head, body) = request.into_parts();
    let body = body.collect().await?;
    let mut told = format!("{} {}\n", head.method, head.uri.path());
    for (name, value) in &head.headers {
        told += &format!("{name}: {}\n", value.to_str().unwrap_or("?"));
    }
    for (name, value) in body.trailers().into_iter().flatten() {
        told += &format!("trailer {name}: {}\n", value.to_str().unwrap_or("?"));
    }
    told += &format!("body {}\n", String::from_utf8_lossy(&body.to_bytes()));
    Ok(Response::new(Full::from(told)))
}

/// What came back for stream 1 on a connection of its own.
#[derive(Debug)]
enum Answer {
    /// 200 with this body.
    Told(String),
    /// Another status, a reset of the stream or the end of the connection.
    Refused,
}

fn ask(client: &Pod, server: &Pod, bytes: &[u8]) -> Answer {
    let mut stream = dial(client, server.ipv4(), 8080);
    stream.write_all(&[&preface(), bytes].concat()).unwrap();
    let (mut all, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        let count = std::io::Read::read(&mut stream, &mut buffer).unwrap_or(0);
        all.extend_from_slice(&buffer[..count]);
        let came = frames(&all);
        if count == 0
            || came.iter().any(|(kind, _, id, _)| *kind == GOAWAY || (*kind, *id) == (RST_STREAM, 1))
        {
            return Answer::Refused;
        }
        let of_one = || came.iter().filter(|(_, _, id, _)| *id == 1);
        if !of_one().any(|(_, flags, ..)| flags & END_STREAM != 0) {
            continue;
        }
        let head = of_one().find(|(kind, ..)| *kind == HEADERS).expect("a head");
        if head.3.first() != Some(&OK) {
            return Answer::Refused;
        }
        let body: Vec<u8> =
            of_one().filter(|(kind, ..)| *kind == DATA).flat_map(|(.., payload)| payload.clone()).collect();
        return Answer::Told(String::from_utf8(body).expect("text"));
    }
}

fn post(more: &[(&str, &str)]) -> Vec<u8> {
    let head = [(":method", "POST"), (":scheme", "http"), (":path", "/one"), (":authority", "orders")];
    fields(&[&head[..], more].concat())
}

fn head(block: &[u8]) -> Vec<u8> {
    frame(HEADERS, END_HEADERS, 1, block)
}

fn last(kind: u8, payload: &[u8]) -> Vec<u8> {
    frame(kind, END_STREAM | (END_HEADERS * u8::from(kind == HEADERS)), 1, payload)
}

/// With so many bytes of padding.
fn padded(kind: u8, flags: u8, payload: &[u8], padding: u8) -> Vec<u8> {
    let bytes = [&[padding], payload, &vec![0; padding.into()]].concat();
    frame(kind, flags | PADDED, 1, &bytes)
}

#[test]
fn frames_are_carried_as_they_were_meant_or_refused() {
    if !can_run(&[Need::Root, Need::Program("curl", "curl")]) {
        return;
    }
    let mesh = Mesh::new();
    let (client, server) = (mesh.network.pod("client"), mesh.network.pod("server"));
    telling_app(&server, 8080);
    let to = mesh.sidecar(&server, "orders", &["--port", "8080"]);
    let _from = mesh.sidecar(&client, "web", &[]);
    mesh.wait_until_published("orders");
    // The address means the service once the client's sidecar has read the file.
    let simple = last(HEADERS, &get(&[]));
    let over_the_mesh =
        || to.access_log().iter().any(|line| line["peer_identity"] == weft_tests::identity("web"));
    until("calls go over the mesh", || {
        matches!(ask(&client, &server, &simple), Answer::Told(_)) && over_the_mesh()
    });

    let long = "y".repeat(100);
    let many: Vec<(String, &str)> = (0..20).map(|number| (format!("x-{number}"), long.as_str())).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|(name, value)| (name.as_str(), *value)).collect();
    let block = get(&many);
    let mut pieces = block.chunks(block.len() / 4 + 1);
    let in_pieces = [
        frame(HEADERS, END_STREAM, 1, pieces.next().unwrap()),
        frame(CONTINUATION, 0, 1, pieces.next().unwrap()),
        frame(CONTINUATION, 0, 1, pieces.next().unwrap()),
        frame(CONTINUATION, END_HEADERS, 1, pieces.next().unwrap()),
    ]
    .concat();
    let trailers = fields(&[("x-sum", "7")]);
    let five = post(&[("content-length", "5")]);
    let hello = last(DATA, b"hello");
    let trailing =
        |block: &[u8]| [head(&post(&[])), frame(DATA, 0, 1, b"hello"), last(HEADERS, block)].concat();
    let carried: &[(&str, Vec<u8>, &[&str])] = &[
        (
            "a length that is kept",
            [head(&five), hello.clone()].concat(),
            &["content-length: 5\n", "body hello\n"],
        ),
        ("no length", [head(&post(&[])), hello.clone()].concat(), &["POST /one\n", "body hello\n"]),
        (
            "padding",
            [
                padded(HEADERS, END_HEADERS, &five, 200),
                padded(DATA, 0, b"hel", 255),
                padded(DATA, 0, b"", 9),
                padded(DATA, END_STREAM, b"lo", 0),
            ]
            .concat(),
            &["content-length: 5\n", "body hello\n"],
        ),
        ("a head in four frames", in_pieces, &["x-0: yyy", "x-19: yyy"]),
        (
            "trailers",
            [head(&post(&[("te", "trailers")])), frame(DATA, 0, 1, b"hello"), last(HEADERS, &trailers)]
                .concat(),
            &["te: trailers\n", "trailer x-sum: 7\n", "body hello\n"],
        ),
        (
            "trailers without a body",
            [head(&post(&[])), last(HEADERS, &trailers)].concat(),
            &["trailer x-sum: 7\n", "body \n"],
        ),
        // left out
        (
            "a pseudo-header in trailers",
            trailing(&fields(&[(":path", "/two")])),
            &["POST /one\n", "body hello\n"],
        ),
        ("a body of nothing", [head(&post(&[])), last(DATA, b"")].concat(), &["body \n"]),
        ("cookies in pieces", last(HEADERS, &get(&[("cookie", "a=1"), ("cookie", "b=2")])), &["a=1", "b=2"]),
    ];
    for (what, bytes, parts) in carried {
        let answer = ask(&client, &server, bytes);
        let Answer::Told(told) = &answer else { panic!("{what}: {answer:?}") };
        assert!(parts.iter().all(|part| told.contains(part)), "{what}: {told}");
        assert!(!told.contains("two"), "{what}: {told}");
    }

    let refused: &[(&str, Vec<u8>)] = &[
        ("less data than the length", [head(&post(&[("content-length", "6")])), hello.clone()].concat()),
        ("more data than the length", [head(&post(&[("content-length", "4")])), hello.clone()].concat()),
        ("a length without data", last(HEADERS, &five)),
        ("trailers before the length is reached", [head(&five), last(HEADERS, &trailers)].concat()),
        ("an upper case name", last(HEADERS, &get(&[("X-A", "a")]))),
        ("connection", last(HEADERS, &get(&[("connection", "x-a"), ("x-a", "a")]))),
        ("keep-alive", last(HEADERS, &get(&[("keep-alive", "1")]))),
        ("proxy-connection", last(HEADERS, &get(&[("proxy-connection", "close")]))),
        ("transfer-encoding", [head(&post(&[("transfer-encoding", "chunked")])), hello.clone()].concat()),
        ("te beyond trailers", last(HEADERS, &get(&[("te", "trailers, gzip")]))),
        ("an upper case name in trailers", trailing(&fields(&[("X-A", "a")]))),
        ("connection in trailers", trailing(&fields(&[("connection", "close")]))),
        ("trailers that do not end", [head(&post(&[])), head(&trailers)].concat()),
        ("padding beyond the frame", [head(&five), frame(DATA, END_STREAM | PADDED, 1, &[200, 1])].concat()),
        ("data of no stream", [head(&five), frame(DATA, 0, 0, b"hello")].concat()),
        ("data before a head", frame(DATA, END_STREAM, 1, b"hello")),
        ("a head between CONTINUATIONs", [frame(HEADERS, 0, 1, &five), head(&five)].concat()),
        ("a stream of the server", frame(HEADERS, END_HEADERS | END_STREAM, 2, &get(&[]))),
    ];
    for (what, bytes) in refused {
        let answer = ask(&client, &server, bytes);
        assert!(matches!(answer, Answer::Refused), "{what}: {answer:?}");
        // and nobody else minds
        assert!(matches!(ask(&client, &server, &simple), Answer::Told(_)), "after {what}");
    }
}

/// An app that answers every request with the same frames.
fn app_of_frames(pod: &Pod, port: u16) -> Arc<Mutex<Vec<Piece>>> {
    let listener = pod.inside(|| TcpListener::bind(("127.0.0.1", port))).expect("a listener");
    let answer = Arc::new(Mutex::new(Vec::new()));
    let of_app = answer.clone();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let answer = of_app.clone();
            thread::spawn(move || {
                let ack = frame(SETTINGS, 1, 0, &[]);
                stream.write_all(&[frame(SETTINGS, 0, 0, &[]), ack].concat()).ok();
                let (mut all, mut buffer, mut answered) = (Vec::new(), [0; 4096], 0);
                while let Ok(count @ 1..) = std::io::Read::read(&mut stream, &mut buffer) {
                    all.extend_from_slice(&buffer[..count]);
                    let after_preface = all.get(24..).unwrap_or_default();
                    let ids: Vec<u32> = frames(after_preface)
                        .iter()
                        .filter(|(kind, ..)| *kind == HEADERS)
                        .map(|(_, _, id, _)| *id)
                        .collect();
                    for id in &ids[answered..] {
                        let pieces: Vec<Piece> = answer.lock().unwrap().clone();
                        let bytes: Vec<u8> = pieces
                            .iter()
                            .flat_map(|(kind, flags, payload)| frame(*kind, *flags, *id, payload))
                            .collect();
                        stream.write_all(&bytes).ok();
                    }
                    answered = ids.len();
                }
            });
        }
    });
    answer
}

/// A frame without its stream.
type Piece = (u8, u8, Vec<u8>);

#[test]
fn frames_of_an_answer_are_carried_as_they_were_meant_or_refused() {
    if !can_run(&[Need::Root, Need::Program("curl", "curl")]) {
        return;
    }
    let mesh = Mesh::new();
    let (client, server) = (mesh.network.pod("client"), mesh.network.pod("server"));
    let answer = app_of_frames(&server, 8080);
    let to = mesh.sidecar(&server, "orders", &["--port", "8080"]);
    let _from = mesh.sidecar(&client, "web", &[]);
    mesh.wait_until_published("orders");
    let status = |code: &str, more: &[(&str, &str)]| fields(&[&[(":status", code)][..], more].concat());
    let head = |more: &[(&str, &str)]| (HEADERS, END_HEADERS, status("200", more));
    let hello = (DATA, END_STREAM, b"hello".to_vec());
    let simple = vec![head(&[]), hello.clone()];
    let request = last(HEADERS, &get(&[]));
    let asked = |pieces: &[Piece]| {
        *answer.lock().unwrap() = pieces.to_vec();
        ask(&client, &server, &request)
    };
    let over_the_mesh =
        || to.access_log().iter().any(|line| line["peer_identity"] == weft_tests::identity("web"));
    until("calls go over the mesh", || matches!(asked(&simple), Answer::Told(_)) && over_the_mesh());

    let padded = |payload: &[u8]| [&[3], payload, &[0; 3]].concat();
    let trailers = (HEADERS, END_HEADERS | END_STREAM, fields(&[("x-sum", "7")]));
    let data = (DATA, 0, b"hello".to_vec());
    let carried: &[(&str, Vec<Piece>)] = &[
        // the interim answer is left out
        ("103", vec![(HEADERS, END_HEADERS, status("103", &[("link", "a")])), head(&[]), hello.clone()]),
        ("a length that is kept", vec![head(&[("content-length", "5")]), hello.clone()]),
        ("trailers", vec![head(&[]), data.clone(), trailers.clone()]),
        (
            "padding",
            vec![
                (HEADERS, END_HEADERS | PADDED, padded(&status("200", &[]))),
                (DATA, PADDED, padded(b"hel")),
                (DATA, PADDED | END_STREAM, padded(b"lo")),
            ],
        ),
    ];
    for (what, pieces) in carried {
        let answer = asked(pieces);
        assert!(matches!(&answer, Answer::Told(body) if body == "hello"), "{what}: {answer:?}");
    }
    let refused: &[(&str, Vec<Piece>)] = &[
        ("less data than the length", vec![head(&[("content-length", "6")]), hello.clone()]),
        ("more data than the length", vec![head(&[("content-length", "4")]), hello.clone()]),
        ("an upper case name", vec![head(&[("X-A", "a")]), hello.clone()]),
        ("connection", vec![head(&[("connection", "close")]), hello.clone()]),
        ("transfer-encoding", vec![head(&[("transfer-encoding", "chunked")]), hello.clone()]),
        ("no status", vec![(HEADERS, END_HEADERS, fields(&[("x-a", "a")])), hello.clone()]),
        ("a status that is none", vec![(HEADERS, END_HEADERS, status("20", &[])), hello.clone()]),
        ("data before the head", vec![hello.clone()]),
        ("103 and the end", vec![(HEADERS, END_HEADERS | END_STREAM, status("103", &[]))]),
        ("padding beyond the frame", vec![head(&[]), (DATA, END_STREAM | PADDED, vec![200, 1])]),
    ];
    for (what, pieces) in refused {
        let answer = asked(pieces);
        assert!(matches!(answer, Answer::Refused), "{what}: {answer:?}");
        assert!(matches!(asked(&simple), Answer::Told(_)), "after {what}");
    }
}
