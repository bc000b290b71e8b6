//! May this caller reach the app? The only maker of a [`Permit`], which forwarding takes as an argument, so that
//! the check cannot be forgotten. Today the question is whether mesh mutual TLS is required. Who the caller is
//! was proven before, in the room `tls`.

use std::net::SocketAddr;

use weft_proto::spiffe::SpiffeId;

use crate::model::{Failed, Failure, MutualTls, Result};

/// The proof that a connection may be forwarded to the app.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Permit {
    peer: Option<SpiffeId>,
}

impl Permit {
    /// Who it was given to; none where a plaintext caller is let in.
    pub fn peer(&self) -> Option<&SpiffeId> {
        self.peer.as_ref()
    }

    /// Would the same caller be let in under this mode? If not, its connection is to be drained and closed.
    pub fn holds_under(&self, mode: MutualTls) -> bool {
        self.peer.is_some() || mode == MutualTls::Permissive
    }
}

/// Decides about a connection. `peer` is the identity that the caller proved with mesh mutual TLS, `from` its
/// address, for the log.
///
/// # Errors
/// [`Failure::PlaintextRefused`] where mesh mutual TLS is required and the caller has none.
pub fn authorize(peer: Option<&SpiffeId>, mode: MutualTls, from: SocketAddr) -> Result<Permit> {
    let permit = Permit { peer: peer.cloned() };
    if permit.holds_under(mode) {
        return Ok(permit);
    }
    Err(Failed::new(
        Failure::PlaintextRefused,
        format!(
            "{from} proved no identity of the mesh and `mutual_tls` is strict; give the caller a sidecar, or \
             set `mutual_tls: permissive`"
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strict_takes_only_proven_peers() {
        let from = "10.0.0.9:4711".parse().unwrap();
        let id: SpiffeId = "spiffe://weft.local/ns/shop/sa/orders".parse().unwrap();
        for (peer, mode, expected) in [
            (None, MutualTls::Permissive, Ok(None)),
            (Some(&id), MutualTls::Permissive, Ok(Some(&id))),
            (Some(&id), MutualTls::Strict, Ok(Some(&id))),
            (None, MutualTls::Strict, Err(Failure::PlaintextRefused)),
        ] {
            let decided = authorize(peer, mode, from);
            let seen = decided.as_ref().map(Permit::peer).map_err(|failed| failed.failure);
            assert_eq!(seen, expected, "{peer:?} {mode:?}");
            if let Err(failed) = decided {
                assert!(failed.detail.contains("10.0.0.9"), "{failed}");
            }
        }
    }

    #[test]
    fn a_permit_ends_when_the_mode_turns_strict() {
        let from = "10.0.0.9:4711".parse().unwrap();
        let permit = authorize(None, MutualTls::Permissive, from).unwrap();
        assert!(permit.holds_under(MutualTls::Permissive) && !permit.holds_under(MutualTls::Strict));
    }
}
