//! The Weft sidecar. This list is the architecture: the rooms from the top floor to the ground. A room uses
//! only rooms below it (`tests/tests/house.rs` checks that). The command line in `main.rs` stands above all.

/// Probes and metrics on the pod address; everything else on a Unix socket.
pub mod admin;
/// Where the parts meet: build, run, drain.
pub mod app;
/// Endpoint sets, load, choice, ejection.
pub mod balance;
/// Settings as written, settings as used.
pub mod config;
/// Dial, secure, pool, send.
pub mod connect;
/// What does a client speak? Pure classification and a thin reader.
pub mod detect;
/// Who is where: by name, by address, from files, over DNS.
pub mod discovery;
/// Telling the parts to finish, and waiting for them.
pub mod drain;
/// HTTP framing around hyper: server, body, replay, headers, answers, upgrades.
pub mod http;
/// Our own certificate: key, request, renewal.
pub mod identity;
/// The story of a connection and a request that reaches the app.
pub mod inbound;
/// Words of the house: pure data, no I/O, no locks.
pub mod model;
/// Streams, sockets, original destinations, two-way copy.
pub mod net;
/// The story of a connection and a request that the app makes.
pub mod outbound;
/// Pure decisions: route, retry, deadline, breaker, authorization.
pub mod policy;
/// iptables rules as data, applied atomically; and a command in a namespace of its own.
pub mod redirect;
/// Accept loops: caps, drain, panic containment.
pub mod serve;
/// Traces, metrics, access log, own log.
pub mod telemetry;
/// Mutual TLS: credentials, SPIFFE verification, accept, connect.
pub mod tls;
