//! Probes and metrics over plain HTTP: `/live`, `/ready`, `/metrics`. Nothing else, and nothing secret.

use std::{
    convert::Infallible,
    net::{IpAddr, Ipv6Addr},
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
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{AbortHandle, yield_now},
    time::{sleep, timeout},
};

use crate::{audit::Audit, authority::Authority, limit::Limit, metrics::Metrics};

/// What the probes look at.
#[derive(Clone)]
pub struct Admin {
    /// The numbers.
    pub metrics: Arc<Metrics>,
    /// Who signs now.
    pub authority: watch::Receiver<Arc<Authority>>,
    /// Where every decision is written.
    pub audit: Arc<Audit>,
    /// False before the listener stands, and again while draining.
    pub serving: Arc<AtomicBool>,
}

/// Probes and scrapes at a time.
pub const CONNECTIONS: usize = 64;
/// For the head of a request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// For a whole connection.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(60);
/// After an accept that failed (no descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Lines of the log about accepts that failed.
const LINES_PER_MINUTE: u32 = 10;

/// Serves until the program ends. Where too many stand, the oldest connection of the busiest address is closed, so
/// that nobody can keep others' probes from being answered, whatever he leaves unsaid.
pub async fn serve(listener: TcpListener, admin: Admin) {
    let lines = Limit::new(LINES_PER_MINUTE);
    let mut open: Vec<(IpAddr, AbortHandle)> = Vec::with_capacity(CONNECTIONS);
    loop {
        let (stream, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                if let Some(left_out) = lines.take() {
                    tracing::warn!(left_out, "accepting on the admin port: {error}");
                }
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        open.retain(|(_, connection)| !connection.is_finished());
        if open.len() >= CONNECTIONS {
            let sources: Vec<IpAddr> = open.iter().map(|(source, _)| *source).collect();
            open.remove(gives_way(&sources)).1.abort();
            // Its descriptor is free once the task has been dropped.
            yield_now().await;
        }
        open.push((source(address.ip()), tokio::spawn(answer_all(stream, admin.clone())).abort_handle()));
    }
}

/// The first, which is the oldest, of the source that has most.
fn gives_way(sources: &[IpAddr]) -> usize {
    let count = |source: &IpAddr| sources.iter().filter(|other| *other == source).count();
    let most = sources.iter().map(count).max();
    sources.iter().position(|source| Some(count(source)) == most).unwrap_or(0)
}

/// Whom an address stands for: of IPv6 one host has a whole network of 64 bits.
fn source(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(six) => Ipv6Addr::from_bits(six.to_bits() & (!0 << 64)).into(),
        four => four,
    }
}

async fn answer_all(stream: TcpStream, admin: Admin) {
    let service = service_fn(move |request| {
        let admin = admin.clone();
        async move { Ok::<_, Infallible>(answer(&admin, &request)) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    let _ = timeout(CONNECTION_TIMEOUT, connection).await;
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
    let unready = |why: String| text(StatusCode::SERVICE_UNAVAILABLE, why);
    if !admin.serving.load(Ordering::Relaxed) {
        return unready("starting or stopping\n".to_owned());
    }
    if let Err(error) = admin.authority.borrow().check_time(SystemTime::now()) {
        return unready(format!("{error:#}\n"));
    }
    if admin.audit.is_failing() {
        return unready("the audit cannot be written, so no certificate is given\n".to_owned());
    }
    text(StatusCode::OK, "ready\n".to_owned())
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut answer = Response::new(Full::new(Bytes::from(body)));
    *answer.status_mut() = status;
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_connection_of_the_busiest_source_gives_way() {
        let addresses = |texts: &[&str]| -> Vec<IpAddr> {
            texts.iter().map(|text| source(text.parse().unwrap())).collect()
        };
        let cases: [(&[&str], usize); 4] = [
            (&["10.0.0.1", "10.0.0.2", "10.0.0.2"], 1),
            (&["10.0.0.1", "10.0.0.2", "10.0.0.3"], 0),
            // One host with many addresses of its own network.
            (&["10.0.0.1", "2001:db8::1", "2001:db8:0:1::1", "2001:db8:0:1::2"], 2),
            (&["10.0.0.2", "10.0.0.1", "::ffff:10.0.0.1"], 1),
        ];
        for (texts, expected) in cases {
            assert_eq!(gives_way(&addresses(texts)), expected, "{texts:?}");
        }
    }
}
