//! Calls of an app through the sidecar to servers outside the mesh, over real sockets: what the end of an answer says of
//! its endpoint, and what is kept between attempts.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use bytes::Bytes;
use h2::{Reason, RecvStream, client, server::SendResponse};
use hyper::{HeaderMap, StatusCode};
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::{
    discovery::Directory,
    drain::{Drain, Draining},
    model::{Endpoint, Policy, Retries, Service},
    outbound::tests::stories_of,
};

/// A sidecar with one service of one endpoint.
struct Mesh {
    outbound: Arc<Outbound>,
    app: client::SendRequest<Bytes>,
    /// Of the endpoint.
    connections: Arc<AtomicUsize>,
    asked: Arc<AtomicUsize>,
    _drain: Drain,
}

/// A server that answers as the path says, and takes one stream at a time where it is told so.
async fn server(streams: u32) -> (SocketAddr, Arc<AtomicUsize>, Arc<AtomicUsize>) {
    // Not the address of the workload itself.
    let listener = TcpListener::bind("127.0.0.2:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (connections, asked) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let counters = (connections.clone(), asked.clone());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            counters.0.fetch_add(1, Ordering::Relaxed);
            let asked = counters.1.clone();
            tokio::spawn(async move {
                let mut builder = h2::server::Builder::new();
                let mut connection =
                    builder.max_concurrent_streams(streams).handshake::<_, Bytes>(stream).await.unwrap();
                let mut endless = Vec::new();
                while let Some(Ok((request, respond))) = connection.accept().await {
                    asked.fetch_add(1, Ordering::Relaxed);
                    endless.extend(answer(&request, respond));
                }
            });
        }
    });
    (address, connections, asked)
}

/// Gives the stream of an answer that has no end. One that breaks off does so when its beginning has gone out.
fn answer(request: &Request<RecvStream>, mut respond: SendResponse<Bytes>) -> Option<h2::SendStream<Bytes>> {
    let (kind, code) = request.uri().path()[1..].split_once('/').unwrap();
    let mut head = Response::new(());
    if kind == "status" {
        *head.status_mut() = code.parse().unwrap();
        respond.send_response(head, true).unwrap();
        return None;
    }
    let mut stream = respond.send_response(head, false).unwrap();
    stream.send_data("a piece".into(), false).unwrap();
    match kind {
        "grpc" => {
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", code.parse().unwrap());
            stream.send_trailers(trailers).unwrap();
        }
        "cut" => {
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(20)).await;
                stream.send_reset(Reason::INTERNAL_ERROR);
            });
        }
        "whole" => stream.send_data(Bytes::new(), true).unwrap(),
        "endless" => return Some(stream),
        _ => panic!("{kind}"),
    }
    None
}

async fn mesh(streams: u32, policy: Policy) -> Mesh {
    let (endpoint, connections, asked) = server(streams).await;
    let name = || "orders".parse().unwrap();
    let service = Service { endpoints: vec![Endpoint::at(endpoint)], ..Service::named(name()) };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let explicit = HashMap::from([(address, name())]);
    let (_, outbound) = stories_of(Directory::new(vec![service]), explicit, policy);
    let (drain, draining) = Drain::new();
    tokio::spawn(accept(listener, outbound.clone(), draining));
    let (app, driver) = client::handshake(TcpStream::connect(address).await.unwrap()).await.unwrap();
    tokio::spawn(driver);
    Mesh { outbound, app, connections, asked, _drain: drain }
}

async fn accept(listener: TcpListener, outbound: Arc<Outbound>, draining: Draining) {
    while let Ok((stream, client)) = listener.accept().await {
        tokio::spawn(outbound.clone().connection(stream, client, draining.clone()));
    }
}

impl Mesh {
    async fn call(&self, path: &str, fields: &[(&'static str, &str)]) -> Response<RecvStream> {
        let mut request = Request::get(format!("http://orders{path}"));
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        let (answer, _) = self.app.clone().send_request(request.body(()).unwrap(), true).unwrap();
        answer.await.unwrap()
    }

    /// Reads an answer to its end, or to where it breaks off.
    async fn whole_call(&self, path: &str, fields: &[(&'static str, &str)]) -> StatusCode {
        let mut answer = self.call(path, fields).await;
        while let Some(Ok(_)) = answer.body_mut().data().await {}
        let _ = answer.body_mut().trailers().await;
        answer.status()
    }

    /// Failures of the endpoint in a row, and how many attempts are in flight there.
    fn failures(&self) -> (u32, u32) {
        let upstreams = self.outbound.upstreams.all();
        let states = upstreams[0].balancer.states(Instant::now());
        (states[0].failures, states[0].in_flight)
    }

    /// The app hears of an end when the sidecar has: it is not judged later.
    async fn failures_are(&self, expected: u32, why: &str) {
        let is_over = async {
            while self.failures().1 > 0 {
                sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(LIMIT, is_over).await.expect(why);
        assert_eq!(self.failures().0, expected, "{why}");
    }
}

/// Longest wait for what happens at once.
const LIMIT: Duration = Duration::from_secs(10);
const GRPC: &[(&str, &str)] = &[("content-type", "application/grpc"), ("te", "trailers")];

#[tokio::test]
async fn an_answer_is_judged_when_it_has_ended() {
    let mesh = mesh(100, Policy::default()).await;
    for (path, fields, failures) in [
        ("/whole/", &[][..], 0),
        ("/cut/", &[], 1),
        ("/cut/", &[], 2),
        ("/status/503", &[], 3),
        ("/grpc/14", GRPC, 4),
        ("/grpc/0", GRPC, 0),
        ("/grpc/13", GRPC, 1),
        ("/grpc/4", GRPC, 2),
        ("/grpc/2", GRPC, 0),
        ("/cut/", GRPC, 1),
        ("/status/404", &[], 0),
    ] {
        mesh.whole_call(path, fields).await;
        mesh.failures_are(failures, path).await;
    }
    mesh.whole_call("/cut/", &[]).await;
    let mut left = mesh.call("/endless/", &[]).await;
    left.body_mut().data().await.unwrap().unwrap();
    assert_eq!(mesh.failures(), (1, 1), "the stream goes on");
    drop(left);
    mesh.failures_are(1, "its client left: neither success nor failure").await;
}

#[tokio::test]
async fn the_end_of_the_callers_time_is_no_failure_of_the_endpoint() {
    let mesh = mesh(100, Policy::default()).await;
    mesh.whole_call("/cut/", &[]).await;
    mesh.failures_are(1, "it broke off").await;
    let hurried = [GRPC, &[("grpc-timeout", "200m")]].concat();
    assert_eq!(mesh.whole_call("/endless/", &hurried).await, StatusCode::OK);
    mesh.failures_are(1, "the time was over").await;
}

#[tokio::test]
async fn nothing_of_an_attempt_is_kept_during_the_pause_before_the_next() {
    let retries = Retries { statuses: vec![503], backoff: Duration::from_secs(600), ..Retries::default() };
    let mesh = mesh(1, Policy { retries, ..Policy::default() }).await;
    let mut pausing = std::pin::pin!(mesh.call("/status/503", &[]));
    let has_failed = async {
        while mesh.asked.load(Ordering::Relaxed) == 0 || mesh.failures() != (1, 0) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        biased;
        _ = pausing.as_mut() => panic!("it waits to try again"),
        () = has_failed => {}
    }
    assert_eq!(mesh.whole_call("/whole/", &[]).await, StatusCode::OK);
    assert_eq!(mesh.connections.load(Ordering::Relaxed), 1, "its stream was free for another call");
}
