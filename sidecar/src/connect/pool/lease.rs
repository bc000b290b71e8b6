//! A connection lent to one call: the call is sent on it, and it stays in use until the answer's body has ended. A stream
//! of HTTP/2 does so until the request's has ended too, which may be later: a server may answer before it has read all.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt, future::Either};
use h2::client::SendRequest;
use hyper::{Request, Response, client::conn::http1};
use tokio::time::Instant;

use super::{Key, Pool};
use crate::{
    connect::{
        SendFailed,
        http2::{self, STREAMS, is_open},
        standing::Standing,
    },
    http::{Body, Sending, headers},
    model::Failed,
    tls::VerifiedPeer,
};

/// An HTTP/2 connection, shared by its streams.
pub(super) struct Http2 {
    sender: SendRequest<Bytes>,
    peer: Option<VerifiedPeer>,
    standing: Standing,
    streams: AtomicUsize,
    /// Requests that go on though their answers have ended: each has its stream until then.
    sending: Mutex<Vec<Sending>>,
    was_used: AtomicBool,
    idle_since: Mutex<Instant>,
}

/// An HTTP/1 connection, of one call at a time.
pub(super) struct Http1 {
    pub(super) sender: http1::SendRequest<Body>,
    pub(super) peer: Option<VerifiedPeer>,
    pub(super) standing: Standing,
}

/// The head of an answer and its connection, or why there is none.
pub type Sent = std::result::Result<(Response<Body>, InUse), SendFailed>;

/// A connection for one call.
pub struct Lease {
    pub(super) connection: Connection,
    /// The connection was used before: it may have been closed by the other side meanwhile.
    pub reused: bool,
}

pub(super) enum Connection {
    Http2(Http2Stream),
    Http1(Http1, Option<(Arc<Pool>, Key)>),
}

/// One stream of an HTTP/2 connection; gives its place back when dropped, or when its request has ended after that.
pub(super) struct Http2Stream {
    connection: Arc<Http2>,
    sender: SendRequest<Bytes>,
    /// Where the answer began first.
    sending: Option<Sending>,
}

/// Keeps a connection in use until the answer's body has ended.
pub struct InUse {
    connection: Connection,
}

impl Http1 {
    pub(super) fn is_usable(&self) -> bool {
        !self.standing.is_retired() && !self.sender.is_closed()
    }
}

impl Http2 {
    pub(super) fn new(
        sender: SendRequest<Bytes>,
        peer: Option<VerifiedPeer>,
        standing: Standing,
    ) -> Arc<Self> {
        Arc::new(Http2 {
            sender,
            peer,
            standing,
            streams: AtomicUsize::new(0),
            sending: Mutex::default(),
            was_used: AtomicBool::new(false),
            idle_since: Mutex::new(Instant::now()),
        })
    }

    pub(super) fn is_usable(&self) -> bool {
        !self.standing.is_retired()
    }

    /// It was closed before it took a call.
    pub(super) fn was_closed_unused(&self) -> bool {
        !self.is_usable() && !self.was_used.load(Ordering::Relaxed)
    }

    /// For how long no call has used it; none while one does.
    pub(super) fn idle_for(&self, now: Instant) -> Option<Duration> {
        (self.streams() == 0).then(|| now.saturating_duration_since(*lock(&self.idle_since)))
    }

    /// Open streams: those whose requests have ended meanwhile are no longer among them.
    fn streams(&self) -> usize {
        let mut sending = lock(&self.sending);
        let before = sending.len();
        sending.retain(|request| !request.is_over());
        let over = before - sending.len();
        drop(sending);
        if over > 0 {
            self.free(over);
        }
        self.streams.load(Ordering::Relaxed)
    }

    fn free(&self, streams: usize) {
        if self.streams.fetch_sub(streams, Ordering::Relaxed) == streams {
            *lock(&self.idle_since) = Instant::now();
        }
    }
}

impl Http2Stream {
    /// None where the connection takes no further stream now.
    pub(super) fn take(connection: &Arc<Http2>) -> Option<Self> {
        if !connection.is_usable() {
            return None;
        }
        let mut sender = connection.sender.clone();
        if !is_open(&mut sender) {
            connection.standing.retire();
            return None;
        }
        // What goes past the server's bound would wait for another stream's end.
        let most = sender.current_max_send_streams().clamp(1, STREAMS);
        // Only this worker takes streams of this connection, so that load and add need not be one step.
        if connection.streams.load(Ordering::Relaxed) >= most && connection.streams() >= most {
            return None;
        }
        connection.streams.fetch_add(1, Ordering::Relaxed);
        connection.was_used.store(true, Ordering::Relaxed);
        Some(Http2Stream { connection: connection.clone(), sender, sending: None })
    }
}

impl Drop for Http2Stream {
    fn drop(&mut self) {
        match self.sending.take().filter(|request| !request.is_over()) {
            Some(request) => lock(&self.connection.sending).push(request),
            None => self.connection.free(1),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Lease {
    /// Who proved to be there; none in plaintext.
    pub fn peer(&self) -> Option<&VerifiedPeer> {
        self.connection.peer()
    }

    /// Begins to send a request at once (it is large: each future that it waits in would move it), then waits for the
    /// head of its answer. The connection stays in use until the returned guard is dropped or finished.
    ///
    /// # Errors
    /// What happened, and whether it is certain that nothing was processed.
    pub fn send(self, request: Request<Body>) -> impl Future<Output = Sent> {
        let mut in_use = InUse { connection: self.connection };
        let sending = match &mut in_use.connection {
            Connection::Http2(stream) => Either::Left(http2::send(&mut stream.sender, request)),
            Connection::Http1(http1, _) => Either::Right(send_http1(http1, request)),
        };
        async move {
            match (sending.await, in_use.cut()) {
                (Ok(response), _) => {
                    in_use.answered(response.body());
                    Ok((response, in_use))
                }
                // Whatever it was doing when we cut it, it may have done.
                (Err(_), Some(reason)) => {
                    Err(SendFailed { failed: reason.clone(), nothing_processed: false })
                }
                (Err(failed), None) => Err(failed),
            }
        }
    }
}

fn send_http1(
    http1: &mut Http1,
    request: Request<Body>,
) -> impl Future<Output = std::result::Result<Response<Body>, SendFailed>> + use<> {
    http1.sender.try_send_request(request).map(|sent| {
        let response =
            sent.map_err(|error| SendFailed::from_hyper(error.error(), error.message().is_some()))?;
        headers::check_coding(&response)?;
        Ok(response.map(Body::from))
    })
}

impl Connection {
    fn peer(&self) -> Option<&VerifiedPeer> {
        match self {
            Connection::Http2(stream) => stream.connection.peer.as_ref(),
            Connection::Http1(connection, _) => connection.peer.as_ref(),
        }
    }
}

impl InUse {
    /// Who proved to be there; none in plaintext.
    pub fn peer(&self) -> Option<&VerifiedPeer> {
        self.connection.peer()
    }

    /// Why we cut the connection, if we did.
    pub fn cut(&self) -> Option<&Failed> {
        self.standing().cut()
    }

    fn answered(&mut self, answer: &Body) {
        if let Connection::Http2(stream) = &mut self.connection {
            stream.sending = answer.sending();
        }
    }

    fn standing(&self) -> &Standing {
        match &self.connection {
            Connection::Http2(stream) => &stream.connection.standing,
            Connection::Http1(connection, _) => &connection.standing,
        }
    }

    /// The answer's body was read to its end: the connection may serve another call.
    pub fn finished(self) {
        if let Connection::Http1(connection, Some((pool, key))) = self.connection {
            pool.take_back(key, connection);
        }
    }
}
