//! What both faces share: one connection served by hyper within limits, and the shapes of answers.

use std::{collections::VecDeque, convert::Infallible, future::Future, time::Duration};

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

/// The open connections of a face. For one too many the oldest makes room: clients that are slow with their requests, or
/// do not take their answers, keep no probe out.
pub struct Open {
    most: usize,
    tasks: VecDeque<AbortHandle>,
}

impl Open {
    pub fn up_to(most: usize) -> Self {
        Open { most, tasks: VecDeque::new() }
    }

    /// Serves a connection in a task of its own.
    pub async fn add(&mut self, connection: impl Future<Output = ()> + Send + 'static) {
        self.tasks.retain(|task| !task.is_finished());
        if self.tasks.len() >= self.most {
            // Those that came a moment ago have their turn first: a whole request is answered in it.
            yield_now().await;
            if let Some(oldest) = self.tasks.pop_front() {
                oldest.abort();
            }
        }
        self.tasks.push_back(tokio::spawn(connection).abort_handle());
    }
}

/// Serves one request and closes: an idle client must not keep a probe of the kubelet out.
pub async fn serve_one<Io, Answering>(io: Io, answer: impl Fn(Request<Incoming>) -> Answering)
where
    Io: AsyncRead + AsyncWrite + Unpin,
    Answering: Future<Output = Answer>,
{
    let service = service_fn(|request| {
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
