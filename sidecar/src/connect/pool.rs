//! Open HTTP connections, lent to calls. HTTP/2 connections are shared by as many streams as their window
//! holds; HTTP/1 connections go to one call at a time. Each worker has its own pool.

mod lease;
mod shelves;

use std::{
    hash::{Hash, Hasher},
    io,
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use futures_util::future;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::{
    sync::watch,
    time::{Instant, timeout, timeout_at},
};
use weft_proto::spiffe::SpiffeId;

pub use self::lease::{InUse, Lease};
use self::{
    lease::{Connection, Http1, Http2, Http2Stream},
    shelves::{Idle, Shelf, Shelves},
};
use super::{
    Connector, Secured, SendFailed,
    http2::{handshake, silence, stream_window},
    standing::Standing,
};
use crate::{
    model::{Failed, Failure, HttpVersion, Protocol, Result},
    telemetry::{Metrics, OpenConnection},
    tls::{self, Alpn},
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
    /// It is not made: nobody says whom to expect there, and plaintext is forbidden.
    Forbidden,
    /// Mutual TLS with a peer that has one of these identities.
    Mesh(Arc<[SpiffeId]>),
}

/// Bytes read at a time from an HTTP/1 server, and so the longest head of its answers.
const HTTP1_BUFFER: usize = 128 * 1024;
/// Header fields of an answer of HTTP/1 (hyper's own bound of 100 is less than apps send).
const HTTP1_FIELDS: usize = 1000;
/// Connections to one key; past it a call is refused rather than queued without bound.
const CONNECTIONS_PER_KEY: usize = 256;
/// Idle HTTP/1 connections kept per key: as many as an app under load has had at a time, or each burst of calls dials
/// anew; there are never more than requests at a time. The youngest are used first, so those that are too many grow
/// old and are closed.
const IDLE_PER_KEY: usize = 16_384;

/// The connections of one worker.
pub struct Pool {
    connector: Connector,
    metrics: Arc<Metrics>,
    shelves: Arc<Shelves>,
}

impl Pool {
    /// An empty pool that dials with `connector`.
    pub fn new(connector: Connector, metrics: Arc<Metrics>) -> Arc<Self> {
        let shelves = Arc::new(Shelves::new());
        let idle = Arc::downgrade(&shelves);
        connector.reclaimer().register(move || {
            if let Some(idle) = idle.upgrade() {
                idle.make_room(Instant::now());
            }
        });
        Arc::new(Pool { connector, metrics, shelves })
    }

    /// Lends a connection, dialling within `limit` where none is free.
    ///
    /// # Errors
    /// Those of [`Connector::connect`]; `overloaded` past the bound of connections; `connect_refused` where the server
    /// closes the connection before it takes a call.
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
            let mut dialing = match self.take_or_dial(key, limit, !reused)? {
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
            outcome.unwrap_or_else(|| Err(dial_panicked(key.address)))?;
        }
    }

    /// A free stream, or the dial to wait for. `has_dialled`: this call has waited for one already.
    fn take_or_dial(
        self: &Arc<Self>,
        key: &Key,
        limit: Duration,
        has_dialled: bool,
    ) -> Result<std::result::Result<Http2Stream, watch::Receiver<Option<Result<()>>>>> {
        let mut shelves = self.shelves.part(key);
        if !shelves.contains_key(key) {
            shelves.insert(key.clone(), Shelf::default());
        }
        let Some(shelf) = shelves.get_mut(key) else {
            return Err(Failed::new(Failure::Internal, "a shelf of the pool vanished"));
        };
        if let Some(stream) = shelf.http2.iter().find_map(Http2Stream::take) {
            return Ok(Ok(stream));
        }
        let closed_unused = shelf.http2.iter().any(|connection| connection.was_closed_unused());
        shelf.http2.retain(|connection| connection.is_usable());
        if has_dialled && closed_unused {
            let detail = format!("{}: it closes the connection before it takes a call", key.address);
            return Err(Failed::new(Failure::ConnectRefused, detail));
        }
        if let Some(dialing) = shelf.dial() {
            return Ok(Err(dialing.clone()));
        }
        if shelf.http2.len() >= CONNECTIONS_PER_KEY {
            let detail = format!("{}: {CONNECTIONS_PER_KEY} connections are full", key.address);
            return Err(Failed::new(Failure::Overloaded, detail));
        }
        let (tell, dialing) = watch::channel(None);
        shelf.dialing = Some(dialing.clone());
        // A task of its own: the call that began the dial may go away, the others still wait for it.
        let window = stream_window(shelf.http2.len());
        tokio::spawn(self.clone().dial_http2(key.clone(), limit, window, tell));
        Ok(Err(dialing))
    }

    async fn dial_http2(
        self: Arc<Self>,
        key: Key,
        limit: Duration,
        window: u32,
        tell: watch::Sender<Option<Result<()>>>,
    ) {
        let opened = self.open_http2(&key, limit, window).await;
        let mut shelves = self.shelves.part(&key);
        let outcome = opened.map(|connection| shelves.entry(key.clone()).or_default().http2.push(connection));
        if let Some(shelf) = shelves.get_mut(&key) {
            shelf.dialing = None;
        }
        drop(shelves);
        tell.send_replace(Some(outcome));
    }

    async fn open_http2(self: &Arc<Self>, key: &Key, limit: Duration, window: u32) -> Result<Arc<Http2>> {
        let Secured { mut stream, peer } =
            self.connector.connect(key.address, &key.security, Alpn::Http2, limit).await?;
        if peer.is_some() {
            // TLS 1.3: its verdict on our certificate comes with its first bytes. Heard before anything is sent,
            // a refusal is known for what it is.
            let heard = timeout(limit, tls::first_bytes(&mut stream)).await;
            heard.map_err(|_| silent(key.address))?.map_err(|error| refused(key.address, &error))?;
        }
        let read = stream.count_reads();
        let (sender, driver, pings) = handshake(stream, window).await.map_err(|failed| failed.failed)?;
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
        Ok(Http2::new(sender, peer, standing))
    }

    async fn lend_http1(self: &Arc<Self>, key: &Key, limit: Duration) -> Result<Lease> {
        let home = Some((self.clone(), key.clone()));
        if let Some(idle) = self.take_idle(key) {
            return Ok(Lease { connection: Connection::Http1(idle.connection, home), reused: true });
        }
        let open = self.metrics.pool_connection(Protocol::Http1);
        // Boxed, or every call would keep room for a dial.
        let connection = Box::pin(open_http1(&self.connector, key, limit, Some(open))).await?;
        Ok(Lease { connection: Connection::Http1(connection, home), reused: false })
    }

    fn take_idle(&self, key: &Key) -> Option<Idle> {
        let mut shelves = self.shelves.part(key);
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
        let mut shelves = self.shelves.part(&key);
        let shelf = shelves.entry(key).or_default();
        if shelf.http1.len() < IDLE_PER_KEY {
            shelf.http1.push(Idle { connection, since: Instant::now() });
        }
    }

    /// Closes connections that were idle for too long, a few at a time: calls go on between. Called now and then.
    pub async fn sweep(&self, now: Instant) {
        self.shelves.sweep(now).await;
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

fn dial_panicked(address: SocketAddr) -> Failed {
    Failed::new(Failure::Internal, format!("{address}: the task that dialled it ended with a panic"))
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
    let Secured { mut stream, peer } =
        connector.connect(key.address, &key.security, Alpn::Http1, limit).await?;
    stream.hold_write_errors();
    let (sender, driver) = http1::Builder::new()
        .title_case_headers(true)
        .max_buf_size(HTTP1_BUFFER)
        .max_headers(HTTP1_FIELDS)
        // RFC 9112 5.1 and 5.2: taken away and unfolded by whoever passes an answer on.
        .allow_spaces_after_header_name_in_responses(true)
        .allow_obsolete_multiline_headers_in_responses(true)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| SendFailed::from_hyper(&error, true).failed)?;
    let standing = Standing::default();
    let (driver, connector) = (driver.with_upgrades(), connector.clone());
    tokio::spawn(standing.clone().drive(driver, peer.clone(), connector, future::pending(), open));
    Ok(Http1 { sender, peer, standing })
}

#[cfg(test)]
mod tests;
