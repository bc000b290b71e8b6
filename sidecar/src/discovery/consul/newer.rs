//! What an agent of Consul 1.14 answers where it differs from 1.8: a port of 0 is left out, blocking queries for
//! services are answered by its streaming backend, and too many connections get a 429 before they have asked anything.

use std::{sync::Arc, time::Duration};

use tokio::{io::AsyncWriteExt, net::TcpListener, sync::mpsc, sync::watch as channel, time::timeout};

use super::{
    client::{Client, Question},
    error::Kind,
    fake,
    watch::{News, Watch},
};
use crate::{discovery::Registry, model::Service};

/// Two instances of `orders`, as 1.14 has them: one has no port, the other all that is new.
const ORDERS: &str = r#"[
{"Node":{"ID":"5c1a7f0e-9c0f-4b1c-8f0e-000000000001","Node":"n1","Address":"10.0.0.1","Datacenter":"dc1",
  "TaggedAddresses":{"lan":"10.0.0.1","lan_ipv4":"10.0.0.1","wan":"10.0.0.1","wan_ipv4":"10.0.0.1"},
  "Meta":{"consul-network-segment":"","consul-version":"1.14.11"},"CreateIndex":13,"ModifyIndex":15},
 "Service":{"ID":"orders-idle","Service":"orders","Tags":[],"Address":"","Meta":null,
  "Weights":{"Passing":1,"Warning":1},"EnableTagOverride":false,
  "Proxy":{"Mode":"","MeshGateway":{},"Expose":{}},"Connect":{},"PeerName":"","CreateIndex":27,"ModifyIndex":27},
 "Checks":[{"Node":"n1","CheckID":"serfHealth","Name":"Serf Health Status","Status":"passing","Notes":"",
  "Output":"Agent alive and reachable","ServiceID":"","ServiceName":"","ServiceTags":[],"Type":"","Interval":"",
  "Timeout":"","ExposedPort":0,"Definition":{},"CreateIndex":13,"ModifyIndex":13}]},
{"Node":{"ID":"5c1a7f0e-9c0f-4b1c-8f0e-000000000001","Node":"n1","Address":"10.0.0.1","Datacenter":"dc1",
  "TaggedAddresses":{"lan":"10.0.0.1"},"Meta":{"consul-version":"1.14.11"},"CreateIndex":13,"ModifyIndex":15},
 "Service":{"ID":"orders-one","Service":"orders","Tags":["v2"],"Address":"10.1.0.2",
  "TaggedAddresses":{"lan_ipv4":{"Address":"10.1.0.2","Port":8080},"wan_ipv4":{"Address":"10.1.0.2","Port":8080}},
  "Meta":{"weft-identity":"spiffe://weft.local/ns/default/sa/orders"},"Port":8080,
  "Weights":{"Passing":1,"Warning":1},"EnableTagOverride":false,
  "Proxy":{"Mode":"","MeshGateway":{},"Expose":{}},"Connect":{},"PeerName":"","CreateIndex":29,"ModifyIndex":29},
 "Checks":[{"Node":"n1","CheckID":"service:orders-one","Name":"The app, as its sidecar sees it","Status":"passing",
  "Notes":"","Output":"","ServiceID":"orders-one","ServiceName":"orders","ServiceTags":["v2"],"Type":"ttl",
  "Interval":"","Timeout":"","ExposedPort":0,"Definition":{},"CreateIndex":29,"ModifyIndex":30}]}
]"#;

fn watching(client: Arc<Client>) -> mpsc::Receiver<News> {
    let registry = Registry::new(channel::channel(Arc::default()).1).0;
    let (tell, news) = mpsc::channel(16);
    let interest = registry.interest(&"orders".parse().unwrap()).unwrap();
    tokio::spawn(Watch::new(1, client, interest, tell, fastrand::Rng::with_seed(1)).run());
    news
}

async fn next(news: &mut mpsc::Receiver<News>) -> (Service, usize) {
    match timeout(Duration::from_secs(20), news.recv()).await.unwrap() {
        Some(News::Read { service, unreadable, .. }) => (service, unreadable),
        Some(News::Failed { error, .. }) => panic!("{error}"),
        _ => panic!("the watch ended"),
    }
}

/// The streaming backend answers a query that waits with the index of its own view: the same when the wait is over, and
/// a lower one, down to 1, when it had to subscribe anew.
#[tokio::test]
async fn the_indices_of_the_streaming_backend_lose_nothing_and_make_no_noise() {
    let (client, asked) = fake::agent(|_, before| match before {
        0 => Some((200, 30, ORDERS)),
        // Its wait is over.
        1 => Some((200, 30, ORDERS)),
        // It subscribed anew, and knows nobody yet.
        2 => Some((200, 1, "[]")),
        // The question for the permissions: this Consul has no ACLs.
        3 => Some((401, 0, "ACL support disabled")),
        4 => Some((200, 31, ORDERS)),
        _ => None,
    })
    .await;
    let mut news = watching(client);
    for step in 0..4 {
        let (service, unreadable) = next(&mut news).await;
        let endpoints: Vec<String> =
            service.endpoints.iter().map(|endpoint| endpoint.address.to_string()).collect();
        assert_eq!(endpoints, ["10.1.0.2:8080"], "answer {step}");
        assert_eq!(service.identities.len(), 1, "answer {step}");
        assert_eq!(unreadable, if step == 2 { 0 } else { 1 }, "answer {step}");
    }
    while asked.lock().unwrap().len() < 6 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let asked = asked.lock().unwrap().clone();
    let indices: Vec<Option<&str>> = asked
        .iter()
        .filter(|path| path.starts_with("/v1/health/"))
        .map(|path| path.split("index=").nth(1).and_then(|rest| rest.split('&').next()))
        .collect();
    // After the one that went back it is asked without an index, and from the new one on it waits again.
    assert_eq!(indices, [None, Some("30"), Some("30"), None, Some("31")], "{asked:?}");
}

const TOO_MANY: &str = "Your IP is issuing too many concurrent connections, please rate limit your calls\n";

/// Since 1.9 the connections beyond `limits.http_max_conns_per_client` are told so, whether they asked or not.
#[tokio::test]
async fn too_many_connections_are_named_with_the_way_out() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let text = format!(
                "HTTP/1.1 429 Too Many Requests\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\
                 Connection: close\r\n\r\n{TOO_MANY}",
                TOO_MANY.len()
            );
            let _ = stream.write_all(text.as_bytes()).await;
        }
    });
    let client = fake::client_of(&[port]);
    for _ in 0..20 {
        let error = client.ask(&Question::get("/v1/status/leader".to_owned(), "")).await.unwrap_err();
        assert!(error.kind.is_of_the_agent(), "{error}");
        assert!(error.text.contains("http_max_conns_per_client"), "{error}");
    }
    // The same where the request came first.
    let (client, _) = fake::agent(|_, _| Some((429, 1, TOO_MANY))).await;
    let error = client.ask_at(0, &Question::get("/v1/status/leader".to_owned(), "")).await.unwrap_err();
    assert_eq!(error.kind, Kind::Unavailable);
    assert!(error.text.contains("too many concurrent connections"), "{error}");
    assert!(error.text.contains("http_max_conns_per_client"), "{error}");
}
