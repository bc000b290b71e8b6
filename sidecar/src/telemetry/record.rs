//! The one guard of a request: made when its head is there, carried into the body of its answer, and dropped
//! when that ended. On drop, and only then, it writes the metrics, the line of the access log and the spans.
//!
//! A record that is dropped before [`Record::complete`] and without a failure means that the client went away; or
//! that we cut its connection, for which [`Cut`] has the reason.
//! What is needed for a line or a span only is not even remembered where there will be none. Span names and
//! attributes follow the
//! [semantic conventions for HTTP](https://opentelemetry.io/docs/specs/semconv/http/http-spans/).

use std::{
    net::SocketAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use hyper::{
    Method, Request, Uri,
    http::{HeaderMap, HeaderValue, header::HOST},
};
use tokio::{sync::OwnedSemaphorePermit, time::Instant};
use weft_proto::spiffe::SpiffeId;

use super::{
    Telemetry,
    access_log::Line,
    cut::Cut,
    metrics::Direction,
    service_metrics::{RequestKey, ServiceMetrics},
    trace::TraceContext,
};
use crate::model::{Failed, Failure, Protocol};

/// One request. Small to move: everything is in one box.
#[derive(Debug)]
pub struct Record {
    pub(super) inner: Box<Inner>,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub telemetry: Arc<Telemetry>,
    pub handles: Arc<ServiceMetrics>,
    pub protocol: Protocol,
    pub trace: TraceContext,
    pub started: Instant,
    pub started_at: SystemTime,
    pub method: Method,
    pub words: Option<Words>,
    pub peer_address: SocketAddr,
    pub peer: Option<SpiffeId>,
    pub status: Option<u16>,
    pub grpc_status: Option<u16>,
    pub failure: Option<Failure>,
    pub detail: Option<String>,
    pub complete: bool,
    /// None: the request has no body, or nobody reads it.
    pub request_body: Option<RequestBodyState>,
    /// Of a request without a body; else the state of its body has it.
    pub permit: Option<OwnedSemaphorePermit>,
    pub response_bytes: u64,
    pub attempts: u32,
    pub attempt: Option<Attempt>,
    pub endpoint: Option<SocketAddr>,
    pub cut: Cut,
}

/// What only a line or a span shows. Clones of what hyper holds anyway.
#[derive(Debug)]
pub(super) struct Words {
    pub uri: Uri,
    pub host: Option<HeaderValue>,
}

/// One attempt, until the next one begins or the request ends.
#[derive(Debug)]
pub(super) struct Attempt {
    pub trace: TraceContext,
    pub number: u32,
    pub endpoint: SocketAddr,
    pub reason: Option<&'static str>,
    pub started_at: SystemTime,
    pub status: Option<u16>,
    pub grpc_status: Option<u16>,
    pub failure: Option<Failure>,
    pub detail: Option<String>,
}

/// What a record knows of the body of its request, which is read elsewhere: how many bytes were read, and why it broke
/// off. It keeps the permit of the request too, which is released when record and body are gone, whichever goes last: a
/// server may answer before it has read the body. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct RequestBodyState(Arc<SharedState>);

#[derive(Debug, Default)]
struct SharedState {
    bytes: AtomicU64,
    failed: OnceLock<Failed>,
    /// Only held.
    _permit: Option<OwnedSemaphorePermit>,
}

/// Longer paths are cut in lines and spans.
const PATH_BYTES: usize = 1024;

impl RequestBodyState {
    /// So many bytes more were read.
    pub fn add(&self, bytes: u64) {
        self.0.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Its client did not send it to its end, or sent what is no body. The first reason stays.
    pub fn failed(&self, failed: Failed) {
        let _ = self.0.failed.set(failed);
    }

    fn bytes(&self) -> u64 {
        self.0.bytes.load(Ordering::Relaxed)
    }
}

impl Record {
    pub(super) fn begin<Body>(
        telemetry: &Arc<Telemetry>,
        handles: &Arc<ServiceMetrics>,
        protocol: Protocol,
        peer_address: SocketAddr,
        request: &Request<Body>,
        cut: &Cut,
    ) -> Record {
        let trace = telemetry.trace(request.headers());
        let shown = telemetry.access_log.is_on() || (trace.sampled && telemetry.exports());
        let words =
            shown.then(|| Words { uri: request.uri().clone(), host: request.headers().get(HOST).cloned() });
        let inner = Inner {
            telemetry: telemetry.clone(),
            handles: handles.clone(),
            protocol,
            trace,
            started: Instant::now(),
            started_at: SystemTime::now(),
            method: request.method().clone(),
            words,
            peer_address,
            peer: None,
            status: None,
            grpc_status: None,
            failure: None,
            detail: None,
            complete: false,
            request_body: None,
            permit: None,
            response_bytes: 0,
            attempts: 0,
            attempt: None,
            endpoint: None,
            cut: cut.clone(),
        };
        Record { inner: Box::new(inner) }
    }

    /// The server or client span of this request; the caller's own where no spans are made here.
    pub fn trace(&self) -> &TraceContext {
        &self.inner.trace
    }

    /// When the request began.
    pub fn started(&self) -> Instant {
        self.inner.started
    }

    /// What it reports to.
    pub fn telemetry(&self) -> &Telemetry {
        &self.inner.telemetry
    }

    /// The handles of the service, to count refused retries through.
    pub fn handles(&self) -> &Arc<ServiceMetrics> {
        &self.inner.handles
    }

    /// The identity that the other side proved: the caller inbound, the called one outbound.
    pub fn peer(&mut self, identity: Option<&SpiffeId>) {
        self.inner.peer = identity.cloned();
    }

    /// Begins an attempt and ends the one before; `retry` is the label of what went wrong before, none for the
    /// first. Returns its span: inject it into the request that is sent.
    pub fn attempt(&mut self, endpoint: SocketAddr, retry: Option<&'static str>) -> TraceContext {
        self.end_attempt();
        let inner = &mut *self.inner;
        inner.attempts += 1;
        inner.endpoint = Some(endpoint);
        inner.peer = None;
        inner.handles.attempt(retry);
        let trace = match inner.telemetry.exports() {
            true => inner.trace.child(&mut fastrand::Rng::new()),
            false => inner.trace,
        };
        inner.attempt = Some(Attempt {
            trace,
            number: inner.attempts,
            endpoint,
            reason: retry,
            started_at: SystemTime::now(),
            status: None,
            grpc_status: None,
            failure: None,
            detail: None,
        });
        trace
    }

    /// The attempt brought an answer with this status. It stays open until the next one or the end.
    pub fn attempt_answered(&mut self, status: u16) {
        if let Some(attempt) = &mut self.inner.attempt {
            attempt.status = Some(status);
        }
    }

    /// The attempt's answer had this `grpc-status` in its head.
    pub fn attempt_grpc_status(&mut self, status: u16) {
        if let Some(attempt) = &mut self.inner.attempt {
            attempt.grpc_status = Some(status);
        }
    }

    /// The attempt failed; whether the request did is said by [`Record::fail`].
    pub fn attempt_failed(&mut self, failed: &Failed) {
        let failed = self.inner.true_reason(failed.clone());
        if let Some(attempt) = &mut self.inner.attempt {
            attempt.failure = Some(failed.failure);
            attempt.detail = Some(failed.detail);
        }
        self.end_attempt();
    }

    /// How many attempts were begun.
    pub fn attempts(&self) -> u32 {
        self.inner.attempts
    }

    /// Writes a span into the headers of a request that is sent. Who makes no spans has none to write, and no decision
    /// to pass on either: the headers stay as they came.
    pub fn inject(&self, trace: &TraceContext, headers: &mut HeaderMap) {
        if self.inner.telemetry.exports() {
            self.inner.telemetry.propagators.inject(trace, headers);
        }
    }

    /// The status of the answer that the caller gets.
    pub fn status(&mut self, status: u16) {
        self.inner.status = Some(status);
    }

    /// The `grpc-status` of the answer, from its head or its trailers.
    pub fn grpc_status(&mut self, status: u16) {
        self.inner.grpc_status = Some(status);
        self.attempt_grpc_status(status);
    }

    /// The request failed. A later failure takes the place of an earlier one.
    pub fn fail(&mut self, failed: Failed) {
        let failed = self.inner.true_reason(failed);
        self.inner.failure = Some(failed.failure);
        self.inner.detail = Some(failed.detail);
    }

    /// The connection that the request came on, and whether we cut it.
    pub fn cut(&self) -> &Cut {
        &self.inner.cut
    }

    /// Keeps the permit of the request until its answer has ended, and its body too where [`Record::request_body`] is
    /// called after this.
    pub fn keep(&mut self, permit: OwnedSemaphorePermit) {
        self.inner.permit = Some(permit);
    }

    /// For the body of the request, which tells it what happens to it wherever it is read.
    pub fn request_body(&mut self) -> RequestBodyState {
        let inner = &mut *self.inner;
        let permit = &mut inner.permit;
        let begin =
            || RequestBodyState(Arc::new(SharedState { _permit: permit.take(), ..SharedState::default() }));
        inner.request_body.get_or_insert_with(begin).clone()
    }

    /// Why the body of the request broke off, if it did.
    pub fn request_body_failed(&self) -> Option<&Failed> {
        self.inner.request_body.as_ref()?.0.failed.get()
    }

    /// So many more body bytes of the answer.
    pub fn add_response_bytes(&mut self, bytes: u64) {
        self.inner.response_bytes += bytes;
    }

    /// The answer was carried to its end.
    pub fn complete(&mut self) {
        self.inner.complete = true;
    }

    fn end_attempt(&mut self) {
        if let Some(attempt) = self.inner.attempt.take() {
            self.inner.export_attempt(&attempt, SystemTime::now());
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if self.inner.failure.is_none() && !self.inner.complete {
            self.fail(match std::thread::panicking() {
                true => Failed::new(Failure::Internal, "a task ended with a panic"),
                false => Failed::new(Failure::ClientGone, "the client left before the end of the answer"),
            });
        }
        let inner = &mut *self.inner;
        if inner.failure == Some(Failure::ClientGone) {
            inner.cut.client_left();
        }
        let took = inner.started.elapsed();
        let request_bytes = inner.request_bytes();
        let key = RequestKey {
            peer: inner.peer.clone(),
            protocol: inner.protocol,
            code: inner.code(),
            failure: inner.failure,
        };
        inner.handles.finished(key, took, request_bytes, inner.response_bytes);
        if inner.telemetry.access_log.wants(inner.failure.is_some()) {
            inner.log(took.as_secs_f64());
        }
        if let Some(attempt) = &mut inner.attempt {
            attempt.failure = attempt.failure.or(inner.failure);
        }
        inner.export(inner.started_at + took);
    }
}

impl Inner {
    /// Where we cut the connection ourselves, its client did not go away.
    fn true_reason(&self, failed: Failed) -> Failed {
        match self.cut.reason() {
            Some(reason) if failed.failure == Failure::ClientGone => reason.clone(),
            _ => failed,
        }
    }

    /// The status that the caller saw, or would have seen.
    fn code(&self) -> u16 {
        self.status.or(self.failure.map(Failure::status)).unwrap_or(200)
    }

    pub fn request_bytes(&self) -> u64 {
        self.request_body.as_ref().map_or(0, RequestBodyState::bytes)
    }

    pub fn direction(&self) -> Direction {
        self.handles.direction()
    }

    fn log(&self, seconds: f64) {
        let own = self.telemetry.identity.load();
        let is_traced = self.trace.trace_id != 0;
        self.telemetry.access_log.write(&Line {
            time: super::rfc3339(self.started_at),
            kind: "request",
            direction: self.direction().label(),
            service: self.handles.service(),
            route: self.handles.route(),
            method: Some(self.method.as_str()),
            authority: self.words.as_ref().and_then(Words::authority),
            path: self.words.as_ref().map(Words::path),
            protocol: Some(self.protocol.label()),
            status: self.status,
            grpc_status: self.grpc_status,
            failure: self.failure.map(Failure::label),
            detail: self.detail.as_deref(),
            attempts: (self.attempts > 0).then_some(self.attempts),
            peer_address: Some(self.peer_address),
            peer_identity: self.peer.as_ref().map(SpiffeId::as_str),
            tls_version: self.peer.as_ref().map(|_| super::MESH_TLS_VERSION),
            own_identity: own.as_deref().map(SpiffeId::as_str),
            endpoint: self.endpoint,
            request_bytes: self.request_bytes(),
            response_bytes: self.response_bytes,
            duration_seconds: seconds,
            trace_id: is_traced.then(|| format!("{:032x}", self.trace.trace_id)),
            span_id: is_traced.then(|| format!("{:016x}", self.trace.span_id)),
            sampled: is_traced.then_some(self.trace.sampled),
            ..Line::default()
        });
    }
}

impl Words {
    /// The authority of the request: from its target, or else its Host header.
    pub fn authority(&self) -> Option<&str> {
        let target = self.uri.authority().map(|authority| authority.as_str());
        target.or_else(|| self.host.as_ref()?.to_str().ok())
    }

    /// Without the query, which may hold secrets; cut where it is long.
    pub fn path(&self) -> &str {
        let path = self.uri.path();
        &path[..path.floor_char_boundary(PATH_BYTES)]
    }
}

#[cfg(test)]
mod tests;
