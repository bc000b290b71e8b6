//! An HTTP/2 connection to a server, over h2 itself. hyper's client puts a queue, a channel and a task between a call and
//! its stream; and as h2 gives a stream no window before it is open, a second task and a second write for each body.
//! Here a call waits for its own stream, and the first piece of its body goes with its head.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::Bytes;
use h2::{
    Ping, PingPong, Reason, SendStream,
    client::{self, Connection, SendRequest},
};
use http_body::Body as _;
use hyper::{Request, Response};
use tokio::{
    task::AbortHandle,
    time::{sleep, timeout},
};

use super::failure::{SendFailed, http2_error};
use crate::{
    http::{Body, body::BodyError, headers},
    net::Stream,
};

/// Streams on one connection; the far side's connection window holds as many full stream windows.
pub(super) const STREAMS: usize = 100;
/// Bytes a peer may send on one stream before the reader has taken them.
const STREAM_WINDOW: u32 = 256 * 1024;
/// Bytes of an answer's header fields (h2's own bound of 16 KiB is less than apps send).
const HEADER_LIST: u32 = 256 * 1024;
/// Bytes of a request's body that wait for its stream's window.
const SEND_BUFFER: usize = 128 * 1024;
/// A silent peer with open streams is asked whether it lives after this long.
const PING_AFTER: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// Says hello on a fresh connection: who sends on it, who must be polled for it, and its pings.
///
/// # Errors
/// The connection broke.
pub(super) async fn handshake(
    stream: Stream,
) -> Result<(SendRequest<Bytes>, Connection<Stream, Bytes>, PingPong), SendFailed> {
    let failed = |error: h2::Error| SendFailed::from_http2(&error, true);
    let mut builder = client::Builder::new();
    builder
        .initial_max_send_streams(STREAMS)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(STREAM_WINDOW * STREAMS as u32)
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
    let sent = sender.send_request(Request::from_parts(head, ()), body.is_none());
    async move {
        let (answer, stream) = sent.map_err(|error| SendFailed::from_http2(&error, true))?;
        let rest = match body {
            Some(body) => upload(stream, body).await,
            None => None,
        };
        let answer = answer.await.map_err(|error| SendFailed::from_http2(&error, false))?;
        if let Some(rest) = rest {
            rest.goes_on();
        }
        Ok(Body::received(answer))
    }
}

/// Resolves when a peer with open streams has been silent for too long: `read` counts the bytes that came from it.
pub(super) async fn silence(mut pings: PingPong, read: Arc<AtomicU64>, streams: Arc<AtomicUsize>) {
    let mut before = 0;
    let mut was_silent = || std::mem::replace(&mut before, read.load(Ordering::Relaxed)) == before;
    loop {
        sleep(PING_AFTER).await;
        if !was_silent() || streams.load(Ordering::Relaxed) == 0 || pings.send_ping(Ping::opaque()).is_err() {
            continue;
        }
        while timeout(PING_TIMEOUT, poll_fn(|context| pings.poll_pong(context))).await.is_err() {
            if was_silent() {
                return;
            }
        }
    }
}

/// Sends what is there of a body at once, and leaves the rest to a task.
async fn upload(stream: SendStream<Bytes>, body: Body) -> Option<Rest> {
    let mut upload = Upload { stream, body, waiting: None, is_first: true };
    if poll_fn(|context| Poll::Ready(upload.poll(context).is_ready())).await {
        return None;
    }
    let task = tokio::spawn(poll_fn(move |context| upload.poll(context)));
    Some(Rest(Some(task.abort_handle())))
}

/// The rest of a body on its way. Dropped, it is sent no further, and the stream is reset.
struct Rest(Option<AbortHandle>);

impl Rest {
    /// The answer has begun: it may end before the request does.
    fn goes_on(mut self) {
        self.0 = None;
    }
}

impl Drop for Rest {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

/// A body on its way into a stream.
struct Upload {
    stream: SendStream<Bytes>,
    body: Body,
    /// A piece that waits for the stream's window; is it the last?
    waiting: Option<(Bytes, bool)>,
    is_first: bool,
}

impl Upload {
    /// Ready when all is sent, or nothing more can be.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let ended = ready!(self.poll_pieces(context));
        if let Err(error) = ended {
            let reason = http2_error(&*error).and_then(h2::Error::reason);
            self.stream.send_reset(reason.unwrap_or(Reason::INTERNAL_ERROR));
        }
        Poll::Ready(())
    }

    fn poll_pieces(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        loop {
            if self.stream.poll_reset(context).is_ready() {
                return Poll::Ready(Ok(()));
            }
            if let Some((piece, is_last)) = self.waiting.take() {
                if !self.is_first && self.poll_window(context)?.is_pending() {
                    self.waiting = Some((piece, is_last));
                    return Poll::Pending;
                }
                self.is_first = false;
                self.stream.send_data(piece, is_last)?;
                if is_last {
                    return Poll::Ready(Ok(()));
                }
            }
            let Some(frame) = ready!(Pin::new(&mut self.body).poll_frame(context)) else {
                self.stream.send_data(Bytes::new(), true)?;
                return Poll::Ready(Ok(()));
            };
            match frame?.into_data() {
                Ok(piece) => self.waiting = Some((piece, self.body.is_end_stream())),
                Err(frame) => {
                    if let Ok(trailers) = frame.into_trailers() {
                        self.stream.send_trailers(trailers)?;
                        return Poll::Ready(Ok(()));
                    }
                }
            }
        }
    }

    /// Is there room in the stream's window? Asked only with a piece in hand: a claim without one would keep the
    /// connection's window from other streams.
    fn poll_window(&mut self, context: &mut Context<'_>) -> Result<Poll<()>, h2::Error> {
        self.stream.reserve_capacity(1);
        while self.stream.capacity() == 0 {
            match self.stream.poll_capacity(context) {
                Poll::Ready(Some(room)) => room?,
                Poll::Ready(None) => return Err(Reason::STREAM_CLOSED.into()),
                Poll::Pending => return Ok(Poll::Pending),
            };
        }
        Ok(Poll::Ready(()))
    }
}

#[cfg(test)]
mod tests;
