//! What hyper's errors mean for a call: which failure, and is it certain that nothing was processed?

use std::{error::Error, io};

use h2::Reason;

use crate::{
    model::{Failed, Failure},
    tls,
};

/// A request that got no answer.
#[derive(Debug)]
pub struct SendFailed {
    /// What happened.
    pub failed: Failed,
    /// The protocol proves that the other side processed nothing: any method may be tried again.
    pub nothing_processed: bool,
}

impl From<Failed> for SendFailed {
    fn from(failed: Failed) -> Self {
        SendFailed { nothing_processed: failed.failure.nothing_processed(), failed }
    }
}

impl SendFailed {
    /// `unsent`: hyper gave the request back.
    pub(super) fn from_hyper(error: &hyper::Error, unsent: bool) -> Self {
        let detail = describe(error);
        let (failure, nothing_processed) = match http2_error(error) {
            // RFC 9113 8.7: both prove that the stream was not processed. A sidecar refuses a stream when its
            // app refuses connections.
            Some(http2) if http2.reason() == Some(Reason::REFUSED_STREAM) && http2.is_remote() => {
                (Failure::AppRefused, true)
            }
            Some(http2) if http2.is_go_away() && http2.is_remote() => (Failure::Reset, true),
            // TLS 1.3: the far side's verdict on our certificate comes after we thought the handshake done.
            _ if io_error(error).is_some_and(tls::refused_by_peer) => (Failure::Handshake, true),
            _ if unsent => (Failure::Reset, true),
            _ if error.is_parse() => (Failure::BadResponse, false),
            _ if error.is_user() => (Failure::ClientGone, false),
            _ => (Failure::Reset, false),
        };
        SendFailed { failed: Failed::new(failure, detail), nothing_processed }
    }
}

fn http2_error(error: &hyper::Error) -> Option<&h2::Error> {
    causes(error).find_map(|cause| cause.downcast_ref())
}

fn io_error(error: &hyper::Error) -> Option<&io::Error> {
    causes(error).find_map(|cause| match cause.downcast_ref::<h2::Error>() {
        Some(http2) => http2.get_io(),
        None => cause.downcast_ref(),
    })
}

fn causes(error: &hyper::Error) -> impl Iterator<Item = &(dyn Error + 'static)> {
    std::iter::successors(error.source(), |&cause| cause.source())
}

fn describe(error: &hyper::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}
