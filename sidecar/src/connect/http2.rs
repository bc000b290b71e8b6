//! An HTTP/2 connection to a server, over h2 itself. hyper's client puts a queue, a channel and a task between a call and
//! its stream; and as h2 gives a stream no window before it is open, a second task and a second write for each body.
//! Here a call waits for its own stream, and the first piece of its body goes with its head.

use std::{
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use h2::{
    Ping, PingPong, Reason,
    client::{self, Connection, SendRequest},
};
use http_body::Body as _;
use hyper::{Request, Response, Version};
use tokio::time::{sleep, timeout};

use super::SendFailed;
use crate::{
    http::{Body, headers, upload},
    net::Stream,
};

/// Streams on one connection; the far side's connection window holds as many full stream windows.
pub(super) const STREAMS: usize = 100;
/// Bytes a peer may send on one stream before the reader has taken them, where another connection to it is open or none:
/// the more streams there are at a time, the less each may hold, so that readers that take nothing cannot fill the memory.
pub(super) fn stream_window(open: usize) -> u32 {
    match open {
        0 => 256 * 1024,
        1..4 => 64 * 1024,
        _ => 16 * 1024,
    }
}

/// Bytes of an answer's header fields (h2's own bound of 16 KiB is less than apps send).
const HEADER_LIST: u32 = 256 * 1024;
/// Bytes of a request's body that wait for its stream's window.
const SEND_BUFFER: usize = 128 * 1024;
/// A silent peer is asked whether it lives after this long. Only a sidecar is: servers of gRPC take questions at this
/// pace for an attack (`too_many_pings`), and TCP's own questions find those that are gone.
const PING_AFTER: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// Says hello on a fresh connection, each stream of which has this window: who sends on it, who must be polled for it, and its pings.
///
/// # Errors
/// The connection broke.
pub(super) async fn handshake(
    stream: Stream,
    window: u32,
) -> Result<(SendRequest<Bytes>, Connection<Stream, Bytes>, PingPong), SendFailed> {
    let failed = |error: h2::Error| SendFailed::from_http2(&error, true);
    let mut builder = client::Builder::new();
    builder
        .initial_max_send_streams(STREAMS)
        .initial_window_size(window)
        .initial_connection_window_size(window * STREAMS as u32)
        .max_header_list_size(HEADER_LIST)
        .max_send_buffer_size(SEND_BUFFER)
        .enable_push(false);
    let (sender, mut connection) = builder.handshake(stream).await.map_err(failed)?;
    let pings = connection.ping_pong().ok_or_else(|| failed(Reason::INTERNAL_ERROR.into()))?;
    Ok((sender, connection, pings))
}

/// Does the connection take another stream? Not after a GOAWAY, and not when it is closed.
pub(super) fn is_open(sender: &mut SendRequest<Bytes>) -> bool {
    // Nobody is woken: a sender that has sent nothing yet has nothing to wait for.
    matches!(sender.poll_ready(&mut Context::from_waker(Waker::noop())), Poll::Ready(Ok(())))
}

/// Begins to send a request at once, then waits for the head of its answer. Dropped before, it resets the stream.
///
/// # Errors
/// What happened, and whether it is certain that nothing was processed.
pub(super) fn send(
    sender: &mut SendRequest<Bytes>,
    request: Request<Body>,
) -> impl Future<Output = Result<Response<Body>, SendFailed>> + use<> {
    let (mut head, body) = request.into_parts();
    headers::say_length(&mut head, body.size_hint().exact());
    let body = (!body.is_end_stream()).then_some(body);
    if head.uri.authority().is_none() {
        // h2 takes a target without a host from HTTP/1 only.
        head.version = Version::HTTP_11;
    }
    let sent = sender.send_request(Request::from_parts(head, ()), body.is_none());
    async move {
        let (answer, stream) = sent.map_err(|error| SendFailed::from_http2(&error, true))?;
        let rest = match body {
            Some(body) => upload(stream, body).await,
            None => None,
        };
        let answer = answer.await.map_err(|error| SendFailed::from_http2(&error, false))?;
        Ok(Body::received(answer, rest))
    }
}

/// Resolves when a peer has been silent for too long, asked or not: `read` counts the bytes that came from it.
pub(super) async fn silence(mut pings: PingPong, read: Arc<AtomicU64>) {
    let mut before = 0;
    let mut was_silent = || std::mem::replace(&mut before, read.load(Ordering::Relaxed)) == before;
    loop {
        sleep(PING_AFTER).await;
        if !was_silent() || pings.send_ping(Ping::opaque()).is_err() {
            continue;
        }
        while timeout(PING_TIMEOUT, poll_fn(|context| pings.poll_pong(context))).await.is_err() {
            if was_silent() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests;
