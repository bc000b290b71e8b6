//! Real programs through two sidecars in two pods, with iptables: what they see is what they see directly.

#[path = "programs/addresses.rs"]
mod addresses;
#[path = "programs/bytes.rs"]
mod bytes;
#[path = "programs/curl.rs"]
mod curl;
#[path = "programs/databases.rs"]
mod databases;
#[path = "programs/destinations.rs"]
mod destinations;
#[path = "programs/http1.rs"]
mod http1;
#[path = "programs/http2.rs"]
mod http2;
#[path = "programs/large.rs"]
mod large;
#[path = "programs/listens.rs"]
mod listens;
#[path = "programs/pair.rs"]
mod pair;
#[path = "programs/python.rs"]
mod python;
#[path = "programs/tls.rs"]
mod tls;
