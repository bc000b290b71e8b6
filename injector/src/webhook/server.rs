//! The HTTPS server below the webhook: accept, handshake, serve; each with a time limit, and no more connections at a time
//! than a bound. Each handshake shows the certificate of that moment.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result};
use axum::Router;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;

use crate::certificate::Serving;

const CONNECTIONS: usize = 1024;
const HANDSHAKE: Duration = Duration::from_secs(5);
const HEADERS: Duration = Duration::from_secs(10);
/// The API server keeps its connections and may ask again at any time; others need no more than one review's time.
const CONNECTION: Duration = Duration::from_secs(3600);

/// Serves until the listener fails for good. While there is no certificate, connections are closed.
///
/// # Errors
/// The listener has ended.
pub async fn serve(listener: TcpListener, serving: Arc<Serving>, router: Router) -> Result<()> {
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
        let Some(config) = serving.config() else { continue };
        let acceptor = TlsAcceptor::from(config);
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
