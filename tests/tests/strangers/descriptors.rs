//! A sidecar that may open few descriptors (`RLIMIT_NOFILE`), or no more: connections that nobody uses make room for
//! clients, clients wait, and neither the sidecar nor the command of `exec` ends.

use std::{
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Barrier},
    thread,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use weft_proto::names::SIDECAR_UID;
use weft_tests::{Mesh, Need, Pod, Sidecar, can_run, output_of, pause, program, program_for_everyone, until};

/// Requests at a time, so that as many connections to the app stay behind.
const BURST: usize = 20;
/// Clients that come when no descriptor is left.
const MORE: usize = 6;

const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

const UPGRADED: &[u8] = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: lines\r\n\r\n";

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
        let is_upgrade = buffer[..count].starts_with(b"GET /upgrade ");
        if stream.write_all(if is_upgrade { UPGRADED } else { ANSWER }).is_err() {
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

const NEEDS: [Need; 3] = [Need::Root, Need::Program("curl", "curl"), Need::Program("prlimit", "util-linux")];

/// Lets a running sidecar have this limit and no more.
fn limit(pod: &Pod, sidecar: Pid, descriptors: usize) {
    // As the same user, who may lower it without a privilege.
    let mut prlimit = pod.command_as(SIDECAR_UID, "prlimit");
    prlimit.args(["--pid", &sidecar.to_string(), &format!("--nofile={descriptors}:{descriptors}")]);
    output_of(prlimit);
}

/// A client of an app that gives lines back. It holds its connection.
fn say(client: &Pod, server: &Pod) -> TcpStream {
    let address = (server.ipv4(), 8080);
    let mut stream = client.inside(|| TcpStream::connect(address)).expect("a connection");
    stream.set_read_timeout(Some(Duration::from_secs(15))).expect("a timeout");
    stream.write_all(b"hello\n").expect("a line");
    stream
}

fn is_given_back(stream: &mut TcpStream) -> bool {
    stream.read_exact(&mut [0; 6]).is_ok()
}

/// The soft and the hard limit of a process.
fn limits(process: Pid) -> Vec<usize> {
    let text = fs::read_to_string(format!("/proc/{process}/limits")).expect("its limits");
    let line = text.lines().find(|line| line.starts_with("Max open files")).expect("the limit of files");
    line.split_whitespace().filter_map(|word| word.parse().ok()).collect()
}

#[test]
fn a_want_of_descriptors_does_not_end_exec() {
    if !can_run(&NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let (client, server) = (mesh.network.pod("client"), mesh.network.pod("server"));
    let (_folder, peer) = program_for_everyone(&program("mesh-peer"));
    let command = [&peer.display().to_string(), "app", "127.0.0.1:8080"];
    let mut exec = mesh.exec(&server, "app", &["--port", "8080", "--protocol", "tcp"], &command);
    exec.process.wait_for_line("serving");
    until("the app is reached", || is_given_back(&mut say(&client, &server)));

    let open = numbers(&format!("/proc/{}/fd", exec.process.id()));
    let most = open.iter().max().expect("descriptors") + 20;
    limit(&server, exec.process.id(), most);
    // Numbers below the highest may be free.
    let clients = most - open.len() + 60;
    let held: Vec<TcpStream> = (0..clients).map(|_| say(&client, &server)).collect();
    until("no descriptor is left", || exec.process.log().contains("cannot accept a connection"));
    drop(held);
    until("others are served", || is_given_back(&mut say(&client, &server)));
    let metrics = exec.metrics(&server);
    let lost = metrics.lines().find_map(|line| line.strip_prefix("weft_app_sockets_lost_total "));
    assert!(lost.is_some_and(|count| count != "0"), "{lost:?}");
    assert!(!exec.process.has_ended(), "{}", exec.process.log());
}

#[test]
fn the_soft_limit_is_raised_and_the_command_gets_it_back() {
    if !can_run(&NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let (client, server) = (mesh.network.pod("client"), mesh.network.pod("server"));
    let (_folder, peer) = program_for_everyone(&program("mesh-peer"));
    let wrapper = ["prlimit", "--nofile=256:2000"];
    let script = format!(
        "echo soft $(ulimit -Sn) hard $(ulimit -Hn); ulimit -Sn 1000; exec {} app 127.0.0.1:8080",
        peer.display()
    );
    let flags = ["--port", "8080", "--protocol", "tcp"];
    let mut exec = mesh.start_exec_under(&wrapper, &server, "app", &flags, &["sh", "-c", &script]);
    exec.process.wait_for_line("soft 256 hard 2000");
    exec.process.wait_for_line("serving");
    assert_eq!(limits(exec.process.id()), [2000, 2000]);
    exec.process.wait_for_line("--max-connections 20000 is clamped to 436");
    // More than fit below the soft limit.
    let mut held: Vec<TcpStream> = (0..200).map(|_| say(&client, &server)).collect();
    assert!(held.iter_mut().all(is_given_back), "{}", exec.process.log());

    // A bound that fits is not spoken of.
    let pod = mesh.network.pod("other");
    let flags = ["--max-connections", "100"];
    let other = mesh.start_sidecar_under(&wrapper, &pod, "other", &flags, &[]);
    other.wait_until_ready(&pod);
    assert_eq!(limits(other.process.id()), [2000, 2000]);
    assert!(!other.process.log().contains("clamped"), "{}", other.process.log());
}

/// So many connections fit into the 400 descriptors of the test below,
const FIT: usize = 50;
/// and so many come at once.
const WAITING: usize = 250;

#[test]
fn clients_wait_where_few_descriptors_are_there() {
    if !can_run(&NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let (_folder, peer) = program_for_everyone(&program("mesh-peer"));
    let peer = peer.display().to_string();
    let wrapper = ["prlimit", "--nofile=400:400"];
    let flags = ["--port", "8080", "--protocol", "tcp"];

    let (client, server) = (mesh.network.pod("client-exec"), mesh.network.pod("exec"));
    let app = [&peer, "app", "127.0.0.1:8080"];
    let mut exec = mesh.start_exec_under(&wrapper, &server, "one", &flags, &app);
    exec.process.wait_for_line("serving");
    all_are_served_in_turn(&client, &server, &exec);

    let (client, server) = (mesh.network.pod("client-run"), mesh.network.pod("run"));
    let mut app = server.start(&peer, &["app", "127.0.0.1:8080"]);
    app.wait_for_line("serving");
    let run = mesh.start_sidecar_under(&wrapper, &server, "two", &flags, &[]);
    run.wait_until_ready(&server);
    all_are_served_in_turn(&client, &server, &run);
}

fn all_are_served_in_turn(client: &Pod, server: &Pod, sidecar: &Sidecar) {
    assert!(sidecar.process.log().contains(&format!("is clamped to {FIT} ")), "{}", sidecar.process.log());
    until("the app is reached", || is_given_back(&mut say(client, server)));
    let clients: Vec<TcpStream> = (0..WAITING).map(|_| say(client, server)).collect();
    let served: Vec<_> = clients
        .into_iter()
        .map(|mut stream| {
            thread::spawn(move || {
                let served = is_given_back(&mut stream);
                (0..5).for_each(|_| pause());
                served
            })
        })
        .collect();
    let count = served.into_iter().filter_map(|client| client.join().ok()).filter(|served| *served).count();
    assert_eq!(count, WAITING, "{}", sidecar.process.log());
    let waits =
        sidecar.process.log().lines().filter(|line| line.contains("clients wait, as the bound")).count();
    // seldom, however many wait
    assert!((1..WAITING / 10).contains(&waits), "{}", sidecar.process.log());
}

#[test]
fn idle_connections_make_room_when_descriptors_run_out() {
    if !can_run(&NEEDS) {
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
    let most = open.iter().max().expect("descriptors") + 1;
    let clients = most - open.len() + MORE;
    limit(&client, sidecar.process.id(), most);
    let mut held = Vec::new();
    for number in 0..clients {
        held.push(ask(&client, &server, "/"));
        assert!(is_answered(&mut held[number]), "client {number}; the log:\n{}", sidecar.process.log());
    }
    assert!(sidecar.process.log().contains("cannot accept a connection"), "the limit was met");
}

/// Clients at a time, one of which finds a descriptor for the connection behind it.
const AT_ONCE: usize = 4;

/// What needs a connection of its own behind it.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Opaque,
    Upgrade,
}

#[test]
fn idle_connections_make_room_for_every_dial() {
    if !can_run(&NEEDS) {
        return;
    }
    for kind in [Kind::Opaque, Kind::Upgrade] {
        let mesh = Mesh::new();
        let (client, server) = (mesh.network.pod("client"), mesh.network.pod("server"));
        serve_both(&server);
        for (name, port, protocol) in [("app", 8080, "http1"), ("bytes", 8081, "tcp")] {
            let endpoint = format!("{}:{port}", server.ipv4());
            mesh.write_service(name, &format!("protocol: {protocol}\nendpoints:\n  - address: {endpoint}\n"));
        }
        let sidecar = mesh.sidecar(&client, "web", &[]);
        dials_find_room(kind, &client, &server, (&sidecar, &client));

        let mesh = Mesh::new();
        let (client, server) = (mesh.network.pod("client"), mesh.network.pod("server"));
        serve_both(&server);
        let sidecar = mesh.sidecar(&server, "app", &["--port", "8080", "--port", "8081"]);
        dials_find_room(kind, &client, &server, (&sidecar, &server));
    }
}

/// The app of HTTP on 8080, and one that gives lines back on 8081.
fn serve_both(pod: &Pod) {
    app(pod);
    let listener = pod.inside(|| TcpListener::bind("0.0.0.0:8081")).expect("a listener");
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut line = [0; 6];
                while stream.read_exact(&mut line).and_then(|()| stream.write_all(&line)).is_ok() {}
            });
        }
    });
}

fn dials_find_room(kind: Kind, client: &Pod, server: &Pod, (sidecar, pod): (&Sidecar, &Pod)) {
    let folder = format!("/proc/{}/fd", sidecar.process.id());
    let before = numbers(&folder).len();
    let mut burst: Vec<TcpStream> = (0..BURST).map(|_| ask(client, server, "/together")).collect();
    assert!(burst.iter_mut().all(is_answered));
    drop(burst);
    until("the clients of the burst are gone", || numbers(&folder).len() <= before + BURST + 1);
    // Those of the pool are idle by then, and were not used this very moment.
    (0..10).for_each(|_| pause());

    let open = numbers(&folder);
    let most = open.iter().max().expect("descriptors") + 1;
    let accepted = match kind {
        Kind::Opaque => AT_ONCE,
        Kind::Upgrade => 0,
    };
    limit(pod, sidecar.process.id(), most);
    // One after the other, so that none of them needs a further connection behind it.
    let mut held = Vec::new();
    for _ in 0..most - open.len() - accepted - 1 {
        held.push(ask(client, server, "/"));
        assert!(held.last_mut().is_some_and(is_answered));
    }
    match kind {
        Kind::Opaque => {
            // All of them are accepted before one is dialled for.
            kill(sidecar.process.id(), Signal::SIGSTOP).expect("it stops");
            let connect = || client.inside(|| TcpStream::connect((server.ipv4(), 8081)));
            let mut clients: Vec<TcpStream> = (0..AT_ONCE).flat_map(|_| connect()).collect();
            kill(sidecar.process.id(), Signal::SIGCONT).expect("it goes on");
            for stream in &mut clients {
                stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
                // one that is reset is found out by reading
                let _ = stream.write_all(b"hello\n");
            }
            let served = clients.iter_mut().filter_map(|stream| is_given_back(stream).then_some(())).count();
            assert_eq!(served, AT_ONCE, "{}", sidecar.process.log());
        }
        Kind::Upgrade => {
            let request =
                b"GET /upgrade HTTP/1.1\r\nhost: app\r\nconnection: upgrade\r\nupgrade: lines\r\n\r\n";
            for stream in &mut held[..AT_ONCE] {
                stream.write_all(request).expect("a request");
            }
            for stream in &mut held[..AT_ONCE] {
                let mut answer = [0; 12];
                stream.read_exact(&mut answer).expect("an answer");
                let answer = String::from_utf8_lossy(&answer);
                assert_eq!(answer, "HTTP/1.1 101", "{}", sidecar.process.log());
            }
        }
    }
}
