//! What travels between the pods: TLS 1.3 and nothing else, while the same bytes are plain to see inside a pod.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use nix::sys::signal::Signal;
use weft_tests::{Mesh, Need, Netns, Process, can_run, output_of, until};

use super::scene::{NEEDS, Scene};

const MARKER: &str = "marker-of-the-plaintext";

/// tcpdump on an interface. Stop it before reading.
struct Capture {
    tcpdump: Process,
    file: PathBuf,
}

impl Capture {
    fn start(netns: &Netns, interface: &str, file: PathBuf) -> Capture {
        let mut command = netns.command("tcpdump");
        command.args(["-i", interface, "-s", "0", "-U", "-Z", "root", "-w"]).arg(&file).arg("tcp");
        let mut tcpdump = Process::start("tcpdump", command);
        tcpdump.wait_for_line("listening on");
        Capture { tcpdump, file }
    }

    fn stop(mut self) -> Vec<u8> {
        self.tcpdump.signal(Signal::SIGINT);
        self.tcpdump.wait();
        fs::read(&self.file).unwrap()
    }
}

/// The bytes of each direction of each TCP connection, put in order. Ethernet, both versions of IP.
fn flows(pcap: &[u8]) -> BTreeMap<String, Vec<u8>> {
    assert_eq!(pcap[..4], 0xa1b2_c3d4_u32.to_ne_bytes(), "a capture of this machine");
    let word = |bytes: &[u8]| u32::from_ne_bytes(bytes[..4].try_into().unwrap()) as usize;
    let mut pieces: BTreeMap<String, BTreeMap<u32, Vec<u8>>> = BTreeMap::new();
    let mut rest = &pcap[24..];
    while rest.len() >= 16 {
        let length = word(&rest[8..]);
        let (packet, after) = rest[16..].split_at(length);
        rest = after;
        let ip = &packet[14..];
        let (tcp, hosts) = match ip[0] >> 4 {
            4 => (
                &ip[usize::from(ip[0] & 15) * 4..usize::from(u16::from_be_bytes([ip[2], ip[3]]))],
                &ip[12..20],
            ),
            _ => (&ip[40..40 + usize::from(u16::from_be_bytes([ip[4], ip[5]]))], &ip[8..40]),
        };
        let data = &tcp[usize::from(tcp[12] >> 4) * 4..];
        let flow = format!("{hosts:?} {:?}", &tcp[..4]);
        let sequence = u32::from_be_bytes(tcp[4..8].try_into().unwrap());
        let flow = pieces.entry(flow).or_default();
        if !data.is_empty() {
            flow.insert(sequence, data.to_vec());
        }
    }
    let in_order = |pieces: BTreeMap<u32, Vec<u8>>| {
        let mut whole: Vec<u8> = Vec::new();
        let mut next = None;
        for (sequence, data) in pieces {
            // what was sent again is there already
            let known = next.map_or(0, |next: u32| next.saturating_sub(sequence) as usize);
            if let Some(new) = data.get(known..) {
                whole.extend(new);
                next = Some(sequence + data.len() as u32);
            }
        }
        whole
    };
    pieces.into_iter().map(|(flow, pieces)| (flow, in_order(pieces))).collect()
}

/// Every byte belongs to a record of TLS; the version that a hello of the server chose, where there is one.
fn tls_version(flow: &str, mut bytes: &[u8]) -> Option<u16> {
    let mut chosen = None;
    while !bytes.is_empty() {
        assert!(
            bytes.len() > 5 && (20..=23).contains(&bytes[0]) && bytes[1] == 3,
            "{flow}: no TLS: {bytes:?}"
        );
        let (record, rest) = bytes[5..].split_at(usize::from(u16::from_be_bytes([bytes[3], bytes[4]])));
        if bytes[0] == 22 && record[0] == 2 {
            chosen = Some(chosen_version(record));
        }
        bytes = rest;
    }
    chosen
}

/// RFC 8446 4.1.3 and 4.2.1.
fn chosen_version(hello: &[u8]) -> u16 {
    // type and length, legacy version, random, session id, cipher suite, compression
    let session = 4 + 2 + 32;
    let mut at = session + 1 + usize::from(hello[session]) + 2 + 1 + 2;
    let number = |at: usize| u16::from_be_bytes([hello[at], hello[at + 1]]);
    while at < hello.len() {
        if number(at) == 0x002b {
            return number(at + 4);
        }
        at += 4 + usize::from(number(at + 2));
    }
    number(4)
}

fn shows_marker(pcap: &[u8]) -> bool {
    pcap.windows(MARKER.len()).any(|window| window == MARKER.as_bytes())
}

#[test]
fn the_wire_shows_tls_1_3_and_no_plaintext() {
    let programs = [
        Need::Program("tcpdump", "tcpdump"),
        Need::Program("redis-server", "redis-server"),
        Need::Program("redis-cli", "redis-tools"),
    ];
    if !can_run(&[&NEEDS[..], &programs].concat()) {
        return;
    }
    let scene = Scene::new(Mesh::new(), &["--mtls", "strict"]);
    let folder = scene.mesh.network.folder().to_owned();
    let (client, data) = (scene.mesh.network.pod("client"), scene.mesh.network.pod("data"));
    let redis_folder = folder.join("redis").display().to_string();
    fs::create_dir(&redis_folder).unwrap();
    let mut redis =
        data.start("redis-server", &["--bind", "127.0.0.1", "--save", "", "--dir", &redis_folder]);
    redis.wait_for_line("eady to accept connections");
    let _redis_sidecar = scene.mesh.sidecar(&data, "cache", &["--port", "6379", "--mtls", "strict"]);
    for service in ["orders", "cache"] {
        scene.mesh.wait_until_published(service);
    }

    let wire = Capture::start(&scene.mesh.network.wire, "bridge", folder.join("wire.pcap"));
    let in_orders = Capture::start(scene.server.netns(), "lo", folder.join("orders.pcap"));
    let in_cache = Capture::start(data.netns(), "lo", folder.join("cache.pcap"));
    let _sidecar = scene.mesh.sidecar(&client, "web", &[]);
    let mut curl = client.command("curl");
    let header = format!("x-secret: {MARKER}");
    curl.args(["-s", "-S", "-f", "-m", "5", "-H", &header, "-d", MARKER, "http://orders/"]);
    assert!(output_of(curl).contains(MARKER));
    for command in [&["SET", "key", MARKER][..], &["GET", "key"]] {
        let mut redis = client.command("redis-cli");
        redis.args(["-h", "cache"]).args(command);
        output_of(redis);
    }
    let complete = |file: &Path| shows_marker(&fs::read(file).unwrap_or_default());
    until("the control captures show the marker", || complete(&in_orders.file) && complete(&in_cache.file));

    let wire = wire.stop();
    assert!(shows_marker(&in_orders.stop()) && shows_marker(&in_cache.stop()));
    assert!(!shows_marker(&wire), "the marker was seen on the wire");
    let versions: Vec<u16> =
        flows(&wire).iter().filter_map(|(flow, bytes)| tls_version(flow, bytes)).collect();
    assert!(versions.len() >= 3, "connections to the authority, to orders, to cache: {versions:x?}");
    assert!(versions.iter().all(|version| *version == 0x0304), "{versions:x?}");
}
