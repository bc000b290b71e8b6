//! Which endpoint takes the next attempt: two candidates at random, the less loaded of them (P2C over peak-EWMA
//! latency and requests in flight, after Finagle and Tower), and a breaker for each endpoint. An update of the
//! set keeps what is known of those that stay. One short lock, never held across an await; dialling and sending
//! are done elsewhere.

mod breaker;
mod endpoints;
mod load;

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

pub use self::breaker::Condition;
use self::endpoints::{Endpoints, Newer, Ticket};
use crate::model::{Breaker, Endpoint, Service};

/// The endpoints of one service. Shared by all workers.
#[derive(Debug)]
pub struct Balancer {
    endpoints: Arc<Mutex<Endpoints>>,
}

/// An endpoint chosen for one attempt, which counts as in flight until this is dropped. The latency is taken when the
/// head of the answer comes; success or failure is known when the answer has ended. Dropped before (the client went
/// away, or its time was over) the attempt is neither; dropped before the head, it counts as slow.
#[derive(Debug)]
pub struct Picked {
    endpoints: Arc<Mutex<Endpoints>>,
    ticket: Ticket,
    stage: Stage,
}

/// How far an attempt has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Nothing has come.
    Sent,
    /// The head of an answer that was no failure so far.
    Answered,
    /// It is known to be a success or a failure, and may still go on.
    Judged,
    /// It is no longer in flight.
    Ended,
}

/// An endpoint was put out by its breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ejection {
    /// Which one.
    pub address: SocketAddr,
    /// For how long.
    pub lasts: Duration,
    /// Its how manieth in a row.
    pub count: u32,
}

/// What is known of an endpoint at a moment.
#[derive(Debug, Clone, PartialEq)]
pub struct EndpointState {
    /// The endpoint as discovery knows it.
    pub endpoint: Endpoint,
    /// What its breaker says.
    pub condition: Condition,
    /// Failures in a row.
    pub failures: u32,
    /// Seconds of latency, decayed, times the attempts in flight plus one; 0 before the first answer.
    pub load: f64,
    /// Attempts in flight.
    pub in_flight: u32,
}

impl Balancer {
    /// Without endpoints yet. The same seed and the same calls give the same choices.
    pub fn new(policy: Breaker, seed: u64) -> Self {
        Balancer { endpoints: Arc::new(Mutex::new(Endpoints::new(policy, seed))) }
    }

    /// Takes the endpoints that the service has now; those known by their address keep load, breaker and attempts
    /// in flight. However many there are, the lock is held only while numbers are copied.
    pub fn update(&self, service: Arc<Service>) {
        let mut newer = Newer::new(service);
        lock(&self.endpoints).update(&mut newer);
    }

    /// Takes a newer policy; who is out stays out for the time once set.
    pub fn set_policy(&self, policy: Breaker) {
        lock(&self.endpoints).set_policy(policy);
    }

    /// Chooses an endpoint, if there is any. Those in `avoid` (already tried) are chosen only where no other is
    /// usable, and those that are out only where all others were tried: an answer is better than none.
    pub fn pick(&self, avoid: &[SocketAddr], now: Instant) -> Option<Picked> {
        let ticket = lock(&self.endpoints).pick(avoid, now)?;
        Some(self.picked(ticket))
    }

    fn picked(&self, ticket: Ticket) -> Picked {
        Picked { endpoints: Arc::clone(&self.endpoints), ticket, stage: Stage::Sent }
    }

    /// Counts an attempt at this endpoint and no other, where the app dialled it by its own address. None where
    /// it is not in the set.
    pub fn pick_only(&self, address: SocketAddr, now: Instant) -> Option<Picked> {
        let ticket = lock(&self.endpoints).pick_only(address, now)?;
        Some(self.picked(ticket))
    }

    /// What is known of every endpoint, sorted by address.
    pub fn states(&self, now: Instant) -> Vec<EndpointState> {
        let look = lock(&self.endpoints).look();
        look.states(now).collect()
    }

    /// What the breakers say, sorted by the addresses of their endpoints.
    pub fn conditions(&self, now: Instant) -> Vec<Condition> {
        lock(&self.endpoints).conditions(now)
    }
}

impl Picked {
    /// Where to go.
    pub fn address(&self) -> SocketAddr {
        self.ticket.address
    }

    /// The head of the answer came, and is no failure of the endpoint: this is its latency. What follows the head may
    /// still fail.
    pub fn answered(&mut self, now: Instant) {
        if self.stage == Stage::Sent {
            self.stage = Stage::Answered;
            lock(&self.endpoints).answered(self.ticket, now);
        }
    }

    /// The endpoint did what was asked of it, though the attempt goes on (bytes on an open connection): it stays in
    /// flight until this is dropped. Does nothing where the attempt was judged before.
    pub fn succeeded(&mut self, now: Instant) {
        self.answered(now);
        if self.stage == Stage::Answered {
            self.stage = Stage::Judged;
            lock(&self.endpoints).succeeded(self.ticket, now);
        }
    }

    /// The answer has ended, and all of it was no failure of the endpoint; does not undo one that was told before.
    pub fn completed(mut self, now: Instant) {
        if self.stage == Stage::Answered {
            self.stage = Stage::Ended;
            lock(&self.endpoints).completed(self.ticket, now);
        }
    }

    /// The endpoint failed, perhaps in the middle of its answer. Says whether that put it out. Does nothing where the
    /// attempt was judged before.
    pub fn failed(&mut self, now: Instant) -> Option<Ejection> {
        let has_answered = match self.stage {
            Stage::Sent => false,
            Stage::Answered => true,
            Stage::Judged | Stage::Ended => return None,
        };
        self.stage = Stage::Judged;
        lock(&self.endpoints).failed(self.ticket, has_answered, now)
    }
}

impl Drop for Picked {
    fn drop(&mut self) {
        let given_up = match self.stage {
            Stage::Sent => Some(Instant::now()),
            Stage::Answered | Stage::Judged => None,
            Stage::Ended => return,
        };
        lock(&self.endpoints).done(self.ticket, given_up);
    }
}

/// A panic elsewhere while the lock was held leaves numbers, which are never inconsistent enough to stop for.
fn lock(endpoints: &Mutex<Endpoints>) -> MutexGuard<'_, Endpoints> {
    endpoints.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
