//! Telling the parts to finish, and waiting for them.
//!
//! A [`Drain`] is held by whoever decides; a [`Draining`] by every connection and task that must end first.
//! Three phases: running, draining (finish what you have, begin nothing new), aborting (the deadline is over:
//! stop now). Waiting ends when the last `Draining` is dropped, on whichever runtime or thread that happens.
//! A dropped `Drain` means aborting, so nothing waits for a word that cannot come any more. Which parts end in
//! which order is not decided here: the app makes one `Drain` per group.

use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

/// The deciding side.
#[derive(Debug)]
pub struct Drain {
    phase: watch::Sender<Phase>,
}

/// The side of a connection or task. Held for as long as there is work to finish; cheap to clone.
#[derive(Debug, Clone)]
pub struct Draining {
    phase: watch::Receiver<Phase>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Phase {
    Running,
    Draining,
    Aborting,
}

/// How the waiting ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finished {
    /// Every `Draining` was dropped in time.
    All,
    /// The deadline came first; this many `Draining` were left and have been told to abort.
    Left(usize),
}

impl Drain {
    /// Both sides of a new group, running.
    pub fn new() -> (Drain, Draining) {
        let (sender, receiver) = watch::channel(Phase::Running);
        (Drain { phase: sender }, Draining { phase: receiver })
    }

    /// Tells every holder to finish. Saying it again changes nothing.
    pub fn start(&self) {
        self.raise(Phase::Draining);
    }

    /// How many `Draining` exist: connections and tasks, and whatever keeps one to clone from.
    pub fn held(&self) -> usize {
        self.phase.receiver_count()
    }

    /// Starts if that was not done yet, and waits until every `Draining` is dropped. At the deadline the rest
    /// is told to abort, and the call returns without waiting for them.
    pub async fn finished(self, deadline: Instant) -> Finished {
        self.start();
        match timeout_at(deadline, self.phase.closed()).await {
            Ok(()) => Finished::All,
            Err(_) => {
                let left = self.held();
                self.raise(Phase::Aborting);
                if left == 0 { Finished::All } else { Finished::Left(left) }
            }
        }
    }

    fn raise(&self, to: Phase) {
        self.phase.send_if_modified(|phase| {
            let later = *phase < to;
            if later {
                *phase = to;
            }
            later
        });
    }
}

impl Draining {
    /// Returns once the drain has started; at once where it has. Safe to cancel and to call again.
    pub async fn started(&mut self) {
        self.reached(Phase::Draining).await;
    }

    /// Returns once the deadline of the drain is over. Safe to cancel and to call again.
    pub async fn aborted(&mut self) {
        self.reached(Phase::Aborting).await;
    }

    /// Has the drain started?
    pub fn is_draining(&self) -> bool {
        *self.phase.borrow() >= Phase::Draining || self.phase.has_changed().is_err()
    }

    async fn reached(&mut self, wanted: Phase) {
        // The error means that the deciding side is gone: that is an abort.
        let _ = self.phase.wait_for(|phase| *phase >= wanted).await;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    #[tokio::test(start_paused = true)]
    async fn it_waits_for_the_last_holder() {
        let (drain, draining) = Drain::new();
        for finishes_after in [1, 5, 3] {
            let mut held = draining.clone();
            tokio::spawn(async move {
                held.started().await;
                tokio::time::sleep(seconds(finishes_after)).await;
            });
        }
        drop(draining);
        tokio::time::sleep(seconds(60)).await;
        assert_eq!(drain.held(), 3, "nobody finishes before the start");
        let start = Instant::now();
        assert_eq!(drain.finished(start + seconds(30)).await, Finished::All);
        assert_eq!(start.elapsed(), seconds(5));
    }

    #[tokio::test(start_paused = true)]
    async fn the_deadline_aborts_the_rest() {
        let (drain, draining) = Drain::new();
        let (mut stubborn, mut other) = (draining.clone(), draining);
        let task = tokio::spawn(async move {
            stubborn.aborted().await;
            Instant::now()
        });
        let start = Instant::now();
        assert!(!other.is_draining());
        drain.start();
        assert!(other.is_draining());
        other.started().await;
        drop(other);
        tokio::time::sleep(seconds(2)).await;
        assert_eq!(drain.finished(start + seconds(10)).await, Finished::Left(1));
        assert_eq!(task.await.unwrap() - start, seconds(10));
    }

    #[tokio::test(start_paused = true)]
    async fn a_holder_that_comes_late_knows_at_once() {
        let (drain, draining) = Drain::new();
        drain.start();
        drain.start();
        let mut late = draining.clone();
        late.started().await;
        assert!(late.is_draining());
    }

    #[tokio::test]
    async fn a_lost_decider_ends_the_waiting() {
        let (drain, mut draining) = Drain::new();
        drop(drain);
        draining.started().await;
        draining.aborted().await;
        assert!(draining.is_draining());
    }

    #[test]
    fn holders_on_other_runtimes_are_waited_for() {
        let (drain, draining) = Drain::new();
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let mut held = draining.clone();
                std::thread::spawn(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                    runtime.block_on(held.started());
                })
            })
            .collect();
        drop(draining);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let finished = runtime.block_on(async { drain.finished(Instant::now() + seconds(60)).await });
        assert_eq!(finished, Finished::All);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}
