//! Was the body of a connection's last request read to its end? If not, its client may still be sending it when the answer is
//! out. For HTTP/1, where one request is read after the other.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use http_body::Body as _;
use hyper::body::Incoming;

use super::{Body, BodyEnd};

/// Of one connection.
#[derive(Debug, Default)]
pub(super) struct Unread {
    /// Requests with a body so far.
    bodies: AtomicU64,
    /// Which of them has not been read to its end; none: [`ALL_READ`].
    last: Arc<AtomicU64>,
}

/// No body has this number.
const ALL_READ: u64 = 0;

impl Unread {
    /// The body of a request that begins now.
    pub(super) fn watch(&self, incoming: Incoming) -> Body {
        if incoming.is_end_stream() {
            self.clear();
            return Body::from(incoming);
        }
        let number = self.bodies.fetch_add(1, Ordering::Relaxed) + 1;
        self.last.store(number, Ordering::Relaxed);
        let last = self.last.clone();
        Body::from(incoming).observed(move |ended| {
            if matches!(ended.how, BodyEnd::Complete) {
                // Another request may have begun meanwhile: hyper reads ahead of whoever reads the body.
                let _ = last.compare_exchange(number, ALL_READ, Ordering::Relaxed, Ordering::Relaxed);
            }
        })
    }

    /// Nobody shall care any more.
    pub(super) fn clear(&self) {
        self.last.store(ALL_READ, Ordering::Relaxed);
    }

    /// Is there a body that was not read to its end?
    pub(super) fn is_any(&self) -> bool {
        self.last.load(Ordering::Relaxed) != ALL_READ
    }
}
