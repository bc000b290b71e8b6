//! Serves one HTTP connection with hyper, within limits that hold against strangers.

use std::{
    future::Future,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use hyper::{Request, Response, Uri, body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    io::AsyncReadExt,
    time::{sleep, timeout},
};

use super::{Activity, Body, respond::refuse_stream, streams::Streams, unread::Unread, waiting::HeadTimer};
use crate::{
    model::{Failed, Failure, HttpVersion},
    net::Stream,
    telemetry::Cut,
};

/// Limits on what a client may send; the defaults hold against strangers.
#[derive(Debug, Clone)]
pub struct HttpLimits {
    /// Bytes of a request's head, and of HTTP/1's read buffer.
    pub header_bytes: usize,
    /// Header fields of a request.
    pub header_fields: usize,
    /// How long a client may take for the head of a request, from its first byte; of an HTTP/2 connection, for
    /// the preface.
    pub header_timeout: Duration,
    /// How long a connection may be without a request.
    pub idle_timeout: Duration,
    /// How long requests may go on after their connection was told to end.
    pub drain_timeout: Duration,
    /// Requests at a time on one HTTP/2 connection.
    pub concurrent_streams: u32,
    /// Streams a client may reset before we have looked at them (CVE-2023-44487).
    pub pending_resets: usize,
    /// Requests a client may take back at once, beyond those that were answered; then the connection is ended.
    pub resets: u32,
    /// Bytes a client may send on one stream before we have passed them on.
    pub stream_window: u32,
    /// The same on all streams of a connection, where that is less than all their windows.
    pub connection_bytes: u32,
    /// Bytes of an answer that wait for the client to take them.
    pub send_buffer: usize,
}

impl Default for HttpLimits {
    fn default() -> Self {
        HttpLimits {
            header_bytes: 64 * 1024,
            header_fields: 100,
            header_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(3600),
            drain_timeout: Duration::from_secs(30),
            concurrent_streams: 128,
            pending_resets: 100,
            resets: 500,
            stream_window: 256 * 1024,
            connection_bytes: MAX_WINDOW,
            send_buffer: 128 * 1024,
        }
    }
}

impl HttpLimits {
    /// The window of a connection: every stream may fill its own, so that a stalled body delays nobody else.
    pub fn connection_window(&self) -> u32 {
        self.stream_window.saturating_mul(self.concurrent_streams).min(self.connection_bytes)
    }

    /// The same for a client without an identity, whose connection nobody else shares: its stalled bodies delay its own
    /// others, and all of them together hold little.
    pub fn of_strangers(&self) -> HttpLimits {
        HttpLimits { connection_bytes: STRANGER_WINDOW, send_buffer: STRANGER_SEND_BUFFER, ..self.clone() }
    }
}

impl HttpLimits {
    /// The same for a peer's sidecar, which adds fields of its own to what its app may send.
    pub fn of_sidecars(&self) -> HttpLimits {
        HttpLimits {
            header_bytes: self.header_bytes.saturating_add(SIDECAR_BYTES),
            header_fields: self.header_fields.saturating_add(SIDECAR_FIELDS),
            ..self.clone()
        }
    }

    /// The same head is longer in the count of HTTP/2.
    fn header_list_bytes(&self) -> usize {
        self.header_bytes.saturating_add(self.header_fields.saturating_mul(FIELD_OVERHEAD))
    }
}

/// Header fields that a sidecar adds to those of its app, and their bytes.
pub const SIDECAR_FIELDS: usize = 16;
const SIDECAR_BYTES: usize = 4096;
/// RFC 9113 6.9.1.
const MAX_WINDOW: u32 = (1 << 31) - 1;
/// hyper refuses a smaller HTTP/1 buffer.
const MIN_BUFFER: usize = 8192;
/// Of a client without an identity.
const STRANGER_WINDOW: u32 = 1024 * 1024;
const STRANGER_SEND_BUFFER: usize = 16 * 1024;
/// How long a client may go on sending a request that was answered, and how long it may be silent then.
const LINGER: Duration = Duration::from_secs(30);
const LINGER_SILENCE: Duration = Duration::from_secs(5);
/// How long an idle connection that is to make room may take: a GOAWAY and its client's answer to the PING behind it.
const MAKE_ROOM_WITHIN: Duration = Duration::from_millis(250);
/// A silent HTTP/2 peer is asked whether it lives after this long.
const PING_AFTER: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// Preface and first frame header of HTTP/2: what any client sends at once.
const PREFACE_BYTES: u64 = 24 + 9;
/// What hyper counts of a header field beside its name and value (RFC 9113 6.5.2).
const FIELD_OVERHEAD: usize = 32;

/// Why a connection is to end.
#[derive(Debug)]
pub enum Stop {
    /// It takes no further request. Those in flight may go on for the drain timeout, and are cut then for this reason.
    Finish(Failed),
    /// The same, but it is idle and another connection waits for its place: it has little time.
    MakeRoom(Failed),
}

impl Stop {
    fn why(&self) -> &Failed {
        let (Stop::Finish(why) | Stop::MakeRoom(why)) = self;
        why
    }

    /// Resolves when a connection that is to make room has had time for it and has no request in flight.
    async fn must_be_gone(&self, activity: &Activity) {
        if let Stop::Finish(_) = self {
            return std::future::pending().await;
        }
        loop {
            sleep(MAKE_ROOM_WITHIN).await;
            if activity.idle_since().is_some() {
                return;
            }
        }
    }
}

/// Serves requests until the client closes, breaks the rules, or `stop` resolves and the last answer is out,
/// for which it waits for the drain timeout at most: then the connection is cut, for the reason that `stop` gave.
///
/// # Errors
/// A failure on the client's side, which hyper has answered already where it could; the reason for the cut; or for
/// which it made room.
pub async fn serve<Answer, Answering>(
    stream: Stream,
    version: HttpVersion,
    limits: &HttpLimits,
    stop: impl Future<Output = Stop>,
    activity: &Activity,
    cut: &Cut,
    answer: Answer,
) -> Result<(), Failed>
where
    Answer: Fn(Request<Body>) -> Answering,
    Answering: Future<Output = Result<Response<Body>, h2::Error>> + Send + 'static,
{
    match version {
        HttpVersion::Http1 => serve_http1(stream, limits, stop, activity, cut, answer).await,
        HttpVersion::Http2 => serve_http2(stream, limits, stop, activity, cut, answer).await,
    }
}

async fn serve_http1<Answer, Answering>(
    mut stream: Stream,
    limits: &HttpLimits,
    stop: impl Future<Output = Stop>,
    activity: &Activity,
    cut: &Cut,
    answer: Answer,
) -> Result<(), Failed>
where
    Answer: Fn(Request<Body>) -> Answering,
    Answering: Future<Output = Result<Response<Body>, h2::Error>> + Send + 'static,
{
    let timer =
        HeadTimer::new(stream.count_reads(), limits.header_timeout, limits.idle_timeout, activity.clone());
    let reset = stream.cut_flag();
    let half_close = stream.half_close();
    stream.note_reads();
    let mut builder = http1(limits, timer.clone());
    builder.half_close(half_close.is_some());
    let unread = Unread::default();
    let service = service_fn(|request: Request<Incoming>| {
        if let Some(half_close) = &half_close {
            half_close.request_came();
        }
        // Boxed, or hyper would keep room for it while the connection is idle.
        Box::pin(answer(request.map(|body| unread.watch(body))))
    });
    let mut connection = builder.serve_connection(TokioIo::new(stream), service).with_upgrades();
    let mut serving = Pin::new(&mut connection);
    let looking = async {
        match &half_close {
            Some(half_close) => half_close.keep_looking().await,
            None => std::future::pending().await,
        }
    };
    let mut stop = pin!(stop);
    let ended = tokio::select! {
        biased;
        ended = serving.as_mut() => ended,
        () = timer.keep_time() => return Ok(()),
        () = looking => return Ok(()),
        stop = stop.as_mut() => {
            serving.as_mut().graceful_shutdown();
            let ending = async {
                tokio::select! {
                    biased;
                    ended = serving.as_mut() => ended,
                    () = timer.keep_time() => Ok(()),
                    // Boxed, as it is rare.
                    () = Box::pin(stop.must_be_gone(activity)) => Ok(()),
                }
            };
            let in_time = timeout(limits.drain_timeout, ending).await;
            // Whoever is told to stop waits for nobody who has had an answer.
            unread.clear();
            let ended = in_time.map_err(|_| cut.because(still_in_flight(stop.why(), limits)))?;
            if let Stop::MakeRoom(why) = stop {
                return Err(why);
            }
            ended
        }
    };
    match ended {
        Err(error) if error.is_user() => {
            // The body of an answer broke off, and the record of its request says why. To a client of HTTP/1.0 a clean
            // close would be its proper end.
            reset.store(true, Ordering::Relaxed);
            Ok(())
        }
        Err(error) if error.is_timeout() && timer.is_idle() => Ok(()),
        Ok(()) if unread.is_any() => {
            // Boxed, as it is rare.
            let lingering = connection.into_parts().map(|parts| Box::pin(linger(parts.io.into_inner())));
            if let Some(lingering) = lingering {
                tokio::select! {
                    () = lingering => {}
                    _ = stop => {}
                }
            }
            Ok(())
        }
        Err(error) if error.is_parse() => {
            let mut failed = client_failure(&error);
            let stream = connection.into_parts().map(|parts| parts.io.into_inner());
            if let Some(target) = stream.as_ref().and_then(|stream| unreadable_target(stream.noted())) {
                failed.detail = format!("{}, {target}", failed.detail);
            }
            Err(failed)
        }
        ended => ended.map_err(|error| client_failure(&error)),
    }
}

/// Reads on, to nowhere, after the last answer to a request that was not read to its end: a client that is still sending it
/// would be reset, and might lose the answer by it (RFC 9112 9.6). Ends with the client.
async fn linger(mut stream: Stream) {
    let mut nowhere = vec![0; MIN_BUFFER];
    let reading =
        async { while let Ok(Ok(1..)) = timeout(LINGER_SILENCE, stream.read(&mut nowhere)).await {} };
    let _ = timeout(LINGER, reading).await;
}

async fn serve_http2<Answer, Answering>(
    mut stream: Stream,
    limits: &HttpLimits,
    stop: impl Future<Output = Stop>,
    activity: &Activity,
    cut: &Cut,
    answer: Answer,
) -> Result<(), Failed>
where
    Answer: Fn(Request<Body>) -> Answering,
    Answering: Future<Output = Result<Response<Body>, h2::Error>> + Send + 'static,
{
    let read = stream.count_reads();
    let streams = Streams::new(activity.clone());
    let service = service_fn(|request: Request<Incoming>| {
        // Boxed: a task is moved several times until it runs, and this is nearly all of it.
        let begun = streams.begin().map(|in_flight| (in_flight, Box::pin(answer(request.map(Body::from)))));
        async move {
            let Some((mut in_flight, answering)) = begun else { return Err(refuse_stream()) };
            let answered = answering.await;
            in_flight.answered();
            answered.map(|response| response.map(|body| body.keeping(in_flight)))
        }
    });
    let mut connection = std::pin::pin!(http2(limits).serve_connection(TokioIo::new(stream), service));
    // None: the client took back too much.
    let stop = tokio::select! {
        biased;
        // First: a connection with enough to do takes all that one turn of a task may.
        stop = stop => Some(stop),
        ended = connection.as_mut() => return ended.map_err(|error| client_failure(&error)),
        () = streams.idle_for(limits.idle_timeout) => Some(Stop::Finish(Failed::new(Failure::Draining, "it was idle"))),
        () = no_preface(&read, limits.header_timeout) => {
            return Err(Failed::new(Failure::ClientTimeout, "the preface of HTTP/2 did not come"));
        }
        () = streams.resets_reach(limits.resets) => None,
    };
    connection.as_mut().graceful_shutdown();
    let Some(stop) = stop else {
        streams.refuse();
        // What is in flight may end; a client that goes on is cut off.
        tokio::select! {
            _ = connection => {}
            () = sleep(limits.drain_timeout) => {}
            () = streams.resets_reach(limits.resets.saturating_mul(2)) => {}
        }
        let detail =
            format!("the client took back {} requests at once, more than were answered", limits.resets);
        return Err(Failed::new(Failure::BadRequest, detail));
    };
    let ended = tokio::select! {
        ended = connection => ended.map_err(|error| client_failure(&error)),
        () = sleep(limits.drain_timeout) => return Err(cut.because(still_in_flight(stop.why(), limits))),
        () = streams.resets_reach(limits.resets.saturating_mul(2)) => {
            let detail = format!("the client took back {} requests at once, more than were answered", limits.resets);
            return Err(Failed::new(Failure::BadRequest, detail));
        }
        // Boxed, as it is rare.
        () = Box::pin(stop.must_be_gone(activity)) => Ok(()),
    };
    match stop {
        Stop::MakeRoom(why) => Err(why),
        Stop::Finish(_) => ended,
    }
}

/// Resolves if the client of an HTTP/2 connection has not begun to speak it in time; never otherwise.
async fn no_preface(read: &Arc<AtomicU64>, limit: Duration) {
    sleep(limit).await;
    if read.load(Ordering::Relaxed) >= PREFACE_BYTES {
        std::future::pending().await
    }
}

fn still_in_flight(why: &Failed, limits: &HttpLimits) -> Failed {
    let limit = humantime::format_duration(limits.drain_timeout);
    Failed::new(why.failure, format!("{}; requests were still in flight {limit} later", why.detail))
}

fn http1(limits: &HttpLimits, timer: HeadTimer) -> hyper::server::conn::http1::Builder {
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder
        .timer(timer)
        .header_read_timeout(limits.idle_timeout)
        .max_headers(limits.header_fields)
        .max_header_size(limits.header_bytes)
        .max_buf_size(limits.header_bytes.max(MIN_BUFFER))
        .title_case_headers(true)
        .auto_date_header(false);
    // Not `pipeline_flush`: it holds back the last answer of a connection that ends with bytes left unread.
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
        .max_header_list_size(u32::try_from(limits.header_list_bytes()).unwrap_or(u32::MAX))
        .initial_stream_window_size(limits.stream_window)
        .initial_connection_window_size(limits.connection_window())
        .max_send_buf_size(limits.send_buffer)
        .auto_date_header(false);
    builder
}

/// The target of a request line among these bytes that is no URI, without its query: that may hold secrets.
fn unreadable_target(bytes: &[u8]) -> Option<String> {
    let mut lines = bytes.split(|byte| *byte == b'\n').peekable();
    while let Some(line) = lines.next() {
        let mut words = line.split(|byte| *byte == b' ');
        let (_method, target, version) = (words.next(), words.next(), words.next());
        let is_cut = lines.peek().is_none();
        if let Some(target) = target
            && version.map_or(is_cut, |version| version.starts_with(b"HTTP/"))
            && Uri::try_from(target).is_err()
        {
            let path = target.split(|byte| *byte == b'?').next().unwrap_or_default();
            let place = if Uri::try_from(path).is_ok() { ", in its query" } else { "" };
            return Some(format!("the target {:?}{place}", String::from_utf8_lossy(path)));
        }
    }
    None
}

fn client_failure(error: &hyper::Error) -> Failed {
    let http2 = std::error::Error::source(error).and_then(|cause| cause.downcast_ref::<h2::Error>());
    let failure = if error.is_parse_too_large() {
        Failure::HeadersTooLarge
    } else if error.is_parse() || http2.is_some_and(h2::Error::is_library) {
        // h2 ends a connection by itself when the client breaks the rules of HTTP/2, or floods.
        Failure::BadRequest
    } else if error.is_timeout() {
        Failure::ClientTimeout
    } else {
        Failure::ClientGone
    };
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
    Failed::new(failure, format!("{error}{cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_that_cannot_be_read_is_found() {
        let cases: [(&[u8], Option<&str>); 9] = [
            (b"GET /a<b HTTP/1.1\r\nHost: orders\r\n\r\n", Some("the target \"/a<b\"")),
            // a query may hold secrets
            (b"GET /a?token=secret&q=\"1\" HTTP/1.1\r\n", Some("the target \"/a\", in its query")),
            (b"GET /a`b?token=secret HTTP/1.1\r\n", Some("the target \"/a`b\"")),
            (b"GET /\xff HTTP/1.1\r\n", Some("the target \"/\u{fffd}\"")),
            // behind another request, and too long for what was noted
            (b"GET /a HTTP/1.1\r\nHost: a\r\n\r\nGET /b`c HTTP/1.1\r\n", Some("the target \"/b`c\"")),
            (b"GET /a`and-so-on", Some("the target \"/a`and-so-on\"")),
            (b"GET /a HTTP/1.1\r\nX: <a> b\r\nReferer: http://<a>\r\n\r\n", None),
            (b"no request", None),
            (b"", None),
        ];
        for (bytes, target) in cases {
            assert_eq!(unreadable_target(bytes).as_deref(), target, "{}", String::from_utf8_lossy(bytes));
        }
    }
}
