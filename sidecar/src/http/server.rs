//! Serves one HTTP connection with hyper, within limits that hold against strangers.

use std::{future::Future, time::Duration};

use hyper::{Request, Response, body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::time::timeout;

use super::Body;
use crate::{
    model::{Failed, Failure, HttpVersion},
    net::Stream,
};

/// Limits on what a client may send; the defaults hold against strangers.
#[derive(Debug, Clone)]
pub struct HttpLimits {
    /// Bytes of a request's head, and of HTTP/1's read buffer.
    pub header_bytes: usize,
    /// Header fields of a request.
    pub header_fields: usize,
    /// How long a client may take for the head of a request, idle time before it included.
    pub header_timeout: Duration,
    /// Requests at a time on one HTTP/2 connection.
    pub concurrent_streams: u32,
    /// Streams a client may reset before we have looked at them (CVE-2023-44487).
    pub pending_resets: usize,
    /// Bytes a client may send on one stream before we have passed them on.
    pub stream_window: u32,
}

impl Default for HttpLimits {
    fn default() -> Self {
        HttpLimits {
            header_bytes: 64 * 1024,
            header_fields: 100,
            header_timeout: Duration::from_secs(60),
            concurrent_streams: 128,
            pending_resets: 20,
            stream_window: 256 * 1024,
        }
    }
}

impl HttpLimits {
    /// The window of a connection: every stream may fill its own, so that a stalled body delays nobody else.
    pub fn connection_window(&self) -> u32 {
        self.stream_window.saturating_mul(self.concurrent_streams).min(MAX_WINDOW)
    }
}

/// RFC 9113 6.9.1.
const MAX_WINDOW: u32 = (1 << 31) - 1;
/// hyper refuses a smaller HTTP/1 buffer.
const MIN_BUFFER: usize = 8192;
/// A silent HTTP/2 peer is asked whether it lives after this long.
const PING_AFTER: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves requests until the client closes, breaks the rules, or `stop` resolves and the last answer is out,
/// for which it waits `drain_timeout` at most.
///
/// # Errors
/// A failure on the client's side; hyper has answered it already where it could.
pub async fn serve<Answer, Answering>(
    stream: Stream,
    version: HttpVersion,
    limits: &HttpLimits,
    stop: impl Future<Output = ()>,
    drain_timeout: Duration,
    answer: Answer,
) -> Result<(), Failed>
where
    Answer: Fn(Request<Incoming>) -> Answering,
    Answering: Future<Output = Result<Response<Body>, h2::Error>> + Send + 'static,
{
    let io = TokioIo::new(stream);
    let mut stop = std::pin::pin!(stop);
    let ended = match version {
        HttpVersion::Http1 => {
            let connection = http1(limits).serve_connection(io, service_fn(answer)).with_upgrades();
            let mut connection = std::pin::pin!(connection);
            tokio::select! {
                ended = connection.as_mut() => ended,
                () = &mut stop => {
                    connection.as_mut().graceful_shutdown();
                    match timeout(drain_timeout, connection).await {
                        Ok(ended) => ended,
                        Err(_) => return Err(drained_too_long(drain_timeout)),
                    }
                }
            }
        }
        HttpVersion::Http2 => {
            let connection = http2(limits).serve_connection(io, service_fn(answer));
            let mut connection = std::pin::pin!(connection);
            tokio::select! {
                ended = connection.as_mut() => ended,
                () = &mut stop => {
                    connection.as_mut().graceful_shutdown();
                    match timeout(drain_timeout, connection).await {
                        Ok(ended) => ended,
                        Err(_) => return Err(drained_too_long(drain_timeout)),
                    }
                }
            }
        }
    };
    ended.map_err(|error| client_failure(&error))
}

fn drained_too_long(limit: Duration) -> Failed {
    let limit = humantime::format_duration(limit);
    Failed::new(
        Failure::Draining,
        format!("requests were still in flight {limit} after the connection was to end"),
    )
}

fn http1(limits: &HttpLimits) -> hyper::server::conn::http1::Builder {
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_headers(limits.header_fields)
        .max_header_size(limits.header_bytes)
        .max_buf_size(limits.header_bytes.max(MIN_BUFFER))
        .title_case_headers(true)
        .auto_date_header(false)
        .pipeline_flush(true);
    builder
}

fn http2(limits: &HttpLimits) -> hyper::server::conn::http2::Builder<TokioExecutor> {
    let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .keep_alive_interval(PING_AFTER)
        .keep_alive_timeout(PING_TIMEOUT)
        .max_concurrent_streams(limits.concurrent_streams)
        .max_pending_accept_reset_streams(limits.pending_resets)
        .max_header_list_size(u32::try_from(limits.header_bytes).unwrap_or(u32::MAX))
        .initial_stream_window_size(limits.stream_window)
        .initial_connection_window_size(limits.connection_window())
        .auto_date_header(false);
    builder
}

fn client_failure(error: &hyper::Error) -> Failed {
    let failure = if error.is_parse_too_large() {
        Failure::HeadersTooLarge
    } else if error.is_parse() {
        Failure::BadRequest
    } else if error.is_timeout() {
        Failure::ClientTimeout
    } else {
        Failure::ClientGone
    };
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
    Failed::new(failure, format!("{error}{cause}"))
}
