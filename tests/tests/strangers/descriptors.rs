//! A sidecar that may open no more descriptors (`RLIMIT_NOFILE`): connections that nobody uses make room for clients.

use std::{
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Barrier},
    thread,
    time::Duration,
};

use weft_proto::names::SIDECAR_UID;
use weft_tests::{Mesh, Need, Pod, can_run, output_of, until};

/// Requests at a time, so that as many connections to the app stay behind.
const BURST: usize = 20;
/// Clients that come when no descriptor is left.
const MORE: usize = 6;

const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

/// An app that answers `/together` when that many such requests are there.
fn app(pod: &Pod) {
    let listener = pod.inside(|| TcpListener::bind("0.0.0.0:8080")).expect("a listener");
    let together = Arc::new(Barrier::new(BURST));
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let together = together.clone();
            thread::spawn(move || serve(stream, &together));
        }
    });
}

fn serve(mut stream: TcpStream, together: &Barrier) {
    let mut buffer = [0; 4096];
    // A request comes in one piece here.
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        if buffer[..count].starts_with(b"GET /together ") {
            together.wait();
        }
        if stream.write_all(ANSWER).is_err() {
            return;
        }
    }
}

fn ask(client: &Pod, server: &Pod, path: &str) -> TcpStream {
    let address = (server.ipv4(), 8080);
    let mut stream = client.inside(|| TcpStream::connect(address)).expect("a connection");
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: app\r\n\r\n").as_bytes()).expect("a request");
    stream
}

fn is_answered(stream: &mut TcpStream) -> bool {
    let mut answer = Vec::new();
    let mut buffer = [0; 1024];
    while !answer.ends_with(b"ok") {
        match stream.read(&mut buffer) {
            Ok(count @ 1..) => answer.extend_from_slice(&buffer[..count]),
            _ => return false,
        }
    }
    answer.starts_with(b"HTTP/1.1 200 ")
}

/// The descriptors of a process, from its folder in `/proc`.
fn numbers(folder: &str) -> Vec<usize> {
    let entries = fs::read_dir(folder).expect("its descriptors").flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

#[test]
fn idle_connections_make_room_when_descriptors_run_out() {
    if !can_run(&[Need::Root, Need::Program("curl", "curl"), Need::Program("prlimit", "util-linux")]) {
        return;
    }
    let mesh = Mesh::new();
    let (client, server) = (mesh.network.pod("client"), mesh.network.pod("server"));
    app(&server);
    mesh.write_service("app", &format!("protocol: http1\nendpoints:\n  - address: {}:8080\n", server.ipv4()));
    let sidecar = mesh.sidecar(&client, "web", &[]);
    let folder = format!("/proc/{}/fd", sidecar.process.id());
    let descriptors = || numbers(&folder).len();

    let before = descriptors();
    let mut burst: Vec<TcpStream> = (0..BURST).map(|_| ask(&client, &server, "/together")).collect();
    assert!(burst.iter_mut().all(is_answered));
    drop(burst);
    until("the clients of the burst are gone", || descriptors() <= before + BURST + 1);
    assert!(descriptors() >= before + BURST, "the connections to the app stay");

    // No number above the highest that is open; those of the burst's clients are free below it.
    let open = numbers(&folder);
    let limit = open.iter().max().expect("descriptors") + 1;
    let clients = limit - open.len() + MORE;
    let limit = format!("--nofile={limit}:{limit}");
    // As the same user, who may lower it without a privilege.
    let mut prlimit = client.command_as(SIDECAR_UID, "prlimit");
    prlimit.args(["--pid", &sidecar.process.id().to_string(), &limit]);
    output_of(prlimit);
    let mut held = Vec::new();
    for number in 0..clients {
        held.push(ask(&client, &server, "/"));
        assert!(is_answered(&mut held[number]), "client {number}; the log:\n{}", sidecar.process.log());
    }
    assert!(sidecar.process.log().contains("cannot accept a connection"), "the limit was met");
}
