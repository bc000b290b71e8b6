//! The public face. Everyone who reaches the pod can ask it: it says whether the sidecar is alive and ready, and how
//! much it did. It never says how the sidecar is configured.

use std::{sync::Arc, time::Duration};

use hyper::{
    Method, Request, StatusCode,
    body::Incoming,
    header::{ACCEPT, HeaderMap},
};
use tokio::{net::TcpListener, sync::watch};

use super::{
    answer::{Answer, Open, answer, only, serve_one, text},
    app_probe::AppProbes,
    readiness::Readiness,
};
use crate::telemetry::{CLASSIC, Metrics, OPENMETRICS};

/// What the public face shows.
#[derive(Clone)]
pub struct Public {
    /// Answers `/ready`.
    pub readiness: Readiness,
    /// Answers `/metrics`.
    pub metrics: Arc<Metrics>,
    /// Answers `/registered`: true once others can find this workload.
    pub registered: watch::Receiver<bool>,
    /// Answers `/probe/CONTAINER/KIND`.
    pub app: Arc<AppProbes>,
}

const NO_SUCH_PATH: &str = "no such path; there are /live, /ready, /registered, /metrics and /probe/\n";
/// Connections at a time; for one more the oldest is closed.
const CONNECTIONS: usize = 128;
/// After a failed accept, which is mostly a lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until it is dropped.
pub async fn serve_public(listener: TcpListener, public: Public) {
    let public = Arc::new(public);
    let mut open = Open::up_to(CONNECTIONS);
    loop {
        let (stream, client) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "the public admin face cannot accept; trying again");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let public = public.clone();
        open.add(Some(client.ip()), |is_asking| async move {
            serve_one(stream, &is_asking, |request| public.answer(request)).await;
        })
        .await;
    }
}

impl Public {
    async fn answer(&self, request: Request<Incoming>) -> Answer {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return only("GET, HEAD", text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n"));
        }
        match request.uri().path() {
            "/live" => text(StatusCode::OK, "alive\n"),
            "/ready" => self.ready(),
            "/metrics" => self.metrics(request.headers()),
            "/registered" => self.is_registered(),
            path => match path.strip_prefix("/probe/") {
                Some(name) => self.probe(name).await,
                None => text(StatusCode::NOT_FOUND, NO_SUCH_PATH),
            },
        }
    }

    fn is_registered(&self) -> Answer {
        if *self.registered.borrow() {
            return text(StatusCode::OK, "registered\n");
        }
        text(StatusCode::SERVICE_UNAVAILABLE, "not in the registry, or its app does not answer yet\n")
    }

    async fn probe(&self, name: &str) -> Answer {
        match self.app.ask(name).await {
            Some(outcome) => text(outcome.status, outcome.text),
            None => text(StatusCode::NOT_FOUND, "no such probe; --app-probes names them\n"),
        }
    }

    fn ready(&self) -> Answer {
        let missing = self.readiness.missing();
        if missing.is_empty() {
            return text(StatusCode::OK, "ready\n");
        }
        text(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {}\n", missing.join(", ")))
    }

    fn metrics(&self, headers: &HeaderMap) -> Answer {
        let accepted = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
        let openmetrics = accepted.into_iter().any(|value| value.contains("application/openmetrics-text"));
        let content_type = if openmetrics { OPENMETRICS } else { CLASSIC };
        answer(StatusCode::OK, content_type, self.metrics.expose(openmetrics))
    }
}

#[cfg(test)]
mod tests;
