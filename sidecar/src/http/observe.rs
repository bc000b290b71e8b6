//! What the head and the end of an answer mean for the record of its request.

use hyper::{Response, http::response::Parts};

use super::{
    Body,
    body::{BodyEnd, Ended, TIME_OVER, grpc_status},
    respond::answer,
};
use crate::{
    model::{Failed, Failure},
    policy::response::GrpcStatus,
    telemetry::Record,
};

/// The head of an answer is on its way to the caller.
pub fn begin_answer(record: &mut Record, head: &Parts) {
    record.status(head.status.as_u16());
    if let Some(status) = grpc_status(&head.headers) {
        record.grpc_status(status);
    }
}

/// The answer of ours to a request that failed. Its record has the status that the caller gets, unless that left.
pub fn answer_failed(record: &mut Record, failed: Failed, is_grpc: bool) -> Response<Body> {
    let (head, body) = answer(failed.failure, is_grpc).into_parts();
    if failed.failure != Failure::ClientGone {
        begin_answer(record, &head);
    }
    record.fail(failed);
    Response::from_parts(head, body)
}

/// The body of an answer has ended, in whichever way.
pub fn end_answer(record: &mut Record, ended: &Ended) {
    record.add_response_bytes(ended.bytes);
    if let Some(status) = ended.grpc_status {
        record.grpc_status(status);
    }
    match &ended.how {
        BodyEnd::Complete => record.complete(),
        // Nobody cut it but the client, whose request could not go on.
        BodyEnd::Cut(_) | BodyEnd::Abandoned if let Some(failed) = record.request_body_failed().cloned() => {
            record.fail(failed);
        }
        BodyEnd::Cut(reason) => record.fail(Failed::new(Failure::BodyCut, reason.clone())),
        BodyEnd::TimeOver => record.fail(Failed::new(Failure::BodyCut, TIME_OVER)),
        // The record knows whether its client left or we cut the connection.
        BodyEnd::Abandoned => {}
    }
}

/// Does what came after a good head speak against the endpoint that sent it? None where it says nothing of it: the reader
/// of the answer went away, the time of the request was over, or its client broke off the request's body.
pub fn end_speaks_against_endpoint(ended: &Ended, request_broke: bool) -> Option<bool> {
    let against = match &ended.how {
        BodyEnd::Complete => {
            let status = ended.grpc_status.map(GrpcStatus::from_code);
            status.is_some_and(GrpcStatus::speaks_against_endpoint)
        }
        BodyEnd::Cut(_) => true,
        BodyEnd::TimeOver | BodyEnd::Abandoned => return None,
    };
    (!against || !request_broke).then_some(against)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_judged_by_the_end_of_its_answer() {
        let end =
            |grpc_status, how| end_speaks_against_endpoint(&Ended { bytes: 1, grpc_status, how }, false);
        assert_eq!(end(None, BodyEnd::Complete), Some(false));
        for (code, expected) in [(0, false), (2, false), (4, true), (5, false), (13, true), (14, true)] {
            assert_eq!(end(Some(code), BodyEnd::Complete), Some(expected), "{code}");
        }
        assert_eq!(end(Some(999), BodyEnd::Complete), Some(false));
        assert_eq!(end(None, BodyEnd::Cut("reset".into())), Some(true));
        assert_eq!(end(Some(0), BodyEnd::TimeOver), None);
        assert_eq!(end(Some(14), BodyEnd::Abandoned), None);
        let after_broken_request =
            |grpc_status, how| end_speaks_against_endpoint(&Ended { bytes: 1, grpc_status, how }, true);
        assert_eq!(after_broken_request(None, BodyEnd::Cut("reset".into())), None);
        assert_eq!(after_broken_request(Some(13), BodyEnd::Complete), None);
        assert_eq!(after_broken_request(Some(0), BodyEnd::Complete), Some(false));
    }
}
