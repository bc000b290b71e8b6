use std::{
    net::Ipv4Addr,
    sync::atomic::{AtomicUsize, Ordering},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::super::probe::ProbeAction;
use super::*;

async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

async fn serve(public: Public) -> SocketAddr {
    let (listener, address) = listen().await;
    tokio::spawn(serve_public(listener, public));
    address
}

fn public(probes: Vec<Probe>) -> Public {
    let metrics = Arc::new(Metrics::new());
    Public { readiness: Readiness::default(), metrics, probes, quit: None }
}

/// The whole answer as it stands on the wire.
async fn ask(address: SocketAddr, head: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("{head}\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

async fn status(address: SocketAddr, head: &str) -> u16 {
    let answer = ask(address, head).await;
    answer.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or_else(|| panic!("{answer:?}"))
}

/// An app that answers every connection with these bytes, and keeps what it was asked.
async fn app(answer: &'static str) -> (SocketAddr, tokio::sync::mpsc::UnboundedReceiver<String>) {
    let (listener, address) = listen().await;
    let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let sender = sender.clone();
            tokio::spawn(async move {
                let mut asked = vec![0; 4096];
                let length = stream.read(&mut asked).await.unwrap();
                let _ = sender.send(String::from_utf8_lossy(&asked[..length]).into_owned());
                stream.write_all(answer.as_bytes()).await.unwrap();
                std::future::pending::<()>().await;
            });
        }
    });
    (address, receiver)
}

#[tokio::test]
async fn ready_when_every_condition_is_met() {
    let public = public(Vec::new());
    let identity = public.readiness.condition("identity");
    let discovery = public.readiness.condition("discovery");
    let address = serve(public).await;
    assert_eq!(status(address, "GET /live HTTP/1.1").await, 200);
    let answer = ask(address, "GET /ready HTTP/1.1").await;
    assert!(answer.starts_with("HTTP/1.1 503") && answer.ends_with("not ready: identity, discovery\n"));
    identity.set(true);
    assert!(ask(address, "GET /ready HTTP/1.1").await.ends_with("not ready: discovery\n"));
    discovery.set(true);
    assert_eq!(status(address, "HEAD /ready HTTP/1.1").await, 200);
    identity.set(false);
    assert_eq!(status(address, "GET /ready HTTP/1.1").await, 503);
}

#[tokio::test]
async fn metrics_in_the_format_that_is_asked_for() {
    let address = serve(public(Vec::new())).await;
    let classic = ask(address, "GET /metrics HTTP/1.1\r\nAccept: text/plain").await;
    assert!(classic.contains(CLASSIC) && classic.contains("weft_build_info{") && !classic.contains("# EOF"));
    let prometheus = "Accept: application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.1";
    let open = ask(address, &format!("GET /metrics HTTP/1.1\r\n{prometheus}")).await;
    assert!(open.contains(OPENMETRICS) && open.ends_with("# EOF\n"));
}

#[tokio::test]
async fn there_is_nothing_else() {
    let address = serve(public(Vec::new())).await;
    for path in ["/", "/config", "/endpoints", "/certificate", "/status", "/log", "/drain", "/quit", "/live/"]
    {
        let answer = ask(address, &format!("GET {path} HTTP/1.1")).await;
        assert!(answer.starts_with("HTTP/1.1 404") && answer.contains("/metrics"), "{path}: {answer}");
    }
    assert_eq!(status(address, "POST /live HTTP/1.1\r\nContent-Length: 0").await, 405);
    assert_eq!(status(address, "POST /drain HTTP/1.1\r\nContent-Length: 0").await, 405);
    let long = format!("GET /{} HTTP/1.1", "x".repeat(40_000));
    assert!((400..500).contains(&status(address, &long).await));
}

#[tokio::test]
async fn probes_do_what_they_were_configured_to_do() {
    let (healthy, mut asked) = app("HTTP/1.1 204 No Content\r\n\r\n").await;
    let (sick, _sick) = app("HTTP/1.1 500 Internal Server Error\r\nContent-Length: 6\r\n\r\nsecret").await;
    let (silent, _silent) = app("").await;
    let (garbage, _garbage) = app("what?\r\n\r\n").await;
    let (closed, gone) = listen().await;
    drop(closed);
    let http = ProbeAction::Http {
        path: "/health?full=1".to_owned(),
        headers: vec![("X-Probe".to_owned(), "yes".to_owned())],
    };
    let probe = |id: &str, address, action: &ProbeAction| Probe {
        id: id.to_owned(),
        address,
        action: action.clone(),
        timeout: Duration::from_millis(300),
    };
    let address = serve(public(vec![
        probe("healthy", healthy, &http),
        probe("sick", sick, &http),
        probe("silent", silent, &http),
        probe("garbage", garbage, &http),
        probe("gone", gone, &http),
        probe("tcp", healthy, &ProbeAction::Tcp),
        probe("tcp-gone", gone, &ProbeAction::Tcp),
    ]))
    .await;
    for (id, expected) in [
        ("healthy", 204),
        ("sick", 500),
        ("silent", 504),
        ("garbage", 503),
        ("gone", 503),
        ("tcp", 200),
        ("tcp-gone", 503),
        ("unknown", 404),
        ("", 404),
        ("healthy/../sick", 404),
        ("http://10.0.0.1/", 404),
    ] {
        assert_eq!(status(address, &format!("GET /probe/{id} HTTP/1.1")).await, expected, "{id}");
    }
    assert!(!ask(address, "GET /probe/sick HTTP/1.1").await.contains("secret"));
    let asked = asked.recv().await.unwrap();
    assert!(asked.starts_with("GET /health?full=1 HTTP/1.1\r\n"), "{asked}");
    assert!(asked.contains("x-probe: yes\r\n") && asked.contains(&format!("host: {healthy}\r\n")), "{asked}");
}

#[tokio::test]
async fn quit_is_there_only_where_switched_on() {
    let calls = Arc::new(AtomicUsize::new(0));
    let counter = calls.clone();
    let quit: Action = Arc::new(move || {
        counter.fetch_add(1, Ordering::SeqCst);
    });
    let address = serve(Public { quit: Some(quit), ..public(Vec::new()) }).await;
    assert_eq!(status(address, "GET /quit HTTP/1.1").await, 405);
    assert_eq!(calls.load(Ordering::SeqCst), 0);
    assert_eq!(status(address, "POST /quit HTTP/1.1\r\nContent-Length: 0").await, 202);
    assert_eq!(calls.load(Ordering::SeqCst), 1);
}

#[test]
fn this_host_is_loopback_or_the_same_address() {
    let from = |text: &str| SocketAddr::new(text.parse().unwrap(), 40_000);
    let here = Some("10.0.0.5".parse().unwrap());
    assert!(is_this_host(from("127.0.0.1"), here) && is_this_host(from("::1"), here));
    assert!(is_this_host(from("10.0.0.5"), here) && is_this_host(from("::ffff:10.0.0.5"), here));
    assert!(!is_this_host(from("10.0.0.6"), here) && !is_this_host(from("10.0.0.6"), None));
}

#[tokio::test]
async fn slow_clients_keep_no_probe_out() {
    let address = serve(public(Vec::new())).await;
    let mut slow = Vec::new();
    for begin in ["", "GET /live HTTP/1.1\r\n"].into_iter().cycle().take(CONNECTIONS + 22) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(begin.as_bytes()).await.unwrap();
        slow.push(stream);
    }
    for _ in 0..10 {
        assert_eq!(status(address, "GET /live HTTP/1.1").await, 200);
    }
    // the oldest made room, the youngest are still there
    let mut nothing = String::new();
    slow[0].read_to_string(&mut nothing).await.unwrap();
    let mut youngest = slow.pop().unwrap();
    youngest.write_all(b"Host: x\r\n\r\n").await.unwrap();
    youngest.read_to_string(&mut nothing).await.unwrap();
    assert!(nothing.starts_with("HTTP/1.1 200"), "{nothing}");
}

#[tokio::test]
async fn a_client_that_stays_silent_is_left() {
    let address = serve(public(Vec::new())).await;
    let mut idle = TcpStream::connect(address).await.unwrap();
    let mut nothing = String::new();
    let closed = tokio::time::timeout(Duration::from_secs(30), idle.read_to_string(&mut nothing)).await;
    closed.expect("an idle client is closed").unwrap();
}
