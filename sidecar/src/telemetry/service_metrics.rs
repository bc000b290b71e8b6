//! The numbers of one service and route, resolved ahead of time: what the hot path counts through. Counting takes
//! a short lock and, once a combination of peer, protocol, code and failure was seen, allocates nothing.

use std::{
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use prometheus_client::{
    metrics::{counter::Counter, histogram::Histogram},
    registry::Registry,
};
use weft_proto::spiffe::SpiffeId;

use super::{
    families::{Cap, Counters, Durations, HISTOGRAM_SERIES, SERIES},
    metrics::Direction,
};
use crate::model::{Failure, Protocol};

/// The families from which the handles of a service are made.
#[derive(Debug, Clone)]
pub(super) struct PerService {
    requests: Counters,
    durations: Durations,
    request_bytes: Counters,
    response_bytes: Counters,
    attempts: Counters,
    retries_refused: Counters,
    tcp_bytes: Counters,
}

/// The handles of one service and route in one direction. Kept by whoever routes; counting through it takes a
/// short lock and, after the first time, allocates nothing.
#[derive(Debug)]
pub struct ServiceMetrics {
    direction: Direction,
    service: Arc<str>,
    route: Arc<str>,
    duration: Histogram,
    request_bytes: Counter,
    response_bytes: Counter,
    first_attempts: Counter,
    families: PerService,
    requests: RwLock<Vec<(RequestKey, Counter)>>,
}

/// The labels of a finished request beside those of its service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestKey {
    /// The proven identity of the other side.
    pub peer: Option<SpiffeId>,
    /// What was spoken on our side of the request.
    pub protocol: Protocol,
    /// The status that the caller saw.
    pub code: u16,
    /// Why the mesh could not carry it.
    pub failure: Option<Failure>,
}

/// Label sets that a service's handles remember; rarer ones are looked up in the family each time.
const REMEMBERED: usize = 64;
impl PerService {
    /// Registers the families; `cap` makes the cap of a name with its labels.
    pub fn register(
        registry: &mut Registry,
        cap: impl Fn(&str, &'static [&'static str], usize) -> Cap,
    ) -> PerService {
        let per_route = &["direction", "service", "route"];
        let name = "request_duration_seconds";
        let help = "From the head of a request to the end of its answer";
        let durations = Durations::register(registry, name, help, cap(name, per_route, HISTOGRAM_SERIES));
        let mut counters = |name: &str, help: &str, labels| {
            Counters::register(registry, name, help, cap(name, labels, SERIES))
        };
        PerService {
            durations,
            requests: counters(
                "requests",
                "Finished requests",
                &["direction", "service", "route", "peer", "protocol", "code", "failure"],
            ),
            request_bytes: counters("request_bytes", "Body bytes of requests", per_route),
            response_bytes: counters("response_bytes", "Body bytes of responses", per_route),
            attempts: counters(
                "attempts",
                "Attempts of requests",
                &["direction", "service", "outcome", "reason"],
            ),
            retries_refused: counters(
                "retries_refused",
                "Retries that were not made",
                &["service", "reason"],
            ),
            tcp_bytes: counters(
                "tcp_bytes",
                "Bytes of opaque connections, as seen by the side that opened them",
                &["direction", "service", "flow"],
            ),
        }
    }
}

impl ServiceMetrics {
    pub(super) fn new(
        families: &PerService,
        direction: Direction,
        service: &str,
        route: &str,
    ) -> Arc<ServiceMetrics> {
        let labels = [direction.label(), service, route];
        Arc::new(ServiceMetrics {
            direction,
            service: service.into(),
            route: route.into(),
            duration: families.durations.with(&labels),
            request_bytes: families.request_bytes.with(&labels),
            response_bytes: families.response_bytes.with(&labels),
            first_attempts: families.attempts.with(&[direction.label(), service, "first", ""]),
            families: families.clone(),
            requests: RwLock::default(),
        })
    }

    /// Which way.
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// The name of the service.
    pub fn service(&self) -> &Arc<str> {
        &self.service
    }

    /// The name of the route; empty where no policy names one.
    pub fn route(&self) -> &Arc<str> {
        &self.route
    }

    /// Counts an attempt: the first without a reason, a retry with the label of what went wrong before.
    pub fn attempt(&self, retry: Option<&str>) {
        match retry {
            None => self.first_attempts.inc(),
            Some(reason) => {
                let labels = [self.direction.label(), &self.service, "retry", reason];
                self.families.attempts.with(&labels).inc()
            }
        };
    }

    /// A retry was wanted and not made (`budget`, `attempts`, `method`, `body`, `deadline`, ...).
    pub fn retry_refused(&self, reason: &'static str) {
        self.families.retries_refused.with(&[&self.service, reason]).inc();
    }

    /// The counters of bytes of opaque connections: from whoever opened them (`sent`), and back (`received`).
    pub(super) fn tcp_bytes(&self) -> [Counter; 2] {
        let counter = |flow| self.families.tcp_bytes.with(&[self.direction.label(), &self.service, flow]);
        [counter("sent"), counter("received")]
    }

    /// A request ended.
    pub(super) fn finished(&self, key: RequestKey, took: Duration, request_bytes: u64, response_bytes: u64) {
        self.duration.observe(took.as_secs_f64());
        self.request_bytes.inc_by(request_bytes);
        self.response_bytes.inc_by(response_bytes);
        let remembered = self.requests.read().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, counter)) = remembered.iter().find(|(known, _)| *known == key) {
            counter.inc();
            return;
        }
        drop(remembered);
        let counter = self.counter(&key);
        counter.inc();
        let mut remembered = self.requests.write().unwrap_or_else(PoisonError::into_inner);
        if remembered.len() < REMEMBERED {
            remembered.push((key, counter));
        }
    }

    fn counter(&self, key: &RequestKey) -> Counter {
        self.families.requests.with(&[
            self.direction.label(),
            &self.service,
            &self.route,
            key.peer.as_ref().map_or("", SpiffeId::as_str),
            key.protocol.label(),
            &key.code.to_string(),
            key.failure.map_or("", Failure::label),
        ])
    }
}
