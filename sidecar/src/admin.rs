//! The two faces of a running sidecar.
//!
//! The public one, on the pod address, has what the kubelet and Prometheus need and nothing of the
//! configuration: `/live`, `/ready`, `/registered`, `/metrics`, and `/probe/…`, which asks the app. Everything else is the private one: JSON over HTTP on a Unix socket
//! of mode 0600, which the command line asks. The room knows no other room's types: views are functions that make
//! JSON.

mod answer;
mod app_probe;
mod client;
mod private;
mod public;
mod readiness;

use std::sync::Arc;

pub use app_probe::AppProbes;
pub use client::ask;
pub use private::{Leave, Private, listen_private, serve_private};
pub use public::{Public, serve_public};
pub use readiness::{Condition, Readiness};

/// Makes a snapshot for the private face.
pub type View = Arc<dyn Fn() -> serde_json::Value + Send + Sync>;
/// Something that a face may set off.
pub type Action = Arc<dyn Fn() + Send + Sync>;
