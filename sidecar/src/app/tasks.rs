//! The tasks of the control thread, and the workers. None of them is meant to panic; one that does must not leave a sidecar behind that
//! runs on with names, endpoints or certificates of yesterday: the log says which it was, and where the sidecar cannot
//! do without it, it drains and ends with an error, for whoever started it to start it again.

use std::{
    future::Future,
    panic::AssertUnwindSafe,
    sync::atomic::{AtomicBool, Ordering},
};

use futures_util::FutureExt;
use tokio::sync::Notify;

/// Says when a task is missing.
#[derive(Debug, Default)]
pub(super) struct Tasks {
    is_one_dead: AtomicBool,
    died: Notify,
}

impl Tasks {
    /// Starts a task that the sidecar cannot do without. It may end by itself where nobody needs it any more.
    pub(super) fn spawn(
        self: &std::sync::Arc<Self>,
        name: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        let tasks = self.clone();
        tokio::spawn(async move {
            if AssertUnwindSafe(task).catch_unwind().await.is_err() {
                tasks.fail(name, "it ended with a panic, a bug of ours");
            }
        });
    }

    /// Starts a task without which traffic goes on as before.
    pub(super) fn spawn_minor(name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        tokio::spawn(async move {
            if AssertUnwindSafe(task).catch_unwind().await.is_err() {
                tracing::error!(
                    task = name,
                    "it ended with a panic, a bug of ours; the sidecar goes on without"
                );
            }
        });
    }

    /// A task that the sidecar cannot do without is missing.
    pub(super) fn fail(&self, name: &'static str, why: &str) {
        tracing::error!(task = name, "{why}; the sidecar cannot go on without and stops");
        self.is_one_dead.store(true, Ordering::Release);
        self.died.notify_one();
    }

    /// Comes when one is missing.
    pub(super) async fn died(&self) {
        self.died.notified().await;
    }

    /// Is one missing?
    pub(super) fn is_one_dead(&self) -> bool {
        self.is_one_dead.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn a_task_that_panics_is_missed_and_one_that_ends_is_not() {
        let tasks = Arc::<Tasks>::default();
        tasks.spawn("ends", async {});
        Tasks::spawn_minor("minor", async { panic!("a bug, for this test") });
        tokio::task::yield_now().await;
        tokio::task::yield_now().await;
        assert!(!tasks.is_one_dead());
        assert!(tasks.died().now_or_never().is_none());
        tasks.spawn("dies", async { panic!("a bug, for this test") });
        tasks.died().await;
        assert!(tasks.is_one_dead());
    }
}
