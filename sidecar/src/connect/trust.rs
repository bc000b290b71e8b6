//! When does a connection end because of trust? When the peer's root is no longer one of ours, and HTTP also when the
//! peer's certificate expires: its requests go on elsewhere, while bytes that are no HTTP cannot. A renewed certificate
//! of our own does not end it.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::sync::watch;

use crate::{
    model::{ExpiredPeers, Failed, Failure},
    tls::{Credentials, VerifiedPeer},
};

/// The clock is looked at this often: it may be set, and timers stand still while the machine is suspended.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);

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
        if left.is_zero() {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(left.min(LONGEST_SLEEP)) => {}
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

/// The same for a connection of bytes: the end of the peer's certificate counts only where that is wanted.
pub async fn trust_in_bytes_ended(
    peer: &VerifiedPeer,
    mut credentials: watch::Receiver<Option<Arc<Credentials>>>,
    expired: ExpiredPeers,
) {
    if expired == ExpiredPeers::Close {
        return trust_ended(peer, credentials, Duration::ZERO).await;
    }
    credentials.mark_changed();
    while credentials.changed().await.is_ok() {
        let current = credentials.borrow_and_update().clone();
        if current.is_some_and(|current| !peer.vouched_for(current.bundle(), SystemTime::now())) {
            return;
        }
    }
    // Nobody renews any more: the process is ending.
    std::future::pending().await
}

/// What to say of a connection that ended because of it.
pub fn trust_is_over(peer: &VerifiedPeer) -> Failed {
    Failed::new(Failure::UntrustedPeer, format!("the trust in {} ended", peer.id()))
}

#[cfg(test)]
mod tests {
    use tokio::{
        net::{TcpListener, TcpStream},
        time::timeout,
    };

    use super::*;
    use crate::tls::{
        self, Alpn,
        tests::{ORDERS, TestAuthority, WEB},
    };

    #[tokio::test]
    async fn the_clock_ends_trust_and_not_the_timer() {
        let authority = TestAuthority::new("weft.local");
        let (web, orders) = (authority.credentials(WEB), authority.credentials(ORDERS));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (far, _) = listener.accept().await.unwrap();
        let expected = [orders.id().clone()];
        let (near, far) = tokio::join!(
            tls::connect(near.into(), &web, &expected, Alpn::Tcp),
            tls::accept(far.into(), &orders)
        );
        let ((_near, peer), _far) = (near.unwrap(), far.unwrap());
        let (_publish, credentials) = watch::channel(Some(Arc::new(web)));
        let hour = Duration::from_secs(3600);

        // Timers run for two hours here, and the clock does not move, as after it was set back. That a suspended
        // machine sees the opposite within one sleep is the same look at the clock.
        tokio::time::pause();
        let ended = timeout(2 * hour, trust_ended(&peer, credentials.clone(), Duration::ZERO)).await;
        assert!(ended.is_err(), "a timer ended the trust in a certificate that is valid for an hour");
        let ended = timeout(hour, trust_ended(&peer, credentials, 2 * hour)).await;
        assert!(ended.is_ok(), "two hours ahead of its end it is over");
    }
}
