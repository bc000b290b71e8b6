//! Real programs through two sidecars in two pods, with iptables: what they see is what they see directly.

#[path = "programs/curl.rs"]
mod curl;
