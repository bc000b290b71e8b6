//! What other people's name servers may say to an app: no name of theirs leads to this host or to a service of the mesh,
//! and what is more than a question and an answer comes through whole.

use weft_tests::{Mesh, Need, Pod, Process, can_run, output_of, until};

use super::scene::{NEEDS, Scene, curl};

const PYTHON: Need = Need::Program("python3", "python3");

/// A name server for `a-N-N-N-N.evil.example`, which has the address N.N.N.N. A zone transfer has 300 messages, after
/// which the connection stays; an UPDATE is answered with its header alone.
const SERVER: &str = "
import socket, struct, threading
def name(data, at):
    labels = []
    while data[at]:
        labels.append(data[at + 1:at + 1 + data[at]])
        at += data[at] + 1
    return labels, at + 5
def answers(data):
    number, flags = struct.unpack('>HH', data[:4])
    if flags >> 11 & 15:
        yield struct.pack('>6H', number, flags | 0x8000, 0, 0, 0, 0)
        return
    labels, end = name(data, 12)
    kind, = struct.unpack('>H', data[end - 4:end - 2])
    words = labels[0].split(b'-')
    record = b''
    if kind in (1, 252) and words[0] == b'a':
        record = b'\\xc0\\x0c' + struct.pack('>HHIH', 1, 1, 5, 4) + bytes(int(word) for word in words[1:])
    for _ in range(300 if kind == 252 else 1):
        yield struct.pack('>6H', number, 0x8180, 1, 1 if record else 0, 0, 0) + data[12:end] + record
def tcp(stream):
    while True:
        head = stream.recv(2, socket.MSG_WAITALL)
        if len(head) < 2:
            return
        for answer in answers(stream.recv(struct.unpack('>H', head)[0], socket.MSG_WAITALL)):
            stream.sendall(struct.pack('>H', len(answer)) + answer)
listener = socket.create_server(('0.0.0.0', 53))
def accept():
    while True:
        threading.Thread(target=tcp, args=(listener.accept()[0],), daemon=True).start()
threading.Thread(target=accept, daemon=True).start()
packets = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
packets.bind(('0.0.0.0', 53))
print('serving', flush=True)
while True:
    data, client = packets.recvfrom(4096)
    for answer in answers(data):
        packets.sendto(answer, client)
";

/// A zone transfer, with a question for `orders` behind it in the same breath, and an UPDATE; what comes of them.
const CLIENT: &str = "
import socket, struct
def message(flags, labels, kind):
    question = b''.join(bytes([len(label)]) + label for label in labels) + b'\\0'
    return struct.pack('>6H', 7, flags, 1, 0, 0, 0) + question + struct.pack('>HH', kind, 1)
place = ('10.77.0.254', 53)
zone = [b'a-192-0-2-7', b'evil', b'example']
stream = socket.create_connection(place, timeout=30)
transfer, question = message(0, zone, 252), message(0x100, [b'orders', b'weft'], 1)
stream.sendall(b''.join(struct.pack('>H', len(one)) + one for one in (transfer, question)))
parts = 0
while True:
    part = stream.recv(struct.unpack('>H', stream.recv(2, socket.MSG_WAITALL))[0], socket.MSG_WAITALL)
    if b'orders' in part:
        break
    parts += 1
print('parts', parts, 'and then', socket.inet_ntoa(part[-4:]))
packets = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
packets.settimeout(10)
packets.sendto(message(5 << 11, zone, 6), place)
print('update', packets.recv(512).hex())
";

fn name_server(pod: &Pod) -> Process {
    let mut server = pod.start("python3", &["-c", SERVER]);
    server.wait_for_line("serving");
    server
}

/// The addresses of a name, as the C library has them.
fn addresses(pod: &Pod, name: &str) -> Vec<String> {
    let mut getent = pod.command("sh");
    getent.args(["-c", "getent ahostsv4 \"$0\" || true", name]);
    let mut found: Vec<String> = output_of(getent)
        .lines()
        .filter_map(|line| Some(line.split_whitespace().next()?.to_owned()))
        .collect();
    found.dedup();
    found
}

fn evil(address: &str) -> String {
    format!("a-{}.evil.example", address.replace('.', "-"))
}

#[test]
fn no_foreign_name_leads_to_this_host_or_to_a_service() {
    if !can_run(&NEEDS) || !can_run(&[PYTHON]) {
        return;
    }
    let scene = Scene::new(Mesh::new(), &[]);
    let (mesh, client) = (&scene.mesh, scene.mesh.network.pod("client"));
    let other = mesh.network.pod("other");
    let _server = name_server(&scene.stranger);
    let resolver = scene.stranger.ipv4().to_string();
    let sidecar = mesh.sidecar(&client, "web", &["--dns-upstream", &resolver]);
    mesh.wait_until_published("orders");
    until("orders has an address", || !addresses(&client, "orders").is_empty());
    let orders = addresses(&client, "orders").remove(0);
    assert!(curl(&client, &["http://orders/"]).starts_with("HTTP/1.1 200"));

    assert_eq!(addresses(&client, &evil("192.0.2.7")), ["192.0.2.7"]);
    let before = scene.accepted();
    for bad in [orders.as_str(), "127.0.0.1", "127.7.7.7", "0.0.0.0", "240.0.0.1"] {
        assert_eq!(addresses(&client, &evil(bad)), [""; 0], "{bad}");
    }
    let seen = curl(&client, &[&format!("http://{}/", evil(&orders))]);
    assert!(seen.contains("curl failed 6"), "{seen}");
    assert_eq!(scene.accepted(), before, "the service was called by a foreign name");
    let metrics = sidecar.metrics(&client);
    assert!(metrics.contains("weft_dns_queries_total{result=\"held_back\"}"), "{metrics}");
    let log = sidecar.process.log();
    assert_eq!(log.matches("--dns-rebinding-allow").count(), 1, "{log}");

    let flags = ["--dns-upstream", &resolver, "--dns-rebinding-allow", "evil.example"];
    let _sidecar = mesh.sidecar(&other, "batch", &flags);
    assert_eq!(addresses(&other, &evil("127.0.0.2")), ["127.0.0.2"]);
}

#[test]
fn zone_transfers_and_updates_come_through_whole() {
    if !can_run(&NEEDS) || !can_run(&[PYTHON]) {
        return;
    }
    let scene = Scene::new(Mesh::new(), &[]);
    let (mesh, client) = (&scene.mesh, scene.mesh.network.pod("client"));
    let _server = name_server(&scene.stranger);
    let resolver = scene.stranger.ipv4().to_string();
    let _sidecar = mesh.sidecar(&client, "web", &["--dns-upstream", &resolver]);
    mesh.wait_until_published("orders");
    until("orders has an address", || !addresses(&client, "orders").is_empty());
    let orders = addresses(&client, "orders").remove(0);
    let mut python = client.command("python3");
    python.args(["-c", CLIENT]);
    let said = output_of(python);
    assert!(said.contains(&format!("parts 300 and then {orders}\n")), "{said}");
    // Its own id, the answer to an UPDATE, and no error.
    assert!(said.contains("update 0007a800"), "{said}");
}
