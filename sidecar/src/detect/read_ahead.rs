//! Reads a stream until it is clear what the client speaks, and puts the bytes back. A client that stays silent
//! may be waiting for the server to speak first: after `limit` the caller is told, and may ask again later, for
//! the bytes are still there. One that has begun gets longer, so that a pause within a request line does not make
//! opaque bytes of HTTP, and a ClientHello all the time there is: it may be a peer's. Bounded in bytes and in time,
//! however slowly the client trickles.

use std::{io, time::Duration};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::AsyncReadExt,
    time::{Instant, timeout_at},
};

use super::{HELLO_BYTES, Hello, HelloReader, LOOK, Verdict, classify, may_be_tls};
use crate::{model::Protocol, net::Stream};

/// A pause within a client's first bytes is no silence until it is this long.
pub(super) const PAUSE: Duration = Duration::from_secs(1);
/// However slowly a client trickles, reading ahead ends this long after its first byte.
const PATIENCE: Duration = Duration::from_secs(10);

/// The bytes a client began with. They are still to be read from the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadAhead {
    /// At most [`HELLO_BYTES`].
    pub bytes: Bytes,
    /// What they mean.
    pub heard: Heard,
}

/// How reading ahead ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    /// The protocol is known. For TLS the bytes hold the whole ClientHello, if it is one that can be read.
    Protocol(Protocol),
    /// The client stopped before the protocol was clear, perhaps before its first byte, or within its ClientHello.
    Silence,
    /// The client closed its side before the protocol was clear, perhaps before its first byte.
    End,
}

impl ReadAhead {
    /// Has the client not said anything yet?
    pub fn is_silence(&self) -> bool {
        self.heard == Heard::Silence && self.bytes.is_empty()
    }
}

impl Heard {
    /// Is it HTTP, of whichever version?
    pub fn is_http(self) -> bool {
        matches!(self, Heard::Protocol(protocol) if protocol.http().is_some())
    }
}

/// Reads until the protocol is known, the client is silent for `limit`, it pauses within its first bytes, or it
/// closes its side. May be asked again
/// about the same stream after [`Heard::Silence`]. Cancel safe: a future dropped half way puts back what it read.
///
/// # Errors
/// What reading the stream says.
pub async fn read_ahead(stream: &mut Stream, limit: Duration) -> io::Result<ReadAhead> {
    read_within(stream, limit, limit.max(PAUSE), PATIENCE).await
}

async fn read_within(
    stream: &mut Stream,
    limit: Duration,
    pause: Duration,
    patience: Duration,
) -> io::Result<ReadAhead> {
    let mut reading = Reading { stream, buffer: BytesMut::with_capacity(HELLO_BYTES), hello: None };
    let mut end = None;
    let heard = loop {
        if let Some(protocol) = reading.settled() {
            break Heard::Protocol(protocol);
        }
        let now = Instant::now();
        let silent = if reading.buffer.is_empty() {
            now + limit
        } else {
            let end = *end.get_or_insert(now + patience);
            if may_be_tls(&reading.buffer) { end } else { end.min(now + pause) }
        };
        match timeout_at(silent, reading.more()).await {
            Ok(Ok(0)) => break Heard::End,
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(error),
            Err(_) => break Heard::Silence,
        }
    };
    Ok(ReadAhead { bytes: reading.put_back(), heard })
}

/// Puts the bytes back when it ends, in whichever way.
struct Reading<'a> {
    stream: &'a mut Stream,
    buffer: BytesMut,
    /// Reads the ClientHello, once there is one; boxed, or each connection would keep room for it.
    hello: Option<Box<HelloReader>>,
}

impl Reading<'_> {
    /// The protocol, once enough was read: for TLS that is the whole ClientHello.
    fn settled(&mut self) -> Option<Protocol> {
        match classify(&self.buffer) {
            Verdict::NeedMore => None,
            Verdict::Is(Protocol::Tls) => {
                let hello = self.hello.get_or_insert_default().read(&self.buffer);
                (hello != Hello::NeedMore).then_some(Protocol::Tls)
            }
            Verdict::Is(protocol) => Some(protocol),
        }
    }

    async fn more(&mut self) -> io::Result<usize> {
        self.stream.read_buf(&mut self.buffer).await
    }

    fn put_back(&mut self) -> Bytes {
        // A copy: the buffer has room for a ClientHello, and would be kept as long as the connection.
        let bytes = Bytes::copy_from_slice(&self.buffer);
        self.buffer.clear();
        self.stream.unread(bytes.clone());
        bytes
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        if !self.buffer.is_empty() {
            self.put_back();
        }
    }
}

const _: () = assert!(LOOK <= HELLO_BYTES, "the buffer must hold what settles every verdict");

#[cfg(test)]
mod tests {
    use tokio::{
        io::AsyncWriteExt,
        net::{TcpListener, TcpStream},
        time::sleep,
    };

    use super::*;

    const LIMIT: Duration = Duration::from_millis(100);

    async fn pair() -> (TcpStream, Stream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (client, Stream::from(listener.accept().await.unwrap().0))
    }

    #[tokio::test]
    async fn what_was_read_ahead_is_read_again() {
        let (mut client, mut stream) = pair().await;
        client.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let ahead = read_ahead(&mut stream, LIMIT).await.unwrap();
        assert_eq!(ahead.heard, Heard::Protocol(Protocol::Http1));
        client.write_all(b"more").await.unwrap();
        drop(client);
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.unwrap();
        assert_eq!(all, b"GET / HTTP/1.1\r\n\r\nmore");
    }

    #[tokio::test]
    async fn a_request_in_two_pieces_is_waited_for_longer_than_a_silent_client() {
        let (mut client, mut stream) = pair().await;
        client.write_all(b"GET / HT").await.unwrap();
        let rest = async {
            sleep(LIMIT * 2).await;
            client.write_all(b"TP/1.1\r\n").await.unwrap();
        };
        let (ahead, ()) = tokio::join!(read_ahead(&mut stream, LIMIT), rest);
        assert_eq!(ahead.unwrap().heard, Heard::Protocol(Protocol::Http1));
    }

    #[tokio::test]
    async fn silence_is_told_and_the_next_look_goes_on_from_there() {
        let (mut client, mut stream) = pair().await;
        assert_eq!(read_ahead(&mut stream, LIMIT).await.unwrap().heard, Heard::Silence);
        client.write_all(b"GET / HT").await.unwrap();
        let ahead = read_within(&mut stream, LIMIT, LIMIT, PATIENCE).await.unwrap();
        assert_eq!((&ahead.bytes[..], ahead.heard), (&b"GET / HT"[..], Heard::Silence));
        client.write_all(b"TP/1.1\r\n").await.unwrap();
        let ahead = read_ahead(&mut stream, LIMIT).await.unwrap();
        assert_eq!(
            (&ahead.bytes[..], ahead.heard),
            (&b"GET / HTTP/1.1\r\n"[..], Heard::Protocol(Protocol::Http1))
        );
    }

    #[tokio::test]
    async fn who_stops_waiting_loses_nothing() {
        let (mut client, mut stream) = pair().await;
        client.write_all(b"GET").await.unwrap();
        tokio::select! {
            _ = read_ahead(&mut stream, LIMIT * 100) => unreachable!(),
            () = sleep(LIMIT) => {}
        }
        client.shutdown().await.unwrap();
        assert_eq!(&read_ahead(&mut stream, LIMIT).await.unwrap().bytes[..], b"GET");
    }

    #[tokio::test]
    async fn a_client_that_closes_is_not_waited_for() {
        let (mut client, mut stream) = pair().await;
        client.write_all(b"GET").await.unwrap();
        client.shutdown().await.unwrap();
        let ahead = read_ahead(&mut stream, Duration::from_secs(60)).await.unwrap();
        assert_eq!((&ahead.bytes[..], ahead.heard), (&b"GET"[..], Heard::End));
    }

    #[tokio::test]
    async fn a_client_that_trickles_is_not_waited_for_for_ever() {
        let (mut client, mut stream) = pair().await;
        let trickle = async {
            loop {
                client.write_all(b"A").await.unwrap();
                client.set_nodelay(true).unwrap();
                sleep(LIMIT).await;
            }
        };
        // Token after token without an end: 32 of them would settle it, time is up before.
        tokio::select! {
            ahead = read_within(&mut stream, LIMIT * 9, LIMIT * 9, LIMIT * 10) => {
                let ahead = ahead.unwrap();
                assert_eq!(ahead.heard, Heard::Silence);
                assert!(!ahead.bytes.is_empty());
            }
            () = trickle => unreachable!(),
        }
    }

    #[tokio::test]
    async fn the_whole_hello_is_waited_for_but_not_for_ever() {
        let (mut client, mut stream) = pair().await;
        let hello = [22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];
        for piece in [&hello[..2], &hello[2..]] {
            client.write_all(piece).await.unwrap();
            let begin = Instant::now();
            let ahead = read_within(&mut stream, LIMIT, LIMIT, LIMIT * 5).await.unwrap();
            assert_eq!(ahead.heard, Heard::Silence);
            assert!(may_be_tls(&ahead.bytes) && begin.elapsed() >= LIMIT * 5);
        }
        client.shutdown().await.unwrap();
        assert_eq!(read_ahead(&mut stream, LIMIT).await.unwrap().heard, Heard::End);
    }
}
