//! Answers that the mesh makes itself: the status and the label of a failure, and nothing of its details.

use hyper::{
    Response, StatusCode,
    header::{CONTENT_TYPE, HeaderName, HeaderValue},
};

use super::{Body, headers::FAILURE};
use crate::model::Failure;

/// The answer to a request that failed. A gRPC caller gets it as a gRPC status in an answer without a body
/// (gRPC over HTTP/2, "Trailers-Only"), anybody else as an HTTP status and one line of text.
pub fn answer(failure: Failure, is_grpc: bool) -> Response<Body> {
    let label = HeaderValue::from_static(failure.label());
    let mut response = if is_grpc {
        let mut response = Response::new(Body::empty());
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert(HeaderName::from_static("grpc-status"), HeaderValue::from_static(grpc_code(failure)));
        headers.insert(HeaderName::from_static("grpc-message"), label.clone());
        response
    } else {
        let mut response = Response::new(Body::whole(format!("weft: {}\n", failure.label())));
        *response.status_mut() =
            StatusCode::from_u16(failure.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        response
    };
    response.headers_mut().insert(FAILURE, label);
    response
}

/// What tells an HTTP/2 caller that nothing of its request was processed (RFC 9113 8.7): the error of a service
/// that makes hyper reset the stream with REFUSED_STREAM.
pub fn refuse_stream() -> h2::Error {
    h2::Reason::REFUSED_STREAM.into()
}

/// The gRPC status (`grpc/status.h`) for an HTTP status of ours, as text for a header.
fn grpc_code(failure: Failure) -> &'static str {
    match failure.status() {
        400 | 431 | 500 => "13", // INTERNAL
        403 => "7",              // PERMISSION_DENIED
        408 | 504 => "4",        // DEADLINE_EXCEEDED
        499 => "1",              // CANCELLED
        _ => "14",               // UNAVAILABLE
    }
}
