//! What is known of a connection that reached us, when a request on it is looked at.

use std::net::SocketAddr;

use weft_proto::spiffe::SpiffeId;

use super::AppAddress;
use crate::{http::Upgrade, telemetry::Cut, tls::VerifiedPeer};

/// One connection to the app.
#[derive(Debug, Clone)]
pub struct Arrival {
    /// Who is there.
    pub caller: Caller,
    /// The caller's address.
    pub client: SocketAddr,
    /// The address that the caller dialled.
    pub meant: SocketAddr,
    /// Where the app is reached for it.
    pub app: AppAddress,
    /// What the connection becomes when it leaves HTTP.
    pub upgrade: Upgrade,
    /// Why the connection was cut, once it was.
    pub cut: Cut,
}

/// Who makes the calls of a connection.
#[derive(Debug, Clone)]
pub enum Caller {
    /// A peer of the mesh that has proven its identity.
    Peer(VerifiedPeer),
    /// The app of this very sidecar, with our identity.
    Own(SpiffeId),
    /// Somebody without an identity.
    Plaintext,
}

impl Caller {
    /// The proven identity.
    pub fn identity(&self) -> Option<&SpiffeId> {
        match self {
            Caller::Peer(peer) => Some(peer.id()),
            Caller::Own(id) => Some(id),
            Caller::Plaintext => None,
        }
    }

    /// May its `x-weft-*` headers be believed?
    pub fn is_sidecar(&self) -> bool {
        !matches!(self, Caller::Plaintext)
    }
}
