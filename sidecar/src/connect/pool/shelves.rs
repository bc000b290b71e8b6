//! Where a pool keeps its connections: a shelf for each key. An app may dial thousands of endpoints, and what is done
//! with all their shelves is done in parts, so that no call waits for it as a whole: a table that grows is one of many,
//! and a sweep lets others run between its steps.

use std::{
    collections::HashMap,
    hash::BuildHasherDefault,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use fnv::FnvHasher;
use tokio::{sync::watch, task::yield_now, time::Instant};

use super::{
    Key,
    lease::{Http1, Http2},
};
use crate::{connect::idle::idle_limit, model::Result};

/// Of 10,000 endpoints some 160 are in each part: 30 KB to move when it grows, instead of 2 MB.
const PARTS: usize = 64;
/// Connections closed in one step: what it takes to close one, some 50 us, is taken right after it.
const CLOSED_IN_A_STEP: usize = 8;
/// Connections closed at once for want of descriptors: a call or a client is waiting.
const CLOSED_IN_NEED: usize = 256;
/// A connection that is idle for less may just have been dialled for a call that has not taken it yet.
const JUST_USED: Duration = Duration::from_millis(100);

pub(super) struct Shelves([Mutex<Part>; PARTS]);

/// Asked at every request. Of a key a stranger chooses the port at most, which cannot make many of one hash.
pub(super) type Part = HashMap<Key, Shelf, BuildHasherDefault<FnvHasher>>;

/// The connections of one key.
#[derive(Default)]
pub(super) struct Shelf {
    pub(super) http2: Vec<Arc<Http2>>,
    /// A dial is under way; whoever waits for it hears how it ended.
    pub(super) dialing: Option<watch::Receiver<Option<Result<()>>>>,
    pub(super) http1: Vec<Idle>,
}

/// An HTTP/1 connection that no call uses.
pub(super) struct Idle {
    pub(super) connection: Http1,
    pub(super) since: Instant,
}

impl Shelves {
    pub(super) fn new() -> Self {
        Shelves(std::array::from_fn(|_| Mutex::default()))
    }

    /// The part that has the shelf of this key, or would.
    pub(super) fn part(&self, key: &Key) -> MutexGuard<'_, Part> {
        let last = match key.address.ip() {
            IpAddr::V4(address) => address.octets()[3],
            IpAddr::V6(address) => address.octets()[15],
        };
        let [_, port] = key.address.port().to_be_bytes();
        lock(&self.0[usize::from(last ^ port) % PARTS])
    }

    /// Closes connections that were idle for too long, step by step.
    pub(super) async fn sweep(&self, now: Instant) {
        let mut ages = Vec::new();
        for part in self.in_use() {
            ages.extend(lock(part).values().flat_map(|shelf| shelf.idle_for(now)));
            yield_now().await;
        }
        let limit = idle_limit(&mut ages);
        for part in self.in_use() {
            while close_idle(&mut lock(part), limit, now, CLOSED_IN_A_STEP) == CLOSED_IN_A_STEP {
                yield_now().await;
            }
            yield_now().await;
        }
    }

    /// Closes some of the connections that nobody uses, but none that was used this very moment.
    pub(super) fn make_room(&self, now: Instant) {
        let mut most = CLOSED_IN_NEED;
        for part in self.in_use() {
            most -= close_idle(&mut lock(part), JUST_USED, now, most);
        }
    }

    fn in_use(&self) -> impl Iterator<Item = &Mutex<Part>> {
        self.0.iter().filter(|part| !lock(part).is_empty())
    }

    #[cfg(test)]
    pub(super) fn all(&self) -> impl Iterator<Item = MutexGuard<'_, Part>> {
        self.0.iter().map(lock)
    }
}

fn lock(part: &Mutex<Part>) -> MutexGuard<'_, Part> {
    part.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Closes at most so many that were idle for `limit`, and says how many; takes away shelves that are empty.
fn close_idle(part: &mut Part, limit: Duration, now: Instant, most: usize) -> usize {
    let mut closed = 0;
    part.retain(|_, shelf| {
        closed += shelf.close_idle(limit, now, most - closed);
        !shelf.is_empty()
    });
    if part.len() < part.capacity() / 4 {
        part.shrink_to_fit();
    }
    closed
}

impl Shelf {
    fn is_empty(&self) -> bool {
        self.http2.is_empty() && self.http1.is_empty() && self.dial().is_none()
    }

    /// The dial that is under way. One whose task has ended without saying how (a panic) is none.
    pub(super) fn dial(&self) -> Option<&watch::Receiver<Option<Result<()>>>> {
        self.dialing.as_ref().filter(|dialing| dialing.has_changed().is_ok())
    }

    fn idle_for(&self, now: Instant) -> impl Iterator<Item = Duration> {
        let http1 = self.http1.iter().map(move |idle| now.duration_since(idle.since));
        self.http2.iter().filter_map(move |connection| connection.idle_for(now)).chain(http1)
    }

    fn close_idle(&mut self, limit: Duration, now: Instant, most: usize) -> usize {
        let is_over = |idle_for: Option<Duration>| idle_for.is_some_and(|age| age >= limit);
        let http2 = |it: &mut Arc<Http2>| !it.is_usable() || is_over(it.idle_for(now));
        let closed = self.http2.extract_if(.., http2).take(most).count();
        let http1 = |it: &mut Idle| !it.connection.is_usable() || is_over(Some(now.duration_since(it.since)));
        closed + self.http1.extract_if(.., http1).take(most - closed).count()
    }
}
