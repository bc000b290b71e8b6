//! The HTTPS server below the webhook: accept, handshake, serve; each with a time limit, and no more connections at a time
//! than a bound. The certificate is read again when its file changes.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result};
use arc_swap::ArcSwap;
use axum::Router;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use rustls::ServerConfig;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;

const CONNECTIONS: usize = 1024;
const HANDSHAKE: Duration = Duration::from_secs(5);
const HEADERS: Duration = Duration::from_secs(10);
/// The API server keeps its connections and may ask again at any time; others need no more than one review's time.
const CONNECTION: Duration = Duration::from_secs(3600);
const RELOAD: Duration = Duration::from_secs(5);

/// A serving certificate in two PEM files.
#[derive(Debug, Clone)]
pub struct Certificate {
    /// The chain, the leaf first.
    pub chain: PathBuf,
    /// The leaf's key.
    pub key: PathBuf,
}

impl Certificate {
    fn changed(&self) -> Option<(SystemTime, SystemTime)> {
        let time = |file| std::fs::metadata(file).and_then(|data| data.modified()).ok();
        Some((time(&self.chain)?, time(&self.key)?))
    }

    fn config(&self) -> Result<Arc<ServerConfig>> {
        let chain = CertificateDer::pem_file_iter(&self.chain)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .with_context(|| format!("{}: not a certificate in PEM", self.chain.display()))?;
        let key = PrivateKeyDer::from_pem_file(&self.key)
            .with_context(|| format!("{}: not a key in PEM", self.key.display()))?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .with_context(|| format!("{}: does not fit its key", self.chain.display()))?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

/// Serves until the listener fails for good.
///
/// # Errors
/// The certificate cannot be read at the start. Later a bad one is named in the log, and the last good one goes on.
pub async fn serve(listener: TcpListener, certificate: Certificate, router: Router) -> Result<()> {
    let config = Arc::new(ArcSwap::new(certificate.config()?));
    tokio::spawn(reload(certificate, Arc::clone(&config)));
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let permit = Arc::clone(&places).acquire_owned().await?;
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let acceptor = TlsAcceptor::from(config.load_full());
        let router = router.clone();
        tokio::spawn(async move {
            if let Ok(Err(error)) = timeout(CONNECTION, connection(stream, acceptor, router)).await {
                tracing::debug!(%error, "a connection of the webhook ended");
            }
            drop(permit);
        });
    }
}

async fn connection(stream: TcpStream, acceptor: TlsAcceptor, router: Router) -> Result<()> {
    stream.set_nodelay(true)?;
    let stream = timeout(HANDSHAKE, acceptor.accept(stream)).await.context("no TLS handshake in time")??;
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADERS);
    builder.http2().timer(TokioTimer::new()).keep_alive_interval(Duration::from_secs(30));
    let service = TowerToHyperService::new(router);
    builder.serve_connection(TokioIo::new(stream), service).await.map_err(|error| anyhow::anyhow!(error))
}

async fn reload(certificate: Certificate, config: Arc<ArcSwap<ServerConfig>>) {
    let mut seen = certificate.changed();
    loop {
        sleep(RELOAD).await;
        let now = certificate.changed();
        if now == seen {
            continue;
        }
        match certificate.config() {
            Ok(new) => {
                config.store(new);
                seen = now;
                tracing::info!(file = %certificate.chain.display(), "the serving certificate was read again");
            }
            Err(error) => tracing::warn!("{error:#}; the last good certificate goes on"),
        }
    }
}
