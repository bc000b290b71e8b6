//! The set of endpoints behind the lock of a balancer: who is there, what is known of each, and the choice. All
//! of it is plain computation with time as an argument and a seeded source of randomness. Words about an endpoint
//! stay in the service that discovery published, so that an update moves numbers and copies nothing else.

use std::{cmp::Ordering, mem, net::SocketAddr, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{Condition, Ejection, EndpointState, breaker::State, load::Load};
use crate::model::{Breaker, Endpoint, Service};

/// How often a candidate is drawn blindly before the suitable ones are counted.
const DRAWS: usize = 8;
/// An endpoint that never answered gets one request at first; each further one in flight weighs like so many
/// seconds of latency.
const UNKNOWN_LATENCY: f64 = 1.0;
/// Who gives up sooner says nothing about the endpoint.
const WAITED: Duration = Duration::from_millis(10);
/// Endpoints of different weight share by weight while their loads differ by less than this factor.
const WEIGHTED_TOLERANCE: f64 = 2.0;

#[derive(Debug)]
pub(super) struct Endpoints {
    policy: Breaker,
    random: fastrand::Rng,
    /// Whose endpoints they are; none before the first update.
    service: Option<Arc<Service>>,
    /// One for each endpoint of the service, sorted by address.
    entries: Vec<Entry>,
    /// Sums of the weights up to and with each entry: for drawing by weight.
    sums: Vec<u64>,
    next_serial: u64,
}

/// What is known of an endpoint beside its words: plain numbers.
#[derive(Debug, Clone, Copy)]
struct Entry {
    address: SocketAddr,
    weight: u16,
    serial: u64,
    load: Load,
    breaker: State,
    in_flight: u32,
}

/// A newer set, made ready before the lock is taken. With what it replaced, it is dropped after the lock.
pub(super) struct Newer {
    service: Option<Arc<Service>>,
    entries: Vec<Entry>,
    sums: Vec<u64>,
}

impl Newer {
    /// Discovery gives endpoints sorted by address and each once; others are made so here.
    pub(super) fn new(mut service: Arc<Service>) -> Self {
        if !service.endpoints.is_sorted_by(|one, next| one.address < next.address) {
            let mut sorted = (*service).clone();
            sorted.endpoints.sort_by_key(|endpoint| endpoint.address);
            sorted.endpoints.dedup_by_key(|endpoint| endpoint.address);
            service = Arc::new(sorted);
        }
        let mut sum = 0;
        let sums = service.endpoints.iter().map(|endpoint| {
            sum += u64::from(endpoint.weight);
            sum
        });
        let (sums, entries) = (sums.collect(), service.endpoints.iter().map(Entry::new).collect());
        Newer { service: Some(service), entries, sums }
    }
}

/// One attempt at one endpoint.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ticket {
    pub(super) address: SocketAddr,
    /// Tells the endpoint from a later one of the same address.
    serial: u64,
    started: Instant,
    is_probe: bool,
}

impl Ticket {
    fn latency(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.started)
    }
}

/// Whom a choice may fall on; tried in the order of [`Endpoints::pick`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Suitable {
    /// Closed and not tried yet.
    Closed,
    /// Closed or to be probed, and not tried yet.
    Usable,
    /// Closed or to be probed, though tried already.
    UsableAgain,
    /// Not tried yet, though out.
    Untried,
    Any,
}

impl Endpoints {
    pub(super) fn new(policy: Breaker, seed: u64) -> Self {
        Endpoints {
            policy,
            random: fastrand::Rng::with_seed(seed),
            service: None,
            entries: Vec::new(),
            sums: Vec::new(),
            next_serial: 1,
        }
    }

    pub(super) fn set_policy(&mut self, policy: Breaker) {
        self.policy = policy;
    }

    /// Takes the newer set, and leaves the older one in its place.
    pub(super) fn update(&mut self, newer: &mut Newer) {
        let mut known = self.entries.iter().peekable();
        for entry in &mut newer.entries {
            while known.next_if(|known| known.address < entry.address).is_some() {}
            match known.next_if(|known| known.address == entry.address) {
                Some(known) => *entry = Entry { weight: entry.weight, ..*known },
                None => {
                    entry.serial = self.next_serial;
                    self.next_serial += 1;
                }
            }
        }
        mem::swap(&mut self.service, &mut newer.service);
        mem::swap(&mut self.entries, &mut newer.entries);
        mem::swap(&mut self.sums, &mut newer.sums);
    }

    pub(super) fn pick(&mut self, avoid: &[SocketAddr], now: Instant) -> Option<Ticket> {
        // A retry is not the time for a probe, if it can be helped.
        let first = if avoid.is_empty() { Suitable::Usable } else { Suitable::Closed };
        let order = [first, Suitable::Usable, Suitable::UsableAgain, Suitable::Untried, Suitable::Any];
        let chosen = order.into_iter().find_map(|suitable| self.choose(suitable, avoid, now))?;
        Some(self.entries[chosen].send(now))
    }

    pub(super) fn pick_only(&mut self, address: SocketAddr, now: Instant) -> Option<Ticket> {
        let at = self.entries.binary_search_by_key(&address, |entry| entry.address).ok()?;
        Some(self.entries[at].send(now))
    }

    pub(super) fn answered(&mut self, ticket: Ticket, now: Instant) {
        if let Some(entry) = self.entry(ticket) {
            entry.load.observe(ticket.latency(now), now);
            if ticket.is_probe {
                entry.breaker.probe_answered(ticket.started);
            }
        }
    }

    pub(super) fn succeeded(&mut self, ticket: Ticket, now: Instant) {
        if let Some(entry) = self.entry(ticket) {
            entry.breaker.succeeded(ticket.started, now);
        }
    }

    /// Succeeded, and over.
    pub(super) fn completed(&mut self, ticket: Ticket, now: Instant) {
        if let Some(entry) = self.entry(ticket) {
            entry.breaker.succeeded(ticket.started, now);
            entry.over(ticket);
        }
    }

    /// `has_answered`: its latency is known from the head; how long a body went on is none.
    pub(super) fn failed(&mut self, ticket: Ticket, has_answered: bool, now: Instant) -> Option<Ejection> {
        let may_eject = self.can_spare_one_more();
        let policy = self.policy.clone();
        let mut random = self.random.fork();
        let entry = self.entry(ticket)?;
        if !has_answered {
            entry.load.observe_at_least(ticket.latency(now), now);
        }
        let (lasts, count) = entry.breaker.failed(&policy, may_eject, &mut random, ticket.started, now)?;
        Some(Ejection { address: ticket.address, lasts, count })
    }

    /// `given_up`: when it was, where no head of an answer came. An endpoint that answers nobody would look idle otherwise, and
    /// be chosen again and again.
    pub(super) fn done(&mut self, ticket: Ticket, given_up: Option<Instant>) {
        if let Some(entry) = self.entry(ticket) {
            let waited = given_up.map(|now| (ticket.latency(now), now));
            if let Some((waited, now)) = waited.filter(|(waited, _)| *waited >= WAITED) {
                entry.load.observe_at_least(waited, now);
            }
            entry.over(ticket);
        }
    }

    pub(super) fn conditions(&self, now: Instant) -> Vec<Condition> {
        self.entries.iter().map(|entry| entry.breaker.condition(now)).collect()
    }

    /// A copy to look at without the lock.
    pub(super) fn look(&self) -> Look {
        Look { service: self.service.clone(), entries: self.entries.clone() }
    }

    fn entry(&mut self, ticket: Ticket) -> Option<&mut Entry> {
        let at = self.entries.binary_search_by_key(&ticket.address, |entry| entry.address).ok()?;
        Some(&mut self.entries[at]).filter(|entry| entry.serial == ticket.serial)
    }

    /// One may always be out, but never the last; otherwise as many as the policy allows.
    fn can_spare_one_more(&self) -> bool {
        let all = self.entries.len();
        let out = self.entries.iter().filter(|entry| entry.breaker.is_out()).count();
        let allowed = (all * usize::from(self.policy.max_ejected_percent) / 100).max(1);
        out < allowed && out + 1 < all
    }

    /// Draws two candidates and takes the better one; one, where there is no other.
    fn choose(&mut self, suitable: Suitable, avoid: &[SocketAddr], now: Instant) -> Option<usize> {
        let first = self.draw(suitable, avoid, None, now)?;
        let Some(second) = self.draw(suitable, avoid, Some(first), now) else { return Some(first) };
        let (one, other) = (&self.entries[first], &self.entries[second]);
        // Who is to be probed is taken: otherwise the memory of its slowness could keep it out for long.
        if other.breaker.condition(now) == Condition::HalfOpen {
            return Some(second);
        }
        let half_open = one.breaker.condition(now) == Condition::HalfOpen;
        let average = self.sums.last().copied().unwrap_or(1) as f64 / self.entries.len() as f64;
        let tolerance = match one.weight.cmp(&other.weight) {
            Ordering::Equal => 1.0,
            _ => WEIGHTED_TOLERANCE,
        };
        let better = one.score(average, now) > other.score(average, now) * tolerance;
        Some(if better && !half_open { second } else { first })
    }

    /// Draws by weight among those that suit, `except` one.
    fn draw(
        &mut self,
        suitable: Suitable,
        avoid: &[SocketAddr],
        except: Option<usize>,
        now: Instant,
    ) -> Option<usize> {
        let total = *self.sums.last()?;
        for _ in 0..DRAWS {
            let ticket = self.random.u64(..total.max(1));
            let at = self.sums.partition_point(|sum| *sum <= ticket);
            if Some(at) != except
                && self.entries.get(at).is_some_and(|entry| entry.suits(suitable, avoid, now))
            {
                return Some(at);
            }
        }
        let suits = |at: &usize| Some(*at) != except && self.entries[*at].suits(suitable, avoid, now);
        let weight = |at: &usize| u64::from(self.entries[*at].weight.max(1));
        let total: u64 = (0..self.entries.len()).filter(suits).map(|at| weight(&at)).sum();
        if total == 0 {
            return None;
        }
        let mut ticket = self.random.u64(..total);
        (0..self.entries.len()).filter(suits).find(|at| {
            let found = ticket < weight(at);
            ticket = ticket.saturating_sub(weight(at));
            found
        })
    }
}

/// The endpoints at a moment.
pub(super) struct Look {
    service: Option<Arc<Service>>,
    entries: Vec<Entry>,
}

impl Look {
    pub(super) fn states(&self, now: Instant) -> impl Iterator<Item = EndpointState> {
        let endpoints = self.service.iter().flat_map(|service| &service.endpoints);
        endpoints.zip(&self.entries).map(move |(endpoint, entry)| EndpointState {
            endpoint: endpoint.clone(),
            condition: entry.breaker.condition(now),
            failures: entry.breaker.failures(),
            load: entry.load.seconds(now).unwrap_or(0.0) * f64::from(entry.in_flight + 1),
            in_flight: entry.in_flight,
        })
    }
}

impl Entry {
    fn new(endpoint: &Endpoint) -> Self {
        Entry {
            address: endpoint.address,
            weight: endpoint.weight,
            serial: 0,
            load: Load::default(),
            breaker: State::default(),
            in_flight: 0,
        }
    }

    fn send(&mut self, now: Instant) -> Ticket {
        self.in_flight += 1;
        let is_probe = self.breaker.chosen(now);
        Ticket { address: self.address, serial: self.serial, started: now, is_probe }
    }

    fn over(&mut self, ticket: Ticket) {
        self.in_flight = self.in_flight.saturating_sub(1);
        if ticket.is_probe {
            self.breaker.probe_ended(ticket.started);
        }
    }

    fn suits(&self, suitable: Suitable, avoid: &[SocketAddr], now: Instant) -> bool {
        let untried = !avoid.contains(&self.address);
        match suitable {
            Suitable::Closed => untried && self.breaker.condition(now) == Condition::Closed,
            Suitable::Usable => untried && self.breaker.is_usable(now),
            Suitable::UsableAgain => self.breaker.is_usable(now),
            Suitable::Untried => untried,
            Suitable::Any => true,
        }
    }

    /// What one more request would meet: latency times the queue, the queue measured by what is its share.
    fn score(&self, average_weight: f64, now: Instant) -> f64 {
        let queue = f64::from(self.in_flight) * average_weight / f64::from(self.weight.max(1));
        match self.load.seconds(now) {
            Some(seconds) => seconds * (1.0 + queue),
            None => UNKNOWN_LATENCY * queue,
        }
    }
}
