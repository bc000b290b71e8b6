//! An agent for tests of this room, in the process and without a Consul: it answers each question as it is told, and
//! notes what it was asked.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

use super::client::Client;
use crate::{
    config::{Consul, ConsulAddress, ConsulTls, ConsulToken},
    telemetry::Metrics,
};

/// The questions so far: path and query.
pub(super) type Asked = Arc<Mutex<Vec<String>>>;

/// An answer: status, index, body.
pub(super) type Said = (u16, u64, &'static str);

/// A client of two agents: the first answers with an index and a body, or never; the second is not there.
pub(super) async fn client(answer: fn(&str) -> Option<(u64, &'static str)>) -> (Arc<Client>, Asked) {
    agent(move |path, _| answer(path).map(|(index, body)| (200, index, body))).await
}

/// The same with a status. `answer` gets the question, and how many came before it.
pub(super) async fn agent(
    answer: impl Fn(&str, usize) -> Option<Said> + Clone + Send + Sync + 'static,
) -> (Arc<Client>, Asked) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let asked = Asked::default();
    let notes = asked.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (notes, answer) = (notes.clone(), answer.clone());
            let service = service_fn(move |request: Request<Incoming>| {
                let path = request.uri().to_string();
                let mut notes = notes.lock().unwrap();
                let answer = answer(&path, notes.len());
                notes.push(path);
                async move {
                    let Some((status, index, body)) = answer else { return std::future::pending().await };
                    let response = Response::builder().status(status).header("X-Consul-Index", index);
                    Ok::<_, Infallible>(
                        response.body(Full::new(Bytes::from_static(body.as_bytes()))).unwrap(),
                    )
                }
            });
            tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
        }
    });
    (client_of(&[port, 1]), asked)
}

/// A client of agents at these ports of loopback.
pub(super) fn client_of(ports: &[u16]) -> Arc<Client> {
    let address = |port: &u16| ConsulAddress::Tcp { tls: false, host: "127.0.0.1".to_owned(), port: *port };
    let settings = Consul {
        addresses: ports.iter().map(address).collect(),
        token: ConsulToken::None,
        tls: ConsulTls { ca_file: None, client: None, server_name: None, verify: true },
        ttl: Duration::from_secs(15),
        deregister_after: Duration::from_secs(60),
    };
    Client::new(&settings, Arc::new(Metrics::new())).unwrap()
}
