//! The words of the house: services, endpoints, policies, protocols, failures. Pure data: no async, no I/O, no
//! locks. What a peer sends is parsed once, at the edge, into one of these types.

mod failure;
mod policy;
mod protocol;
mod service;

pub use failure::{Failed, Failure, Result, Side};
pub use policy::{Breaker, Budget, ExpiredPeers, KeyExchange, MutualTls, Policy, Retries, Timeouts};
pub use protocol::{HttpVersion, Protocol};
pub use service::{DEFAULT_WEIGHT, Endpoint, InvalidName, Registered, Service, ServiceName};
