//! The injector's numbers.

use std::time::SystemTime;

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

    /// In the text format of OpenMetrics.
    pub fn text(&self) -> String {
        let mut text = String::new();
        match encode(&mut text, &self.registry) {
            Ok(()) => text,
            Err(error) => format!("# {error}\n"),
        }
    }
}
