//! One agent's HTTP interface: over TLS one HTTP/2 connection for everything, over plain HTTP some HTTP/1
//! connections that are kept for the next question. A kept connection that turns out dead is replaced once. When any
//! connection breaks, a new term begins: behind the next one may be a Consul that lost its state, where a question
//! that waits for an index of before would wait until its time is over. Time limits are the caller's.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Request, Response,
    body::Incoming,
    client::conn::{http1, http2},
    header::CONTENT_TYPE,
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::ClientConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{UnixStream, lookup_host},
    sync::{Mutex as AsyncMutex, Semaphore},
    time::timeout,
};

use super::error::{Error, Kind, said};
use crate::{
    config::ConsulAddress,
    net::{self, Stream},
    tls::connect_registry,
};

/// What is offered in TLS (ALPN).
pub(super) const PROTOCOLS: [&[u8]; 2] = [HTTP2, b"http/1.1"];
const HTTP2: &[u8] = b"h2";
/// TCP and TLS together.
const CONNECT: Duration = Duration::from_secs(3);
/// A silent HTTP/2 connection is probed after this long.
const KEEPALIVE: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

type Body = Full<Bytes>;

/// An agent.
pub(super) struct Agent {
    address: ConsulAddress,
    tls: Option<(Arc<ClientConfig>, String)>,
    /// HTTP/1 connections without a question.
    idle: Mutex<Vec<http1::SendRequest<Body>>>,
    http2: AsyncMutex<Option<http2::SendRequest<Body>>>,
    connections: Semaphore,
    most_connections: usize,
    /// How often a connection broke, or the servers behind the agent lost their state.
    term: AtomicU64,
}

/// A connection for one question.
enum Connection {
    Http1(http1::SendRequest<Body>),
    Http2(http2::SendRequest<Body>),
}

/// What an agent said, whatever the status.
pub(super) struct Said {
    pub(super) head: hyper::http::response::Parts,
    pub(super) body: Bytes,
    /// The term in which it was asked.
    pub(super) term: u64,
}

impl Agent {
    /// `tls` with the name that its certificate must have; none: plain HTTP, with at most so many connections.
    pub(super) fn new(
        address: ConsulAddress,
        tls: Option<(Arc<ClientConfig>, String)>,
        most_connections: usize,
    ) -> Self {
        Agent {
            address,
            tls,
            idle: Mutex::default(),
            http2: AsyncMutex::default(),
            connections: Semaphore::new(most_connections),
            most_connections,
            term: AtomicU64::new(0),
        }
    }

    /// For the log.
    pub(super) fn shown(&self) -> String {
        let (tls, host, port) = match &self.address {
            ConsulAddress::Tcp { tls, host, port } => (tls, host, port),
            ConsulAddress::Unix(path) => return format!("unix://{}", path.display()),
        };
        let scheme = if *tls { "https" } else { "http" };
        if host.contains(':') {
            format!("{scheme}://[{host}]:{port}")
        } else {
            format!("{scheme}://{host}:{port}")
        }
    }

    /// Is it asked over TLS?
    pub(super) fn has_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// The value of the `Host` header.
    pub(super) fn authority(&self) -> String {
        if matches!(self.address, ConsulAddress::Unix(_)) {
            return "localhost".to_owned();
        }
        self.shown().split_once("://").map(|(_, rest)| rest.to_owned()).unwrap_or_default()
    }

    /// The number of its term.
    pub(super) fn term(&self) -> u64 {
        self.term.load(Ordering::Relaxed)
    }

    /// What waited for an index of before may wait no more.
    pub(super) fn begin_term(&self) {
        self.term.fetch_add(1, Ordering::Relaxed);
    }

    /// A question on a kept connection got no answer: the next one is asked on a new connection, for this one may lead
    /// nowhere. What still waits on it goes on.
    pub(super) fn forget_connections(&self) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
        // Held while somebody connects: then there is nothing to forget.
        if let Ok(mut shared) = self.http2.try_lock() {
            *shared = None;
        }
    }

    /// Sends the question and reads the answer, of at most `most` bytes. `waiting` is the question for the term
    /// with this number; it is not repeated.
    pub(super) async fn ask(
        &self,
        question: &Request<Body>,
        waiting: Option<(&Request<Body>, u64)>,
        most: usize,
    ) -> Result<Said, Error> {
        let closed = |_| Error::new(Kind::Unreachable, "the client has ended");
        let _one_of_few = match self.tls {
            Some(_) => None,
            None => Some(self.connections.acquire().await.map_err(closed)?),
        };
        if let Some(connection) = self.kept().await {
            let term = self.term.load(Ordering::Relaxed);
            let waiting = waiting.filter(|(_, then)| *then == term).map(|(waiting, _)| waiting);
            match self.exchange(connection, waiting.unwrap_or(question), most).await {
                Err(error) if waiting.is_none() && error.kind == Kind::Unreachable => {}
                other => return other,
            }
        }
        let connection = match timeout(CONNECT, self.connect()).await {
            Ok(connected) => connected?,
            Err(_) => return Err(unreachable(format!("cannot be connected within {CONNECT:?}"))),
        };
        let is_new = |error: Error| match error.kind {
            // An agent takes 200 connections of one client address, and closes the rest without a word.
            Kind::Unreachable => Error {
                text: format!(
                    "{}, and it was new; are there too many from this address (limits.http_max_conns_per_client)?",
                    error.text
                ),
                ..error
            },
            _ => error,
        };
        self.exchange(connection, question, most).await.map_err(is_new)
    }

    async fn exchange(
        &self,
        connection: Connection,
        question: &Request<Body>,
        most: usize,
    ) -> Result<Said, Error> {
        let said = self.exchange_once(connection, question, most).await;
        if matches!(&said, Err(error) if error.kind == Kind::Unreachable) {
            self.begin_term();
        }
        said
    }

    async fn exchange_once(
        &self,
        connection: Connection,
        question: &Request<Body>,
        most: usize,
    ) -> Result<Said, Error> {
        let term = self.term.load(Ordering::Relaxed);
        match connection {
            Connection::Http1(mut sender) => {
                let answer = sender.send_request(question.clone()).await.map_err(broke)?;
                let said = read(answer, most, term).await?;
                if sender.ready().await.is_ok() {
                    let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
                    if idle.len() < self.most_connections {
                        idle.push(sender);
                    }
                }
                Ok(said)
            }
            Connection::Http2(mut sender) => {
                read(sender.send_request(question.clone()).await.map_err(broke)?, most, term).await
            }
        }
    }

    /// A connection from before, if one still stands.
    async fn kept(&self) -> Option<Connection> {
        if self.tls.is_some() {
            let mut shared = self.http2.lock().await;
            if let Some(sender) = shared.as_ref().filter(|sender| sender.is_ready()) {
                return Some(Connection::Http2(sender.clone()));
            }
            if shared.take().is_some() {
                self.begin_term();
            }
        }
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let before = idle.len();
        idle.retain(|sender| !sender.is_closed());
        if idle.len() < before {
            self.begin_term();
        }
        std::iter::from_fn(|| idle.pop()).find(|sender| sender.is_ready()).map(Connection::Http1)
    }

    async fn connect(&self) -> Result<Connection, Error> {
        let Some((config, name)) = &self.tls else {
            return match &self.address {
                ConsulAddress::Unix(path) => {
                    let refused = |error: io::Error| {
                        unreachable(format!(
                            "cannot be reached: {error}; is the agent running, and may we write there?"
                        ))
                    };
                    self.speak_http1(UnixStream::connect(path).await.map_err(refused)?).await
                }
                ConsulAddress::Tcp { host, port, .. } => self.speak_http1(dial(host, *port).await?).await,
            };
        };
        // Held while connecting, so that many questions at the start share one connection.
        let mut shared = self.http2.lock().await;
        if let Some(sender) = shared.as_ref().filter(|sender| sender.is_ready()) {
            return Ok(Connection::Http2(sender.clone()));
        }
        let ConsulAddress::Tcp { host, port, .. } = &self.address else {
            return Err(unreachable("a socket has no TLS".to_owned()));
        };
        let stream = dial(host, *port).await?;
        let (stream, protocol) = connect_registry(stream, config.clone(), name)
            .await
            .map_err(|error| unreachable(format!("TLS failed: {error}{}", hint(&error))))?;
        if protocol.as_deref() != Some(HTTP2) {
            return self.speak_http1(stream).await;
        }
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .adaptive_window(true)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(broke)?;
        tokio::spawn(connection);
        *shared = Some(sender.clone());
        Ok(Connection::Http2(sender))
    }

    async fn speak_http1(
        &self,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    ) -> Result<Connection, Error> {
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broke)?;
        // It ends when the sender is dropped.
        tokio::spawn(connection);
        Ok(Connection::Http1(sender))
    }
}

/// The first address of this host that answers.
async fn dial(host: &str, port: u16) -> Result<Stream, Error> {
    let unknown = |error: io::Error| unreachable(format!("its address is not known: {error}"));
    let mut last = "its name has no address".to_owned();
    for address in lookup_host((host, port)).await.map_err(unknown)? {
        match net::dial(address).await {
            Ok(tcp) => return Ok(tcp.into()),
            Err(error) => last = format!("cannot be reached at {address}: {error}; is the agent running?"),
        }
    }
    Err(unreachable(last))
}

async fn read(answer: Response<Incoming>, most: usize, term: u64) -> Result<Said, Error> {
    let (head, body) = answer.into_parts();
    match Limited::new(body, most).collect().await {
        Ok(collected) => {
            let body = collected.to_bytes();
            let is_page =
                head.headers.get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"text/html"));
            if is_page && head.status.is_success() {
                let text = format!("a web page came ({}); is a proxy in between?", said(&body));
                return Err(Error::new(Kind::BadAnswer, text));
            }
            Ok(Said { head, body, term })
        }
        Err(error) if error.is::<http_body_util::LengthLimitError>() => {
            Err(Error::new(Kind::BadAnswer, format!("the answer is longer than {most} bytes; it is refused")))
        }
        Err(error) => Err(unreachable(format!("the answer broke off: {error}"))),
    }
}

fn broke(error: hyper::Error) -> Error {
    unreachable(format!("the connection broke: {error}"))
}

fn unreachable(text: String) -> Error {
    Error::new(Kind::Unreachable, text)
}

/// What most often is behind a failed handshake.
fn hint(error: &io::Error) -> &'static str {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match tls {
        Some(rustls::Error::InvalidMessage(_)) => "; does it speak plain HTTP there?",
        Some(rustls::Error::InvalidCertificate(_)) => "; see --consul-ca-file and --consul-server-name",
        Some(rustls::Error::AlertReceived(_)) => "; does it want a certificate (--consul-certificate)?",
        _ => "",
    }
}
