//! Why we cut a connection, for the records of what was under way on it. From below all that a request sees is
//! that its other side is gone; only whoever cut the connection knows that it was us, and why.

use std::sync::{Arc, OnceLock};

use crate::model::Failed;

/// One per connection, shared with the records of its requests; empty until we cut it. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Cut(Arc<OnceLock<Failed>>);

impl Cut {
    /// The connection is cut for this reason, which is given back. To be said before anything on the connection
    /// is dropped. The first reason stays.
    pub fn because(&self, failed: Failed) -> Failed {
        self.0.get_or_init(|| failed).clone()
    }

    /// Why the connection was cut, if it was.
    pub fn reason(&self) -> Option<&Failed> {
        self.0.get()
    }
}
