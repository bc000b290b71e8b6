//! What the head and the end of an answer mean for the record of its request.

use hyper::http::response::Parts;

use super::body::{BodyEnd, Ended, grpc_status};
use crate::{
    model::{Failed, Failure},
    telemetry::Record,
};

/// The head of an answer is on its way to the caller.
pub fn begin_answer(record: &mut Record, head: &Parts) {
    record.status(head.status.as_u16());
    if let Some(status) = grpc_status(&head.headers) {
        record.grpc_status(status);
    }
}

/// The body of an answer has ended, in whichever way.
pub fn end_answer(record: &mut Record, ended: &Ended) {
    record.add_response_bytes(ended.bytes);
    if let Some(status) = ended.grpc_status {
        record.grpc_status(status);
    }
    match &ended.how {
        BodyEnd::Complete => record.complete(),
        BodyEnd::Cut(reason) => record.fail(Failed::new(Failure::BodyCut, reason.clone())),
        // The record knows whether its client left or we cut the connection.
        BodyEnd::Abandoned => {}
    }
}
