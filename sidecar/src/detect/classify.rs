//! Classifies a connection by its first bytes: HTTP/2 preface (RFC 9113 3.4), TLS ClientHello (RFC 8446 4.1.2
//! and 5.1), HTTP/1 request line (RFC 9112 3), else opaque. Pure: more bytes never change a verdict, and the
//! verdict is always out within [`LOOK`] bytes. What any lenient parser could take for a request line is HTTP,
//! so that nothing slips past an HTTP policy as opaque bytes; a strict server refuses it afterwards.

use crate::model::Protocol;

/// Bytes after which a verdict is always out.
pub const LOOK: usize = 8 * 1024;

/// What the bytes so far say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// They are a beginning of more than one protocol.
    NeedMore,
    /// They settle it.
    Is(Protocol),
}

/// What does a client speak whose first bytes are these?
pub fn classify(bytes: &[u8]) -> Verdict {
    for candidate in [http2, tls, http1] {
        match candidate(bytes) {
            Match::No => {}
            Match::Perhaps => return Verdict::NeedMore,
            Match::Yes(protocol) => return Verdict::Is(protocol),
        }
    }
    Verdict::Is(Protocol::Opaque)
}

/// Do they begin a ClientHello, or may they yet?
pub fn may_be_tls(bytes: &[u8]) -> bool {
    !bytes.is_empty() && !matches!(tls(bytes), Match::No)
}

enum Match {
    No,
    Perhaps,
    Yes(Protocol),
}

/// RFC 9113 3.4: what a client of HTTP/2 sends first.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

fn http2(bytes: &[u8]) -> Match {
    if bytes.starts_with(PREFACE) {
        Match::Yes(Protocol::Http2)
    } else if PREFACE.starts_with(bytes) {
        Match::Perhaps
    } else {
        Match::No
    }
}

/// A handshake record (22) of version 3.x that opens with a ClientHello (1): six bytes tell.
fn tls(bytes: &[u8]) -> Match {
    let fits = bytes.iter().take(6).enumerate().all(|(at, &byte)| match at {
        0 => byte == 22,
        1 => byte == 3,
        2 => byte <= 4,
        3 => byte <= 0x48,
        4 => byte != 0 || bytes[3] != 0,
        _ => byte == 1,
    });
    match (fits, bytes.len()) {
        (false, _) => Match::No,
        (true, 0..6) => Match::Perhaps,
        (true, _) => Match::Yes(Protocol::Tls),
    }
}

/// The longest method that is taken for one; the longest registered has 17 letters.
const METHOD_BYTES: usize = 32;
/// After one of these a control character is no sign of another protocol: it is a bad target, to be refused as such.
/// Others (IBM MQ begins with `TSH `) shall not wait for a line's end that never comes.
const METHODS: [&[u8]; 9] =
    [b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"CONNECT", b"OPTIONS", b"TRACE", b"PATCH"];
/// RFC 9112 2.2: a server should ignore an empty line before the request line. Two are let pass.
const BLANK_BYTES: usize = 4;

fn http1(bytes: &[u8]) -> Match {
    let blank = bytes.iter().take(BLANK_BYTES).take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
    let line = &bytes[blank..];
    let Some(method) = line.iter().take(METHOD_BYTES + 1).position(|&byte| !is_token(byte)) else {
        return if line.len() > METHOD_BYTES { Match::No } else { Match::Perhaps };
    };
    if method == 0 || !is_space(line[method]) {
        return Match::No;
    }
    let is_known = METHODS.iter().any(|known| line[..method].eq_ignore_ascii_case(known));
    let rest = &line[method + 1..];
    let end = rest.iter().position(|&byte| byte == b'\n');
    let text = &rest[..end.unwrap_or(rest.len())];
    if !is_known && text.iter().any(|&byte| is_control(byte)) {
        return Match::No;
    }
    match end {
        Some(_) if names_http_version(text) => Match::Yes(Protocol::Http1),
        Some(_) => Match::No,
        // So long a line that looks like a request line all the way: the server may refuse it as such.
        None if bytes.len() >= LOOK => Match::Yes(Protocol::Http1),
        None => Match::Perhaps,
    }
}

/// Does the rest of a line end in `<space>HTTP/<digit>.<digit>`, as every version but 0.9 does?
fn names_http_version(text: &[u8]) -> bool {
    let text = text.trim_ascii_end();
    let Some(at) = text.iter().rposition(|&byte| is_space(byte)) else { return false };
    matches!(&text[at + 1..], [b'H', b'T', b'T', b'P', b'/', major, b'.', minor]
        if major.is_ascii_digit() && minor.is_ascii_digit())
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t')
}

/// Never part of a request line; a carriage return and a tab may be, before its end.
fn is_control(byte: u8) -> bool {
    byte.is_ascii_control() && !matches!(byte, b'\r' | b'\t')
}

/// `tchar` of RFC 9110 5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Protocol::{Http1, Http2, Opaque, Tls};

    /// Feeds every prefix: no verdict may come before it is settled, none may change afterwards.
    #[track_caller]
    fn settles(bytes: &[u8], expected: Protocol) {
        let mut settled = None;
        for length in 0..=bytes.len() {
            match (classify(&bytes[..length]), settled) {
                (Verdict::NeedMore, None) => {}
                (Verdict::Is(protocol), None) => settled = Some(protocol),
                (Verdict::Is(protocol), Some(before)) => assert_eq!(protocol, before, "after {length} bytes"),
                (Verdict::NeedMore, Some(before)) => panic!("{before} is taken back after {length} bytes"),
            }
        }
        assert_eq!(settled, Some(expected), "{:?}", String::from_utf8_lossy(bytes));
    }

    #[test]
    fn requests_are_http1() {
        for bytes in [
            "GET / HTTP/1.1\r\nhost: a\r\n\r\n",
            "GET / HTTP/1.0\n\n",
            "get /a?b=c HTTP/1.1\r\n",
            "CONNECT example.org:443 HTTP/1.1\r\n",
            "OPTIONS * HTTP/1.1\r\n",
            "POST http://orders/v1 HTTP/1.1\r\n",
            "VERSION-CONTROL /x HTTP/1.1\r\n",
            "M-SEARCH * HTTP/1.1\r\n",
            "X!#$%&'*+-.^_`|~9 / HTTP/1.1\r\n",
            "\r\nGET / HTTP/1.1\r\n",
            "PRI * HTTP/1.1\r\n",
            // What a lenient server would take for a request, ours must see as one.
            "GET  / HTTP/1.1\r\n",
            "GET\t/\tHTTP/1.1\r\n",
            "GET / HTTP/1.1 \r\n",
            "GET /ä HTTP/1.1\r\n",
            "GET / HTTP/2.0\r\n",
            "GET /a\0b HTTP/1.1\r\n",
            "get \0 HTTP/1.1\r\n",
            "POST /a\x1b\x7f HTTP/1.1\r\n",
            "PRI * HTTP/2.0\r\n\r\nXX",
        ] {
            settles(bytes.as_bytes(), Http1);
        }
    }

    #[test]
    fn an_endless_request_line_is_settled_in_time() {
        settles(format!("GET /{}", "x".repeat(LOOK)).as_bytes(), Http1);
        settles("x".repeat(LOOK).as_bytes(), Opaque);
    }

    #[test]
    fn the_preface_is_http2_and_only_whole() {
        settles(PREFACE, Http2);
        settles(&[PREFACE, &[0, 0, 0, 4, 0, 0, 0, 0, 0]].concat(), Http2);
        assert_eq!(classify(&PREFACE[..PREFACE.len() - 1]), Verdict::NeedMore);
    }

    #[test]
    fn a_client_hello_is_tls_and_other_records_are_not() {
        settles(&[22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3], Tls);
        settles(&[22, 3, 3, 0, 5, 1], Tls);
        for not in [
            &[22, 3, 1, 0, 0, 1][..],
            &[22, 3, 1, 2, 0, 2],
            &[22, 3, 9, 2, 0, 1],
            &[22, 3, 1, 0xff, 0, 1],
            &[22, 4, 1, 2, 0, 1],
            &[21, 3, 1, 0, 2, 1],
        ] {
            settles(not, Opaque);
        }
    }

    #[test]
    fn protocols_of_others_are_opaque() {
        for bytes in [
            &b"*1\r\n$4\r\nPING\r\n"[..],               // redis
            b"PING\r\n",                                // redis, inline
            b"GET key\r\n",                             // redis, inline; memcached
            b"set k 0 0 1\r\nv\r\n",                    // memcached
            b"\0\0\0\x08\x04\xd2\x16\x2f",              // PostgreSQL, SSLRequest
            b"SSH-2.0-OpenSSH_9.2 Debian\r\n",          // ssh
            b"EHLO example.org\r\n",                    // smtp
            b"AMQP\0\0\x09\x01",                        // amqp
            b"CONNECT {\"verbose\":false}\r\nPING\r\n", // nats
            b"OPTIONS rtsp://a/ RTSP/1.0\r\n",          // rtsp
            b"INVITE sip:a@b SIP/2.0\r\n",              // sip
            b"GET /\r\n",                               // HTTP/0.9 is no HTTP of ours
            b"\x10\x0c\0\x04MQTT\x04\x02",              // mqtt
            b"A\0\0\0\x01 \0",                          // a length that looks like a letter
            b"TSH \0\0\x01\x0c\x02\x01",                // IBM MQ
            b"\n\x03foo",                               // protobuf
            b"GET / \x01HTTP/1.1\r\n",
            b" GET / HTTP/1.1\r\n",
            b"GET(/) HTTP/1.1\r\n",
            b"\r\n\r\n\r\nGET / HTTP/1.1\r\n",
            b"GET / XHTTP/1.1\r\n",
            b"GET / HTTP/1.10\r\n",
            b"GET / HTTP/1\r\n",
        ] {
            settles(bytes, Opaque);
        }
    }

    #[test]
    fn random_bytes_are_settled_once_and_without_a_panic() {
        let mut random = fastrand::Rng::with_seed(7);
        let alphabet = b"GET / HTP1.20\r\n\t\x16\x03\x01\0PRI*SM";
        for _ in 0..20_000 {
            let mut settled = None;
            let bytes: Vec<u8> =
                (0..random.usize(..40)).map(|_| alphabet[random.usize(..alphabet.len())]).collect();
            for length in 0..=bytes.len() {
                if let Verdict::Is(protocol) = classify(&bytes[..length]) {
                    assert_eq!(*settled.get_or_insert(protocol), protocol, "{bytes:?}");
                } else {
                    assert!(settled.is_none(), "{bytes:?}");
                }
            }
        }
    }
}
