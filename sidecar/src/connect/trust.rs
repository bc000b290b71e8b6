//! When does a connection end because of trust? When the peer's certificate expires, or its root is no longer
//! one of ours. A renewed certificate of our own does not end it.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::sync::watch;

use crate::{
    model::{Failed, Failure},
    tls::{Credentials, VerifiedPeer},
};

/// Resolves when `peer` is no longer to be trusted, `ahead` of the end of its certificate; at once where it is not.
pub async fn trust_ended(
    peer: &VerifiedPeer,
    mut credentials: watch::Receiver<Option<Arc<Credentials>>>,
    ahead: Duration,
) {
    // The bundle may have changed since the handshake.
    credentials.mark_changed();
    loop {
        let now = SystemTime::now();
        let left = peer.not_after().duration_since(now).unwrap_or_default().saturating_sub(ahead);
        tokio::select! {
            () = tokio::time::sleep(left) => return,
            changed = credentials.changed() => {
                let current = credentials.borrow_and_update().clone();
                match (changed, current) {
                    // Nobody renews any more: the process is ending.
                    (Err(_), _) => return tokio::time::sleep(left).await,
                    (Ok(()), Some(current)) if !peer.still_trusted(current.bundle(), SystemTime::now()) => return,
                    (Ok(()), _) => {}
                }
            }
        }
    }
}

/// What to say of a connection that ended because of it.
pub fn trust_is_over(peer: &VerifiedPeer) -> Failed {
    Failed::new(Failure::UntrustedPeer, format!("the trust in {} ended", peer.id()))
}
