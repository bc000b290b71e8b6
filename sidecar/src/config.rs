//! Settings. As written: flags over `WEFT_*` variables over one file, every key known, every mistake listed at
//! once with its place. As used: [`Config`], checked, no option left open. Traffic policy is not here: it changes
//! at run time, and comes from the stores.

mod consul;
pub mod document;
mod keys;
mod kubelet_probe;
pub mod policy_document;
mod reader;
mod used;
mod written;

pub use consul::{Consul, ConsulAddress, ConsulTls, ConsulToken, Probe, ProbeKind};
pub use keys::{KEYS, Key, arguments};
pub use kubelet_probe::{Grpc, HttpGet, KubeletProbe, ProbeHandler, Scheme};
pub use used::{
    AccessLogMode, App, Authority, Config, DrainTimes, Limits, Mode, OwnService, Pin, Ports, Stores, Upstream,
};
pub use written::{InvalidSettings, Written};

#[cfg(test)]
mod tests;
