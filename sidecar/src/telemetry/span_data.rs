//! From a record to the spans that are exported: one for the request (server inbound, client outbound) and one
//! client span below it per attempt. Attributes follow the semantic conventions for HTTP; ours begin with
//! `weft.`. Only sampled traces get here.

use std::time::SystemTime;

use hyper::Method;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;

use super::{
    metrics::Direction,
    otlp::{Attributes, SpanFields},
    record::{Attempt, Inner},
    spans::Spans,
};
use crate::model::{Failure, HttpVersion};

/// How one span ended.
struct Outcome<'a> {
    status: Option<u16>,
    grpc_status: Option<u16>,
    failure: Option<Failure>,
    detail: Option<&'a str>,
}

impl Inner {
    /// Where the spans of this request go, if anywhere.
    fn spans(&self) -> Option<&Spans> {
        self.telemetry.spans.as_ref().filter(|_| self.trace.sampled)
    }

    /// Hands over the span of an attempt that was not the last thing.
    pub fn export_attempt(&self, attempt: &Attempt, end: SystemTime) {
        if let Some(spans) = self.spans() {
            spans.finished(self.attempt_span(attempt, self.common_attributes(), end));
        }
    }

    /// Hands over the spans of the last attempt, where one is open, and of the request.
    pub fn export(&self, end: SystemTime) {
        let Some(spans) = self.spans() else { return };
        let common = self.common_attributes();
        if let Some(attempt) = &self.attempt {
            spans.finished(self.attempt_span(attempt, common.to_be_continued(), end));
        }
        spans.finished(self.request_span(common, end));
    }

    fn request_span(&self, mut attributes: Attributes, end: SystemTime) -> Vec<u8> {
        if let Some(words) = &self.words {
            attributes.text("url.path", words.path());
        }
        attributes.number("http.request.body.size", self.request_bytes() as i64);
        attributes.number("http.response.body.size", self.response_bytes as i64);
        let kind = match self.direction() {
            Direction::Inbound => {
                let address = self.peer_address.ip().to_string();
                attributes.text("client.address", &address);
                put_peer(&mut attributes, &address, self.peer_address.port());
                SpanKind::Server
            }
            Direction::Outbound => SpanKind::Client,
        };
        if self.attempts > 1 {
            attributes.number("http.request.resend_count", i64::from(self.attempts - 1));
        }
        let outcome = Outcome {
            status: self.status,
            grpc_status: self.grpc_status,
            failure: self.failure,
            detail: self.detail.as_deref(),
        };
        let error = put_outcome(&mut attributes, kind, &outcome);
        let times = (self.started_at, end);
        attributes.into_span(&SpanFields { trace: &self.trace, kind, name: &self.name(), times, error })
    }

    fn attempt_span(&self, attempt: &Attempt, mut attributes: Attributes, end: SystemTime) -> Vec<u8> {
        let endpoint = attempt.endpoint.to_string();
        attributes.text("weft.endpoint", &endpoint);
        attributes.number("weft.attempt", i64::from(attempt.number));
        if let Some(reason) = attempt.reason {
            attributes.text("weft.retry.reason", reason);
        }
        let address = endpoint.rsplit_once(':').map_or("", |(address, _)| address);
        put_peer(&mut attributes, address.trim_matches(['[', ']']), attempt.endpoint.port());
        let outcome = Outcome {
            status: attempt.status,
            grpc_status: attempt.grpc_status,
            failure: attempt.failure,
            detail: attempt.detail.as_deref(),
        };
        let kind = SpanKind::Client;
        let error = put_outcome(&mut attributes, kind, &outcome);
        let ([method, space, service], number) = (self.name(), attempt.number.to_string());
        let name = &[method, space, service, " attempt ", &number];
        let times = (attempt.started_at, end);
        attributes.into_span(&SpanFields { trace: &attempt.trace, kind, name, times, error })
    }

    /// In parts. Few values: the method and the service, never a path.
    fn name(&self) -> [&str; 3] {
        [known(&self.method).unwrap_or("HTTP"), " ", self.handles.service()]
    }

    fn common_attributes(&self) -> Attributes {
        let mut attributes = Attributes::new();
        attributes.text("http.request.method", known(&self.method).unwrap_or("_OTHER"));
        attributes.text("url.scheme", "http");
        if let Some(authority) = self.words.as_ref().and_then(|words| words.authority()) {
            let parsed: Option<hyper::http::uri::Authority> = authority.parse().ok();
            if let Some(authority) = parsed {
                attributes.text("server.address", authority.host());
                if let Some(port) = authority.port_u16() {
                    attributes.number("server.port", i64::from(port));
                }
            }
        }
        let version = match self.protocol.http() {
            Some(HttpVersion::Http2) => "2",
            _ => "1.1",
        };
        attributes.text("network.protocol.version", version);
        attributes.text("weft.direction", self.direction().label());
        attributes.text("weft.service", self.handles.service());
        if !self.handles.route().is_empty() {
            attributes.text("weft.route", self.handles.route());
        }
        if let Some(own) = &*self.telemetry.identity.load() {
            attributes.text("weft.own.identity", own.as_str());
        }
        if let Some(peer) = &self.peer {
            attributes.text("weft.peer.identity", peer.as_str());
            attributes.text("weft.tls.version", super::MESH_TLS_VERSION);
        }
        attributes
    }
}

/// Adds how the span ended; returns the message of its status where that is an error.
fn put_outcome<'a>(attributes: &mut Attributes, kind: SpanKind, outcome: &Outcome<'a>) -> Option<&'a str> {
    if let Some(status) = outcome.status {
        attributes.number("http.response.status_code", i64::from(status));
    }
    if let Some(status) = outcome.grpc_status {
        attributes.number("rpc.grpc.status_code", i64::from(status));
    }
    if let Some(failure) = outcome.failure {
        attributes.text("error.type", failure.label());
        attributes.text("weft.failure", failure.label());
    } else {
        let status = outcome.status.filter(|status| is_error(*status, kind));
        let grpc = outcome.grpc_status.filter(|status| is_grpc_error(*status, kind));
        attributes.text("error.type", &status.or(grpc)?.to_string());
    }
    Some(outcome.detail.unwrap_or_default())
}

/// A server's 4xx is the client's fault; a client's is an error.
fn is_error(status: u16, kind: SpanKind) -> bool {
    status >= if kind == SpanKind::Server { 500 } else { 400 }
}

/// As the conventions for gRPC have it: for a server only what speaks against itself, which are UNKNOWN,
/// DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE and DATA_LOSS.
fn is_grpc_error(status: u16, kind: SpanKind) -> bool {
    match kind {
        SpanKind::Server => matches!(status, 2 | 4 | 12..=15),
        _ => status != 0,
    }
}

fn put_peer(attributes: &mut Attributes, address: &str, port: u16) {
    attributes.text("network.peer.address", address);
    attributes.number("network.peer.port", i64::from(port));
}

/// The conventions allow only methods of RFC 9110 and PATCH as values.
fn known(method: &Method) -> Option<&'static str> {
    const KNOWN: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];
    KNOWN.into_iter().find(|known| method == *known)
}
