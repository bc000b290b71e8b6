//! Since when an HTTP connection has had no request in flight. Its server writes that with one store at each request;
//! whoever looks for a connection that may be closed reads it. No request takes a lock for it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

/// What one connection is doing. Cheap to clone; all clones see the same connection.
#[derive(Debug, Clone)]
pub struct Activity(Arc<State>);

#[derive(Debug)]
struct State {
    start: Instant,
    /// In nanoseconds from `start`; [`BUSY`] while a request is in flight.
    idle_since: AtomicU64,
}

const BUSY: u64 = u64::MAX;

impl Default for Activity {
    fn default() -> Self {
        Activity::new()
    }
}

impl Activity {
    /// Of a connection that begins now, without a request.
    pub fn new() -> Self {
        Activity(Arc::new(State { start: Instant::now(), idle_since: AtomicU64::new(0) }))
    }

    /// Since when no request has been in flight; none while one is. A head that is not complete is no request yet.
    pub fn idle_since(&self) -> Option<Instant> {
        let since = self.0.idle_since.load(Ordering::Relaxed);
        (since != BUSY).then(|| self.0.start + Duration::from_nanos(since))
    }

    /// A request is in flight.
    pub fn begin(&self) {
        self.0.idle_since.store(BUSY, Ordering::Relaxed);
    }

    /// The last request in flight has ended at this time.
    pub fn end(&self, now: Instant) {
        let since = now.saturating_duration_since(self.0.start).as_nanos();
        // Not in 500 years.
        self.0.idle_since.store(u64::try_from(since).unwrap_or(BUSY - 1), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_idle_from_its_start_and_after_each_request() {
        let activity = Activity::new();
        let start = Instant::now();
        assert_eq!(activity.idle_since(), Some(start));
        activity.begin();
        assert_eq!(activity.idle_since(), None);
        tokio::time::advance(Duration::from_secs(3)).await;
        activity.end(Instant::now());
        assert_eq!(activity.clone().idle_since(), Some(start + Duration::from_secs(3)));
    }
}
