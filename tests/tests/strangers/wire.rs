//! Raw sockets, frames of HTTP/2 by hand (RFC 9113 4.1), and an app that records requests byte for byte.

use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use weft_tests::Pod;

/// How long a test waits for what should come at once.
const PATIENCE: Duration = Duration::from_secs(15);

/// A request as the app read it, strictly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) head: String,
    pub(crate) body: String,
    pub(crate) trailers: String,
}

/// An HTTP/1 app that answers every request and keeps what it read.
#[derive(Debug, Clone, Default)]
pub(crate) struct Recorder {
    requests: Arc<Mutex<Vec<Request>>>,
    broken: Arc<Mutex<Vec<String>>>,
}

impl Recorder {
    /// Starts on a port of the pod's loopback; ends with the test's process.
    pub(crate) fn start(pod: &Pod, port: u16) -> Recorder {
        let listener = pod.inside(|| TcpListener::bind(("127.0.0.1", port))).expect("a listener");
        let recorder = Recorder::default();
        let of_thread = recorder.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (recorder, Ok(stream)) = (of_thread.clone(), stream) else { return };
                thread::spawn(move || recorder.serve(stream));
            }
        });
        recorder
    }

    /// Everything since the last call.
    pub(crate) fn take(&self) -> Vec<Request> {
        std::mem::take(&mut self.requests.lock().unwrap())
    }

    /// What was no request of HTTP/1.1 in its strictest form.
    pub(crate) fn broken(&self) -> Vec<String> {
        self.broken.lock().unwrap().clone()
    }

    fn serve(&self, mut stream: TcpStream) {
        let (mut bytes, mut buffer) = (Vec::new(), [0; 4096]);
        loop {
            match parse(&bytes) {
                Ok(Some((request, length))) => {
                    bytes.drain(..length);
                    self.requests.lock().unwrap().push(request);
                    if stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nyes").is_err() {
                        return;
                    }
                    continue;
                }
                Ok(None) => {}
                Err(what) => {
                    let shown = String::from_utf8_lossy(&bytes).into_owned();
                    return self.broken.lock().unwrap().push(format!("{what}: {shown:?}"));
                }
            }
            match stream.read(&mut buffer) {
                Ok(0) | Err(_) => return,
                Ok(count) => bytes.extend_from_slice(&buffer[..count]),
            }
        }
    }
}

/// The first request of `bytes` and its length, once it is whole. Nothing lenient is taken.
fn parse(bytes: &[u8]) -> Result<Option<(Request, usize)>, &'static str> {
    let Some(end) = find(bytes, b"\r\n\r\n") else { return Ok(None) };
    let head = std::str::from_utf8(&bytes[..end]).map_err(|_| "no text")?;
    let field = |name: &str| {
        let mut values = head.split("\r\n").skip(1).filter_map(|line| {
            let (other, value) = line.split_once(": ")?;
            other.eq_ignore_ascii_case(name).then(|| value.to_owned())
        });
        (values.next(), values.next().is_some())
    };
    for line in head.split("\r\n") {
        if line.contains(['\r', '\n', '\0']) || line.starts_with([' ', '\t']) {
            return Err("a bare CR, LF, NUL or a folded line");
        }
    }
    let mut words = head.split("\r\n").next().unwrap_or_default().split(' ');
    if words.clone().count() != 3 || words.nth(2) != Some("HTTP/1.1") {
        return Err("the request line");
    }
    let ((host, two_hosts), (length, two_lengths)) = (field("host"), field("content-length"));
    let (coding, two_codings) = field("transfer-encoding");
    if host.is_none() || two_hosts || two_lengths || two_codings || length.is_some() && coding.is_some() {
        return Err("host, length or coding");
    }
    let start = end + 4;
    let head = head.to_owned();
    let (body, trailers, length) = match (coding.as_deref(), length) {
        (None, None) => (Vec::new(), String::new(), start),
        (None, Some(length)) => {
            let length: usize = length.parse().map_err(|_| "the length")?;
            if bytes.len() < start + length {
                return Ok(None);
            }
            (bytes[start..start + length].to_vec(), String::new(), start + length)
        }
        (Some("chunked"), None) => match chunks(&bytes[start..])? {
            Some((body, trailers, length)) => (body, trailers, start + length),
            None => return Ok(None),
        },
        _ => return Err("the coding"),
    };
    let body = String::from_utf8_lossy(&body).into_owned();
    Ok(Some((Request { head, body, trailers }, length)))
}

type Chunks = (Vec<u8>, String, usize);

fn chunks(bytes: &[u8]) -> Result<Option<Chunks>, &'static str> {
    let (mut at, mut body) = (0, Vec::new());
    loop {
        let Some(end) = find(&bytes[at..], b"\r\n") else { return Ok(None) };
        let digits = std::str::from_utf8(&bytes[at..at + end]).map_err(|_| "a chunk's size")?;
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err("a chunk's size");
        }
        let size = usize::from_str_radix(digits, 16).map_err(|_| "a chunk's size")?;
        at += end + 2;
        if size == 0 {
            let Some(end) = find(&bytes[at - 2..], b"\r\n\r\n") else { return Ok(None) };
            let trailers = String::from_utf8_lossy(&bytes[at - 2..at - 2 + end]).trim_start().to_owned();
            return Ok(Some((body, trailers, at - 2 + end + 4)));
        }
        if bytes.len() < at + size + 2 {
            return Ok(None);
        }
        if &bytes[at + size..at + size + 2] != b"\r\n" {
            return Err("a chunk's end");
        }
        body.extend_from_slice(&bytes[at..at + size]);
        at += size + 2;
    }
}

fn find(bytes: &[u8], part: &[u8]) -> Option<usize> {
    bytes.windows(part.len()).position(|window| window == part)
}

/// Connects from a pod.
pub(crate) fn dial(pod: &Pod, to: IpAddr, port: u16) -> TcpStream {
    let address = SocketAddr::new(to, port);
    let stream = pod.inside(move || TcpStream::connect_timeout(&address, PATIENCE)).expect("a connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("a read timeout");
    stream.set_write_timeout(Some(PATIENCE)).expect("a write timeout");
    stream.set_nodelay(true).expect("no delay");
    stream
}

/// All that comes until the other side closes.
pub(crate) fn read_to_close(stream: &mut TcpStream) -> Vec<u8> {
    let (mut all, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return all,
            Ok(count) => all.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return all,
            Err(error) => panic!("not closed ({error}) after {:?}", String::from_utf8_lossy(&all)),
        }
    }
}

/// What comes until this part, or until the other side closes.
pub(crate) fn read_until_text(stream: &mut TcpStream, part: &str) -> String {
    let (mut all, mut buffer) = (Vec::new(), [0; 4096]);
    while find(&all, part.as_bytes()).is_none() {
        match stream.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(count) => all.extend_from_slice(&buffer[..count]),
        }
    }
    String::from_utf8_lossy(&all).into_owned()
}

/// Sends bytes and gives all that comes back until the other side closes.
pub(crate) fn exchange(pod: &Pod, to: IpAddr, port: u16, bytes: &[u8]) -> String {
    let mut stream = dial(pod, to, port);
    // the other side may refuse before it has read all
    let _ = stream.write_all(bytes);
    String::from_utf8_lossy(&read_to_close(&mut stream)).into_owned()
}

/// What a client of HTTP/2 begins with.
pub(crate) fn preface() -> Vec<u8> {
    [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &frame(SETTINGS, 0, 0, &[])].concat()
}

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const CONTINUATION: u8 = 9;
pub(crate) const END_STREAM: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;

pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a short frame").to_be_bytes();
    let mut bytes = length[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// Header fields as literals without indexing or Huffman code (RFC 7541 6.2.2); each shorter than 127 bytes.
pub(crate) fn fields(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in fields {
        bytes.push(0);
        for text in [name, value] {
            bytes.push(u8::try_from(text.len()).ok().filter(|length| *length < 127).expect("a short text"));
            bytes.extend(text.as_bytes());
        }
    }
    bytes
}

/// The pseudo-headers of a GET, and more.
pub(crate) fn get(more: &[(&str, &str)]) -> Vec<u8> {
    let head = [(":method", "GET"), (":scheme", "http"), (":path", "/one"), (":authority", "orders")];
    fields(&[&head[..], more].concat())
}

/// Frames as (kind, flags, stream, payload).
pub(crate) fn frames(mut bytes: &[u8]) -> Vec<(u8, u8, u32, Vec<u8>)> {
    let mut all = Vec::new();
    while let Some((head, rest)) = bytes.split_at_checked(9) {
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        let Some((payload, after)) = rest.split_at_checked(length) else { break };
        all.push((head[3], head[4], stream, payload.to_vec()));
        bytes = after;
    }
    all
}

/// Reads frames until one of that kind on that stream, or the end.
pub(crate) fn read_until(
    stream: &mut TcpStream,
    is_it: impl Fn(u8, u32) -> bool,
) -> Option<(u8, u8, Vec<u8>)> {
    let (mut all, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        let found = frames(&all).into_iter().find(|(kind, _, id, _)| is_it(*kind, *id));
        if let Some((kind, flags, _, payload)) = found {
            return Some((kind, flags, payload));
        }
        match stream.read(&mut buffer) {
            Ok(0) | Err(_) => return None,
            Ok(count) => all.extend_from_slice(&buffer[..count]),
        }
    }
}
