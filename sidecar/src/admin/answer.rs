//! What both faces share: one connection served by hyper within limits, and the shapes of answers.

use std::{
    collections::VecDeque,
    convert::Infallible,
    future::Future,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Request, Response, StatusCode,
    body::Incoming,
    header::{ALLOW, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    task::{AbortHandle, yield_now},
    time::timeout,
};

/// An answer, all in memory.
pub type Answer = Response<Full<Bytes>>;

/// How long a client may take for the head of its request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection may take altogether; longer than any probe.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(75);
/// hyper's read buffer: bounds the head of a request.
const BUFFER_BYTES: usize = 16 * 1024;
const MAX_HEADERS: usize = 64;

/// The open connections of a face. For one too many another makes room: one without a whole request before one that is
/// being answered, and of those the oldest of the address that has most. So neither slow clients nor many requests of one
/// keep a probe of the kubelet out.
pub struct Open {
    most: usize,
    /// The oldest first.
    connections: VecDeque<OpenConnection>,
}

struct OpenConnection {
    task: AbortHandle,
    /// Is its request complete?
    is_asking: Arc<AtomicBool>,
    /// From where; none on a Unix socket.
    source: Option<IpAddr>,
}

impl Open {
    pub fn up_to(most: usize) -> Self {
        Open { most, connections: VecDeque::new() }
    }

    /// Serves a connection in a task of its own, which gets the flag to set once its request is complete.
    pub async fn add<Serving>(
        &mut self,
        source: Option<IpAddr>,
        serve: impl FnOnce(Arc<AtomicBool>) -> Serving,
    ) where
        Serving: Future<Output = ()> + Send + 'static,
    {
        self.connections.retain(|open| !open.task.is_finished());
        if self.connections.len() >= self.most {
            // Those that came a moment ago have their turn first: a whole request is answered in it.
            yield_now().await;
            if let Some(open) = self.one_to_end().and_then(|index| self.connections.remove(index)) {
                open.task.abort();
            }
        }
        let is_asking = Arc::new(AtomicBool::new(false));
        let task = tokio::spawn(serve(is_asking.clone())).abort_handle();
        self.connections.push_back(OpenConnection { task, is_asking, source });
    }

    fn one_to_end(&self) -> Option<usize> {
        let idle = |open: &OpenConnection| !open.is_asking.load(Ordering::Relaxed);
        let any_idle = self.connections.iter().any(idle);
        let candidates = || self.connections.iter().enumerate().filter(|(_, open)| !any_idle || idle(open));
        let of_source = |source| candidates().filter(|(_, open)| open.source == source).count();
        // Of equals the last one counts for `max_by_key`, so they are looked at from the youngest to the oldest.
        let (index, _) = candidates()
            .collect::<Vec<_>>()
            .into_iter()
            .rev()
            .max_by_key(|(_, open)| of_source(open.source))?;
        Some(index)
    }
}

/// Serves one request and closes: an idle client must not keep a probe of the kubelet out.
pub async fn serve_one<Io, Answering>(
    io: Io,
    is_asking: &AtomicBool,
    answer: impl Fn(Request<Incoming>) -> Answering,
) where
    Io: AsyncRead + AsyncWrite + Unpin,
    Answering: Future<Output = Answer>,
{
    let service = service_fn(|request| {
        is_asking.store(true, Ordering::Relaxed);
        let answering = answer(request);
        async { Ok::<_, Infallible>(answering.await) }
    });
    let connection = http1::Builder::new()
        .keep_alive(false)
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(BUFFER_BYTES)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(io), service);
    // A client that breaks off or is too slow is its own problem.
    let _ = timeout(CONNECTION_TIMEOUT, connection).await;
}

pub fn answer(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer
}

pub fn text(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    answer(status, "text/plain; charset=utf-8", body)
}

pub fn json(status: StatusCode, value: &serde_json::Value) -> Answer {
    answer(status, "application/json", value.to_string())
}

/// 405 with the methods that are taken (RFC 9110 15.5.6).
pub fn only(methods: &'static str, mut refusal: Answer) -> Answer {
    *refusal.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
    refusal.headers_mut().insert(ALLOW, HeaderValue::from_static(methods));
    refusal
}
