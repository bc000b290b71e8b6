//! Requests that are answered before their bodies have ended: they count as requests until then, and a client that breaks
//! one off is not mistaken for a server that does.

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, Shutdown, TcpListener, TcpStream},
    thread,
};

use weft_tests::{Mesh, Need, Pod, Sidecar, can_run, until};

use crate::wire::{dial, exchange, read_until_text};

const GET: &[u8] = b"GET /early HTTP/1.1\r\nHost: orders\r\nConnection: close\r\n\r\n";

/// An app behind a sidecar, and one without; a client behind a sidecar, and one without, where the second app is.
struct Place {
    bare: Pod,
    client: Pod,
    server: Pod,
    outbound: Sidecar,
    inbound: Sidecar,
    _mesh: Mesh,
}

fn place(flags: &[&str]) -> Option<Place> {
    if !can_run(&[Need::Root, Need::Program("curl", "curl")]) {
        return None;
    }
    let mesh = Mesh::new();
    let [bare, client, server] = ["bare", "client", "server"].map(|name| mesh.network.pod(name));
    app(&bare);
    app(&server);
    // Of a single endpoint the breaker takes none out.
    let endpoint = |port: u16| format!("  - address: {}:{port}\n", bare.ipv4());
    let endpoints = format!("protocol: http1\nendpoints:\n{}{}", endpoint(8080), endpoint(8081));
    mesh.write_service("plain", &endpoints);
    let policy = "breaker: {consecutive_failures: 1, ejection: 1m}\n";
    fs::write(mesh.policies().join("plain.yaml"), policy).expect("a policy");
    let inbound = mesh.sidecar(&server, "orders", &[&["--port", "8080"], flags].concat());
    mesh.wait_until_published("orders");
    let outbound = mesh.sidecar(&client, "web", flags);
    Some(Place { bare, client, server, outbound, inbound, _mesh: mesh })
}

/// Answers a request when it has read its head, and then reads its body. An answer to `/stream` does not end.
fn app(pod: &Pod) {
    let listener = pod.inside(|| TcpListener::bind("0.0.0.0:8080")).expect("a listener");
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || serve(stream));
        }
    });
}

fn serve(mut stream: TcpStream) {
    loop {
        let (mut head, mut byte) = (Vec::new(), [0]);
        while !head.ends_with(b"\r\n\r\n") {
            match stream.read(&mut byte) {
                Ok(1) => head.push(byte[0]),
                _ => return,
            }
        }
        let head = String::from_utf8(head).expect("a head");
        let length = head
            .lines()
            .find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
        let is_stream = head.starts_with("POST /stream ");
        let answer: &[u8] = match is_stream {
            true => b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n",
            false => b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        };
        let length = if is_stream { u64::MAX } else { length.unwrap_or(0) };
        let answered = stream.write_all(answer);
        let body = std::io::copy(&mut Read::by_ref(&mut stream).take(length), &mut std::io::sink());
        if answered.is_err() || body.is_err() || is_stream {
            return;
        }
    }
}

/// Begins a request, and reads its answer as far as it comes.
fn begin(from: &Pod, to: IpAddr, request: &str) -> TcpStream {
    let mut stream = dial(from, to, 8080);
    stream.write_all(request.as_bytes()).unwrap();
    let answer = read_until_text(&mut stream, "ok");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    stream
}

#[test]
fn a_request_holds_its_permit_until_its_body_has_ended_too() {
    let Some(place) = place(&["--max-requests", "1"]) else { return };
    for (way, from, to) in [
        ("to the app", &place.bare, &place.server),
        ("to an endpoint outside the mesh", &place.client, &place.bare),
        ("to a peer", &place.client, &place.server),
    ] {
        let ask = || exchange(from, to.ipv4(), 8080, GET);
        let is_free = || ask().starts_with("HTTP/1.1 200");
        until(&format!("{way}: it is answered"), is_free);
        for ends in [true, false] {
            let head = "POST /early HTTP/1.1\r\nHost: orders\r\nContent-Length: 10\r\n\r\nhel";
            let mut upload = begin(from, to.ipv4(), head);
            for _ in 0..3 {
                let answer = ask();
                assert!(
                    answer.starts_with("HTTP/1.1 503") && answer.contains("overloaded"),
                    "{way}: {answer}"
                );
            }
            if ends {
                upload.write_all(b"lo mesh").unwrap();
                until(&format!("{way}: it is free again, as the body has ended"), is_free);
            } else {
                drop(upload);
                until(&format!("{way}: it is free again, as the client has left"), is_free);
            }
        }
    }
}

#[test]
fn a_request_that_its_client_breaks_off_is_no_failure_of_its_endpoint() {
    let Some(place) = place(&[]) else { return };
    for (way, from, to, sidecar) in [
        ("to the app", &place.bare, &place.server, &place.inbound),
        ("to an endpoint outside the mesh", &place.client, &place.bare, &place.outbound),
    ] {
        let mut seen = 0;
        for (label, framing, broken) in [
            ("client_gone", "Content-Length: 10\r\n\r\n", "hel"),
            ("client_gone", "Transfer-Encoding: chunked\r\n\r\n", "5\r\nhel"),
            ("bad_request", "Transfer-Encoding: chunked\r\n\r\n", "no size\r\n"),
        ] {
            let mut upload =
                begin(from, to.ipv4(), &format!("POST /stream HTTP/1.1\r\nHost: orders\r\n{framing}"));
            upload.write_all(broken.as_bytes()).unwrap();
            // It still reads: nothing but the end of its request says that it has left.
            upload.shutdown(Shutdown::Write).unwrap();
            let mut lines = Vec::new();
            until(&format!("{way}: the request is in the log"), || {
                lines = sidecar.access_log();
                lines.retain(|line| line["kind"] == "request" && line["path"] == "/stream");
                lines.len() > seen
            });
            seen += 1;
            assert_eq!(lines.len(), seen);
            let line = lines.last().expect("a line");
            assert_eq!(line["failure"], label, "{way}, {framing:?}: {line}");
        }
    }
    let log = place.outbound.process.log();
    assert!(!log.contains("endpoint ejected"), "{log}");
    let answer = exchange(&place.client, place.bare.ipv4(), 8080, GET);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}
