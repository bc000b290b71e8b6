//! What happens on one HTTP/2 connection, counted: requests in flight, since when there is none, and requests
//! that the client took back at once. h2 itself bounds what it has not handed out (resets before we looked,
//! CONTINUATION frames, header lists, small frames); here is bounded what it has handed out: a client that goes
//! on opening and resetting streams (CVE-2023-44487) costs work at each, and is told to go.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

use super::Activity;

/// A request that its client takes back later than this has waited for an answer; it is not counted.
const AT_ONCE: Duration = Duration::from_secs(1);

/// The streams of one connection.
#[derive(Debug)]
pub(super) struct Streams {
    in_flight: AtomicUsize,
    activity: Activity,
    resets: AtomicU32,
    changed: Notify,
    ending: AtomicBool,
}

/// A request in flight, until it is dropped.
#[derive(Debug)]
pub(super) struct InFlight {
    streams: Arc<Streams>,
    began: Instant,
    answered: bool,
}

impl Streams {
    pub(super) fn new(activity: Activity) -> Arc<Self> {
        Arc::new(Streams {
            in_flight: AtomicUsize::new(0),
            activity,
            resets: AtomicU32::new(0),
            changed: Notify::new(),
            ending: AtomicBool::new(false),
        })
    }

    /// A request came. None if the connection is ending for its resets: it should not have come.
    pub(super) fn begin(self: &Arc<Self>) -> Option<InFlight> {
        if self.ending.load(Ordering::Relaxed) {
            self.count_reset();
            return None;
        }
        if self.in_flight.fetch_add(1, Ordering::Relaxed) == 0 {
            self.activity.begin();
        }
        Some(InFlight { streams: self.clone(), began: Instant::now(), answered: false })
    }

    /// From now on no request is taken.
    pub(super) fn refuse(&self) {
        self.ending.store(true, Ordering::Relaxed);
    }

    /// Resolves when so many requests more were taken back at once than were answered.
    pub(super) async fn resets_reach(&self, most: u32) {
        loop {
            let changed = self.changed.notified();
            if self.resets.load(Ordering::Relaxed) >= most {
                return;
            }
            changed.await;
        }
    }

    /// Resolves when no request was in flight for that long.
    pub(super) async fn idle_for(&self, limit: Duration) {
        loop {
            match self.activity.idle_since().map(|since| since + limit) {
                None => sleep_until(Instant::now() + limit).await,
                Some(end) if end <= Instant::now() => return,
                Some(end) => sleep_until(end).await,
            }
        }
    }

    fn count_reset(&self) {
        self.resets.fetch_add(1, Ordering::Relaxed);
        self.changed.notify_one();
    }
}

impl InFlight {
    /// Its answer begins.
    pub(super) fn answered(&mut self) {
        self.answered = true;
        let less = |resets: u32| resets.checked_sub(1);
        let _ = self.streams.resets.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if !self.answered && self.began.elapsed() < AT_ONCE {
            self.streams.count_reset();
        }
        if self.streams.in_flight.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.streams.activity.end(Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn resets_at_once_count_and_answers_make_up_for_them() {
        let streams = Streams::new(Activity::new());
        let mut answered = streams.begin().unwrap();
        drop((streams.begin(), streams.begin()));
        assert!(streams.resets_reach(2).now_or_never().is_some());
        answered.answered();
        assert!(streams.resets_reach(2).now_or_never().is_none());
        let patient = streams.begin();
        tokio::time::advance(AT_ONCE).await;
        drop(patient);
        assert!(streams.resets_reach(2).now_or_never().is_none());
        streams.refuse();
        assert!(streams.begin().is_none());
        assert!(streams.resets_reach(2).now_or_never().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_idle_only_without_requests() {
        let limit = Duration::from_secs(60);
        let (streams, start) = (Streams::new(Activity::new()), Instant::now());
        let request = streams.begin();
        let later = streams.clone();
        tokio::spawn(async move {
            tokio::time::sleep(limit * 3).await;
            drop(request);
        });
        later.idle_for(limit).await;
        assert_eq!(start.elapsed(), limit * 4);
    }
}
