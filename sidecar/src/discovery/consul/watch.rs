//! The watch of one service: blocking queries to `/v1/health/service/NAME`, one after the other (Consul's
//! documentation, "Blocking Queries"). An index that went back begins anew without one; after a failure the first
//! question does not block either, for a Consul that lost its state would keep it waiting. Where all places for
//! blocking queries are taken, the service is read every ten seconds until one is free; a name that nobody
//! registered is read so and takes no place. It ends when nobody used the service for a while.

use std::{
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use hyper::Method;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc},
    task::spawn_blocking,
    time::{Instant, sleep_until, timeout},
};

use super::{
    backoff::{LONGEST, pause, spread, turn},
    client::{Answer, Client, Place, Question},
    error::{Error, Kind},
    health::{self, Reading},
    known::Known,
};
use crate::{
    discovery::registry::Interest,
    model::{Registered, Service, ServiceName},
};

/// How long a blocking query waits for a change; shorter where others wait for its place.
pub(super) const WAIT: Duration = Duration::from_secs(300);
const WAIT_OF_MANY: Duration = Duration::from_secs(60);
/// How stale a service may be that has no place among the blocking queries.
const POLL: Duration = Duration::from_secs(10);
/// A name that nobody registered is asked for no more often.
const UNREGISTERED: Duration = Duration::from_secs(10);
/// A service that changes all the time is read no more often.
const LEAST_PAUSE: Duration = Duration::from_millis(250);
/// While nothing is known of a service, somebody may be waiting for it.
const LONGEST_WITHOUT: Duration = Duration::from_secs(10);
/// Nobody used the service for so long: the watch ends.
const IDLE: Duration = Duration::from_secs(300);
const IDLE_UNREGISTERED: Duration = Duration::from_secs(60);
/// How often Consul is asked whether an empty answer is one, or an ACL's.
pub(super) const ACL_CHECK: Duration = Duration::from_secs(60);
/// A filter that no instance passes: the answer is an index and nothing else.
const NOBODY: &str = "filter=Service.ID%3D%3D%22%22";
/// Some 20,000 instances.
const MAX_BYTES: usize = 64 * 1024 * 1024;
/// A longer answer is read aside, so that DNS and admin go on meanwhile.
const LARGE: usize = 256 * 1024;

/// What a watch tells.
pub(super) enum News {
    /// An answer came, or the grace of some endpoints is over. `unreadable`: instances that cannot be read.
    Read { service: Service, mistakes: Vec<String>, unreadable: usize },
    /// A question failed. What was known stays.
    Failed { name: ServiceName, error: Error },
    /// The watch with this number is over; nobody used the service.
    Ended { name: ServiceName, number: u64 },
}

/// One service that is watched.
pub(super) struct Watch {
    /// Tells it from an earlier one of the same service.
    number: u64,
    client: Arc<Client>,
    interest: Arc<Interest>,
    tell: mpsc::Sender<News>,
    random: fastrand::Rng,
    known: Known,
    /// What is wrong with single instances in the last answer that could be read, and with how many.
    mistakes: Vec<String>,
    unreadable: usize,
    /// Of the last answer.
    last: Option<Place>,
    /// Where to wait from; none: the next question does not block.
    wait_from: Option<Place>,
    was_registered: bool,
    failures: u32,
    used: Instant,
    acl_checked: Option<Instant>,
}

impl Watch {
    pub(super) fn new(
        number: u64,
        client: Arc<Client>,
        interest: Arc<Interest>,
        tell: mpsc::Sender<News>,
        random: fastrand::Rng,
    ) -> Self {
        let known = Known::new(interest.name().clone());
        client.watches.fetch_add(1, Ordering::Relaxed);
        Watch {
            number,
            client,
            interest,
            tell,
            random,
            known,
            mistakes: Vec::new(),
            unreadable: 0,
            last: None,
            wait_from: None,
            was_registered: false,
            failures: 0,
            used: Instant::now(),
            acl_checked: None,
        }
    }

    /// Watches until nobody uses the service, or nobody listens.
    pub(super) async fn run(mut self) {
        loop {
            let (began, had_failed) = (Instant::now(), self.failures > 0);
            let rest_until = match self.look().await {
                // Those that failed together may be answered together too, and go on together.
                Ok(()) if had_failed && !self.known.is_empty() => {
                    Instant::now() + self.spacing() + self.turn()
                }
                Ok(()) => began + self.spacing(),
                Err(error) => {
                    self.failures = self.failures.saturating_add(1);
                    self.wait_from = None;
                    let name = self.interest.name().clone();
                    if self.tell.send(News::Failed { name, error }).await.is_err() {
                        return;
                    }
                    Instant::now() + self.pause()
                }
            };
            if self.is_idle() {
                let ended = News::Ended { name: self.interest.name().clone(), number: self.number };
                let _ = self.tell.send(ended).await;
                return;
            }
            let resting = sleep_until(rest_until);
            if self.keeping(resting).await.is_none() {
                return;
            }
        }
    }

    /// The pause after a failure; who knows the service does not wait for the answer.
    fn pause(&mut self) -> Duration {
        if self.known.is_empty() {
            return pause(self.failures, LONGEST_WITHOUT, &mut self.random);
        }
        pause(self.failures, LONGEST, &mut self.random) + self.turn()
    }

    /// One of all that this sidecar watches.
    fn turn(&mut self) -> Duration {
        turn(self.client.watches.load(Ordering::Relaxed), &mut self.random)
    }

    fn spacing(&mut self) -> Duration {
        match self.last {
            _ if self.known.is_empty() => spread(UNREGISTERED, &mut self.random),
            // Something between takes the index away: there is no waiting for a change.
            None => spread(POLL, &mut self.random),
            Some(_) => LEAST_PAUSE,
        }
    }

    fn is_idle(&mut self) -> bool {
        if self.interest.was_used() {
            self.used = Instant::now();
        }
        let idle = if self.known.is_empty() { IDLE_UNREGISTERED } else { IDLE };
        // What is known is not let go while it could not be learnt again.
        let is_away = self.failures > 0 && !self.known.is_empty();
        // A new watch would not know what is kept after a gap, and might call the service in plaintext.
        let is_kept = self.known.kept_until().is_some();
        !is_away && !is_kept && self.used.elapsed() >= idle && self.interest.retire()
    }

    /// Asks once, and tells what came.
    async fn look(&mut self) -> Result<(), Error> {
        let slot = self.slot().await;
        let answer = self.read(slot).await?;
        let reading = parse(self.interest.name().clone(), answer.clone()).await?;
        if reading.instances.is_empty() && reading.unreadable.is_empty() {
            self.check_acl(answer.is_filtered).await?;
        }
        let went_back = matches!((answer.place, self.last), (Some(new), Some(old)) if new.index < old.index);
        let elsewhere = matches!((answer.place, self.last), (Some(new), Some(old)) if !new.follows(old));
        let after_gap = self.failures > 0 || went_back || elsewhere;
        self.failures = 0;
        self.last = answer.place;
        self.wait_from = answer.place.filter(|_| !went_back);
        self.mistakes.clone_from(&reading.mistakes);
        self.unreadable = reading.unreadable.len();
        self.known.accept(reading, after_gap, Instant::now());
        let gone = |_| Error::new(Kind::Unreachable, "nobody listens");
        let read = self.read_now();
        self.tell.send(read).await.map_err(gone)
    }

    /// The service as it is known now.
    fn read_now(&mut self) -> News {
        let (service, contradiction) = self.known.service();
        self.was_registered |= service.registered == Registered::Yes;
        let mistakes = self.mistakes.iter().cloned().chain(contradiction).collect();
        News::Read { service, mistakes, unreadable: self.unreadable }
    }

    /// A slot among the blocking queries, and where to wait from; none: read without blocking.
    async fn slot(&mut self) -> Option<(OwnedSemaphorePermit, Place)> {
        let place = self.wait_from.filter(|_| self.was_registered)?;
        let slots = self.client.slots.clone();
        let waiting = timeout(spread(POLL, &mut self.random), slots.acquire_owned());
        Some((self.keeping(waiting).await?.ok()?.ok()?, place))
    }

    async fn read(&mut self, slot: Option<(OwnedSemaphorePermit, Place)>) -> Result<Answer, Error> {
        let name = self.interest.name().clone();
        let permission = format!("service:read on `{name}` and node:read");
        let path = format!("/v1/health/service/{name}?stale");
        let mut question = Question { most: MAX_BYTES, ..Question::get(path, &permission) };
        if let Some((_, place)) = &slot {
            let longest = if self.client.slots.available_permits() == 0 { WAIT_OF_MANY } else { WAIT };
            let wait = longest.mul_f64(1.0 - 0.1 * self.random.f64());
            question = question.waiting(*place, wait, format!("/v1/health/service/{name}?{NOBODY}"));
        }
        let client = self.client.clone();
        let of_service = |error: Error| Error { text: format!("service `{name}`: {}", error.text), ..error };
        match self.keeping(client.ask(&question)).await {
            Some(answer) => answer.map_err(of_service),
            None => Err(Error::new(Kind::Unreachable, "nobody listens")),
        }
    }

    /// Waits, and meanwhile drops the endpoints whose grace is over. None where nobody listens.
    async fn keeping<T>(&mut self, waiting: impl Future<Output = T>) -> Option<T> {
        let mut waiting = std::pin::pin!(waiting);
        loop {
            let Some(until) = self.known.kept_until() else { return Some(waiting.await) };
            tokio::select! {
                done = &mut waiting => return Some(done),
                () = sleep_until(until) => {}
            }
            if self.known.expire(Instant::now()) {
                let read = self.read_now();
                self.tell.send(read).await.ok()?;
            }
        }
    }

    /// Consul answers with an empty list where an ACL hides everything; before 1.11 without a word. So an empty
    /// answer is believed only if the token may read the service.
    async fn check_acl(&mut self, is_filtered: bool) -> Result<(), Error> {
        let now = Instant::now();
        let is_known = !self.known.is_empty();
        let due = self.acl_checked.is_none_or(|then| now.duration_since(then) >= ACL_CHECK);
        if !is_filtered && !is_known && !due {
            return Ok(());
        }
        let name = self.interest.name();
        let asked = [
            Access { resource: "service", access: "read", segment: name.as_str() },
            Access { resource: "node", access: "read", segment: "" },
        ];
        let denied = if is_filtered {
            Some("service:read and node:read")
        } else {
            denied(&self.client, &asked).await?
        };
        self.acl_checked = Some(now);
        match denied {
            Some(permission) => {
                let text = format!(
                    "service `{name}`: Consul at {} hides it; the token needs {permission} there, see docs/consul.md",
                    self.client.shown()
                );
                // Asked again with the next empty answer: until then nothing may pass for unregistered.
                self.acl_checked = None;
                Err(Error::new(Kind::Denied, text))
            }
            None => Ok(()),
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.client.watches.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn parse(name: ServiceName, answer: Answer) -> Result<Reading, Error> {
    let panicked = || Error::new(Kind::BadAnswer, "reading the answer ended with a panic, a bug of ours");
    if answer.body.len() < LARGE {
        let read = catch_unwind(AssertUnwindSafe(|| health::read(&name, &answer.body)));
        return read.unwrap_or_else(|_| Err(panicked()));
    }
    let read = spawn_blocking(move || health::read(&name, &answer.body)).await;
    read.unwrap_or_else(|_| Err(panicked()))
}

/// One thing that a token may or may not do.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Access<'a> {
    pub(super) resource: &'a str,
    pub(super) access: &'a str,
    pub(super) segment: &'a str,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Allowed {
    #[serde(default)]
    resource: String,
    #[serde(default)]
    access: String,
    allow: bool,
}

/// The first of these that the token may not do, as `resource:access`. None too where this Consul does not say
/// (no ACLs, or a version without this question).
///
/// # Errors
/// No agent can say it now.
pub(super) async fn denied(client: &Client, asked: &[Access<'_>]) -> Result<Option<&'static str>, Error> {
    let Ok(body) = serde_json::to_vec(asked) else { return Ok(None) };
    let path = "/v1/internal/acl/authorize".to_owned();
    let question = Question { method: Method::POST, ..Question::put(path, body, "") };
    match client.ask(&question).await {
        Ok(answer) => Ok(first_denied(&answer.body)),
        Err(error) if error.kind.is_of_the_agent() => Err(error),
        Err(_) => Ok(None),
    }
}

/// The same, from the answer.
pub(super) fn first_denied(answer: &[u8]) -> Option<&'static str> {
    let allowed: Vec<Allowed> = serde_json::from_slice(answer).ok()?;
    let denied = allowed.into_iter().find(|one| !one.allow)?;
    const NAMED: [(&str, &str, &str); 4] = [
        ("service", "read", "service:read"),
        ("service", "write", "service:write"),
        ("node", "read", "node:read"),
        ("key", "read", "key:read"),
    ];
    let named =
        NAMED.iter().find(|(resource, access, _)| *resource == denied.resource && *access == denied.access);
    Some(named.map_or("more", |named| named.2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::{Registry, consul::fake};

    #[tokio::test(start_paused = true)]
    async fn a_watch_that_keeps_identities_after_a_gap_does_not_end() {
        let registry = Registry::new(tokio::sync::watch::channel(Arc::default()).1).0;
        let interest = registry.interest(&"orders".parse().unwrap()).unwrap();
        interest.touch();
        let (tell, _news) = mpsc::channel(1);
        let mut watch = Watch::new(1, fake::client_of(&[1]), interest, tell, fastrand::Rng::with_seed(1));
        let identities = vec!["spiffe://d/ns/default/sa/orders".parse().unwrap()];
        let stated = Reading { identities, ..Reading::default() };
        watch.known.accept(stated, false, Instant::now());
        assert!(!watch.is_idle());
        tokio::time::advance(IDLE_UNREGISTERED).await;
        watch.known.accept(Reading::default(), true, Instant::now());
        assert!(!watch.is_idle(), "the identity is kept");
        tokio::time::advance(super::super::known::GRACE).await;
        watch.known.expire(Instant::now());
        assert!(watch.is_idle());
    }
}
