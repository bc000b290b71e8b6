//! Why we cut a connection, for the records of what was under way on it. From below all that a request sees is
//! that its other side is gone; only whoever cut the connection knows that it was us, and why. And the other way round,
//! whether a request has said that the client left.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicBool, Ordering},
};

use crate::model::Failed;

/// One per connection, shared with the records of its requests; empty until one of them ends it. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Cut(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    reason: OnceLock<Failed>,
    client_left: AtomicBool,
}

impl Cut {
    /// The connection is cut for this reason, which is given back. To be said before anything on the connection
    /// is dropped. The first reason stays.
    pub fn because(&self, failed: Failed) -> Failed {
        self.0.reason.get_or_init(|| failed).clone()
    }

    /// Why the connection was cut, if it was.
    pub fn reason(&self) -> Option<&Failed> {
        self.0.reason.get()
    }

    /// A request has said in its own record that the client left.
    pub(super) fn client_left(&self) {
        self.0.client_left.store(true, Ordering::Relaxed);
    }

    /// Has one? Then the connection need not say it again.
    pub(super) fn is_client_gone_told(&self) -> bool {
        self.0.client_left.load(Ordering::Relaxed)
    }
}
