//! Accepting workloads: a place for each, the handshake with its time limit, and who is there.
//!
//! A client certificate is optional, but one that is shown must lead to our roots (rustls checks that) and be
//! exactly one workload's. Decides nothing about certificates.

use std::{
    future::poll_fn,
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
    sync::{mpsc, watch},
    task::yield_now,
    time::{sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::transport::server::Connected;
use weft_proto::certificate::Leaf;

use crate::{
    connections::{Connections, Place},
    limit::Limit,
    metrics::Metrics,
    service::Caller,
    upkeep::Tls,
};

/// For the TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// After an accept that failed (no descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Lines of the log about connections that were refused.
const LINES_PER_MINUTE: u32 = 60;

/// What accepting takes.
pub struct Accepting {
    /// Where workloads connect.
    pub listener: TcpListener,
    /// How we serve.
    pub tls: watch::Receiver<Arc<Tls>>,
    /// Which connections stand.
    pub connections: Arc<Connections>,
    /// The numbers.
    pub metrics: Arc<Metrics>,
    /// Turns true when the program stops.
    pub stopping: watch::Receiver<bool>,
}

/// Accepts and secures connections until the program stops.
pub async fn accept(accepting: Accepting, secured: mpsc::Sender<Connection>) {
    let Accepting { listener, tls, connections, metrics, mut stopping } = accepting;
    let lines = Arc::new(Limit::new(LINES_PER_MINUTE));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stopping.wait_for(|stopping| *stopping) => return,
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                if let Some(left_out) = lines.take() {
                    tracing::warn!(left_out, "accepting: {error}");
                }
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // None: dropped and counted.
        let Some(place) = connections.enter() else { continue };
        let securing = Securing { address, place, metrics: metrics.clone(), lines: lines.clone() };
        let (config, secured) = (tls.borrow().config.clone(), secured.clone());
        tokio::spawn(async move {
            if let Some(connection) = securing.run(stream, config).await {
                let _ = secured.send(connection).await;
            }
        });
        // Whoever gave way closes first: its descriptor is needed.
        yield_now().await;
    }
}

/// A connection whose far side has not shown yet that it speaks TLS.
struct Securing {
    address: SocketAddr,
    place: Place,
    metrics: Arc<Metrics>,
    lines: Arc<Limit>,
}

impl Securing {
    async fn run(mut self, stream: TcpStream, config: Arc<ServerConfig>) -> Option<Connection> {
        let _ = stream.set_nodelay(true);
        let handshake = timeout(HANDSHAKE_TIMEOUT, TlsAcceptor::from(config).accept(stream));
        let outcome = tokio::select! {
            outcome = handshake => outcome,
            _ = poll_fn(|context| self.place.poll_end(context)) => return None,
        };
        let tls = match outcome {
            Ok(Ok(tls)) => tls,
            Ok(Err(error)) => return self.refuse("handshake", &error.to_string()),
            Err(_) => return self.refuse("timeout", "the TLS handshake took too long"),
        };
        let leaf = match tls.get_ref().1.peer_certificates().and_then(|chain| chain.first()) {
            None => None,
            Some(certificate) => match Leaf::parse(certificate) {
                Ok(leaf) => Some(Arc::new(leaf)),
                Err(error) => return self.refuse("certificate", &error.to_string()),
            },
        };
        let caller = Caller { address: self.address, leaf, activity: self.place.activity().clone() };
        Some(Connection { tls, caller, place: self.place })
    }

    fn refuse(&self, reason: &'static str, error: &str) -> Option<Connection> {
        self.metrics.dropped.get_or_create(&[("reason", reason)]).inc();
        if let Some(left_out) = self.lines.take() {
            tracing::info!(address = %self.address, error, left_out, "a connection was refused");
        }
        None
    }
}

/// A secured connection, as tonic wants it: bytes, and who is there.
pub struct Connection {
    tls: TlsStream<TcpStream>,
    caller: Caller,
    place: Place,
}

impl Connection {
    /// Where the connection is to be closed, every operation on it fails.
    fn check_end(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        match self.place.poll_end(context) {
            Poll::Ready(reason) => Err(reason),
            Poll::Pending => Ok(()),
        }
    }
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
        self.check_end(context)?;
        Pin::new(&mut self.tls).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check_end(context)?;
        Pin::new(&mut self.tls).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check_end(context)?;
        Pin::new(&mut self.tls).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(context)
    }
}
