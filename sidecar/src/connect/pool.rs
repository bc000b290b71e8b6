//! Open HTTP connections, lent to calls. HTTP/2 connections are shared by as many streams as their window
//! holds; HTTP/1 connections go to one call at a time. Each worker has its own pool.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hash, Hasher},
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use fnv::FnvHasher;
use futures_util::{
    FutureExt,
    future::{self, Either},
};
use h2::client::SendRequest;
use hyper::{Request, Response, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::{
    sync::watch,
    time::{Instant, timeout, timeout_at},
};
use weft_proto::spiffe::SpiffeId;

use super::{
    Connector, Secured, SendFailed,
    http2::{self, STREAMS, handshake, is_open, silence},
    idle::idle_limit,
    standing::Standing,
};
use crate::{
    http::Body,
    model::{Failed, Failure, HttpVersion, Protocol, Result},
    telemetry::{Metrics, OpenConnection},
    tls::{self, Alpn, VerifiedPeer},
};

/// What must be the same for a connection to be used again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// Where it goes.
    pub address: SocketAddr,
    /// Whom it must have proven.
    pub security: Security,
    /// What it speaks.
    pub version: HttpVersion,
}

/// Asked for at every request: keys that differ in the identities alone are rare, and need not differ in hash.
impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.address.hash(state);
        self.version.hash(state);
    }
}

/// How a connection is secured.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Security {
    /// Not at all: to the app on this host, or to a service outside the mesh.
    Plain,
    /// Mutual TLS with a peer that has one of these identities.
    Mesh(Arc<[SpiffeId]>),
}

/// Bytes read at a time from an HTTP/1 server, and so the longest head of its answers.
const HTTP1_BUFFER: usize = 128 * 1024;
/// Connections to one key; past it a call is refused rather than queued without bound.
const CONNECTIONS_PER_KEY: usize = 256;
/// A connection that is idle for less may just have been dialled for a call that has not taken it yet.
const JUST_USED: Duration = Duration::from_millis(100);
/// Idle HTTP/1 connections kept per key: as many as an app under load has had at a time, or each burst of calls dials
/// anew; there are never more than requests at a time. The youngest are used first, so those that are too many grow
/// old and are closed.
const IDLE_PER_KEY: usize = 16_384;

/// The connections of one worker.
pub struct Pool {
    connector: Connector,
    metrics: Arc<Metrics>,
    shelves: Mutex<Shelves>,
}

/// Asked at every request. Of a key a stranger chooses the port at most, which cannot make many of one hash.
type Shelves = HashMap<Key, Shelf, BuildHasherDefault<FnvHasher>>;

#[derive(Default)]
struct Shelf {
    http2: Vec<Arc<Http2>>,
    /// A dial is under way; whoever waits for it hears how it ended.
    dialing: Option<watch::Receiver<Option<Result<()>>>>,
    http1: Vec<Idle>,
}

struct Http2 {
    sender: SendRequest<Bytes>,
    peer: Option<VerifiedPeer>,
    standing: Standing,
    streams: AtomicUsize,
    idle_since: Mutex<Instant>,
}

struct Idle {
    connection: Http1,
    since: Instant,
}

struct Http1 {
    sender: http1::SendRequest<Body>,
    peer: Option<VerifiedPeer>,
    standing: Standing,
}

/// The head of an answer and its connection, or why there is none.
pub type Sent = std::result::Result<(Response<Body>, InUse), SendFailed>;

/// A connection for one call.
pub struct Lease {
    connection: Connection,
    /// The connection was used before: it may have been closed by the other side meanwhile.
    pub reused: bool,
}

enum Connection {
    Http2(Http2Stream),
    Http1(Http1, Option<(Arc<Pool>, Key)>),
}

/// One stream of an HTTP/2 connection; gives its place back when dropped.
struct Http2Stream {
    connection: Arc<Http2>,
    sender: SendRequest<Bytes>,
}

/// Keeps a connection in use until the answer's body has ended.
pub struct InUse {
    connection: Connection,
}

impl Pool {
    /// An empty pool that dials with `connector`.
    pub fn new(connector: Connector, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Pool { connector, metrics, shelves: Mutex::default() })
    }

    /// Lends a connection, dialling within `limit` where none is free.
    ///
    /// # Errors
    /// Those of [`Connector::connect`]; `overloaded` past the bound of connections; `connect_timeout` where the server
    /// closes each connection before it takes the call.
    pub async fn lend(self: &Arc<Self>, key: &Key, limit: Duration) -> Result<Lease> {
        match key.version {
            HttpVersion::Http2 => self.lend_http2(key, limit).await,
            HttpVersion::Http1 => self.lend_http1(key, limit).await,
        }
    }

    async fn lend_http2(self: &Arc<Self>, key: &Key, limit: Duration) -> Result<Lease> {
        let mut reused = true;
        let over = Instant::now() + limit;
        loop {
            let mut dialing = match self.take_or_dial(key, limit)? {
                Ok(stream) => return Ok(Lease { connection: Connection::Http2(stream), reused }),
                Err(dialing) => dialing,
            };
            reused = false;
            let outcome = timeout_at(over, dialing.wait_for(Option::is_some)).await;
            let outcome = outcome.map_err(|_| {
                let detail = format!("{}: no connection took the call in time", key.address);
                Failed::new(Failure::ConnectTimeout, detail)
            })?;
            let outcome = outcome.ok().and_then(|outcome| outcome.clone());
            outcome
                .unwrap_or_else(|| Err(Failed::new(Failure::Internal, "a dial ended without an outcome")))?;
        }
    }

    /// A free stream, or the dial to wait for.
    fn take_or_dial(
        self: &Arc<Self>,
        key: &Key,
        limit: Duration,
    ) -> Result<std::result::Result<Http2Stream, watch::Receiver<Option<Result<()>>>>> {
        let mut shelves = self.shelves();
        if !shelves.contains_key(key) {
            shelves.insert(key.clone(), Shelf::default());
        }
        let Some(shelf) = shelves.get_mut(key) else {
            return Err(Failed::new(Failure::Internal, "a shelf of the pool vanished"));
        };
        shelf.http2.retain(|connection| connection.is_usable());
        if let Some(stream) = shelf.http2.iter().find_map(Http2Stream::take) {
            return Ok(Ok(stream));
        }
        if let Some(dialing) = &shelf.dialing {
            return Ok(Err(dialing.clone()));
        }
        if shelf.http2.len() >= CONNECTIONS_PER_KEY {
            let detail = format!("{}: {CONNECTIONS_PER_KEY} connections are full", key.address);
            return Err(Failed::new(Failure::Overloaded, detail));
        }
        let (tell, dialing) = watch::channel(None);
        shelf.dialing = Some(dialing.clone());
        // A task of its own: the call that began the dial may go away, the others still wait for it.
        tokio::spawn(self.clone().dial_http2(key.clone(), limit, tell));
        Ok(Err(dialing))
    }

    async fn dial_http2(self: Arc<Self>, key: Key, limit: Duration, tell: watch::Sender<Option<Result<()>>>) {
        let opened = self.open_http2(&key, limit).await;
        let mut shelves = self.shelves();
        let outcome = opened.map(|connection| shelves.entry(key.clone()).or_default().http2.push(connection));
        if let Some(shelf) = shelves.get_mut(&key) {
            shelf.dialing = None;
        }
        drop(shelves);
        tell.send_replace(Some(outcome));
    }

    async fn open_http2(self: &Arc<Self>, key: &Key, limit: Duration) -> Result<Arc<Http2>> {
        let secured = self.connector.connect(key.address, &key.security, Alpn::Http2, limit).await;
        let Secured { mut stream, peer } = self.making_room(secured)?;
        if peer.is_some() {
            // TLS 1.3: its verdict on our certificate comes with its first bytes. Heard before anything is sent,
            // a refusal is known for what it is.
            let heard = timeout(limit, tls::first_bytes(&mut stream)).await;
            heard.map_err(|_| silent(key.address))?.map_err(|error| refused(key.address, &error))?;
        }
        let read = stream.count_reads();
        let (sender, driver, pings) = handshake(stream).await.map_err(|failed| failed.failed)?;
        let standing = Standing::default();
        let (address, is_sidecar) = (key.address, peer.is_some());
        let dead = async move {
            if !is_sidecar {
                return future::pending().await;
            }
            silence(pings, read).await;
            Failed::new(Failure::Reset, format!("{address}: silent, and no answer to a PING"))
        };
        let open = self.metrics.pool_connection(Protocol::Http2);
        let driving = standing.clone().drive(driver, peer.clone(), self.connector.clone(), dead, Some(open));
        tokio::spawn(driving);
        Ok(Arc::new(Http2 {
            sender,
            peer,
            standing,
            streams: AtomicUsize::new(0),
            idle_since: Mutex::new(Instant::now()),
        }))
    }

    async fn lend_http1(self: &Arc<Self>, key: &Key, limit: Duration) -> Result<Lease> {
        let home = Some((self.clone(), key.clone()));
        if let Some(idle) = self.take_idle(key) {
            return Ok(Lease { connection: Connection::Http1(idle.connection, home), reused: true });
        }
        let open = self.metrics.pool_connection(Protocol::Http1);
        // Boxed, or every call would keep room for a dial.
        let connection = Box::pin(open_http1(&self.connector, key, limit, Some(open))).await;
        let connection = self.making_room(connection)?;
        Ok(Lease { connection: Connection::Http1(connection, home), reused: false })
    }

    fn take_idle(&self, key: &Key) -> Option<Idle> {
        let mut shelves = self.shelves();
        let shelf = shelves.get_mut(key)?;
        // The youngest first: the others may grow old and be closed. They may be many, and are not looked at here.
        let mut at = shelf.http1.len();
        while at > 0 {
            at -= 1;
            let connection = &shelf.http1[at].connection;
            if !connection.is_usable() {
                shelf.http1.swap_remove(at);
            } else if connection.sender.is_ready() {
                return Some(shelf.http1.swap_remove(at));
            }
        }
        None
    }

    fn take_back(&self, key: Key, connection: Http1) {
        if !connection.is_usable() {
            return;
        }
        let mut shelves = self.shelves();
        let shelf = shelves.entry(key).or_default();
        if shelf.http1.len() < IDLE_PER_KEY {
            shelf.http1.push(Idle { connection, since: Instant::now() });
        }
    }

    /// Closes connections that were idle for too long. Called now and then.
    pub fn sweep(&self, now: Instant) {
        let mut shelves = self.shelves();
        let mut ages: Vec<Duration> = shelves.values().flat_map(|shelf| shelf.idle_for(now)).collect();
        close_idle_for(&mut shelves, idle_limit(&mut ages), now);
    }

    /// Where a dial failed for want of a descriptor, the next one shall find some.
    fn making_room<T>(&self, dialled: Result<T>) -> Result<T> {
        dialled.inspect_err(|failed| {
            if failed.failure == Failure::Overloaded {
                self.close_idle(Instant::now());
            }
        })
    }

    /// Closes all idle connections but those that were used this very moment, for want of descriptors.
    pub fn close_idle(&self, now: Instant) {
        close_idle_for(&mut self.shelves(), JUST_USED, now);
    }

    fn shelves(&self) -> MutexGuard<'_, Shelves> {
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An HTTP/1 connection that is not shared and not kept: for upgrades and CONNECT.
///
/// # Errors
/// Those of [`Connector::connect`].
pub async fn one_off(connector: &Connector, key: &Key, limit: Duration) -> Result<Lease> {
    let connection = open_http1(connector, key, limit, None).await?;
    Ok(Lease { connection: Connection::Http1(connection, None), reused: false })
}

fn close_idle_for(shelves: &mut Shelves, limit: Duration, now: Instant) {
    let stays = |idle_for: Option<Duration>| idle_for.is_none_or(|age| age < limit);
    shelves.retain(|_, shelf| {
        shelf.http2.retain(|connection| connection.is_usable() && stays(connection.idle_for(now)));
        shelf.http1.retain(|idle| idle.connection.is_usable() && stays(Some(now.duration_since(idle.since))));
        !shelf.http2.is_empty() || !shelf.http1.is_empty() || shelf.dialing.is_some()
    });
    if shelves.len() < shelves.capacity() / 4 {
        shelves.shrink_to_fit();
    }
}

fn silent(address: SocketAddr) -> Failed {
    Failed::new(Failure::ConnectTimeout, format!("{address}: silent after the TLS handshake"))
}

fn refused(address: SocketAddr, error: &io::Error) -> Failed {
    let why = if tls::refused_by_peer(error) { "it refuses our certificate: " } else { "" };
    Failed::new(Failure::Handshake, format!("{address}: {why}{error}"))
}

async fn open_http1(
    connector: &Connector,
    key: &Key,
    limit: Duration,
    open: Option<OpenConnection>,
) -> Result<Http1> {
    let Secured { stream, peer } = connector.connect(key.address, &key.security, Alpn::Http1, limit).await?;
    let (sender, driver) = http1::Builder::new()
        .title_case_headers(true)
        .max_buf_size(HTTP1_BUFFER)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| SendFailed::from_hyper(&error, true).failed)?;
    let standing = Standing::default();
    let (driver, connector) = (driver.with_upgrades(), connector.clone());
    tokio::spawn(standing.clone().drive(driver, peer.clone(), connector, future::pending(), open));
    Ok(Http1 { sender, peer, standing })
}

impl Shelf {
    fn idle_for(&self, now: Instant) -> impl Iterator<Item = Duration> {
        let http1 = self.http1.iter().map(move |idle| now.duration_since(idle.since));
        self.http2.iter().filter_map(move |connection| connection.idle_for(now)).chain(http1)
    }
}

impl Http1 {
    fn is_usable(&self) -> bool {
        !self.standing.is_retired() && !self.sender.is_closed()
    }
}

impl Http2 {
    fn is_usable(&self) -> bool {
        !self.standing.is_retired()
    }

    /// For how long no call has used it; none while one does.
    fn idle_for(&self, now: Instant) -> Option<Duration> {
        let since = *self.idle_since.lock().unwrap_or_else(PoisonError::into_inner);
        (self.streams.load(Ordering::Relaxed) == 0).then(|| now.duration_since(since))
    }
}

impl Http2Stream {
    fn take(connection: &Arc<Http2>) -> Option<Self> {
        let mut sender = connection.sender.clone();
        if !is_open(&mut sender) {
            connection.standing.retire();
            return None;
        }
        // What goes past the server's bound would wait for another stream's end.
        let most = sender.current_max_send_streams().clamp(1, STREAMS);
        // Only this worker takes streams of this connection, so that load and add need not be one step.
        if connection.streams.load(Ordering::Relaxed) >= most {
            return None;
        }
        connection.streams.fetch_add(1, Ordering::Relaxed);
        Some(Http2Stream { connection: connection.clone(), sender })
    }
}

impl Drop for Http2Stream {
    fn drop(&mut self) {
        let connection = &self.connection;
        if connection.streams.fetch_sub(1, Ordering::Relaxed) == 1 {
            *connection.idle_since.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        }
    }
}

impl Lease {
    /// Begins to send a request at once (it is large: each future that it waits in would move it), then waits for the
    /// head of its answer. The connection stays in use until the returned guard is dropped or finished.
    ///
    /// # Errors
    /// What happened, and whether it is certain that nothing was processed.
    pub fn send(self, request: Request<Body>) -> impl Future<Output = Sent> {
        let mut in_use = InUse { connection: self.connection };
        let sending = match &mut in_use.connection {
            Connection::Http2(stream) => Either::Left(http2::send(&mut stream.sender, request)),
            Connection::Http1(http1, _) => Either::Right(send_http1(http1, request)),
        };
        async move {
            match (sending.await, in_use.cut()) {
                (Ok(response), _) => Ok((response, in_use)),
                // Whatever it was doing when we cut it, it may have done.
                (Err(_), Some(reason)) => {
                    Err(SendFailed { failed: reason.clone(), nothing_processed: false })
                }
                (Err(failed), None) => Err(failed),
            }
        }
    }
}

fn send_http1(
    http1: &mut Http1,
    request: Request<Body>,
) -> impl Future<Output = std::result::Result<Response<Body>, SendFailed>> + use<> {
    http1.sender.try_send_request(request).map(|sent| {
        let response =
            sent.map_err(|error| SendFailed::from_hyper(error.error(), error.message().is_some()))?;
        Ok(response.map(Body::from))
    })
}

impl InUse {
    /// Who proved to be there; none in plaintext.
    pub fn peer(&self) -> Option<&VerifiedPeer> {
        match &self.connection {
            Connection::Http2(stream) => stream.connection.peer.as_ref(),
            Connection::Http1(connection, _) => connection.peer.as_ref(),
        }
    }

    /// Why we cut the connection, if we did.
    pub fn cut(&self) -> Option<&Failed> {
        self.standing().cut()
    }

    fn standing(&self) -> &Standing {
        match &self.connection {
            Connection::Http2(stream) => &stream.connection.standing,
            Connection::Http1(connection, _) => &connection.standing,
        }
    }

    /// The answer's body was read to its end: the connection may serve another call.
    pub fn finished(self) {
        if let Connection::Http1(connection, Some((pool, key))) = self.connection {
            pool.take_back(key, connection);
        }
    }
}

#[cfg(test)]
mod tests;
