//! A request body that can be sent again: what was read of it is kept, up to a bound, for the next attempt.
//! Past the bound the bytes go on to the attempt that is under way, and no other can begin.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use hyper::{HeaderMap, body::Incoming};

use super::body::{Body, BodyError};
use crate::telemetry::ByteCount;

/// The source of a request's body, for one attempt after the other.
#[derive(Clone)]
pub struct Replay {
    /// None: there is no body.
    shared: Option<Arc<Mutex<Shared>>>,
}

struct Shared {
    incoming: Incoming,
    /// What was read of the client's body, each byte once.
    counter: ByteCount,
    kept: Vec<Bytes>,
    kept_bytes: usize,
    trailers: Option<HeaderMap>,
    /// Most bytes to keep.
    limit: usize,
    /// More was read than may be kept.
    overflowed: bool,
    /// The client's body was read to its end.
    finished: bool,
    /// Its client did not send it to its end.
    broken: bool,
    /// The attempt that may read on; an older one must not steal its bytes.
    attempt: u64,
}

impl Replay {
    /// Keeps up to `limit` bytes of `incoming` for further attempts; `counter` is asked for where there is a body.
    pub fn new(incoming: Incoming, limit: usize, counter: impl FnOnce() -> ByteCount) -> Self {
        if incoming.is_end_stream() {
            return Replay { shared: None };
        }
        let shared = Shared {
            incoming,
            counter: counter(),
            kept: Vec::new(),
            kept_bytes: 0,
            trailers: None,
            limit,
            overflowed: false,
            finished: false,
            broken: false,
            attempt: 0,
        };
        Replay { shared: Some(Arc::new(Mutex::new(shared))) }
    }

    /// Can the whole body be sent from its beginning?
    pub fn can_begin(&self) -> bool {
        self.shared.as_ref().is_none_or(|shared| !lock(shared).overflowed)
    }

    /// Takes the body from the attempt under way, so that it can begin anew whenever that is. False: its beginning is
    /// gone meanwhile.
    pub fn take_back(&self) -> bool {
        self.shared.as_ref().is_none_or(|shared| {
            let mut state = lock(shared);
            state.attempt += u64::from(!state.overflowed);
            !state.overflowed
        })
    }

    /// The body for the next attempt. The body of an earlier attempt ends with an error from here on, and so does this
    /// one where its beginning is gone.
    pub fn begin(&self) -> Body {
        let Some(shared) = &self.shared else { return Body::empty() };
        let mut state = lock(shared);
        state.attempt += 1;
        Body::replay(ReplayBody {
            shared: shared.clone(),
            attempt: if state.overflowed { NOBODY } else { state.attempt },
            next: 0,
            trailers_sent: false,
        })
    }
}

/// No attempt has this number.
const NOBODY: u64 = 0;

/// The body of one attempt.
pub(super) struct ReplayBody {
    shared: Arc<Mutex<Shared>>,
    attempt: u64,
    /// How many of the kept pieces were passed on.
    next: usize,
    trailers_sent: bool,
}

impl ReplayBody {
    pub(super) fn poll(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let mut shared = lock(&self.shared);
        if shared.attempt != self.attempt {
            return Poll::Ready(Some(Err("a newer attempt has taken over the body".into())));
        }
        if let Some(piece) = shared.kept.get(self.next) {
            self.next += 1;
            return Poll::Ready(Some(Ok(Frame::data(piece.clone()))));
        }
        if shared.broken {
            return Poll::Ready(Some(Err("the body of the request broke off".into())));
        }
        if shared.finished {
            let trailers = if self.trailers_sent { None } else { shared.trailers.clone() };
            self.trailers_sent = true;
            return Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))));
        }
        match ready!(Pin::new(&mut shared.incoming).poll_frame(context)) {
            Some(Ok(frame)) => {
                shared.keep(&frame);
                self.next = shared.kept.len();
                self.trailers_sent = frame.is_trailers();
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                // Asked again it would say that it has ended, and a later attempt would take it for whole.
                shared.broken = true;
                Poll::Ready(Some(Err(error.into())))
            }
            None => {
                shared.finished = true;
                Poll::Ready(None)
            }
        }
    }

    pub(super) fn is_end(&self) -> bool {
        let shared = lock(&self.shared);
        let passed_on = self.next >= shared.kept.len() && (shared.trailers.is_none() || self.trailers_sent);
        shared.attempt == self.attempt && passed_on && (shared.finished || shared.incoming.is_end_stream())
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        let shared = lock(&self.shared);
        let ahead: usize = shared.kept.iter().skip(self.next).map(Bytes::len).sum();
        let rest = if shared.finished { SizeHint::with_exact(0) } else { shared.incoming.size_hint() };
        let mut hint = SizeHint::new();
        hint.set_lower(ahead as u64 + rest.lower());
        if let Some(upper) = rest.upper() {
            hint.set_upper(ahead as u64 + upper);
        }
        hint
    }
}

impl Shared {
    /// Keeps a copy of a new frame for later attempts while the bound allows.
    fn keep(&mut self, frame: &Frame<Bytes>) {
        if let Some(data) = frame.data_ref() {
            self.counter.add(data.len() as u64);
            self.kept_bytes = self.kept_bytes.saturating_add(data.len());
            if self.kept_bytes > self.limit {
                self.overflowed = true;
                self.kept = Vec::new();
            } else {
                self.kept.push(data.clone());
            }
        } else if let Some(trailers) = frame.trailers_ref() {
            self.trailers = Some(trailers.clone());
            self.finished = true;
        }
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
