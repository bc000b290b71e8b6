//! The one body type of the house. It passes frames on as they come, counts bytes, and tells an observer once
//! how it ended: complete, cut by its source, or abandoned by its reader.

use std::{
    error::Error,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::RecvStream;
use http_body::{Frame, SizeHint};
use hyper::{Response, body::Incoming, header::HeaderMap};
use tokio::time::{Instant, Sleep, sleep_until};

use super::{
    headers::GRPC_STATUS,
    received::Received,
    replay::ReplayBody,
    streams::InFlight,
    upload::{Rest, Sending, request_body_failed},
};
use crate::telemetry::RequestBodyState;

/// What a body reports when its source fails. A server that gets it cuts the connection or resets the stream,
/// so that a broken body is never taken for a whole one.
pub type BodyError = Box<dyn Error + Send + Sync>;

/// A message body.
pub struct Body {
    source: Source,
    bytes: u64,
    grpc_status: Option<u16>,
    deadline: Option<Pin<Box<Sleep>>>,
    state: Option<RequestBodyState>,
    observer: Option<Observer>,
    in_flight: Option<InFlight>,
}

/// What a body reports that is broken off at its time.
pub(super) const TIME_OVER: &str = "the deadline of the request is over";

/// Called once, when the body has ended.
type Observer = Box<dyn FnOnce(&Ended) + Send>;

enum Source {
    Empty,
    Whole(Bytes),
    Incoming(Incoming),
    Received(Received),
    Replay(ReplayBody),
}

/// How a body ended.
#[derive(Debug, Clone)]
pub struct Ended {
    /// Data bytes that went through.
    pub bytes: u64,
    /// `grpc-status` of the trailers, where there was one.
    pub grpc_status: Option<u16>,
    /// In which way.
    pub how: BodyEnd,
}

/// In which way a body ended.
#[derive(Debug, Clone)]
pub enum BodyEnd {
    /// All of it was passed on.
    Complete,
    /// Its source broke off, with the reason.
    Cut(String),
    /// It was broken off at the time set by [`Body::until`].
    TimeOver,
    /// Its reader went away, or broke off the request whose answer it is.
    Abandoned,
}

impl Body {
    /// No bytes.
    pub fn empty() -> Self {
        Body::of(Source::Empty)
    }

    /// Bytes that are all here.
    pub fn whole(bytes: impl Into<Bytes>) -> Self {
        Body::of(Source::Whole(bytes.into()))
    }

    /// What comes after the head of an answer on an HTTP/2 stream, while the rest of the request goes on. Dropped before
    /// its end it ends that too.
    pub fn received(answer: Response<RecvStream>, rest: Option<Rest>) -> Response<Self> {
        let (head, stream) = answer.into_parts();
        let body = Body::of(Source::Received(Received::new(&head.headers, stream, rest)));
        Response::from_parts(head, body)
    }

    /// What is still on its way of the request whose answer this is.
    pub fn sending(&self) -> Option<Sending> {
        match &self.source {
            Source::Received(received) => received.sending(),
            _ => None,
        }
    }

    /// Drops the body of an answer that is not wanted, with what is still on its way of the request.
    pub fn abandon(mut self) {
        if let Source::Received(received) = std::mem::replace(&mut self.source, Source::Empty) {
            received.abandon();
        }
    }

    pub(super) fn replay(body: ReplayBody) -> Self {
        Body::of(Source::Replay(body))
    }

    /// Has `observer` called when this body has ended, in the task of whoever reads it. Of several the first comes
    /// first: in a call of the app to itself both stories observe one body.
    pub fn observed(mut self, observer: impl FnOnce(&Ended) + Send + 'static) -> Self {
        self.observer = Some(match self.observer.take() {
            None => Box::new(observer),
            Some(first) => Box::new(move |ended| {
                first(ended);
                observer(ended);
            }),
        });
        self
    }

    /// Breaks off at that time, if it has not ended by then. Of several times the earliest counts.
    pub fn until(mut self, deadline: Option<Instant>) -> Self {
        let known = self.deadline.as_ref().map(|sleep| sleep.deadline());
        let earliest = [known, deadline].into_iter().flatten().min();
        self.deadline = earliest.filter(|_| !self.source.is_end()).map(|at| Box::pin(sleep_until(at)));
        self
    }

    /// Has the state of a request's body updated by what happens to this one, wherever it is read. Not asked for where
    /// the body is empty.
    pub fn with_state(mut self, state: impl FnOnce() -> RequestBodyState) -> Self {
        if !self.source.is_end() {
            self.state = Some(state());
        }
        self
    }

    /// Keeps a request in flight until this body, its answer's, is gone.
    pub(super) fn keeping(mut self, request: InFlight) -> Self {
        self.in_flight = Some(request);
        self
    }

    fn of(source: Source) -> Self {
        Body {
            source,
            bytes: 0,
            grpc_status: None,
            deadline: None,
            state: None,
            observer: None,
            in_flight: None,
        }
    }

    fn ended(&mut self, how: BodyEnd) {
        if let Some(observer) = self.observer.take() {
            observer(&Ended { bytes: self.bytes, grpc_status: self.grpc_status, how });
        }
    }
}

impl From<Incoming> for Body {
    fn from(incoming: Incoming) -> Self {
        Body::of(Source::Incoming(incoming))
    }
}

impl Source {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self {
            Source::Empty => Poll::Ready(None),
            Source::Whole(bytes) if bytes.is_empty() => Poll::Ready(None),
            Source::Whole(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Source::Incoming(incoming) => {
                let polled = http_body::Body::poll_frame(Pin::new(incoming), context);
                polled.map(|frame| frame.map(|read| read.map_err(Into::into)))
            }
            Source::Received(received) => received.poll(context),
            Source::Replay(replay) => replay.poll(context),
        }
    }

    /// Did the answer break off because its request did?
    fn request_broke(&self) -> bool {
        matches!(self, Source::Received(received) if received.request_broke())
    }

    fn is_end(&self) -> bool {
        match self {
            Source::Empty => true,
            Source::Whole(bytes) => bytes.is_empty(),
            Source::Incoming(incoming) => http_body::Body::is_end_stream(incoming),
            Source::Received(received) => received.is_end(),
            Source::Replay(replay) => replay.is_end(),
        }
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        // Asked first: where the reader is slow, the source may always have something.
        let is_over =
            self.deadline.as_mut().is_some_and(|deadline| deadline.as_mut().poll(context).is_ready());
        let mut polled =
            if is_over { Some(Err(TIME_OVER.into())) } else { ready!(self.source.poll(context)) };
        if let Some(Ok(frame)) = &mut polled
            && let Some(trailers) = frame.trailers_mut()
        {
            super::headers::clean_trailers(trailers);
        }
        match &polled {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    self.bytes += data.len() as u64;
                    if let Some(state) = &self.state {
                        state.add(data.len() as u64);
                    }
                } else if let Some(trailers) = frame.trailers_ref() {
                    self.grpc_status = grpc_status(trailers);
                }
                // Nothing comes behind trailers, and nobody reads on: hyper's HTTP/1 does not know that it has ended.
                if frame.is_trailers() || self.source.is_end() {
                    self.ended(BodyEnd::Complete);
                }
            }
            Some(Err(_)) if is_over => self.ended(BodyEnd::TimeOver),
            Some(Err(_)) if self.source.request_broke() => self.ended(BodyEnd::Abandoned),
            Some(Err(error)) => {
                if let Some(state) = &self.state {
                    state.failed(request_body_failed(&**error));
                }
                let reason = error.to_string();
                self.ended(BodyEnd::Cut(reason));
            }
            None => self.ended(BodyEnd::Complete),
        }
        Poll::Ready(polled)
    }

    fn is_end_stream(&self) -> bool {
        self.source.is_end()
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Empty => SizeHint::with_exact(0),
            Source::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Source::Incoming(incoming) => http_body::Body::size_hint(incoming),
            Source::Received(received) => received.size_hint(),
            Source::Replay(replay) => replay.size_hint(),
        }
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        if self.observer.is_some() {
            // A reader that knows the length stops without asking for the end.
            let whole = self.source.is_end() || http_body::Body::size_hint(self).exact() == Some(0);
            self.ended(if whole { BodyEnd::Complete } else { BodyEnd::Abandoned });
        }
    }
}

/// The gRPC status of trailers, or of the head of an answer that has no body.
pub fn grpc_status(headers: &HeaderMap) -> Option<u16> {
    headers.get(GRPC_STATUS)?.to_str().ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use http_body_util::BodyExt;
    use hyper::{Request, client::conn::http1};
    use hyper_util::rt::TokioIo;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// How the body of an answer of HTTP/1 ended for a reader that stops at its last frame, as servers do.
    async fn ending(answer: &str) -> String {
        let (ours, mut server) = tokio::io::duplex(4096);
        let (mut sender, connection) = http1::handshake(TokioIo::new(ours)).await.unwrap();
        tokio::spawn(connection);
        let serving = async {
            assert!(server.read(&mut [0; 1024]).await.unwrap() > 0);
            server.write_all(answer.as_bytes()).await.unwrap();
            drop(server);
        };
        let (answer, ()) = tokio::join!(sender.send_request(Request::new(Body::empty())), serving);
        let answer = answer.unwrap();
        let seen = Arc::new(Mutex::new(String::new()));
        let told = seen.clone();
        let mut body = Body::from(answer.into_body())
            .observed(move |ended| *told.lock().unwrap() = format!("{:?} {}", ended.how, ended.bytes));
        while let Some(frame) = body.frame().await {
            if frame.is_err() || frame.is_ok_and(|frame| frame.is_trailers()) {
                break;
            }
        }
        drop(body);
        let seen = seen.lock().unwrap();
        seen.clone()
    }

    #[tokio::test]
    async fn whatever_marks_the_end_of_a_body_it_is_complete() {
        for body in [
            "Transfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 7\r\n\r\n",
            "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
            "Content-Length: 3\r\n\r\nabc",
            "Connection: close\r\n\r\nabc",
        ] {
            assert_eq!(ending(&format!("HTTP/1.1 200 OK\r\n{body}")).await, "Complete 3", "{body}");
        }
        let only_trailers = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Sum: 7\r\n\r\n";
        assert_eq!(ending(only_trailers).await, "Complete 0");
        let cut = ending("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nab").await;
        assert!(cut.starts_with("Cut"), "{cut}");
    }
}
