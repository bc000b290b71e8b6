//! The certificate authority of Weft: proves callers, signs their keys, keeps the roots.
//!
//! The programs of the mesh talk to it by gRPC (`weft_proto::ca`); operators by its command line. As in the
//! sidecar, a module uses only modules below it in this list.

/// Wiring: listeners, limits, upkeep, drain.
pub mod server;

/// Accepting workloads: a place for each, handshake, who is there.
pub mod listener;
/// Renewing what ends, reading what changed.
pub mod upkeep;

/// Probes and metrics over plain HTTP.
pub mod admin;
/// Who asks, is it proven, what was given: the gRPC service.
pub mod service;

/// Who may have DNS names in its certificate, and which.
pub mod dns_names;
/// Workloads of a Kubernetes cluster: their tokens, and the bundle as a ConfigMap.
pub mod kubernetes;
/// Which connections stand, and which one gives way.
pub mod connections;
/// One line for each certificate given or refused.
pub mod audit;
/// How many lines of the log strangers may cause.
pub mod limit;
/// The numbers for Prometheus.
pub mod metrics;

/// Join tokens, kept hashed.
pub mod token;

/// Root and issuing certificate: made, kept, renewed, used.
pub mod authority;
/// What a caller wants signed: the public key of a CSR.
pub mod request;

/// A directory that nobody else may read.
pub mod directory;
