//! A request body that can be sent again: what was read of it is kept, up to a bound, for the next attempt.
//! Past the bound the bytes go on to the attempt that is under way, and no other can begin.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use hyper::HeaderMap;

use super::body::{Body, BodyError};

/// The source of a request's body, for one attempt after the other.
pub struct Replay {
    /// None: there is no body.
    shared: Option<Arc<Mutex<Shared>>>,
}

struct Shared {
    /// The client's body, each byte of which is read once.
    source: Body,
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
    /// That attempt still has its body.
    is_read: bool,
    /// No further attempt will begin.
    is_last: bool,
}

impl Replay {
    /// Keeps up to `limit` bytes of `source` for further attempts.
    pub fn new(source: Body, limit: usize) -> Self {
        if source.is_end_stream() {
            return Replay { shared: None };
        }
        let shared = Shared {
            source,
            kept: Vec::new(),
            kept_bytes: 0,
            trailers: None,
            limit,
            overflowed: false,
            finished: false,
            broken: false,
            attempt: 0,
            is_read: false,
            is_last: false,
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
            if !state.overflowed {
                state.attempt += 1;
                state.is_read = false;
            }
            !state.overflowed
        })
    }

    /// The body for the next attempt. The body of an earlier attempt ends with an error from here on, and so does this
    /// one where its beginning is gone.
    pub fn begin(&self) -> Body {
        let Some(shared) = &self.shared else { return Body::empty() };
        let mut state = lock(shared);
        state.attempt += 1;
        state.is_read = !state.overflowed;
        Body::replay(ReplayBody {
            shared: shared.clone(),
            attempt: if state.overflowed { NOBODY } else { state.attempt },
            next: 0,
            trailers_sent: false,
        })
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        if let Some(shared) = &self.shared {
            let mut state = lock(shared);
            state.is_last = true;
            let released = state.release();
            drop(state);
            drop(released);
        }
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
        match ready!(Pin::new(&mut shared.source).poll_frame(context)) {
            Some(Ok(frame)) => {
                shared.keep(&frame);
                self.next = shared.kept.len();
                self.trailers_sent = frame.is_trailers();
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                // Asked again it would say that it has ended, and a later attempt would take it for whole.
                shared.broken = true;
                Poll::Ready(Some(Err(error)))
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
        shared.attempt == self.attempt && passed_on && (shared.finished || shared.source.is_end_stream())
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        let shared = lock(&self.shared);
        let ahead: usize = shared.kept.iter().skip(self.next).map(Bytes::len).sum();
        let rest = if shared.finished { SizeHint::with_exact(0) } else { shared.source.size_hint() };
        let mut hint = SizeHint::new();
        hint.set_lower(ahead as u64 + rest.lower());
        if let Some(upper) = rest.upper() {
            hint.set_upper(ahead as u64 + upper);
        }
        hint
    }
}

impl Drop for ReplayBody {
    fn drop(&mut self) {
        let mut shared = lock(&self.shared);
        if shared.attempt == self.attempt {
            shared.is_read = false;
        }
        let released = shared.release();
        drop(shared);
        drop(released);
    }
}

impl Shared {
    /// Nobody will read on: the client's body is dropped, although the body of an earlier attempt may remain for as long
    /// as its server takes nothing of it.
    fn release(&mut self) -> Option<Body> {
        (self.is_last && !self.is_read).then(|| std::mem::replace(&mut self.source, Body::empty()))
    }

    /// Keeps a copy of a new frame for later attempts while the bound allows.
    fn keep(&mut self, frame: &Frame<Bytes>) {
        if let Some(data) = frame.data_ref() {
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
