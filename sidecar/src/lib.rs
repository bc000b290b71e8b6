//! The Weft sidecar. This list is the architecture: the rooms from the top floor to the ground. A room uses
//! only rooms below it (`tests/tests/house.rs` checks that). The command line in `main.rs` stands above all.

/// Where the parts meet: build, run, drain.
pub mod app;
/// iptables rules as data, applied atomically; and a command in a namespace of its own.
pub mod redirect;
/// Probes and metrics on the pod address; everything else on a Unix socket.
pub mod admin;
/// The story of a connection and a request that the app makes.
pub mod outbound;
/// The story of a connection and a request that reaches the app.
pub mod inbound;
/// Accept loops: caps, drain, panic containment.
pub mod serve;
/// Endpoint sets, load, choice, ejection.
pub mod balance;
/// Dial, secure, pool, send.
pub mod connect;
/// HTTP framing around hyper: server, body, replay, headers, answers, upgrades.
pub mod http;
/// Pure decisions: route, retry, deadline, breaker, authorization.
pub mod policy;
/// Our own certificate: key, request, renewal.
pub mod identity;
/// Who is where: by name, by address, from files, over DNS.
pub mod discovery;
/// Mutual TLS: credentials, SPIFFE verification, accept, connect.
pub mod tls;
/// What does a client speak? Pure classification and a thin reader.
pub mod detect;
/// Streams, sockets, original destinations, two-way copy.
pub mod net;
/// Telling the parts to finish, and waiting for them.
pub mod drain;
/// Traces, metrics, access log, own log.
pub mod telemetry;
/// Settings as written, settings as used.
pub mod config;
/// Words of the house: pure data, no I/O, no locks.
pub mod model;
