//! Seeing what the mesh does: traces, metrics, the access log, and the sidecar's own log.
//!
//! One [`Telemetry`] per process is shared by all workers. A story opens one [`Record`] per request and one
//! [`Connection`] per connection, tells it what happens, and drops it; everything is written then, once. Nothing
//! in this room waits, and nothing grows without a bound: what is too much is dropped and counted.

mod access_log;
mod collector;
mod connection;
mod cut;
mod exposition;
mod families;
mod log;
mod metrics;
mod otlp;
mod process;
mod propagation;
mod record;
mod service_metrics;
mod settings;
mod span_data;
mod spans;
mod trace;

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwapOption;
use hyper::{Request, http::HeaderMap};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use weft_proto::spiffe::SpiffeId;

pub use access_log::{AccessLog, AccessLogTarget};
pub use connection::Connection;
pub use cut::Cut;
pub use exposition::{CLASSIC, OPENMETRICS};
#[cfg(test)]
pub(crate) use log::silent_log;
pub use log::{LogFormat, LogLevel, init_log};
pub use metrics::{Direction, Metrics, OpenConnection, Security};
pub use propagation::Propagators;
pub use record::{Record, RequestBodyState};
pub use service_metrics::{RequestKey, ServiceMetrics};
pub use settings::{ExportSettings, OtlpProtocol, TraceSettings};
pub use spans::{SpanExport, Spans};
pub use trace::{Formats, Incoming, Parent, Sampler, TraceContext};

use crate::model::Protocol;

/// A peer's identity is proven by the mesh's mutual TLS only, and that has one version.
const MESH_TLS_VERSION: &str = "1.3";

/// What all records share.
#[derive(Debug)]
pub struct Telemetry {
    propagators: Propagators,
    sampler: Sampler,
    spans: Option<Spans>,
    access_log: AccessLog,
    metrics: Arc<Metrics>,
    identity: ArcSwapOption<SpiffeId>,
}

impl Telemetry {
    /// The shared part, and the task that sends spans, which is to be run apart from the workers.
    pub fn new(
        settings: &TraceSettings,
        access_log: AccessLog,
        metrics: Arc<Metrics>,
    ) -> (Arc<Telemetry>, Option<SpanExport>) {
        let (spans, export) = Spans::new(settings, &metrics).unzip();
        let (propagators, sampler) = (settings.propagators, settings.sampler);
        let identity = ArcSwapOption::empty();
        (Arc::new(Telemetry { propagators, sampler, spans, access_log, metrics, identity }), export)
    }

    /// The numbers.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Our own identity, for lines and spans.
    pub fn set_identity(&self, identity: &SpiffeId) {
        self.identity.store(Some(Arc::new(identity.clone())));
    }

    /// Are spans made here at all?
    fn exports(&self) -> bool {
        self.spans.is_some()
    }

    /// The span of a request that arrived with these headers. Without an exporter it is the caller's, and read only
    /// where the access log shows it.
    fn trace(&self, headers: &HeaderMap) -> TraceContext {
        if !self.exports() && !self.access_log.is_on() {
            return TraceContext::of_caller(&Incoming::default());
        }
        let incoming = self.propagators.extract(headers);
        match self.exports() {
            true => TraceContext::begin(&incoming, &self.sampler, &mut fastrand::Rng::new()),
            false => TraceContext::of_caller(&incoming),
        }
    }

    /// Opens the record of a request whose head has arrived. `handles` say the direction and what is known of
    /// the service so far, `cut` belongs to the connection that it came on. Call it before the headers are
    /// changed.
    pub fn begin<Body>(
        self: &Arc<Self>,
        handles: &Arc<ServiceMetrics>,
        protocol: Protocol,
        peer_address: SocketAddr,
        request: &Request<Body>,
        cut: &Cut,
    ) -> Record {
        Record::begin(self, handles, protocol, peer_address, request, cut)
    }

    /// Opens the record of a connection that was accepted.
    pub fn connection(self: &Arc<Self>, direction: Direction, peer_address: SocketAddr) -> Connection {
        Connection::begin(self, direction, peer_address)
    }

    /// Waits until the spans and the lines so far are out, but not longer than this. For the end of the process.
    pub async fn flush(&self, longest: Duration) {
        let spans = async {
            if let Some(spans) = &self.spans {
                spans.flush(longest).await;
            }
        };
        tokio::join!(spans, self.access_log.flush(longest));
    }
}

fn rfc3339(time: SystemTime) -> String {
    // Fails only for years past 9999.
    OffsetDateTime::from(time).format(&Rfc3339).unwrap_or_default()
}
