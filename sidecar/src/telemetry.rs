//! Seeing what the mesh does: traces, metrics, the access log, and the sidecar's own log.

mod propagation;
mod trace;

pub use propagation::Propagators;
pub use trace::{Formats, Incoming, Parent, Sampler, TraceContext};
