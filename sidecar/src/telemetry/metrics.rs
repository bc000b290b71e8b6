//! The numbers: one struct for all metrics of the sidecar, prefix `weft_`, in seconds and bytes.
//! `docs/observability.md` lists them. A path, a query or a header never becomes a label, and each name has a
//! cap (`families`). What the hot path counts is resolved ahead of time into
//! [`ServiceMetrics`].

use std::{
    net::IpAddr,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    encoding::text::encode,
    metrics::{counter::Counter, gauge::Gauge},
    registry::Registry,
};

use super::{
    exposition,
    families::{Cap, Counters, Gauges, SERIES},
    process::Process,
    service_metrics::{PerService, ServiceMetrics},
};
use crate::model::{Failure, Protocol};

/// Which way a connection or request crosses the sidecar.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// To the app.
    Inbound,
    /// From the app.
    Outbound,
}

/// What protects a connection between the sidecar and its peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Security {
    /// Mutual TLS of the mesh.
    MutualTls,
    /// Nothing.
    Plaintext,
    /// The app's own TLS, passed through.
    TlsPassthrough,
    /// It leads nowhere: it would be plaintext, which is forbidden.
    Forbidden,
}

/// All metrics of the sidecar.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    per_service: PerService,
    connections: Counters,
    connections_active: Gauges,
    connection_failures: Counters,
    endpoints: Gauges,
    ejections: Counters,
    pool_connections: Gauges,
    detected: Counters,
    plaintext_callers: Counters,
    dns_queries: Counters,
    certificate_expiry: Gauge,
    identity_renewals: Counters,
    config_reloads: Counters,
    registry_requests: Counters,
    registry_unreadable: Gauge,
    registration_overwritten: Counter,
    spans_exported: Counter,
    spans_dropped: Counters,
    log_lines_dropped: Counters,
    app_sockets_lost: Counter,
}

/// One open connection; counts it as gone when dropped.
#[derive(Debug)]
pub struct OpenConnection {
    active: Gauge,
}

/// Plaintext callers are counted by address, up to this many.
const PLAINTEXT_CALLERS: usize = 100;

impl Direction {
    /// The label value.
    pub fn label(self) -> &'static str {
        match self {
            Direction::Inbound => "inbound",
            Direction::Outbound => "outbound",
        }
    }
}

impl Security {
    /// The label value.
    pub fn label(self) -> &'static str {
        match self {
            Security::MutualTls => "mtls",
            Security::Plaintext => "plaintext",
            Security::TlsPassthrough => "tls_passthrough",
            Security::Forbidden => "forbidden",
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics::new()
    }
}

impl Metrics {
    /// All metrics at zero. Made once per process.
    pub fn new() -> Metrics {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Process::starting()));
        let weft = registry.sub_registry_with_prefix("weft");
        let overflow_cap = Cap::new(&["metric"], SERIES, Counter::default());
        let help = "Lookups of a series past the cap of its metric, counted there as `other`";
        let overflow = Counters::register(weft, "metrics_overflow", help, overflow_cap);
        let cap = |name: &str, labels, series| Cap::new(labels, series, overflow.with(&[name]));
        let per_service = PerService::register(weft, cap);
        let mut counters = |name: &str, help: &str, labels, series| {
            Counters::register(weft, name, help, cap(name, labels, series))
        };

        let connections = counters(
            "connections",
            "Connections accepted from the app (outbound) and from peers (inbound)",
            &["direction", "security", "protocol"],
            SERIES,
        );
        let connection_failures = counters(
            "connection_failures",
            "Connections that ended with a failure",
            &["direction", "failure"],
            SERIES,
        );
        let ejections = counters("ejections", "Endpoints taken out by their breaker", &["service"], SERIES);
        let detected = counters("detected", "Connections by detected protocol", &["protocol"], SERIES);
        let plaintext_callers = counters(
            "plaintext_callers",
            "Inbound plaintext connections by address",
            &["address"],
            PLAINTEXT_CALLERS,
        );
        let dns_queries = counters("dns_queries", "DNS queries of the app", &["result"], SERIES);
        let identity_renewals =
            counters("identity_renewals", "Requests for a certificate", &["result"], SERIES);
        // A rate or an alert needs them before the first failure.
        for result in ["ok", "failed"] {
            identity_renewals.with(&[result]);
        }
        let config_reloads = counters("config_reloads", "Changes of policy", &["result"], SERIES);
        let help = "Questions to the registry";
        let registry_requests = counters("registry_requests", help, &["result"], SERIES);
        let spans_dropped = counters("spans_dropped", "Spans that were lost", &["reason"], SERIES);
        let help = "Lines of a log that were lost because writing was too slow or failed";
        let log_lines_dropped = counters("log_lines_dropped", help, &["log"], SERIES);

        let mut gauges =
            |name: &str, help: &str, labels| Gauges::register(weft, name, help, cap(name, labels, SERIES));
        let connections_active =
            gauges("connections_active", "Open connections", &["direction", "security", "protocol"]);
        let endpoints = gauges("endpoints", "Known endpoints", &["service", "state"]);
        let pool_connections =
            gauges("pool_connections", "Open connections to endpoints, kept for reuse", &["protocol"]);
        let build_info = gauges("build_info", "Always 1", &["version"]);
        build_info.with(&[env!("CARGO_PKG_VERSION")]).set(1);
        let certificate_expiry = Gauge::default();
        let registry_unreadable = Gauge::default();
        let help = "Registered instances of the services in use that cannot be read, and are left out";
        weft.register("registry_unreadable_instances", help, registry_unreadable.clone());
        let registration_overwritten = Counter::default();
        let help = "Times that somebody else's registration stood under the id of ours, and was replaced";
        weft.register("registration_overwritten", help, registration_overwritten.clone());
        let spans_exported = Counter::default();
        weft.register("spans_exported", "Spans that the collector took", spans_exported.clone());
        let help = "Unix time at which our certificate ends; 0 without one";
        weft.register("certificate_expiry_seconds", help, certificate_expiry.clone());
        let app_sockets_lost = Counter::default();
        let help = "Sockets to the app of `exec` that were lost for want of descriptors";
        weft.register("app_sockets_lost", help, app_sockets_lost.clone());

        Metrics {
            registry,
            per_service,
            connections,
            connections_active,
            connection_failures,
            endpoints,
            ejections,
            pool_connections,
            detected,
            plaintext_callers,
            dns_queries,
            certificate_expiry,
            identity_renewals,
            config_reloads,
            registry_requests,
            registry_unreadable,
            registration_overwritten,
            spans_exported,
            spans_dropped,
            log_lines_dropped,
            app_sockets_lost,
        }
    }

    /// Everything in OpenMetrics, or else in the classic text format of Prometheus.
    pub fn expose(&self, openmetrics: bool) -> String {
        let mut text = String::with_capacity(16 * 1024);
        // Writing into a String does not fail; a collector that does would leave out its own lines only.
        let _ = encode(&mut text, &self.registry);
        if openmetrics { text } else { exposition::classic(&text) }
    }

    /// The handles of a service and a route; `route` is empty where no policy names one.
    pub fn service(&self, direction: Direction, service: &str, route: &str) -> Arc<ServiceMetrics> {
        ServiceMetrics::new(&self.per_service, direction, service, route)
    }

    /// Counts a connection as open until the answer is dropped.
    pub fn connection(&self, direction: Direction, security: Security, protocol: Protocol) -> OpenConnection {
        let labels = [direction.label(), security.label(), protocol.label()];
        self.connections.with(&labels).inc();
        let active = self.connections_active.with(&labels);
        active.inc();
        OpenConnection { active }
    }

    /// A connection ended with a failure.
    pub fn connection_failed(&self, direction: Direction, failure: Failure) {
        self.connection_failures.with(&[direction.label(), failure.label()]).inc();
    }

    /// How many endpoints of a service are in a state (`ready`, `ejected`, `probing`).
    pub fn endpoints(&self, service: &str, state: &'static str, count: usize) {
        self.endpoints.with(&[service, state]).set(count as i64);
    }

    /// A service is no longer known: its endpoint gauges go.
    pub fn forget_endpoints(&self, service: &str, states: &[&'static str]) {
        states.iter().for_each(|state| self.endpoints.remove(&[service, state]));
    }

    /// A breaker took an endpoint out.
    pub fn ejected(&self, service: &str) {
        self.ejections.with(&[service]).inc();
    }

    /// A connection to an endpoint or the app was opened. It counts as open until this is dropped.
    pub fn pool_connection(&self, protocol: Protocol) -> OpenConnection {
        let active = self.pool_connections.with(&[protocol.label()]);
        active.inc();
        OpenConnection { active }
    }

    /// Detection found out what a client speaks.
    pub fn detected(&self, protocol: Protocol) {
        self.detected.with(&[protocol.label()]).inc();
    }

    /// Somebody called in plaintext.
    pub fn plaintext_caller(&self, address: IpAddr) {
        self.plaintext_callers.with(&[&address.to_canonical().to_string()]).inc();
    }

    /// A DNS query was answered (`answered`, `forwarded`, `ignored`, `failed`, `held_back`).
    pub fn dns_query(&self, result: &'static str) {
        self.dns_queries.with(&[result]).inc();
    }

    /// When our certificate ends; none where we have none.
    pub fn certificate_expires(&self, at: Option<SystemTime>) {
        let since = at.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
        let seconds = since.unwrap_or_default().as_secs();
        self.certificate_expiry.set(seconds.min(i64::MAX as u64) as i64);
    }

    /// So many requests for a certificate ended (`ok`, `failed`).
    pub fn identity_renewed(&self, result: &'static str, count: u64) {
        self.identity_renewals.with(&[result]).inc_by(count);
    }

    /// A change of policy was read (`ok`, `refused`).
    pub fn config_reloaded(&self, result: &'static str) {
        self.config_reloads.with(&[result]).inc();
    }

    /// The registry was asked (`ok`, or a kind of error).
    pub fn registry_request(&self, result: &'static str) {
        self.registry_requests.with(&[result]).inc();
    }

    /// Somebody else's registration stood under the id of ours.
    pub fn registration_overwritten(&self) {
        self.registration_overwritten.inc();
    }

    /// So many registered instances cannot be read now.
    pub fn registry_unreadable(&self, count: usize) {
        self.registry_unreadable.set(count as i64);
    }

    /// Sockets that were made for connections to the app arrived when no descriptor was left for them.
    pub fn app_sockets_lost(&self, count: usize) {
        self.app_sockets_lost.inc_by(count as u64);
    }

    pub(super) fn spans_sent(&self, count: usize) {
        self.spans_exported.inc_by(count as u64);
    }

    /// Spans were lost (`queue_full`, `export_failed`).
    pub(super) fn spans_dropped(&self, reason: &'static str, count: usize) {
        self.spans_dropped.with(&[reason]).inc_by(count as u64);
    }

    /// For the lines that a log loses (`access`, `own`).
    pub(super) fn log_lines_dropped(&self, log: &'static str) -> Counter {
        self.log_lines_dropped.with(&[log])
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.active.dec();
    }
}

#[cfg(test)]
mod tests;
