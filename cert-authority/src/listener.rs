//! Accepting workloads: the cap on connections, the handshake with its time limit, and who is there.
//!
//! A connection counts from its accept to its end. A client certificate is optional, but one that is shown must
//! lead to our roots (rustls checks that) and be exactly one workload's. Decides nothing about certificates.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::{sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::transport::server::Connected;
use weft_proto::certificate::Leaf;

use crate::{metrics::Metrics, service::Caller, upkeep::Tls};

/// For the TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// After an accept that failed (no descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Secured connections that wait for the service.
const WAITING: usize = 16;

/// Accepts and secures connections until the program stops.
pub fn accept(
    listener: TcpListener,
    tls: watch::Receiver<Arc<Tls>>,
    max_connections: usize,
    metrics: Arc<Metrics>,
    mut stopping: watch::Receiver<bool>,
) -> mpsc::Receiver<Connection> {
    let (sender, receiver) = mpsc::channel(WAITING);
    let permits = Arc::new(Semaphore::new(max_connections));
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = stopping.wait_for(|stopping| *stopping) => return,
            };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!("accepting: {error}");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(permit) = permits.clone().try_acquire_owned() else {
                metrics.dropped.get_or_create(&[("reason", "too_many")]).inc();
                continue;
            };
            let counted = Counted::new(permit, metrics.clone());
            let config = tls.borrow().config.clone();
            let sender = sender.clone();
            tokio::spawn(async move {
                if let Some(connection) = secure(stream, address, config, counted).await {
                    let _ = sender.send(connection).await;
                }
            });
        }
    });
    receiver
}

async fn secure(
    stream: TcpStream,
    address: SocketAddr,
    config: Arc<ServerConfig>,
    counted: Counted,
) -> Option<Connection> {
    let _ = stream.set_nodelay(true);
    let refuse = |reason: &'static str, error: String| {
        tracing::info!(%address, error, "a connection was refused");
        counted.metrics.dropped.get_or_create(&[("reason", reason)]).inc();
    };
    let tls = match timeout(HANDSHAKE_TIMEOUT, TlsAcceptor::from(config).accept(stream)).await {
        Ok(Ok(tls)) => tls,
        Ok(Err(error)) => {
            refuse("handshake", error.to_string());
            return None;
        }
        Err(_) => {
            refuse("timeout", "the TLS handshake took too long".to_owned());
            return None;
        }
    };
    let leaf = match tls.get_ref().1.peer_certificates().and_then(|chain| chain.first()) {
        None => None,
        Some(certificate) => match Leaf::parse(certificate) {
            Ok(leaf) => Some(Arc::new(leaf)),
            Err(error) => {
                refuse("certificate", error.to_string());
                return None;
            }
        },
    };
    Some(Connection { tls, caller: Caller { address, leaf }, _counted: counted })
}

/// A connection counts while this lives.
struct Counted {
    metrics: Arc<Metrics>,
    _permit: OwnedSemaphorePermit,
}

impl Counted {
    fn new(permit: OwnedSemaphorePermit, metrics: Arc<Metrics>) -> Self {
        metrics.connections.inc();
        Counted { metrics, _permit: permit }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.metrics.connections.dec();
    }
}

/// A secured connection, as tonic wants it: bytes, and who is there.
pub struct Connection {
    tls: TlsStream<TcpStream>,
    caller: Caller,
    _counted: Counted,
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(context)
    }
}
