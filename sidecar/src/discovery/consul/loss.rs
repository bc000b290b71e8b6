//! Has Consul lost what it knew? A question that waits for an index of before would wait until its time is over,
//! minutes later. Where the agent itself went, its connections broke, and that is told (see `agent`); where only the
//! servers behind it lost their state, or an index went back for another reason that Consul's documentation names,
//! nobody tells. So now and then one of the questions that wait now is asked without waiting, and of the leader: for
//! its index alone. An index below the one that is waited for ends all of them, as if the agent had failed.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, futures::Notified},
    time::sleep,
};

use super::{
    backoff::spread,
    client::{Client, Place, Question},
};

/// How often one question is asked so, by a sidecar.
const PERIOD: Duration = Duration::from_secs(30);

/// The questions that wait now; as many as there are places for them.
#[derive(Default)]
pub(super) struct Waits {
    open: Mutex<HashMap<u64, (String, Place)>>,
    next: AtomicU64,
    lost: Notify,
}

/// A question that waits. It does so no more when this is dropped.
pub(super) struct Open<'a> {
    waits: &'a Waits,
    number: u64,
}

impl Waits {
    /// A question begins to wait; `path` asks for its index alone.
    pub(super) fn open(&self, path: &str, place: Place) -> Open<'_> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.insert(number, (path.to_owned(), place));
        Open { waits: self, number }
    }

    /// Ends when there is nothing to wait for any more, from the call on.
    pub(super) fn lost(&self) -> Notified<'_> {
        self.lost.notified()
    }

    /// Ends all that wait.
    pub(super) fn end(&self) {
        self.lost.notify_waiters();
    }

    /// The one that waits for the highest index, which is missed most surely where all is lost.
    fn highest(&self) -> Option<(String, Place)> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.values().max_by_key(|(_, place)| place.index).cloned()
    }

    fn any(&self, random: &mut fastrand::Rng) -> Option<(String, Place)> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        random.choice(open.values()).cloned()
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.waits.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.number);
    }
}

impl fmt::Debug for Waits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Waits").finish_non_exhaustive()
    }
}

/// Looks now and then, without an end.
pub(super) async fn look(client: &Client, mut random: fastrand::Rng) {
    let mut is_for_highest = false;
    loop {
        sleep(spread(PERIOD, &mut random)).await;
        is_for_highest = !is_for_highest;
        let chosen = if is_for_highest { client.waits.highest() } else { client.waits.any(&mut random) };
        let Some((path, waits_from)) = chosen else { continue };
        // Whoever cannot be asked will be missed by others.
        let Ok(answer) = client.ask(&Question::get(path, "")).await else { continue };
        if answer.place.is_some_and(|place| place.is_before(waits_from)) {
            client.lost(waits_from);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::consul::{error::Kind, fake};

    #[tokio::test]
    async fn whoever_waited_does_not_leave_an_agent_that_is_well() {
        let (client, asked) = fake::client(|_| None).await;
        let (agent, place) = (client.shown(), Place::of(7));
        let question = Question::get("/orders?stale".to_owned(), "");
        let question = question.waiting(place, Duration::from_secs(60), "/orders?".to_owned());
        let ending = async {
            while asked.lock().unwrap().is_empty() {
                tokio::task::yield_now().await;
            }
            client.lost(place);
        };
        let (answer, ()) = tokio::join!(client.ask(&question), ending);
        assert_eq!(answer.unwrap_err().kind, Kind::WentBack);
        assert_eq!(client.shown(), agent);
    }

    #[tokio::test]
    async fn whoever_waits_is_found_and_ended() {
        let (waits, mut random) = (Waits::default(), fastrand::Rng::with_seed(1));
        assert_eq!(waits.any(&mut random), None);
        let open = [5, 7, 6].map(|index| waits.open("/orders", Place::of(index)));
        assert_eq!(waits.highest(), Some(("/orders".to_owned(), Place::of(7))));
        assert!(waits.any(&mut random).is_some());
        // Also where it ends before anybody looks.
        let lost = waits.lost();
        waits.end();
        lost.await;
        drop(open);
        assert_eq!(waits.any(&mut random), None);
        assert!(Place::of(6).is_before(Place::of(7)) && !Place::of(7).is_before(Place::of(7)));
    }
}
