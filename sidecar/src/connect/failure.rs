//! What the errors of hyper and h2 mean for a call: which failure, and is it certain that nothing was processed?

use std::{error::Error, io};

use h2::Reason;

use crate::{
    http::is_malformed,
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
    /// A call on an HTTP/1 connection failed. `unsent`: hyper gave the request back.
    pub(super) fn from_hyper(error: &hyper::Error, unsent: bool) -> Self {
        let io = causes(error).find_map(|cause| cause.downcast_ref());
        let (failure, nothing_processed) = match io {
            _ if unsent || io.is_some_and(tls::refused_by_peer) => unprocessed(io),
            _ if error.is_parse_too_large() => (Failure::ResponseHeadersTooLarge, false),
            _ if error.is_parse() => (Failure::BadResponse, false),
            _ if error.is_user() && is_malformed(error) => (Failure::BadRequest, false),
            _ if error.is_user() => (Failure::ClientGone, false),
            _ => (Failure::Reset, false),
        };
        let detail = match (failure, error.source()) {
            (Failure::BadRequest, _) => {
                let last = causes(error).last().map(ToString::to_string).unwrap_or_default();
                format!("the body is malformed: {last}")
            }
            (_, Some(source)) => format!("{error}: {source}"),
            (_, None) => error.to_string(),
        };
        SendFailed { failed: Failed::new(failure, detail), nothing_processed }
    }

    /// A call on an HTTP/2 connection failed. `unsent`: its stream was never made.
    pub(super) fn from_http2(error: &h2::Error, unsent: bool) -> Self {
        let is_ours = !error.is_remote() && !error.is_library();
        let (failure, nothing_processed) = match error.reason() {
            // RFC 9113 8.7: both prove that the stream was not processed. A sidecar refuses a stream when its
            // app refuses connections.
            Some(Reason::REFUSED_STREAM) if error.is_remote() => (Failure::AppRefused, true),
            _ if error.is_go_away() && error.is_remote() => (Failure::Reset, true),
            _ if unsent => unprocessed(error.get_io()),
            // We reset it, because its body was malformed, or broke off.
            Some(Reason::PROTOCOL_ERROR) if error.is_reset() && is_ours => (Failure::BadRequest, false),
            _ if error.is_reset() && is_ours => (Failure::ClientGone, false),
            // h2 found that the server broke the rules. Of one stream that is mostly a head that is too large.
            Some(Reason::PROTOCOL_ERROR) if error.is_reset() && error.is_library() => {
                (Failure::BadResponse, false)
            }
            _ => (Failure::Reset, false),
        };
        let what = if failure == Failure::BadRequest { "the body is malformed" } else { "HTTP/2" };
        SendFailed { failed: Failed::new(failure, format!("{what}: {error}")), nothing_processed }
    }
}

/// TLS 1.3: the far side's verdict on our certificate comes after we thought the handshake done.
fn unprocessed(io: Option<&io::Error>) -> (Failure, bool) {
    let refused = io.is_some_and(tls::refused_by_peer);
    (if refused { Failure::Handshake } else { Failure::Reset }, true)
}

/// An error and what it comes from.
fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&cause| cause.source())
}
