//! From a record to the spans that are exported: one for the request (server inbound, client outbound) and one
//! client span below it per attempt. Attributes follow the semantic conventions for HTTP; ours begin with
//! `weft.`. Only sampled traces get here.

use std::{net::SocketAddr, time::SystemTime};

use hyper::Method;
use opentelemetry::{
    InstrumentationScope, KeyValue,
    trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState},
};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};

use super::{
    metrics::Direction,
    record::{Attempt, Inner},
    trace::TraceContext,
};
use crate::model::{Failure, HttpVersion};

/// How one span ended.
struct Outcome<'a> {
    status: Option<u16>,
    failure: Option<Failure>,
    detail: Option<&'a str>,
}

impl Inner {
    /// Hands over the span of the request.
    pub fn export(&self, end: SystemTime) {
        let Some(spans) = self.telemetry.spans.as_ref().filter(|_| self.trace.sampled) else { return };
        let mut attributes = self.common_attributes();
        if let Some(words) = &self.words {
            attributes.push(KeyValue::new("url.path", words.path().to_owned()));
        }
        attributes.push(KeyValue::new("http.request.body.size", self.request_bytes() as i64));
        attributes.push(KeyValue::new("http.response.body.size", self.response_bytes as i64));
        if let Some(status) = self.grpc_status {
            attributes.push(KeyValue::new("rpc.grpc.status_code", i64::from(status)));
        }
        let kind = match self.direction() {
            Direction::Inbound => {
                attributes.push(KeyValue::new("client.address", self.peer_address.ip().to_string()));
                attributes.extend(peer_attributes(self.peer_address));
                SpanKind::Server
            }
            Direction::Outbound => SpanKind::Client,
        };
        if self.attempts > 1 {
            attributes.push(KeyValue::new("http.request.resend_count", i64::from(self.attempts - 1)));
        }
        let outcome = Outcome { status: self.status, failure: self.failure, detail: self.detail.as_deref() };
        spans.finished(span(&self.trace, kind, self.name(), (self.started_at, end), attributes, &outcome));
    }

    /// Hands over the span of an attempt.
    pub fn export_attempt(&self, attempt: Attempt, end: SystemTime) {
        let Some(spans) = self.telemetry.spans.as_ref().filter(|_| self.trace.sampled) else { return };
        let mut attributes = self.common_attributes();
        attributes.push(KeyValue::new("weft.endpoint", attempt.endpoint.to_string()));
        attributes.push(KeyValue::new("weft.attempt", i64::from(attempt.number)));
        attributes.extend(attempt.reason.map(|reason| KeyValue::new("weft.retry.reason", reason)));
        attributes.extend(peer_attributes(attempt.endpoint));
        let outcome =
            Outcome { status: attempt.status, failure: attempt.failure, detail: attempt.detail.as_deref() };
        let name = format!("{} attempt {}", self.name(), attempt.number);
        let times = (attempt.started_at, end);
        spans.finished(span(&attempt.trace, SpanKind::Client, name, times, attributes, &outcome));
    }

    /// Few values: the method and the service, never a path.
    fn name(&self) -> String {
        let method = known(&self.method).unwrap_or("HTTP");
        format!("{method} {}", self.handles.service())
    }

    fn common_attributes(&self) -> Vec<KeyValue> {
        let mut attributes = Vec::with_capacity(20);
        attributes.push(KeyValue::new("http.request.method", known(&self.method).unwrap_or("_OTHER")));
        attributes.push(KeyValue::new("url.scheme", "http"));
        if let Some(authority) = self.words.as_ref().and_then(|words| words.authority()) {
            let parsed: Option<hyper::http::uri::Authority> = authority.parse().ok();
            if let Some(authority) = parsed {
                attributes.push(KeyValue::new("server.address", authority.host().to_owned()));
                let port = authority.port_u16().map(|port| KeyValue::new("server.port", i64::from(port)));
                attributes.extend(port);
            }
        }
        let version = match self.protocol.http() {
            Some(HttpVersion::Http2) => "2",
            _ => "1.1",
        };
        attributes.push(KeyValue::new("network.protocol.version", version));
        attributes.push(KeyValue::new("weft.direction", self.direction().label()));
        attributes.push(KeyValue::new("weft.service", self.handles.service().clone()));
        if !self.handles.route().is_empty() {
            attributes.push(KeyValue::new("weft.route", self.handles.route().clone()));
        }
        if let Some(own) = &*self.telemetry.identity.load() {
            attributes.push(KeyValue::new("weft.own.identity", own.as_str().to_owned()));
        }
        if let Some(peer) = &self.peer {
            attributes.push(KeyValue::new("weft.peer.identity", peer.as_str().to_owned()));
            // An identity is proven by the mesh's mutual TLS only, and that has one version.
            attributes.push(KeyValue::new("weft.tls.version", "1.3"));
        }
        attributes
    }
}

fn span(
    trace: &TraceContext,
    kind: SpanKind,
    name: String,
    (start_time, end_time): (SystemTime, SystemTime),
    mut attributes: Vec<KeyValue>,
    outcome: &Outcome<'_>,
) -> SpanData {
    if let Some(status) = outcome.status {
        attributes.push(KeyValue::new("http.response.status_code", i64::from(status)));
    }
    if let Some(failure) = outcome.failure {
        attributes.push(KeyValue::new("error.type", failure.label()));
        attributes.push(KeyValue::new("weft.failure", failure.label()));
    } else if let Some(status) = outcome.status.filter(|status| is_error(*status, &kind)) {
        attributes.push(KeyValue::new("error.type", status.to_string()));
    }
    let failed = outcome.failure.is_some() || outcome.status.is_some_and(|status| is_error(status, &kind));
    let status = match failed {
        true => Status::error(outcome.detail.unwrap_or_default().to_owned()),
        false => Status::Unset,
    };
    SpanData {
        span_context: SpanContext::new(
            TraceId::from_bytes(trace.trace_id.to_be_bytes()),
            SpanId::from_bytes(trace.span_id.to_be_bytes()),
            TraceFlags::SAMPLED,
            false,
            TraceState::NONE,
        ),
        parent_span_id: SpanId::from_bytes(trace.parent_id.to_be_bytes()),
        parent_span_is_remote: trace.parent_is_remote,
        span_kind: kind,
        name: name.into(),
        start_time,
        // A clock that was set back must not make a span end before it began.
        end_time: end_time.max(start_time),
        attributes,
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: SpanLinks::default(),
        status,
        instrumentation_scope: InstrumentationScope::builder("weft-sidecar")
            .with_version(env!("CARGO_PKG_VERSION"))
            .build(),
    }
}

/// A server's 4xx is the client's fault; a client's is an error.
fn is_error(status: u16, kind: &SpanKind) -> bool {
    status >= if *kind == SpanKind::Server { 500 } else { 400 }
}

fn peer_attributes(address: SocketAddr) -> [KeyValue; 2] {
    [
        KeyValue::new("network.peer.address", address.ip().to_string()),
        KeyValue::new("network.peer.port", i64::from(address.port())),
    ]
}

/// The conventions allow only methods of RFC 9110 and PATCH as values.
fn known(method: &Method) -> Option<&'static str> {
    const KNOWN: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];
    KNOWN.into_iter().find(|known| method == *known)
}
