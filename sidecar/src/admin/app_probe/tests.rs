use std::net::Ipv4Addr;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

use super::*;

/// An app that answers each connection with the next of some texts, and keeps what it was asked.
async fn app(answers: &'static [&'static str]) -> (u16, tokio::sync::mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (sender, asked) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        for answer in answers {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let byte = stream.read_u8().await.unwrap();
                request.push(byte);
            }
            let _ = sender.send(String::from_utf8(request).unwrap());
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    (port, asked)
}

fn probes(json: &str) -> AppProbes {
    let written = format!("{{\"service\": \"app\", \"app-probes\": {}}}", serde_json::Value::from(json));
    let written = crate::config::Written::from_text("test", &written);
    let config = crate::config::Config::check(&written, (Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let addresses = Arc::new(|port| vec![(Ipv4Addr::LOCALHOST, port).into()]);
    AppProbes::new(&config.app.kubelet_probes, Dialer::Direct, Reclaimer::default(), addresses)
}

const EMPTY: &str = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\nwell";

#[tokio::test]
async fn a_get_is_asked_as_the_kubelet_would_and_its_answer_is_passed_on() {
    let (port, mut asked) =
        app(&[EMPTY, "HTTP/1.1 500 No\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno"]).await;
    let probes = probes(&format!(
        r#"{{"app/livenessProbe": {{"httpGet": {{"port": {port}, "path": "/live?x=1",
            "httpHeaders": [{{"name": "Host", "value": "orders"}}, {{"name": "X-A", "value": "b"}}]}}}}}}"#
    ));
    let outcome = probes.ask("app/livenessProbe").await.unwrap();
    assert_eq!(outcome, Outcome { status: StatusCode::OK, text: "well".into() });
    let request = asked.recv().await.unwrap();
    assert!(request.starts_with("GET /live?x=1 HTTP/1.1\r\n"), "{request}");
    assert!(request.contains("host: orders\r\n") && request.contains("x-a: b\r\n"), "{request}");
    assert!(request.contains("user-agent: kube-probe"), "{request}");
    let outcome = probes.ask("app/livenessProbe").await.unwrap();
    assert_eq!(outcome, Outcome { status: StatusCode::INTERNAL_SERVER_ERROR, text: "no".into() });
}

#[tokio::test]
async fn a_redirect_within_the_app_is_followed_and_no_other() {
    let (port, mut asked) = app(&[
        "HTTP/1.1 301 Moved\r\nLocation: /live/\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        EMPTY,
        "HTTP/1.1 302 Found\r\nLocation: https://elsewhere.example/\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    ])
    .await;
    let probes = probes(&format!(r#"{{"a/b": {{"httpGet": {{"port": {port}, "path": "/live"}}}}}}"#));
    assert_eq!(probes.ask("a/b").await.unwrap().status, StatusCode::OK);
    asked.recv().await.unwrap();
    assert!(asked.recv().await.unwrap().starts_with("GET /live/ "));
    assert_eq!(probes.ask("a/b").await.unwrap().status, StatusCode::FOUND);
}

#[tokio::test]
async fn an_app_that_is_not_there_or_silent_is_unwell_in_time() {
    let refused = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap().local_addr().unwrap().port();
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let silent_port = silent.local_addr().unwrap().port();
    let probes = probes(&format!(
        r#"{{"a/tcp": {{"tcpSocket": {{"port": {refused}}}}},
            "a/there": {{"tcpSocket": {{"port": {silent_port}}}}},
            "a/http": {{"httpGet": {{"port": {silent_port}}}, "timeoutSeconds": 1}}}}"#
    ));
    let outcome = probes.ask("a/tcp").await.unwrap();
    assert_eq!(outcome.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(outcome.text.contains(&format!("port {refused}")), "{}", outcome.text);
    assert_eq!(probes.ask("a/there").await.unwrap().status, StatusCode::OK);
    let outcome = probes.ask("a/http").await.unwrap();
    assert!(outcome.text.contains("within 1s"), "{}", outcome.text);
    assert_eq!(probes.ask("a/other").await, None);
}

#[test]
fn a_redirect_is_resolved_as_the_kubelet_would() {
    let from: Uri = "/live/x?y=1".parse().unwrap();
    for (location, expected) in [
        ("/other", Some("/other")),
        ("bad", Some("/live/bad")),
        ("?bad=1", Some("/live/x?bad=1")),
        ("http://orders/bad", Some("/bad")),
        ("http://ORDERS:8080/bad?x#y", Some("/bad?x")),
        ("https://localhost:8443", Some("/")),
        ("http://elsewhere/bad", None),
        ("//elsewhere/bad", None),
    ] {
        let found = match redirect(&from, "orders", &HeaderValue::from_static(location)).unwrap() {
            Redirect::Here(uri) => Some(uri.to_string()),
            Redirect::Elsewhere => None,
        };
        assert_eq!(found.as_deref(), expected, "{location}");
    }
    assert!(redirect(&from, "orders", &HeaderValue::from_static("/ no")).is_err());
}

#[tokio::test]
async fn of_one_probe_one_is_under_way_at_a_time_and_its_answer_is_everybodys() {
    let (port, mut asked) = app(&[EMPTY, EMPTY]).await;
    let probes = probes(&format!(r#"{{"a/b": {{"httpGet": {{"port": {port}}}}}}}"#));
    let first = probes.ask("a/b");
    let others = futures_util::future::join_all((0..50).map(|_| probes.ask("a/b")));
    let (first, others) = futures_util::future::join(first, others).await;
    assert!(others.iter().all(|outcome| outcome == &first));
    // One for the first, and one for all who came while it was under way.
    asked.recv().await.unwrap();
    asked.recv().await.unwrap();
    assert!(asked.try_recv().is_err());
}
