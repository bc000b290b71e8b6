//! The numbers of the authority, in Prometheus' text format. Names begin with `weft_ca_`; times in seconds.

use std::time::SystemTime;

use prometheus_client::{
    encoding::text::encode,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

/// One label and its value; every value is one of ours, never a caller's.
pub type Label = [(&'static str, &'static str); 1];

/// Every number, and the registry that prints them.
pub struct Metrics {
    registry: Registry,
    /// Certificates given, by proof.
    pub issued: Family<Label, Counter>,
    /// Requests refused, by reason.
    pub refused: Family<Label, Counter>,
    /// Time to answer an Issue request.
    pub issue_seconds: Histogram,
    /// Connections now.
    pub connections: Gauge,
    /// Connections that ended before the service saw them, by reason.
    pub dropped: Family<Label, Counter>,
    /// Streams of the trust bundle now.
    pub watchers: Gauge,
    /// Failures of the upkeep, by what it was about.
    pub upkeep_failures: Family<Label, Counter>,
    root_not_after: Gauge,
    issuing_not_after: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics::new(Counter::default())
    }
}

impl Metrics {
    /// All numbers at zero, but for the lines of the log that were lost: the log began before.
    pub fn new(log_lines_dropped: Counter) -> Self {
        let mut metrics = Metrics {
            registry: Registry::with_prefix("weft_ca"),
            issued: Family::default(),
            refused: Family::default(),
            issue_seconds: Histogram::new(exponential_buckets(0.0005, 4.0, 8)),
            connections: Gauge::default(),
            dropped: Family::default(),
            watchers: Gauge::default(),
            upkeep_failures: Family::default(),
            root_not_after: Gauge::default(),
            issuing_not_after: Gauge::default(),
        };
        let Metrics { registry, issued, refused, issue_seconds, connections, dropped, .. } = &mut metrics;
        registry.register("issued", "Certificates given, by proof", issued.clone());
        registry.register("refused", "Requests refused, by reason", refused.clone());
        registry.register("issue_seconds", "Time to answer a request", issue_seconds.clone());
        registry.register("connections", "Connections now", connections.clone());
        registry.register("dropped", "Connections ended before a request, by reason", dropped.clone());
        let help = "Lines of the log that were lost because writing was too slow or failed";
        registry.register("log_lines_dropped", help, log_lines_dropped);
        let Metrics { registry, watchers, upkeep_failures, root_not_after, issuing_not_after, .. } =
            &mut metrics;
        registry.register("watchers", "Streams of the trust bundle now", watchers.clone());
        registry.register("upkeep_failures", "Failures of the upkeep, by subject", upkeep_failures.clone());
        registry.register(
            "root_not_after_seconds",
            "When the root ends, in seconds since 1970",
            root_not_after.clone(),
        );
        registry.register(
            "issuing_not_after_seconds",
            "When the issuing certificate ends, in seconds since 1970",
            issuing_not_after.clone(),
        );
        metrics
    }

    /// Notes when the signing certificates end.
    pub fn set_ends(&self, root: SystemTime, issuing: SystemTime) {
        for (gauge, end) in [(&self.root_not_after, root), (&self.issuing_not_after, issuing)] {
            let seconds = end.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
            gauge.set(i64::try_from(seconds).unwrap_or(i64::MAX));
        }
    }

    /// All numbers as text (OpenMetrics 1.0).
    pub fn render(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}
