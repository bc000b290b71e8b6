//! Does an answer speak against the endpoint that gave it? The breaker counts what says that the endpoint, or what
//! it stands on, is in trouble: 502, 503 and 504, and the gRPC statuses DEADLINE_EXCEEDED, INTERNAL, UNAVAILABLE
//! and DATA_LOSS. A 500, and UNKNOWN in gRPC, is mostly the app's bug with this one request and would put out one
//! endpoint after the other. Failures of the transport count too; they are no answers and not judged here.

use crate::model::{Failure, Side};

/// A gRPC status (gRPC "Status codes and their use").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GrpcStatus(u8);

impl GrpcStatus {
    /// Reads `grpc-status`. What is no known number is UNKNOWN, as gRPC libraries take it.
    pub fn parse(text: &str) -> Self {
        match text.parse::<u8>() {
            Ok(code @ 0..=16) if text.len() <= 2 && !text.starts_with('+') => GrpcStatus(code),
            _ => GrpcStatus(2),
        }
    }

    /// A number that was read elsewhere; UNKNOWN where it is none of the known.
    pub fn from_code(code: u16) -> Self {
        u8::try_from(code).ok().filter(|code| *code <= 16).map_or(GrpcStatus(2), GrpcStatus)
    }

    /// Does it count as a failure of the endpoint? From the head of an answer that has trailers only, or from the
    /// trailers.
    pub fn speaks_against_endpoint(self) -> bool {
        matches!(self.0, 4 | 13 | 14 | 15)
    }

    /// The number.
    pub fn code(self) -> u8 {
        self.0
    }

    /// Did the call succeed?
    pub fn is_ok(self) -> bool {
        self.0 == 0
    }

    /// The name in the specification.
    pub fn label(self) -> &'static str {
        const NAMES: [&str; 17] = [
            "OK",
            "CANCELLED",
            "UNKNOWN",
            "INVALID_ARGUMENT",
            "DEADLINE_EXCEEDED",
            "NOT_FOUND",
            "ALREADY_EXISTS",
            "PERMISSION_DENIED",
            "RESOURCE_EXHAUSTED",
            "FAILED_PRECONDITION",
            "ABORTED",
            "OUT_OF_RANGE",
            "UNIMPLEMENTED",
            "INTERNAL",
            "UNAVAILABLE",
            "DATA_LOSS",
            "UNAUTHENTICATED",
        ];
        NAMES.get(usize::from(self.0)).copied().unwrap_or("UNKNOWN")
    }
}

/// Does an answer with this head count as a failure of its endpoint? `label` is that of a sidecar which made the
/// answer itself and is believed: it says more than the status that comes with it.
pub fn head_speaks_against_endpoint(label: Option<Failure>, status: u16, grpc: Option<GrpcStatus>) -> bool {
    match label {
        Some(failure) if failure.side() == Side::Client || is_of_the_request(failure) => false,
        Some(failure) if failure_speaks_against_endpoint(failure) => true,
        _ => matches!(status, 502..=504) || grpc.is_some_and(GrpcStatus::speaks_against_endpoint),
    }
}

/// Does this failure of an attempt count as a failure of its endpoint? What the caller or the mesh did wrong does
/// not, nor does a request's own deadline, which may have been short from the start, nor a head that no endpoint may send.
pub fn failure_speaks_against_endpoint(failure: Failure) -> bool {
    failure.side() == Side::Upstream && !is_of_the_request(failure)
}

/// Would any other endpoint fail at this request too?
fn is_of_the_request(failure: Failure) -> bool {
    matches!(failure, Failure::RequestTimeout | Failure::ResponseHeadersTooLarge)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_judged_as_documented() {
        for (status, grpc, expected) in [
            (200, None, false),
            (404, None, false),
            (429, None, false),
            (500, None, false),
            (501, None, false),
            (502, None, true),
            (503, None, true),
            (504, None, true),
            (505, None, false),
            (200, Some("0"), false),
            (200, Some("2"), false),
            (200, Some("4"), true),
            (200, Some("5"), false),
            (200, Some("13"), true),
            (200, Some("14"), true),
            (200, Some("15"), true),
            (200, Some("16"), false),
            (200, Some("99"), false),
            (503, Some("0"), true),
        ] {
            let grpc = grpc.map(GrpcStatus::parse);
            assert_eq!(head_speaks_against_endpoint(None, status, grpc), expected, "{status} {grpc:?}");
        }
    }

    #[test]
    fn the_label_of_a_sidecar_says_more_than_its_status() {
        for (failure, status, grpc, expected) in [
            (Failure::AppReset, 502, None, true),
            (Failure::AppReset, 200, Some("14"), true),
            (Failure::Overloaded, 503, None, true),
            (Failure::Draining, 200, Some("14"), true),
            (Failure::RequestTimeout, 504, None, false),
            (Failure::RequestTimeout, 200, Some("4"), false),
            (Failure::ResponseHeadersTooLarge, 502, None, false),
            (Failure::HeadersTooLarge, 200, Some("13"), false),
            (Failure::PlaintextRefused, 403, None, false),
        ] {
            let grpc = grpc.map(GrpcStatus::parse);
            assert_eq!(head_speaks_against_endpoint(Some(failure), status, grpc), expected, "{failure}");
        }
    }

    #[test]
    fn a_strange_grpc_status_is_unknown() {
        for text in ["", "x", "17", "-1", "+4", "014", " 4", "256", "99999999999999999999"] {
            assert_eq!(GrpcStatus::parse(text).label(), "UNKNOWN", "{text:?}");
        }
        assert_eq!(GrpcStatus::parse("14").label(), "UNAVAILABLE");
        assert!(GrpcStatus::parse("0").is_ok());
        for (code, label) in [(0, "OK"), (16, "UNAUTHENTICATED"), (17, "UNKNOWN"), (270, "UNKNOWN")] {
            assert_eq!(GrpcStatus::from_code(code).label(), label);
        }
    }

    #[test]
    fn only_upstream_failures_speak_against_an_endpoint() {
        for (failure, expected) in [
            (Failure::ConnectRefused, true),
            (Failure::Handshake, true),
            (Failure::Reset, true),
            (Failure::AttemptTimeout, true),
            (Failure::BodyCut, true),
            (Failure::RequestTimeout, false),
            (Failure::ResponseHeadersTooLarge, false),
            (Failure::ClientGone, false),
            (Failure::NoIdentity, false),
            (Failure::Overloaded, false),
        ] {
            assert_eq!(failure_speaks_against_endpoint(failure), expected, "{failure}");
        }
    }
}
