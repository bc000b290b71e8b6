//! The one guard of a connection: counts it while it is open, and on drop writes the metrics and, for an opaque
//! connection or a failure, one line of the access log. The requests on a connection have records of their own.

use std::{
    net::SocketAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use prometheus_client::metrics::counter::Counter;
use tokio::time::Instant;
use weft_proto::spiffe::SpiffeId;

use super::{
    Telemetry,
    access_log::Line,
    cut::Cut,
    metrics::{Direction, OpenConnection, Security},
    service_metrics::ServiceMetrics,
};
use crate::model::{Failed, Failure, Protocol};

/// One connection that was accepted, from a peer or from the app.
#[derive(Debug)]
pub struct Connection {
    telemetry: Arc<Telemetry>,
    direction: Direction,
    peer_address: SocketAddr,
    started: Instant,
    started_at: SystemTime,
    handles: Option<Arc<ServiceMetrics>>,
    opened: Option<(Security, Protocol, OpenConnection)>,
    peer: Option<SpiffeId>,
    endpoint: Option<SocketAddr>,
    sent: AtomicU64,
    received: AtomicU64,
    /// The metrics of `sent` and `received`; made with the first bytes.
    counters: OnceLock<[Counter; 2]>,
    failed: Option<Failed>,
    cut: Cut,
}

impl Connection {
    pub(super) fn begin(
        telemetry: &Arc<Telemetry>,
        direction: Direction,
        peer_address: SocketAddr,
    ) -> Connection {
        Connection {
            telemetry: telemetry.clone(),
            direction,
            peer_address,
            started: Instant::now(),
            started_at: SystemTime::now(),
            handles: None,
            opened: None,
            peer: None,
            endpoint: None,
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            counters: OnceLock::new(),
            failed: None,
            cut: Cut::default(),
        }
    }

    /// Who opened it.
    pub fn peer_address(&self) -> SocketAddr {
        self.peer_address
    }

    /// It is known what protects the connection and what is spoken on it: it counts as open. Said again, for
    /// instance after an upgrade, it counts under the new labels.
    pub fn opened(&mut self, security: Security, protocol: Protocol) {
        let metrics = &self.telemetry.metrics;
        if self.direction == Direction::Inbound
            && security != Security::MutualTls
            && self.opened.as_ref().is_none_or(|(before, ..)| *before != security)
        {
            metrics.plaintext_caller(self.peer_address.ip());
        }
        self.opened = None;
        self.opened = Some((security, protocol, metrics.connection(self.direction, security, protocol)));
    }

    /// The connection is meant for this service.
    pub fn service(&mut self, handles: &Arc<ServiceMetrics>) {
        self.handles = Some(handles.clone());
    }

    /// The identity that the other side proved.
    pub fn peer(&mut self, identity: Option<&SpiffeId>) {
        self.peer = identity.cloned();
    }

    /// Where the connection is carried to.
    pub fn endpoint(&mut self, address: SocketAddr) {
        self.endpoint = Some(address);
    }

    /// Bytes of an opaque connection were passed on that came from whoever opened it.
    pub fn sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
        self.count(0, bytes);
    }

    /// The same in the other direction.
    pub fn received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
        self.count(1, bytes);
    }

    fn count(&self, flow: usize, bytes: u64) {
        if let Some(handles) = self.handles.as_ref().filter(|_| self.is_opaque()) {
            self.counters.get_or_init(|| handles.tcp_bytes())[flow].inc_by(bytes);
        }
    }

    /// The connection failed. A later failure takes the place of an earlier one.
    pub fn fail(&mut self, failed: Failed) {
        self.failed = Some(failed);
    }

    /// Where to say why the connection is cut, for the records of its requests.
    pub fn cut(&self) -> &Cut {
        &self.cut
    }

    /// A client that left in the middle of a request ended both, and the record of the request says so. On HTTP/1: on
    /// HTTP/2 a request that its client took back says nothing of the connection.
    fn is_told_by_its_request(&self) -> bool {
        let is_http1 = matches!(self.opened, Some((_, Protocol::Http1, _)));
        let is_gone = self.failed.as_ref().is_some_and(|failed| failed.failure == Failure::ClientGone);
        is_http1 && is_gone && self.cut.is_client_gone_told()
    }

    /// Opaque bytes, and not requests that have lines of their own.
    fn is_opaque(&self) -> bool {
        self.opened.as_ref().is_some_and(|(_, protocol, _)| protocol.http().is_none())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.failed.is_none() && std::thread::panicking() {
            self.failed = Some(Failed::new(Failure::Internal, "a task ended with a panic"));
        }
        if self.is_told_by_its_request() {
            self.failed = None;
        }
        if let Some(failed) = &self.failed {
            self.telemetry.metrics.connection_failed(self.direction, failed.failure);
        }
        let log = &self.telemetry.access_log;
        if !log.wants(self.failed.is_some()) || (self.failed.is_none() && !self.is_opaque()) {
            return;
        }
        let own = self.telemetry.identity.load();
        log.write(&Line {
            time: super::rfc3339(self.started_at),
            kind: "connection",
            direction: self.direction.label(),
            service: self.handles.as_ref().map_or("", |handles| handles.service()),
            protocol: self.opened.as_ref().map(|(_, protocol, _)| protocol.label()),
            security: self.opened.as_ref().map(|(security, ..)| security.label()),
            failure: self.failed.as_ref().map(|failed| failed.failure.label()),
            detail: self.failed.as_ref().map(|failed| failed.detail.as_str()),
            peer_address: Some(self.peer_address),
            peer_identity: self.peer.as_ref().map(SpiffeId::as_str),
            tls_version: self.peer.as_ref().map(|_| super::MESH_TLS_VERSION),
            own_identity: own.as_deref().map(SpiffeId::as_str),
            endpoint: self.endpoint,
            request_bytes: *self.sent.get_mut(),
            response_bytes: *self.received.get_mut(),
            duration_seconds: self.started.elapsed().as_secs_f64(),
            ..Line::default()
        });
    }
}
