//! Mutual TLS between sidecars: types and checks. TLS 1.3 only, both sides authenticated by one SPIFFE id each
//! ([X509-SVID](https://github.com/spiffe/spiffe/blob/main/standards/X509-SVID.md) section 5).
//!
//! This room alone makes a [`VerifiedPeer`], so whoever holds one knows that the check was made. It obtains no
//! certificates (that is `identity`), sets no time limits, and decides on no one's permissions.

mod authority;
mod bundle;
mod credentials;
mod handshake;
mod issuer;
mod judge;
mod registry;
mod verify;

#[cfg(test)]
pub(crate) mod tests;

pub use authority::{Anchor, connect_authority};
pub use bundle::Bundle;
pub use credentials::Credentials;
pub use handshake::{Alpn, accept, connect, first_bytes, refused_by_peer};
pub use registry::{connect_registry, registry_client};
pub use verify::VerifiedPeer;
