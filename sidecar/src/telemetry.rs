//! Seeing what the mesh does: traces, metrics, the access log, and the sidecar's own log.

mod exposition;
mod families;
mod metrics;
mod process;
mod propagation;
mod trace;

pub use exposition::{CLASSIC, OPENMETRICS};
pub use metrics::{Direction, Metrics, OpenConnection, RequestKey, Security, ServiceMetrics};
pub use propagation::Propagators;
pub use trace::{Formats, Incoming, Parent, Sampler, TraceContext};
