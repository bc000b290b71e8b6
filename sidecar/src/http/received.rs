//! The body of an answer that comes on an HTTP/2 stream. What its reader takes is given back to the stream's window.

use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{Reason, RecvStream};
use http_body::{Frame, SizeHint};
use hyper::{HeaderMap, header::CONTENT_LENGTH};

use super::{
    body::BodyError,
    upload::{Rest, Sending},
};

/// What comes on a stream after its head.
pub(super) struct Received {
    stream: RecvStream,
    /// Bytes still to come, where the head said so.
    left: Option<u64>,
    data_ended: bool,
    /// It broke off because we reset the stream: its request had broken off.
    request_broke: bool,
    /// Of the request, which may still be on its way.
    rest: Option<Rest>,
}

impl Received {
    /// The body after a head with these fields. (h2 refuses a Content-Length that is no number, or not kept.)
    pub(super) fn new(head: &HeaderMap, stream: RecvStream, rest: Option<Rest>) -> Self {
        let said = || head.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok();
        let left = if stream.is_end_stream() { Some(0) } else { said() };
        Received { stream, left, data_ended: false, request_broke: false, rest }
    }

    pub(super) fn poll(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if !self.data_ended {
            match ready!(self.stream.poll_data(context)) {
                Some(Ok(data)) => {
                    // It fails only where the stream was reset meanwhile and has given all back by itself.
                    let _ = self.stream.flow_control().release_capacity(data.len());
                    self.left = self.left.map(|left| left.saturating_sub(data.len() as u64));
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                // The stream was reset before its end (h2 tells of none that comes after it), but all is here.
                Some(Err(error)) if error.reason() == Some(Reason::NO_ERROR) && self.left == Some(0) => {
                    return Poll::Ready(None);
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(self.broke(&error)))),
                None => self.data_ended = true,
            }
        }
        let trailers = ready!(self.stream.poll_trailers(context));
        Poll::Ready(
            trailers.map_err(|error| self.broke(&error)).transpose().map(|read| read.map(Frame::trailers)),
        )
    }

    /// The reason is of this hop alone: on the next, REFUSED_STREAM would say that nothing was processed, and NO_ERROR
    /// that all was.
    fn broke(&mut self, error: &h2::Error) -> BodyError {
        self.request_broke = error.is_reset() && !error.is_remote() && !error.is_library();
        error.to_string().into()
    }

    /// Did it break off for its request, and not for its server?
    pub(super) fn request_broke(&self) -> bool {
        self.request_broke
    }

    /// Neither the answer nor the rest of its request is wanted.
    pub(super) fn abandon(mut self) {
        self.rest = None;
    }

    /// The rest of the request, where there is one.
    pub(super) fn sending(&self) -> Option<Sending> {
        self.rest.as_ref()?.sending()
    }

    pub(super) fn is_end(&self) -> bool {
        self.stream.is_end_stream()
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        self.left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        // A reader that knows the length stops without asking for the end.
        if (self.is_end() || self.left == Some(0))
            && let Some(rest) = self.rest.take()
        {
            rest.goes_on();
        }
    }
}
