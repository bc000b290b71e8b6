//! The life of an HTTP connection beyond the calls on it. When the trust in its peer is about to end it takes no new
//! calls; what is under way may go on for the drain timeout after the end, and then the connection is cut.

use std::{
    error::Error,
    future::Future,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::{
    FutureExt,
    future::{self, Either},
};
use tokio::task::AbortHandle;

use super::{Connector, trust_ended, trust_is_over};
use crate::{
    model::Failed,
    telemetry::{Cut, OpenConnection},
    tls::VerifiedPeer,
};

/// New calls leave a connection this long before its peer's certificate ends.
const RETIRE_AHEAD: Duration = Duration::from_secs(1);

/// May a connection be lent again, and was it cut? Told by its driver, asked by whoever lends it. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Standing {
    retired: Arc<AtomicBool>,
    cut: Cut,
}

/// Runs what hyper spawns for one HTTP/2 connection. The first of it is the connection itself, which hyper would
/// keep until its last stream has ended.
#[derive(Debug, Clone, Default)]
pub(super) struct Tasks(Arc<OnceLock<AbortHandle>>);

impl Standing {
    /// It takes no further calls.
    pub(super) fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Relaxed)
    }

    /// Why it was cut, if it was.
    pub(super) fn cut(&self) -> Option<&Failed> {
        self.cut.reason()
    }

    /// Drives a connection to its end, or until it is cut; it counts as `open` until then. `tasks` are those of an
    /// HTTP/2 connection. Not an async function: that would keep room for the driver twice.
    pub(super) fn drive<Broken: Error>(
        self,
        driver: impl Future<Output = Result<(), Broken>> + Unpin,
        peer: Option<VerifiedPeer>,
        connector: Connector,
        tasks: Tasks,
        open: Option<OpenConnection>,
    ) -> impl Future<Output = ()> {
        let over = async move {
            let Some(peer) = &peer else { return std::future::pending().await };
            trust_ended(peer, connector.credentials().clone(), RETIRE_AHEAD).await;
            self.retired.store(true, Ordering::Relaxed);
            trust_ended(peer, connector.credentials().clone(), Duration::ZERO).await;
            tokio::time::sleep(connector.drain_timeout()).await;
            // Said before the streams hear of it.
            self.cut.because(trust_is_over(peer));
        };
        future::select(driver, Box::pin(over)).map(move |ended| {
            match ended {
                Either::Left((ended, _)) => log(ended),
                Either::Right(_) => tasks.abort_connection(),
            }
            drop(open);
        })
    }
}

fn log<Broken: Error>(ended: Result<(), Broken>) {
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection to a server broke");
    }
}

impl Tasks {
    fn abort_connection(&self) {
        if let Some(connection) = self.0.get() {
            connection.abort();
        }
    }
}

impl<Task> hyper::rt::Executor<Task> for Tasks
where
    Task: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, task: Task) {
        let task = tokio::spawn(task);
        self.0.get_or_init(|| task.abort_handle());
    }
}
