//! Where the parts of the authority meet: listeners, TLS, limits, upkeep, drain.
//!
//! The order of the start is that of readiness: state, addresses, then service. On a stop the probes turn first,
//! then nobody is accepted, streams of the bundle are told, and what is under way may finish.

use std::{
    future::Future,
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use weft_proto::ca::certificate_authority_server::CertificateAuthorityServer;

use crate::{
    admin::{self, Admin},
    audit::Audit,
    authority::Authority,
    directory::{Directory, write_private},
    listener::{Connection, accept},
    metrics::Metrics,
    service::{Face, Guesses, Lifetimes, Service},
    token::Tokens,
    upkeep::{Upkeep, make_tls},
};

/// How `weft-ca serve` was asked to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where root, issuing certificate and tokens are kept.
    pub dir: PathBuf,
    /// Where workloads ask.
    pub listen: SocketAddr,
    /// Probes and metrics.
    pub admin: SocketAddr,
    /// How long certificates live.
    pub lifetimes: Lifetimes,
    /// The audit file; standard output without one.
    pub audit: Option<PathBuf>,
    /// Connections at a time.
    pub max_connections: usize,
    /// Where the addresses are written as JSON once the listeners stand.
    pub address_file: Option<PathBuf>,
}

/// For one Issue request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection is asked to end after this long; a workload connects again.
const CONNECTION_AGE: Duration = Duration::from_secs(3600);
/// A silent connection is probed after this long.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// For what is under way when the program stops.
const DRAIN: Duration = Duration::from_secs(10);
/// A request is a CSR and a token.
const MAX_MESSAGE: usize = 16 * 1024;
/// Streams on one connection: a renewal and the bundle.
const MAX_STREAMS: u32 = 8;
/// Header bytes of a request.
const MAX_HEADERS: u32 = 8 * 1024;

/// Serves until the future ends, then drains.
///
/// # Errors
/// The state is refused, or an address cannot be bound.
pub async fn serve(options: Options, stop: impl Future<Output = ()>) -> Result<()> {
    let directory = Directory::open(&options.dir)
        .with_context(|| "no authority here; `weft-ca init` makes one".to_owned())?;
    let authority = Arc::new(Authority::load(&directory, SystemTime::now())?);
    let tokens = Tokens::open(&directory)?;
    let audit = Audit::open(options.audit.as_deref())?;
    let metrics = Arc::new(Metrics::default());
    metrics.set_ends(authority.root_not_after(), authority.issuing_not_after());
    let tls = Arc::new(make_tls(&authority, SystemTime::now())?);
    let listener = bind(options.listen).await?;
    let admin_listener = bind(options.admin).await?;
    announce(&options, &authority, &listener, &admin_listener)?;

    let (stopping_sender, stopping) = watch::channel(false);
    let (authority_sender, authority) = watch::channel(authority);
    let (tls_sender, tls) = watch::channel(tls);
    let serving = Arc::new(AtomicBool::new(true));
    let admin = Admin { metrics: metrics.clone(), authority: authority.clone(), serving: serving.clone() };
    let service = Service {
        authority,
        stopping: stopping.clone(),
        tokens: tokens.clone(),
        audit,
        metrics: metrics.clone(),
        lifetimes: options.lifetimes,
        guesses: Guesses::default(),
    };
    let upkeep = Upkeep { directory, tokens, metrics: metrics.clone(), authority_sender, tls_sender };
    let background = [tokio::spawn(admin::serve(admin_listener, admin)), tokio::spawn(upkeep.run())];
    let connections = accept(listener, tls, options.max_connections, metrics, stopping.clone());
    let grpc = tokio::spawn(serve_grpc(service, connections, stopping));
    stop.await;
    tracing::info!("stopping");
    serving.store(false, Ordering::Relaxed);
    let _ = stopping_sender.send(true);
    if timeout(DRAIN, grpc).await.is_err() {
        tracing::warn!("connections were cut after {} s", DRAIN.as_secs());
    }
    for task in background {
        task.abort();
    }
    Ok(())
}

async fn bind(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("listening on {address}"))
}

fn announce(
    options: &Options,
    authority: &Authority,
    listener: &TcpListener,
    admin: &TcpListener,
) -> Result<()> {
    let (listen, admin) = (listener.local_addr()?, admin.local_addr()?);
    tracing::info!(
        %listen,
        %admin,
        trust_domain = %authority.trust_domain(),
        root_sha256 = authority.root_sha256(),
        "serving"
    );
    if let Some(path) = &options.address_file {
        let text = serde_json::json!({ "listen": listen, "admin": admin }).to_string();
        write_private(path, text.as_bytes()).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

async fn serve_grpc(
    service: Service,
    connections: mpsc::Receiver<Connection>,
    mut stopping: watch::Receiver<bool>,
) -> Result<(), tonic::transport::Error> {
    let service =
        CertificateAuthorityServer::new(Face(Arc::new(service))).max_decoding_message_size(MAX_MESSAGE);
    let incoming = tokio_stream::StreamExt::map(ReceiverStream::new(connections), Ok::<_, io::Error>);
    Server::builder()
        .max_concurrent_streams(MAX_STREAMS)
        .http2_max_header_list_size(MAX_HEADERS)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .max_connection_age(CONNECTION_AGE)
        .max_connection_age_grace(DRAIN)
        .timeout(REQUEST_TIMEOUT)
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, async move {
            let _ = stopping.wait_for(|stopping| *stopping).await;
        })
        .await
}
