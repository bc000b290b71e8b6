//! The life of an HTTP connection beyond the calls on it. When the trust in its peer is about to end it takes no new
//! calls; what is under way may go on for the drain timeout after the end, and then the connection is cut.

use std::{
    error::Error,
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use super::{Connector, trust_ended, trust_is_over};
use crate::{
    model::Failed,
    telemetry::{Cut, OpenConnection},
    tls::VerifiedPeer,
};
use futures_util::{
    FutureExt,
    future::{self, Either},
};

/// New calls leave a connection this long before its peer's certificate ends.
const RETIRE_AHEAD: Duration = Duration::from_secs(1);

/// May a connection be lent again, and was it cut? Told by its driver, asked by whoever lends it. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Standing {
    retired: Arc<AtomicBool>,
    cut: Cut,
}

impl Standing {
    /// It takes no further calls, or has ended.
    pub(super) fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Relaxed)
    }

    /// It takes no further calls from here on.
    pub(super) fn retire(&self) {
        self.retired.store(true, Ordering::Relaxed);
    }

    /// Why it was cut, if it was.
    pub(super) fn cut(&self) -> Option<&Failed> {
        self.cut.reason()
    }

    /// Drives a connection to its end, or until it is cut, which is also when `dead` says why; it counts as `open` until
    /// then. Not an async function: that would keep room for the driver twice.
    pub(super) fn drive<Broken: Error>(
        self,
        driver: impl Future<Output = Result<(), Broken>> + Unpin,
        peer: Option<VerifiedPeer>,
        connector: Connector,
        dead: impl Future<Output = Failed>,
        open: Option<OpenConnection>,
    ) -> impl Future<Output = ()> {
        let standing = self.clone();
        let over = async move {
            let trust_over = self.trust_is_over(peer.as_ref(), &connector);
            let why = tokio::select! {
                why = trust_over => why,
                why = dead => why,
            };
            // Said before the streams hear of it, which is when the driver is dropped.
            self.cut.because(why);
        };
        future::select(driver, Box::pin(over)).map(move |ended| {
            standing.retire();
            if let Either::Left((Err(error), _)) = ended {
                tracing::debug!(%error, "a connection to a server broke");
            }
            drop(open);
        })
    }

    /// Resolves when what was under way had its time after the trust in the peer ended.
    async fn trust_is_over(&self, peer: Option<&VerifiedPeer>, connector: &Connector) -> Failed {
        let Some(peer) = peer else { return future::pending().await };
        trust_ended(peer, connector.credentials().clone(), RETIRE_AHEAD).await;
        self.retire();
        trust_ended(peer, connector.credentials().clone(), Duration::ZERO).await;
        tokio::time::sleep(connector.drain_timeout()).await;
        trust_is_over(peer)
    }
}
