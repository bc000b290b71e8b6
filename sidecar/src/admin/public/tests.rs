use std::net::{Ipv4Addr, SocketAddr};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

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

fn public() -> Public {
    let metrics = Arc::new(Metrics::new());
    let (dialer, reclaimer) = (crate::connect::Dialer::Direct, crate::net::Reclaimer::default());
    let app = Arc::new(AppProbes::new(&[], dialer, reclaimer, Arc::new(|_| Vec::new())));
    Public { readiness: Readiness::default(), metrics, registered: watch::channel(false).1, app }
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

#[tokio::test]
async fn ready_when_every_condition_is_met() {
    let public = public();
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
    let address = serve(public()).await;
    let classic = ask(address, "GET /metrics HTTP/1.1\r\nAccept: text/plain").await;
    assert!(classic.contains(CLASSIC) && classic.contains("weft_build_info{") && !classic.contains("# EOF"));
    let prometheus = "Accept: application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.1";
    let open = ask(address, &format!("GET /metrics HTTP/1.1\r\n{prometheus}")).await;
    assert!(open.contains(OPENMETRICS) && open.ends_with("# EOF\n"));
}

#[tokio::test]
async fn there_is_nothing_else() {
    let address = serve(public()).await;
    for path in [
        "/",
        "/config",
        "/endpoints",
        "/certificate",
        "/status",
        "/log",
        "/drain",
        "/quit",
        "/probe",
        "/live/",
    ] {
        let answer = ask(address, &format!("GET {path} HTTP/1.1")).await;
        assert!(answer.starts_with("HTTP/1.1 404") && answer.contains("/metrics"), "{path}: {answer}");
    }
    // there is no probe in these settings
    assert_eq!(status(address, "GET /probe/ HTTP/1.1").await, 404);
    assert_eq!(status(address, "GET /probe/app/readinessProbe HTTP/1.1").await, 404);
    assert_eq!(status(address, "POST /live HTTP/1.1\r\nContent-Length: 0").await, 405);
    assert_eq!(status(address, "POST /drain HTTP/1.1\r\nContent-Length: 0").await, 405);
    let long = format!("GET /{} HTTP/1.1", "x".repeat(40_000));
    assert!((400..500).contains(&status(address, &long).await));
}

#[tokio::test]
async fn slow_clients_keep_no_probe_out() {
    let address = serve(public()).await;
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
    let address = serve(public()).await;
    let mut idle = TcpStream::connect(address).await.unwrap();
    let mut nothing = String::new();
    let closed = tokio::time::timeout(Duration::from_secs(30), idle.read_to_string(&mut nothing)).await;
    closed.expect("an idle client is closed").unwrap();
}

#[tokio::test]
async fn who_is_being_answered_does_not_make_room_for_silent_ones() {
    let (app, app_address) = listen().await;
    let port = app_address.port();
    let probe = format!(r#"{{"a/livenessProbe": {{"httpGet": {{"port": {port}}}, "timeoutSeconds": 10}}}}"#);
    let written = format!("{{\"service\": \"a\", \"app-probes\": {}}}", serde_json::Value::from(probe));
    let config = crate::config::Config::check(
        &crate::config::Written::from_text("test", &written),
        (Ipv4Addr::LOCALHOST, 0).into(),
    )
    .unwrap();
    let (dialer, reclaimer) = (crate::connect::Dialer::Direct, crate::net::Reclaimer::default());
    let addresses = Arc::new(|port| vec![(Ipv4Addr::LOCALHOST, port).into()]);
    let probes = AppProbes::new(&config.app.kubelet_probes, dialer, reclaimer, addresses);
    let address = serve(Public { app: Arc::new(probes), ..public() }).await;
    let asking = tokio::spawn(async move { status(address, "GET /probe/a/livenessProbe HTTP/1.1").await });
    let (mut question, _) = app.accept().await.unwrap();
    let mut silent = Vec::new();
    for _ in 0..CONNECTIONS + 5 {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    assert_eq!(status(address, "GET /live HTTP/1.1").await, 200);
    question.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await.unwrap();
    assert_eq!(asking.await.unwrap(), 200);
}
