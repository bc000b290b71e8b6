//! The injector's numbers.

use std::{sync::atomic::AtomicU64, time::SystemTime};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

/// The labels of a review.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

/// The labels of a write into the registry.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Operation {
    operation: &'static str,
    result: &'static str,
}

/// All metrics of the injector.
pub struct Metrics {
    registry: Registry,
    reviews: Family<Outcome, Counter>,
    /// Serving certificates that the authority gave.
    pub certificates: Counter,
    /// Attempts to get one that failed.
    pub certificate_failures: Counter,
    /// Attempts to write the CA bundle of the webhook that failed.
    pub ca_bundle_failures: Counter,
    certificate_not_after: Gauge,
    controller: ControllerMetrics,
}

/// Those of the controller.
#[derive(Default)]
struct ControllerMetrics {
    operations: Family<Operation, Counter>,
    instances: Gauge,
    last_sync: Gauge<f64, AtomicU64>,
    leader: Gauge,
}

impl ControllerMetrics {
    fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("controller");
        registry.register("operations", "Writes into the registry by result", self.operations.clone());
        let help = "Instances that the registry should hold";
        registry.register("instances", help, self.instances.clone());
        let help = "When the registry last held what it should, in seconds since 1970";
        registry.register("last_sync_seconds", help, self.last_sync.clone());
        registry.register("leader", "1 where this replica writes into the registry", self.leader.clone());
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let mut metrics = Metrics {
            registry: Registry::with_prefix("weft_injector"),
            reviews: Family::default(),
            certificates: Counter::default(),
            certificate_failures: Counter::default(),
            ca_bundle_failures: Counter::default(),
            certificate_not_after: Gauge::default(),
            controller: ControllerMetrics::default(),
        };
        let Metrics { registry, reviews, certificates, .. } = &mut metrics;
        registry.register("reviews", "Admission reviews by what became of the pod", reviews.clone());
        let help = "Serving certificates that the authority gave";
        registry.register("certificates", help, certificates.clone());
        let Metrics { registry, certificate_failures, ca_bundle_failures, certificate_not_after, .. } =
            &mut metrics;
        let help = "Attempts to get a serving certificate that failed";
        registry.register("certificate_failures", help, certificate_failures.clone());
        let help = "Attempts to write the CA bundle of the webhook that failed";
        registry.register("ca_bundle_failures", help, ca_bundle_failures.clone());
        let help = "When the serving certificate of the authority ends, in seconds since 1970; 0 without one";
        registry.register("certificate_not_after_seconds", help, certificate_not_after.clone());
        metrics.controller.register(&mut metrics.registry);
        metrics
    }
}

impl Metrics {
    /// Counts one review.
    pub fn reviewed(&self, outcome: &'static str) {
        self.reviews.get_or_create(&Outcome { outcome }).inc();
    }

    /// Counts a certificate, and notes when it ends.
    pub fn obtained(&self, not_after: SystemTime) {
        let seconds = not_after.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        self.certificates.inc();
        self.certificate_not_after.set(i64::try_from(seconds).unwrap_or(i64::MAX));
    }

    /// Counts one write into the registry.
    pub fn wrote(&self, operation: &'static str, is_done: bool) {
        let result = if is_done { "ok" } else { "failed" };
        self.controller.operations.get_or_create(&Operation { operation, result }).inc();
    }

    /// The registry holds what it should: so many instances.
    pub fn synced(&self, instances: usize) {
        self.controller.instances.set(i64::try_from(instances).unwrap_or(i64::MAX));
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.controller.last_sync.set(now.as_secs_f64());
    }

    /// Does this replica write?
    pub fn leads(&self, leads: bool) {
        self.controller.leader.set(i64::from(leads));
    }

    /// In the text format of OpenMetrics.
    pub fn text(&self) -> String {
        let mut text = String::new();
        match encode(&mut text, &self.registry) {
            Ok(()) => text,
            Err(error) => format!("# {error}\n"),
        }
    }
}
