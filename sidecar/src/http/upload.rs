//! The body of a request on its way into an HTTP/2 stream: its first piece with the head, the others as the stream's
//! window has room, trailers at the end.

use std::{
    error::Error,
    future::poll_fn,
    io::{self, ErrorKind},
    iter,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::{Reason, SendStream};
use http_body::Body as _;
use tokio::task::AbortHandle;

use super::body::{Body, BodyError};
use crate::model::{Failed, Failure};

/// Sends what is there of a body at once, and leaves the rest to a task.
pub async fn upload(stream: SendStream<Bytes>, body: Body) -> Option<Rest> {
    let mut upload = Upload { stream, body, waiting: None, is_first: true };
    if poll_fn(|context| Poll::Ready(upload.poll(context).is_ready())).await {
        return None;
    }
    let task = tokio::spawn(poll_fn(move |context| upload.poll(context)));
    Some(Rest(Some(task.abort_handle())))
}

/// The rest of a body on its way. Dropped, it is sent no further, and the stream is reset.
pub struct Rest(Option<AbortHandle>);

impl Rest {
    /// To ask later whether it has ended.
    pub(super) fn sending(&self) -> Option<Sending> {
        self.0.clone().map(Sending)
    }

    /// Lets it go on by itself: an answer may end before its request does.
    pub(super) fn goes_on(mut self) {
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

/// A request of which something is on its way, perhaps after its answer has ended. It keeps its stream until then.
pub struct Sending(AbortHandle);

impl Sending {
    /// All of it was sent, or nothing more can be.
    pub fn is_over(&self) -> bool {
        self.0.is_finished()
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
            self.stream.send_reset(reason_of(&*error));
        }
        Poll::Ready(())
    }

    fn poll_pieces(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        loop {
            if self.stream.poll_reset(context).is_ready() {
                return Poll::Ready(Ok(()));
            }
            if let Some((piece, is_last)) = self.waiting.take() {
                // An empty one needs no room, and may be the end that the server waits for before it gives any.
                if !self.is_first && !piece.is_empty() && self.poll_window(context)?.is_pending() {
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

/// The reason that a client of HTTP/2 gave when it broke off; of one of HTTP/1, whether it broke the rules.
fn reason_of(error: &(dyn Error + 'static)) -> Reason {
    let given = causes(error).find_map(|cause| cause.downcast_ref::<h2::Error>()?.reason());
    let other = if is_malformed(error) { Reason::PROTOCOL_ERROR } else { Reason::INTERNAL_ERROR };
    given.unwrap_or(other)
}

/// Did a body break off because it was malformed (RFC 9112 7.1, RFC 9113 8.1.1), here or at the sidecar before us?
pub fn is_malformed(error: &(dyn Error + 'static)) -> bool {
    let is_no_chunk =
        |cause: &io::Error| matches!(cause.kind(), ErrorKind::InvalidInput | ErrorKind::InvalidData);
    causes(error).any(|cause| {
        cause.downcast_ref().is_some_and(is_no_chunk)
            || cause.downcast_ref().and_then(h2::Error::reason) == Some(Reason::PROTOCOL_ERROR)
    })
}

/// Why a client's body broke off: its client left, unless what it sent was malformed.
pub fn request_body_failed(error: &(dyn Error + 'static)) -> Failed {
    let last = causes(error).last().map(ToString::to_string).unwrap_or_default();
    match is_malformed(error) {
        true => Failed::new(Failure::BadRequest, format!("the body is malformed: {last}")),
        false => Failed::new(Failure::ClientGone, format!("the body of the request broke off: {last}")),
    }
}

/// An error and what it comes from.
fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    iter::successors(Some(error), |&cause| cause.source())
}
