//! Our own certificate: the key, the request to the certificate authority, renewal, and the trust bundle.
//!
//! [`run`] publishes credentials and replaces them in time; a valid certificate is kept while the authority is
//! away, and an expired one is withdrawn. The key is made here and leaves memory only where a `state_dir` is
//! set. Who may do what with an identity is not decided here.

mod client;
mod kept;
mod renewal;
mod wake;

use std::time::SystemTime;

pub use client::prove;
pub use renewal::run;

/// How the renewal stands, for the admin room.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// When the authority is asked next; none while it is being asked.
    pub next_attempt: Option<SystemTime>,
    /// Why the last attempt failed; none where it succeeded.
    pub last_error: Option<String>,
    /// Attempts that failed, since the last success.
    pub failures: u32,
    /// Certificates obtained since the start.
    pub obtained: u64,
    /// Attempts that failed since the start.
    pub failed: u64,
}
