//! Probes and metrics over plain HTTP: `/live`, `/ready`, `/metrics`. Nothing else, and nothing secret.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::CONTENT_TYPE,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
    time::sleep,
};

use crate::{authority::Authority, metrics::Metrics};

/// What the probes look at.
#[derive(Clone)]
pub struct Admin {
    /// The numbers.
    pub metrics: Arc<Metrics>,
    /// Who signs now.
    pub authority: watch::Receiver<Arc<Authority>>,
    /// False before the listener stands, and again while draining.
    pub serving: Arc<AtomicBool>,
}

/// Probes and scrapes at a time.
const CONNECTIONS: usize = 64;
/// For the head of a request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// For a whole connection.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(60);
/// After an accept that failed (no descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until the program ends.
pub async fn serve(listener: TcpListener, admin: Admin) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        // The semaphore is never closed.
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!("accepting on the admin port: {error}");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let admin = admin.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let admin = admin.clone();
                async move { Ok::<_, Infallible>(answer(&admin, &request)) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service);
            let _ = tokio::time::timeout(CONNECTION_TIMEOUT, connection).await;
            drop(permit);
        });
    }
}

fn answer(admin: &Admin, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n".to_owned());
    }
    match request.uri().path() {
        "/live" => text(StatusCode::OK, "live\n".to_owned()),
        "/ready" => ready(admin),
        "/metrics" => {
            let mut answer = text(StatusCode::OK, admin.metrics.render());
            let openmetrics = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            answer.headers_mut().insert(CONTENT_TYPE, openmetrics.parse().expect("a header value"));
            answer
        }
        _ => text(StatusCode::NOT_FOUND, "/live, /ready, /metrics\n".to_owned()),
    }
}

fn ready(admin: &Admin) -> Response<Full<Bytes>> {
    if !admin.serving.load(Ordering::Relaxed) {
        return text(StatusCode::SERVICE_UNAVAILABLE, "starting or stopping\n".to_owned());
    }
    if admin.authority.borrow().issuing_not_after() <= SystemTime::now() {
        return text(StatusCode::SERVICE_UNAVAILABLE, "the issuing certificate has expired\n".to_owned());
    }
    text(StatusCode::OK, "ready\n".to_owned())
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut answer = Response::new(Full::new(Bytes::from(body)));
    *answer.status_mut() = status;
    answer
}
