//! Connections to whom we call: dial, secure (mutual TLS to an expected identity), pool, send. A connection is
//! lent only to calls with the same address, the same expected identities and the same protocol: a wrong reuse
//! would be an identity leak.

mod confirmation;
mod connector;
mod failure;
mod http2;
mod idle;
mod pool;
mod standing;
mod trust;

pub use confirmation::{app_has_taken, confirm, is_confirmed, refuse};
pub use connector::{Connector, Dialer, Secured, SocketMaker};
pub use failure::SendFailed;
pub use pool::{InUse, Key, Lease, Pool, Security, one_off};
pub use trust::{trust_ended, trust_in_bytes_ended, trust_is_over};
