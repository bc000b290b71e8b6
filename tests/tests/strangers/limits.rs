//! Limits hold, what is over them is counted under its label, and others go on being served.

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, TcpListener, TcpStream},
};

use weft_tests::{Mesh, Need, Pod, Sidecar, can_run, pause, until};

use crate::peers::hello;
use crate::wire::{
    CONTINUATION, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PING, RST_STREAM, Recorder, SETTINGS, dial,
    exchange, frame, frames, get, preface, read_to_close, read_until,
};

/// A stranger, a sidecar with an HTTP/1 app on 8080, and what holds them.
struct Place {
    stranger: Pod,
    server: Pod,
    sidecar: Sidecar,
    _app: Recorder,
    mesh: Mesh,
}

const GET: &[u8] = b"GET /one HTTP/1.1\r\nHost: orders\r\nConnection: close\r\n\r\n";

fn place(flags: &[&str]) -> Option<Place> {
    place_under(&[], flags)
}

/// The same with a program around the sidecar.
fn place_under(wrapper: &[&str], flags: &[&str]) -> Option<Place> {
    let needs = [Need::Root, Need::Program("curl", "curl"), Need::Program("prlimit", "util-linux")];
    if !can_run(&needs) {
        return None;
    }
    let mesh = Mesh::new();
    let (stranger, server) = (mesh.network.pod("stranger"), mesh.network.pod("server"));
    let app = Recorder::start(&server, 8080);
    let flags = [&["--port", "8080", "--port", "8081"], flags].concat();
    let sidecar = mesh.start_sidecar_under(wrapper, &server, "orders", &flags, &[]);
    sidecar.wait_until_ready(&server);
    Some(Place { stranger, server, sidecar, _app: app, mesh })
}

impl Place {
    fn to(&self) -> IpAddr {
        self.server.ipv4()
    }

    fn dial(&self) -> TcpStream {
        dial(&self.stranger, self.to(), 8080)
    }

    fn exchange(&self, bytes: &[u8]) -> String {
        exchange(&self.stranger, self.to(), 8080, bytes)
    }

    fn others_are_served(&self) {
        let answer = self.exchange(GET);
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }

    /// A failure label stands in the metrics with a count above 0.
    fn counted(&self, label: &str) {
        until(&format!("{label} is counted"), || {
            self.sidecar.metrics(&self.server).lines().any(|line| {
                line.contains(&format!("\"{label}\"")) && !line.starts_with('#') && !line.ends_with(" 0")
            })
        });
    }

    /// Resident memory in KiB.
    fn memory(&self) -> u64 {
        let status =
            fs::read_to_string(format!("/proc/{}/status", self.sidecar.process.id())).expect("status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
        line.trim().trim_end_matches(" kB").parse().expect("a number")
    }
}

#[test]
fn a_head_has_bounds_in_bytes_and_fields() {
    let Some(place) = place(&["--header-bytes", "16384", "--header-fields", "50"]) else { return };
    let long = format!("GET / HTTP/1.1\r\nHost: orders\r\nX: {}\r\n\r\n", "x".repeat(20_000));
    let many = format!("GET / HTTP/1.1\r\nHost: orders\r\n{}\r\n", "X: y\r\n".repeat(60));
    for head in [long, many] {
        let answer = place.exchange(head.as_bytes());
        assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
    }
    place.counted("headers_too_large");
    let mut stream = place.dial();
    let block = get(&[("x", "y"); 60]);
    stream.write_all(&[preface(), frame(HEADERS, END_HEADERS | END_STREAM, 1, &block)].concat()).unwrap();
    let (.., block) = read_until(&mut stream, |kind, id| kind == HEADERS && id == 1).expect("an answer");
    // "431" as it is, or in the Huffman code of RFC 7541 B
    let is_431 = |text: &[u8]| text == b"431" || text == [0x69, 0x90, 0xff];
    assert!(block.windows(3).any(is_431), "{block:x?}");
    place.others_are_served();
}

#[test]
fn who_trickles_a_head_is_left_and_who_is_idle_is_not() {
    let Some(place) = place(&["--header-timeout", "500ms", "--protocol", "http1"]) else { return };
    let mut slow = place.dial();
    let mut idle = place.dial();
    idle.write_all(b"GET /one HTTP/1.1\r\nHost: orders\r\n\r\n").unwrap();
    slow.write_all(b"GET / HTTP/1.1\r\n").unwrap();
    let mut trickling = slow.try_clone().unwrap();
    // ends with the connection, whose other side is gone
    let trickle = std::thread::spawn(move || {
        while trickling.write_all(b"X: y\r\n").is_ok() {
            (0..5).for_each(|_| pause());
        }
    });
    read_to_close(&mut slow);
    drop(slow);
    trickle.join().unwrap();
    place.counted("client_timeout");
    // idle for longer than the time for a head by now
    idle.write_all(GET).unwrap();
    let answers = String::from_utf8(read_to_close(&mut idle)).unwrap();
    assert_eq!(answers.matches("HTTP/1.1 200").count(), 2, "{answers}");
}

#[test]
fn idle_connections_are_closed_in_time() {
    let Some(place) = place(&["--idle-timeout", "300ms"]) else { return };
    let mut idle = place.dial();
    idle.write_all(b"GET /one HTTP/1.1\r\nHost: orders\r\n\r\n").unwrap();
    assert!(String::from_utf8(read_to_close(&mut idle)).unwrap().starts_with("HTTP/1.1 200"));
    let mut idle = place.dial();
    idle.write_all(&preface()).unwrap();
    assert!(read_until(&mut idle, |kind, _| kind == GOAWAY).is_some());
}

#[test]
fn a_preface_that_does_not_come_is_not_waited_for() {
    let Some(place) = place(&["--header-timeout", "300ms", "--protocol", "http2"]) else { return };
    let mut stream = place.dial();
    stream.write_all(b"PRI * HTTP/2.0\r\n").unwrap();
    read_to_close(&mut stream);
    place.counted("client_timeout");
    // nor is one that has not begun
    let connections = || {
        let lines = place.sidecar.access_log();
        lines
            .iter()
            .filter(|line| line["failure"] == "client_timeout" && line["kind"] == "connection")
            .count()
    };
    until("the first is told of", || connections() == 1);
    read_to_close(&mut place.dial());
    until("the silent one is told of", || connections() == 2);
}

#[test]
fn connections_have_a_cap_and_more_are_closed_at_once() {
    let Some(place) = place(&["--max-connections", "5", "--protocol", "http1"]) else { return };
    let held: Vec<TcpStream> = (0..5).map(|_| place.dial()).collect();
    until("a further one is closed", || {
        let mut stream = place.dial();
        matches!(stream.write_all(GET).and_then(|()| stream.read(&mut [0; 64])), Ok(0) | Err(_))
    });
    place.counted("overloaded");
    drop(held);
    until("there is room again", || place.exchange(GET).starts_with("HTTP/1.1 200"));
}

#[test]
fn connections_that_say_nothing_leave_room_for_others() {
    for flags in [&["--max-connections", "100"][..], &["--max-connections", "100", "--protocol", "http1"]] {
        let Some(place) = place(flags) else { return };
        let silent: Vec<TcpStream> = (0..120).map(|_| place.dial()).collect();
        place.counted("overloaded");
        let line = place.sidecar.wait_for_failure("overloaded", &["without a word"]);
        assert_eq!(line["kind"], "connection", "{line}");
        place.others_are_served();
        // of one source a quarter may wait, and those are served when they speak
        let mut first = &silent[0];
        first.write_all(GET).unwrap();
        let mut answer = [0; 12];
        first.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200");
    }
}

#[test]
fn connections_that_stop_within_their_first_words_leave_room_for_others() {
    for words in [vec![0x16], hello(), b"GET / HTTP/1.1\r\nHost: orders\r\n".to_vec()] {
        let Some(place) = place(&["--max-connections", "100"]) else { return };
        let say = || {
            let mut stream = place.dial();
            let _ = stream.write_all(&words);
            stream
        };
        let _begun: Vec<TcpStream> = (0..90).map(|_| say()).collect();
        let line = place.sidecar.wait_for_failure("overloaded", &["or stopped within their first"]);
        assert_eq!(line["kind"], "connection", "{line}");
        let _more: Vec<TcpStream> = (0..20).map(|_| say()).collect();
        place.others_are_served();
    }
}

const KEPT: &[u8] = b"GET /one HTTP/1.1\r\nHost: orders\r\n\r\n";

/// Reads the answer to one request of HTTP/1, whose connection stays.
fn is_answered(stream: &mut TcpStream) -> bool {
    let mut answer = Vec::new();
    let mut buffer = [0; 1024];
    while !answer.ends_with(b"yes") {
        match stream.read(&mut buffer) {
            Ok(count @ 1..) => answer.extend_from_slice(&buffer[..count]),
            _ => return false,
        }
    }
    answer.starts_with(b"HTTP/1.1 200")
}

/// Has the other side closed it?
fn is_closed(stream: &TcpStream) -> bool {
    stream.set_nonblocking(true).expect("a socket");
    let mut buffer = [0; 4096];
    let ended = loop {
        match (&mut &*stream).read(&mut buffer) {
            Err(error) => break error.kind() != std::io::ErrorKind::WouldBlock,
            Ok(0) => break true,
            Ok(_) => {}
        }
    };
    stream.set_nonblocking(false).expect("a socket");
    ended
}

#[test]
fn idle_connections_of_whom_has_most_make_room() {
    let Some(place) = place(&["--max-connections", "20"]) else { return };
    let other = place.mesh.network.pod("other");
    let mut of_other = dial(&other, place.to(), 8080);
    of_other.write_all(KEPT).unwrap();
    assert!(is_answered(&mut of_other));
    let mut held: Vec<TcpStream> = (0..19).map(|_| place.dial()).collect();
    for (number, stream) in held.iter_mut().enumerate() {
        if number % 2 == 0 {
            stream.write_all(KEPT).unwrap();
            assert!(is_answered(stream));
        } else {
            // It answers no PING, as clients do that want to stay.
            stream.write_all(&preface()).unwrap();
            assert!(read_until(stream, |kind, _| kind == SETTINGS).is_some());
        }
    }
    // They count as idle after a second.
    (0..75).for_each(|_| pause());
    let mut more = Vec::new();
    for _ in 0..4 {
        let mut stream = place.dial();
        stream.write_all(KEPT).unwrap();
        assert!(is_answered(&mut stream));
        more.push(stream);
    }
    assert!(read_until(&mut held[1], |kind, _| kind == GOAWAY).is_some());
    let closed: Vec<usize> = (0..held.len()).filter(|number| is_closed(&held[*number])).collect();
    assert_eq!(closed, [0, 1, 2, 3], "the longest idle of whom has most");
    of_other.write_all(KEPT).unwrap();
    assert!(is_answered(&mut of_other), "whoever has one keeps it");
    let line = place.sidecar.wait_for_failure("overloaded", &["made room for another"]);
    assert_eq!(line["kind"], "connection", "{line}");
    place.counted("overloaded");
}

#[test]
fn idle_connections_make_room_where_few_descriptors_are_there() {
    let Some(place) = place_under(&["prlimit", "--nofile=400:400"], &[]) else { return };
    let clamped = "--max-connections 20000 is clamped to 50 ";
    assert!(place.sidecar.process.log().contains(clamped), "{}", place.sidecar.process.log());
    let _held: Vec<TcpStream> = (0..50)
        .map(|_| {
            let mut stream = place.dial();
            stream.write_all(KEPT).unwrap();
            assert!(is_answered(&mut stream));
            stream
        })
        .collect();
    (0..10).for_each(|_| place.others_are_served());
}

#[test]
fn half_requests_keep_no_probe_out() {
    let Some(place) = place(&[]) else { return };
    let halves: Vec<TcpStream> = (0..300)
        .map(|number| {
            let mut stream = dial(&place.stranger, place.to(), 15020);
            let _ = stream.write_all(if number % 2 == 0 { b"GET /live HTTP/1.1\r\n" } else { b"" });
            stream
        })
        .collect();
    for path in ["/live", "/ready", "/metrics"] {
        let probe = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        let answer = exchange(&place.stranger, place.to(), 15020, probe.as_bytes());
        assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
    }
    drop(halves);
}

/// Bytes that readers who take nothing may cost altogether, in KiB.
const STALLED_KIB: u64 = 200 * 1024;

#[test]
fn readers_that_take_nothing_cost_little_memory() {
    if !can_run(&[Need::Program("nginx", "nginx-light")]) {
        return;
    }
    let Some(place) = place(&["--port", "8082"]) else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().to_str().expect("a path");
    fs::write(folder.path().join("one"), vec![b'x'; 1024 * 1024]).expect("a file");
    let settings = format!(
        "user root; daemon off; pid {path}/pid; error_log stderr; events {{}}
         http {{ access_log off; server {{ listen 8082 http2; root {path}; }} }}
"
    );
    fs::write(folder.path().join("nginx.conf"), settings).expect("a file");
    let _app = place.server.start("nginx", &["-c", &format!("{path}/nginx.conf")]);
    until("nginx listens", || place.server.inside(|| TcpStream::connect("127.0.0.1:8082")).is_ok());
    place.others_are_served();
    let before = place.memory();
    for (connections, answers) in [(20, 100), (200, 10)] {
        let stalled = stalled_answers(&place, connections, answers);
        (0..50).for_each(|_| pause());
        let after = place.memory();
        println!("{connections} times {answers} answers: {before} KiB before, {after} KiB after");
        assert!(after < before + STALLED_KIB, "{before} KiB before, {after} KiB after");
        drop(stalled);
        place.others_are_served();
    }
}

/// Connections that ask for many answers each, and take none of them.
fn stalled_answers(place: &Place, connections: u32, answers: u32) -> Vec<TcpStream> {
    // SETTINGS_INITIAL_WINDOW_SIZE (4) of 0
    let settings = frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0]);
    let begin = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &settings].concat();
    let heads: Vec<u8> = (0..answers)
        .flat_map(|number| frame(HEADERS, END_HEADERS | END_STREAM, 2 * number + 1, &get(&[])))
        .collect();
    let stalled = |_| {
        let mut stream = dial(&place.stranger, place.to(), 8082);
        stream.write_all(&[&begin[..], &heads].concat()).unwrap();
        // the last answer has begun: the app was asked for all of them
        assert!(read_until(&mut stream, |kind, id| kind == HEADERS && id == 2 * answers - 1).is_some());
        stream
    };
    (0..connections).map(stalled).collect()
}

#[test]
fn a_stranger_may_send_little_that_nobody_reads() {
    let Some(place) = place(&[]) else { return };
    let mut stream = place.dial();
    stream.write_all(&preface()).unwrap();
    // WINDOW_UPDATE (8) of the connection, beyond the 65,535 bytes that there are at first
    let (.., more) = read_until(&mut stream, |kind, id| kind == 8 && id == 0).expect("a window");
    let more = u32::from_be_bytes(more.try_into().expect("four bytes"));
    assert_eq!(more + 65_535, 1024 * 1024);
}

/// The window of a connection that begins: what its server says at first, before it answers a second PING.
fn window(stream: &mut TcpStream) -> u32 {
    let ping = frame(PING, 0, 0, &[0; 8]);
    stream.write_all(&[preface(), ping.clone()].concat()).unwrap();
    let (mut all, mut buffer) = (Vec::new(), [0; 4096]);
    for answered in 1..=2 {
        while frames(&all).iter().filter(|(kind, ..)| *kind == PING).count() < answered {
            let count = stream.read(&mut buffer).unwrap();
            assert!(count > 0, "it was closed");
            all.extend_from_slice(&buffer[..count]);
        }
        stream.write_all(&ping).unwrap();
    }
    // WINDOW_UPDATE (8) of the connection
    let more = frames(&all).into_iter().filter(|(kind, _, id, _)| *kind == 8 && *id == 0);
    more.fold(65_535, |window, (.., more)| window + u32::from_be_bytes(more.try_into().expect("four bytes")))
}

#[test]
fn what_all_strangers_may_send_that_nobody_reads_has_a_bound() {
    let Some(place) = place(&["--buffer-memory", "4194304"]) else { return };
    let first_window = || {
        let mut stream = place.dial();
        (window(&mut stream), stream)
    };
    let held: Vec<(u32, TcpStream)> = (0..60).map(|_| first_window()).collect();
    let windows: Vec<u32> = held.iter().map(|(window, _)| *window).collect();
    assert_eq!((windows[0], windows[59]), (4_194_304 / 16, 65_535), "{windows:?}");
    assert!(windows.iter().sum::<u32>() <= 4_194_304 + 60 * 65_535, "{windows:?}");
    drop(held);
    until("all of it has come back", || first_window().0 == 4_194_304 / 16);
}

#[test]
fn requests_have_a_cap_and_more_get_503() {
    let Some(place) = place(&["--max-requests", "1", "--protocol", "http1"]) else { return };
    let mut held = place.dial();
    held.write_all(b"POST /one HTTP/1.1\r\nHost: orders\r\nContent-Length: 5\r\n\r\nhel").unwrap();
    until("the second is refused", || {
        let answer = place.exchange(GET);
        answer.starts_with("HTTP/1.1 503") && answer.contains("overloaded")
    });
    place.counted("overloaded");
    held.write_all(b"lo").unwrap();
    until("there is room again", || place.exchange(GET).starts_with("HTTP/1.1 200"));
}

#[test]
fn a_client_whose_request_was_read_to_its_end_is_not_waited_for() {
    let Some(place) = place(&[]) else { return };
    for framing in ["Content-Length: 3\r\n\r\nhel", "Transfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n0\r\n\r\n"]
    {
        let mut stream = place.dial();
        let request = format!("POST /one HTTP/1.1\r\nHost: orders\r\nConnection: close\r\n{framing}");
        stream.write_all(request.as_bytes()).unwrap();
        let answer = String::from_utf8(read_to_close(&mut stream)).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        // Of a client that is waited for each of these bytes would be read.
        until("what the client sends is refused", || stream.write_all(b"x").is_err());
    }
}

/// Sends the same bytes again and again until the other side ends the connection, 20 MB at most.
fn flood(place: &Place, begin: &[u8], piece: impl Fn(u32) -> Vec<u8>) -> bool {
    let mut stream = place.dial();
    stream.write_all(begin).unwrap();
    let mut reading = stream.try_clone().unwrap();
    // what comes back is taken away, so that only the other side's own bounds count
    let reader = std::thread::spawn(move || {
        let mut buffer = [0; 65536];
        while reading.read(&mut buffer).is_ok_and(|count| count > 0) {}
    });
    let mut sent = 0;
    let mut number = 0;
    let ended = loop {
        let bytes = piece(number);
        number += 1;
        sent += bytes.len();
        if stream.write_all(&bytes).is_err() {
            break true;
        }
        if sent > 20_000_000 {
            break false;
        }
    };
    let _ = stream.shutdown(std::net::Shutdown::Both);
    reader.join().unwrap();
    ended
}

#[test]
fn floods_of_frames_end_the_connection_and_nobody_else_suffers() {
    let Some(place) = place(&[]) else { return };
    place.others_are_served();
    let before = place.memory();
    let reset = |number: u32| {
        let id = 2 * number + 1;
        let head = frame(HEADERS, END_HEADERS | END_STREAM, id, &get(&[]));
        [head, frame(RST_STREAM, 0, id, &8_u32.to_be_bytes())].concat()
    };
    let rapid = |number: u32| (0..50).flat_map(|more| reset(number * 50 + more)).collect();
    assert!(flood(&place, &preface(), rapid), "rapid reset in bursts");
    place.others_are_served();
    assert!(flood(&place, &preface(), reset), "rapid reset one by one");
    place.others_are_served();
    let endless = [preface(), frame(HEADERS, END_STREAM, 1, &get(&[]))].concat();
    assert!(flood(&place, &endless, |_| frame(CONTINUATION, 0, 1, &[])), "empty CONTINUATION frames");
    let field = crate::wire::fields(&[("x", &"y".repeat(100))]);
    assert!(flood(&place, &endless, |_| frame(CONTINUATION, 0, 1, &field)), "an endless head");
    place.others_are_served();
    // these are answered one by one, and cost nothing that stays
    flood(&place, &preface(), |_| frame(PING, 0, 0, &[0; 8]).repeat(100));
    flood(&place, &preface(), |_| frame(SETTINGS, 0, 0, &[]).repeat(100));
    place.others_are_served();
    let after = place.memory();
    assert!(after < before + 64 * 1024, "{before} KiB before, {after} KiB after");
}

#[test]
fn who_takes_requests_back_after_they_were_taken_up_is_told_to_go() {
    let Some(place) = place(&[]) else { return };
    // an app that takes connections and never answers
    let _silent = place.server.inside(|| TcpListener::bind(("127.0.0.1", 8081))).expect("a listener");
    let mut stream = dial(&place.stranger, place.to(), 8081);
    stream.write_all(&preface()).unwrap();
    // each stream is seen by the sidecar before it is reset: the answered PING after it proves that
    let ended = (0..5_000_u32).any(|number| {
        let id = 2 * number + 1;
        let head = frame(HEADERS, END_HEADERS | END_STREAM, id, &get(&[]));
        let asked = stream.write_all(&[head, frame(PING, 0, 0, &u64::from(id).to_be_bytes())].concat());
        let answer =
            asked.ok().and_then(|()| read_until(&mut stream, |kind, _| kind == GOAWAY || kind == PING));
        let reset = frame(RST_STREAM, 0, id, &8_u32.to_be_bytes());
        answer.is_none() || stream.write_all(&reset).is_err()
    });
    // (the GOAWAY that it was sent may be lost in the reset behind it)
    assert!(ended);
    until("the sidecar says why", || place.sidecar.process.log().contains("took back 500 requests at once"));
    place.counted("bad_request");
    place.others_are_served();
}

#[test]
fn streams_over_the_limit_are_refused() {
    let Some(place) = place(&["--max-streams", "2"]) else { return };
    let mut stream = place.dial();
    let opened = [1, 3, 5].map(|id| frame(HEADERS, END_HEADERS, id, &get(&[("content-length", "5")])));
    stream.write_all(&[preface(), opened.concat()].concat()).unwrap();
    let (.., reason) = read_until(&mut stream, |kind, id| kind == RST_STREAM && id == 5).expect("a refusal");
    assert_eq!(reason, 7_u32.to_be_bytes(), "REFUSED_STREAM");
    place.others_are_served();
}
