//! Has Consul lost what it knew? A question that waits for an index of before would wait until its time is over,
//! minutes later. Where the agent itself went, its connections broke, and that is told (see `agent`); where only the
//! servers behind it lost their state, or an index went back for another reason that Consul's documentation names,
//! nobody tells. So now and then one of the questions that wait now is asked without waiting, for its index alone: of
//! the leader, then of any server, for servers may differ (Consul's issue 7939). Two indices below the one that is
//! waited for end all of them. Those of the key-value store end only the question for the policies: they go back too
//! where Consul forgets that a key was deleted.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep},
};

use super::{
    backoff::spread,
    client::{Client, Place, Question},
};

/// How often one question is asked so, by a sidecar.
const PERIOD: Duration = Duration::from_secs(30);

/// Servers that go on differing are told of no more often; by then a question that waits has ended by itself.
const QUIET: Duration = Duration::from_secs(600);

/// How a question of the key-value store begins.
const STORE: &str = "/v1/kv/";

/// The questions that wait now; as many as there are places for them.
#[derive(Default)]
pub(super) struct Waits {
    open: Mutex<HashMap<u64, Wait>>,
    next: AtomicU64,
}

/// One of them.
struct Wait {
    /// Asks for its index alone.
    path: String,
    place: Place,
    end: Arc<Notify>,
}

/// A question that waits. It does so no more when this is dropped.
pub(super) struct Open<'a> {
    waits: &'a Waits,
    number: u64,
    end: Arc<Notify>,
}

impl Waits {
    /// A question begins to wait; `path` asks for its index alone.
    pub(super) fn open(&self, path: &str, place: Place) -> Open<'_> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let end = Arc::new(Notify::new());
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.insert(number, Wait { path: path.to_owned(), place, end: end.clone() });
        Open { waits: self, number, end }
    }

    /// Ends all that wait, or only those with this path.
    fn end(&self, only: Option<&str>) {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let chosen = open.values().filter(|wait| only.is_none_or(|path| wait.path == path));
        chosen.for_each(|wait| wait.end.notify_one());
    }

    /// The one that waits for the highest index, which is missed most surely where all is lost; of the services, as
    /// long as there are any.
    fn highest(&self) -> Option<(String, Place)> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let highest = open.values().max_by_key(|wait| (!wait.path.starts_with(STORE), wait.place.index));
        highest.map(|wait| (wait.path.clone(), wait.place))
    }

    fn any(&self, random: &mut fastrand::Rng) -> Option<(String, Place)> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        random.choice(open.values()).map(|wait| (wait.path.clone(), wait.place))
    }
}

impl Open<'_> {
    /// Comes when there is nothing to wait for any more.
    pub(super) async fn ended(&self) {
        self.end.notified().await;
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
    let (mut is_for_highest, mut told) = (false, Told::default());
    loop {
        sleep(spread(PERIOD, &mut random)).await;
        is_for_highest = !is_for_highest;
        let chosen = if is_for_highest { client.waits.highest() } else { client.waits.any(&mut random) };
        let Some((path, waits_from)) = chosen else { continue };
        if went_back(client, &path, waits_from).await && told.is_new(&path, waits_from, Instant::now()) {
            lost(client, &path, waits_from);
        }
    }
}

/// Do the leader and another server (as a rule) both say a lower index?
async fn went_back(client: &Client, path: &str, waits_from: Place) -> bool {
    for path in [path.to_owned(), format!("{path}&stale")] {
        // Whoever cannot be asked will be missed by others.
        let Ok(answer) = client.ask(&Question::get(path, "")).await else { return false };
        if !answer.place.is_some_and(|place| place.is_before(waits_from)) {
            return false;
        }
    }
    true
}

/// What was told lately: path and index. One alarm at most is added in each period.
#[derive(Default)]
struct Told(HashMap<(String, u64), Instant>);

impl Told {
    fn is_new(&mut self, path: &str, place: Place, now: Instant) -> bool {
        self.0.retain(|_, then| now.duration_since(*then) < QUIET);
        let key = (path.to_owned(), place.index);
        let is_new = !self.0.contains_key(&key);
        self.0.entry(key).or_insert(now);
        is_new
    }
}

/// There is no such history any more as this question waits in: whoever waits there asks anew.
fn lost(client: &Client, path: &str, place: Place) {
    if path.starts_with(STORE) {
        tracing::info!("Consul at {}: the index of the policies went back", client.shown());
        client.waits.end(Some(path));
        return;
    }
    tracing::warn!("Consul at {}: its index went back; it may have lost its state", client.shown());
    client.begin_term(place);
    client.waits.end(None);
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

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
            lost(&client, "/orders?", place);
        };
        let (answer, ()) = tokio::join!(client.ask(&question), ending);
        assert_eq!(answer.unwrap_err().kind, Kind::WentBack);
        assert_eq!(client.shown(), agent);
    }

    #[tokio::test]
    async fn an_index_of_the_store_ends_the_wait_for_policies_alone() {
        let (client, _) = fake::client(|_| None).await;
        let (store, place) = ("/v1/kv/weft/policies/?keys", Place::of(9));
        let of_service = client.waits.open("/orders?", Place::of(7));
        let of_policies = client.waits.open(store, place);
        lost(&client, store, place);
        of_policies.ended().await;
        let mut waiting = std::pin::pin!(of_service.ended());
        assert!(waiting.as_mut().now_or_never().is_none(), "the service is not asked anew");
        lost(&client, "/orders?", place);
        waiting.await;
    }

    #[tokio::test]
    async fn servers_that_differ_are_no_loss() {
        let (client, asked) = fake::client(|path| match path {
            "/v1/health/service/lost?a" | "/v1/health/service/lost?a&stale" => Some((5, "[]")),
            "/v1/health/service/differs?a" => Some((5, "[]")),
            _ => Some((7, "[]")),
        })
        .await;
        for (name, expected) in [("lost", true), ("differs", false), ("same", false)] {
            let path = format!("/v1/health/service/{name}?a");
            assert_eq!(went_back(&client, &path, Place::of(7)).await, expected, "{name}");
        }
        assert_eq!(asked.lock().unwrap().len(), 5);
    }

    #[test]
    fn the_same_loss_is_told_once_in_a_while() {
        let (mut told, start) = (Told::default(), Instant::now());
        let mut is_new =
            |path, index, seconds| told.is_new(path, Place::of(index), start + Duration::from_secs(seconds));
        assert!(is_new("/orders", 7, 0) && is_new("/cart", 7, 30) && is_new("/orders", 8, 60));
        assert!(!is_new("/orders", 7, 90) && !is_new("/orders", 7, 599));
        assert!(is_new("/orders", 7, 600));
    }

    #[tokio::test]
    async fn whoever_waits_is_found_and_ended() {
        let (waits, mut random) = (Waits::default(), fastrand::Rng::with_seed(1));
        assert_eq!(waits.any(&mut random), None);
        let open = [5, 7, 6].map(|index| waits.open("/orders", Place::of(index)));
        let of_policies = waits.open("/v1/kv/weft/policies/?keys", Place::of(9));
        assert_eq!(waits.highest(), Some(("/orders".to_owned(), Place::of(7))));
        assert!(waits.any(&mut random).is_some());
        // Also where it ends before anybody looks.
        waits.end(None);
        for one in open.iter().chain([&of_policies]) {
            one.ended().await;
        }
        drop(open);
        assert_eq!(waits.highest(), Some(("/v1/kv/weft/policies/?keys".to_owned(), Place::of(9))));
        drop(of_policies);
        assert_eq!(waits.any(&mut random), None);
        assert!(Place::of(6).is_before(Place::of(7)) && !Place::of(7).is_before(Place::of(7)));
    }
}
