//! Metric families with a cap. Labels such as service, route and peer come from outside: past the cap a new set
//! of values is counted under `other`, and in `weft_metrics_overflow_total{metric}`, so that no peer and no
//! registry can grow our memory or a Prometheus without end. Looking a series up takes a lock and allocates:
//! whoever is on the hot path does it once and keeps the handle.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

/// The series of one metric name that a process may have, unless stated otherwise.
pub const SERIES: usize = 1000;
/// A histogram has some fifteen lines per series.
pub const HISTOGRAM_SERIES: usize = 200;
/// What stands for all values past the cap.
pub const OTHER: &str = "other";

/// Labels whose values come from outside; the others have few values, all ours.
const OPEN: [&str; 5] = ["service", "route", "peer", "address", "code"];

type Labels = Vec<(&'static str, String)>;

/// Counters under one name.
#[derive(Debug, Clone)]
pub struct Counters {
    family: Family<Labels, Counter>,
    cap: Cap,
}

/// Gauges under one name.
#[derive(Debug, Clone)]
pub struct Gauges {
    family: Family<Labels, Gauge>,
    cap: Cap,
}

/// Histograms of seconds under one name.
#[derive(Debug, Clone)]
pub struct Durations {
    family: Family<Labels, Histogram, fn() -> Histogram>,
    cap: Cap,
}

/// How many series there may be, their label names, and where the overflow is counted.
#[derive(Debug, Clone)]
pub struct Cap {
    labels: &'static [&'static str],
    series: usize,
    admitted: Arc<AtomicUsize>,
    overflow: Counter,
}

impl Cap {
    /// A cap of this many series; what is above it is counted in `overflow`.
    pub fn new(labels: &'static [&'static str], series: usize, overflow: Counter) -> Cap {
        Cap { labels, series, admitted: Arc::default(), overflow }
    }

    fn labels(&self, values: &[&str]) -> Labels {
        debug_assert_eq!(self.labels.len(), values.len());
        self.labels.iter().zip(values).map(|(name, value)| (*name, (*value).to_owned())).collect()
    }

    /// Lets a new set of values in, or makes it `other`.
    fn admit(&self, labels: &mut Labels) {
        // Two threads may overshoot the cap by one series: harmless.
        if self.admitted.load(Ordering::Relaxed) < self.series {
            self.admitted.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.overflow.inc();
        for (name, value) in labels {
            if OPEN.contains(name) && !value.is_empty() {
                OTHER.clone_into(value);
            }
        }
    }
}

impl Counters {
    /// Registers the name, without its `_total`.
    pub fn register(registry: &mut Registry, name: &str, help: &str, cap: Cap) -> Counters {
        let family = Family::default();
        registry.register(name, help, family.clone());
        Counters { family, cap }
    }

    /// The counter with these label values, in the order of the names.
    pub fn with(&self, values: &[&str]) -> Counter {
        let mut labels = self.cap.labels(values);
        if self.family.get(&labels).is_none() {
            self.cap.admit(&mut labels);
        }
        self.family.get_or_create_owned(&labels)
    }
}

impl Gauges {
    /// Registers the name.
    pub fn register(registry: &mut Registry, name: &str, help: &str, cap: Cap) -> Gauges {
        let family = Family::default();
        registry.register(name, help, family.clone());
        Gauges { family, cap }
    }

    /// The gauge with these label values, in the order of the names.
    pub fn with(&self, values: &[&str]) -> Gauge {
        let mut labels = self.cap.labels(values);
        if self.family.get(&labels).is_none() {
            self.cap.admit(&mut labels);
        }
        self.family.get_or_create_owned(&labels)
    }

    /// Forgets the gauge with these label values.
    pub fn remove(&self, values: &[&str]) {
        if self.family.remove(&self.cap.labels(values)) {
            self.cap.admitted.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Durations {
    /// Registers the name, which ends in `_seconds`.
    pub fn register(registry: &mut Registry, name: &str, help: &str, cap: Cap) -> Durations {
        let family = Family::new_with_constructor(seconds as fn() -> Histogram);
        registry.register(name, help, family.clone());
        Durations { family, cap }
    }

    /// The histogram with these label values, in the order of the names.
    pub fn with(&self, values: &[&str]) -> Histogram {
        let mut labels = self.cap.labels(values);
        if self.family.get(&labels).is_none() {
            self.cap.admit(&mut labels);
        }
        self.family.get_or_create_owned(&labels)
    }
}

/// Half a millisecond to ten seconds: a sidecar's own time shows as well as a slow app's.
fn seconds() -> Histogram {
    Histogram::new([0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn past_the_cap_values_from_outside_become_other() {
        let overflow = Counter::default();
        let cap = Cap::new(&["direction", "service"], 2, overflow.clone());
        let counters = Counters::register(&mut Registry::default(), "requests", "Requests", cap);
        for service in ["a", "b", "c", "d", "a"] {
            counters.with(&["inbound", service]).inc();
        }
        assert_eq!(counters.with(&["inbound", "a"]).get(), 2);
        assert_eq!(counters.with(&["inbound", OTHER]).get(), 2);
        assert_eq!(overflow.get(), 2);
    }
}
