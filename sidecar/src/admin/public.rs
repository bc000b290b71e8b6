//! The public face. Everyone who reaches the pod can ask it: it says whether the sidecar is alive and ready, how
//! much it did, and how the app answers its probes. It never says how the sidecar is configured.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use hyper::{
    Method, Request, StatusCode,
    body::Incoming,
    header::{ACCEPT, HeaderMap},
};
use tokio::net::TcpListener;

use super::{
    Action,
    answer::{Answer, Open, answer, only, serve_one, text},
    probe::Probe,
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
    /// Answers `/probe/{id}`.
    pub probes: Vec<Probe>,
    /// Answers `POST /quit` from this host; none: there is no such path.
    pub quit: Option<Action>,
}

/// Connections at a time; for one more the oldest is closed.
const CONNECTIONS: usize = 128;
/// After a failed accept, which is mostly a lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until it is dropped.
pub async fn serve_public(listener: TcpListener, public: Public) {
    let public = Arc::new(public);
    let mut open = Open::up_to(CONNECTIONS);
    loop {
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "the public admin face cannot accept; trying again");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let here = stream.local_addr().map(|address| address.ip());
        let local = is_this_host(from, here.ok());
        let public = public.clone();
        open.add(async move { serve_one(stream, |request| public.answer(request, local)).await }).await;
    }
}

fn is_this_host(from: SocketAddr, here: Option<IpAddr>) -> bool {
    let from = from.ip().to_canonical();
    from.is_loopback() || here.is_some_and(|here| here.to_canonical() == from)
}

impl Public {
    async fn answer(&self, request: Request<Incoming>, local: bool) -> Answer {
        let path = request.uri().path();
        if path == "/quit"
            && let Some(quit) = &self.quit
        {
            return answer_quit(request.method(), quit, local);
        }
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return only("GET, HEAD", text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n"));
        }
        match path {
            "/live" => text(StatusCode::OK, "alive\n"),
            "/ready" => self.ready(),
            "/metrics" => self.metrics(request.headers()),
            _ => match path.strip_prefix("/probe/") {
                Some(id) => self.probe(id).await,
                None => text(
                    StatusCode::NOT_FOUND,
                    "no such path; there are /live, /ready, /metrics and /probe/{id}\n",
                ),
            },
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

    async fn probe(&self, id: &str) -> Answer {
        let Some(probe) = self.probes.iter().find(|probe| probe.id == id) else {
            return text(StatusCode::NOT_FOUND, "no probe with this identifier\n");
        };
        let (status, reason) = probe.run().await;
        text(status, reason)
    }
}

fn answer_quit(method: &Method, quit: &Action, local: bool) -> Answer {
    if method != Method::POST {
        return only("POST", text(StatusCode::METHOD_NOT_ALLOWED, "only POST\n"));
    }
    if !local {
        return text(StatusCode::FORBIDDEN, "only for programs on this host\n");
    }
    quit();
    text(StatusCode::ACCEPTED, "stopping\n")
}

#[cfg(test)]
mod tests;
