//! A peer with a valid identity that floods, and a stranger whose TLS handshake does not go on: both cost little
//! that lasts, the log says why they were cut, and other connections are served meanwhile.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    process::{Child, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use rustls::{ClientConfig, ClientConnection, RootCertStore, crypto::aws_lc_rs::default_provider};
use weft_tests::{Forged, Forger, Mesh, Need, Pod, Sidecar, can_run, identity, pause, until};

use crate::wire::{
    CONTINUATION, END_HEADERS, END_STREAM, HEADERS, PING, RST_STREAM, Recorder, SETTINGS, dial, exchange,
    frame, get, preface, read_to_close,
};

const GET: &[u8] = b"GET /one HTTP/1.1\r\nHost: orders\r\nConnection: close\r\n\r\n";
/// Bytes of a flood that nobody ends.
const FLOOD: usize = 20_000_000;
/// More memory than that a flood must not leave behind, nor hold while it goes on.
const MOST_KIB: u64 = 32 * 1024;

/// A program that ends with its owner.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A pod without a sidecar, and an app behind one.
struct Place {
    outside: Pod,
    server: Pod,
    sidecar: Sidecar,
    app: Recorder,
    mesh: Mesh,
}

fn place(flags: &[&str]) -> Option<Place> {
    let needs = [Need::Root, Need::Program("curl", "curl"), Need::Program("openssl", "openssl")];
    if !can_run(&needs) {
        return None;
    }
    let mesh = Mesh::new();
    let (outside, server) = (mesh.network.pod("outside"), mesh.network.pod("server"));
    let app = Recorder::start(&server, 8080);
    let sidecar = mesh.sidecar(&server, "orders", &[&["--port", "8080"], flags].concat());
    Some(Place { outside, server, sidecar, app, mesh })
}

impl Place {
    fn others_are_served(&self) {
        let answer = exchange(&self.outside, self.server.ipv4(), 8080, GET);
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }

    fn status(&self, name: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.sidecar.process.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect(name);
        line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().expect("a number")
    }

    /// Hundredths of a second on a processor so far.
    fn ticks(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.sidecar.process.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11..13].iter().map(|ticks| ticks.parse::<u64>().unwrap()).sum()
    }

    /// HTTP/2 over mutual TLS as the service `web`, byte by byte: what is written goes out, what comes is thrown away.
    fn peer(&self) -> Child {
        let pem =
            Forger::of_mesh(&self.mesh).leaf("web", &Forged::of(&identity("web"))).display().to_string();
        let mut openssl = self.outside.command("openssl");
        openssl.args(["s_client", "-quiet", "-connect", &format!("{}:8080", self.server.ipv4())]);
        openssl.args(["-alpn", "weft-h2", "-cert", &pem, "-cert_chain", &pem, "-key", &pem]);
        openssl.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        openssl.spawn().expect("openssl")
    }

    /// Sends pieces until the connection ends, enough was sent, or nothing more is taken; others are served all the
    /// while. `reads`: takes what comes back. Says whether the connection ended.
    fn flood(&self, what: &str, reads: bool, begin: &[u8], piece: impl Fn(u32) -> Vec<u8> + Sync) -> bool {
        self.others_are_served();
        let (memory, ticks) = (self.status("VmRSS"), self.ticks());
        let mut peer = self.peer();
        let (mut to, mut from) = (peer.stdin.take().unwrap(), peer.stdout.take().unwrap());
        let sent = AtomicUsize::new(0);
        let ended = thread::scope(|scope| {
            if reads {
                scope.spawn(|| {
                    let mut buffer = [0; 65536];
                    while from.read(&mut buffer).is_ok_and(|count| count > 0) {}
                });
            }
            let flood = scope.spawn(|| {
                let mut written = to.write_all(begin);
                for number in 0.. {
                    if written.is_err() || sent.load(Ordering::Relaxed) > FLOOD {
                        break;
                    }
                    let bytes = piece(number);
                    written = to.write_all(&bytes);
                    sent.fetch_add(bytes.len(), Ordering::Relaxed);
                }
                written.is_err()
            });
            // what still waits to be written breaks off in the end, after a panic too
            let _killed = Killed(peer);
            let (mut before, mut standing, mut served) = (0, 0, 0);
            while !flood.is_finished() && standing < 25 {
                self.others_are_served();
                served += 1;
                let now = sent.load(Ordering::Relaxed);
                standing = if now == before { standing + 1 } else { 0 };
                before = now;
                pause();
            }
            let ended = flood.is_finished() && flood.join().unwrap();
            let (cost, after) = (self.ticks() - ticks, self.status("VmRSS"));
            println!(
                "{what}: {before} bytes sent, ended: {ended}, {served} others served, {cost}0 ms of processor, \
                 {memory} KiB before, {after} KiB after"
            );
            assert!(after < memory + MOST_KIB, "{what}: {memory} KiB before, {after} KiB after");
            ended
        });
        self.others_are_served();
        ended
    }

    /// The log says that a connection of the peer was ended, and why.
    fn cut(&self) {
        let line = self.sidecar.wait_for_failure("bad_request", &[]);
        assert_eq!(line["peer_identity"], identity("web"), "{line}");
        assert_ne!(line["detail"], "", "{line}");
    }
}

#[test]
fn floods_of_a_peer_cost_no_memory_and_delay_nobody() {
    let Some(place) = place(&[]) else { return };
    let reset = |number: u32| {
        let id = 2 * number + 1;
        let head = frame(HEADERS, END_HEADERS | END_STREAM, id, &get(&[]));
        [head, frame(RST_STREAM, 0, id, &8_u32.to_be_bytes())].concat()
    };
    let resets = |number: u32| (0..50).flat_map(|more| reset(number * 50 + more)).collect();
    assert!(place.flood("RST_STREAM", true, &preface(), resets));
    place.cut();
    let endless = [preface(), frame(HEADERS, END_STREAM, 1, &get(&[]))].concat();
    assert!(place.flood("CONTINUATION", true, &endless, |_| frame(CONTINUATION, 0, 1, &[]).repeat(100)));
    let ends = || {
        let log = place.sidecar.access_log();
        log.iter().filter(|line| line["kind"] == "connection" && line["failure"] == "bad_request").count()
    };
    until("both ends are in the log", || ends() == 2);
    // answered one by one, as long as the peer takes the answers
    place.flood("PING", true, &preface(), |_| frame(PING, 0, 0, &[0; 8]).repeat(100));
    place.flood("SETTINGS", true, &preface(), |_| frame(SETTINGS, 0, 0, &[]).repeat(100));
    // and from one who does not take them nothing more is read (CVE-2019-9512, CVE-2019-9515)
    place.flood("PING unread", false, &preface(), |_| frame(PING, 0, 0, &[0; 8]).repeat(100));
    place.flood("SETTINGS unread", false, &preface(), |_| frame(SETTINGS, 0, 0, &[]).repeat(100));
}

/// The ClientHello of a peer's sidecar.
pub(crate) fn hello() -> Vec<u8> {
    let config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let mut config = config;
    config.alpn_protocols = vec![b"weft-h2".to_vec()];
    let name = rustls_pki_types::ServerName::try_from("orders").unwrap();
    let mut hello = Vec::new();
    ClientConnection::new(Arc::new(config), name).unwrap().write_tls(&mut hello).unwrap();
    hello
}

#[test]
fn a_hello_that_pauses_is_not_taken_for_foreign_tls() {
    let Some(place) = place(&[]) else { return };
    let hello = hello();
    for first in [3, 100, hello.len() - 1] {
        let mut stream = dial(&place.outside, place.server.ipv4(), 8080);
        stream.write_all(&hello[..first]).unwrap();
        // longer than a pause that settles what other clients speak
        (0..75).for_each(|_| pause());
        stream.write_all(&hello[first..]).unwrap();
        let mut answer = [0; 6];
        stream.read_exact(&mut answer).expect("an answer");
        assert_eq!((answer[0], answer[5]), (22, 2), "a ServerHello after {first} bytes");
    }
    assert_eq!(place.app.broken(), Vec::<String>::new());
    // and for one that does not go on nobody else pays
    let mut half = dial(&place.outside, place.server.ipv4(), 8080);
    half.write_all(&hello[..100]).unwrap();
    assert_eq!(read_to_close(&mut half), b"");
    place.sidecar.wait_for_failure("client_timeout", &["the ClientHello of TLS did not come whole"]);
    assert_eq!(place.app.broken(), Vec::<String>::new());
}

#[test]
fn a_handshake_that_does_not_go_on_is_cut() {
    let Some(place) = place(&["--mtls", "strict"]) else { return };
    let hello = hello();
    let say = |bytes: &[u8]| -> TcpStream {
        let mut stream = dial(&place.outside, place.server.ipv4(), 8080);
        stream.write_all(bytes).unwrap();
        stream
    };
    let (mut whole, mut half) = (say(&hello), say(&hello[..hello.len() / 2]));
    // closed by the sidecar: the client never ends it
    assert_eq!(read_to_close(&mut half), b"");
    place.sidecar.wait_for_failure("client_timeout", &["the ClientHello of TLS did not come whole"]);
    let answer = read_to_close(&mut whole);
    assert_eq!(answer.first(), Some(&22), "a ServerHello");
    place.sidecar.wait_for_failure("client_timeout", &["the TLS handshake took too long"]);
}
