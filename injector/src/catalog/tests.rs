use std::{net::TcpListener, process::Stdio, sync::Arc};

use axum::{
    Router,
    body::to_bytes,
    extract::{Request as Asked, State},
};
use tokio::sync::Mutex;

use super::*;

fn settings(agents: &[&str]) -> Settings {
    let mut settings = Settings::of_images("a", "b");
    settings.consul = agents.iter().map(|agent| (*agent).to_owned()).collect();
    settings
}

fn client(agents: &[&str]) -> ConsulCatalog {
    ConsulCatalog::new(&settings(agents), |_| None).unwrap()
}

#[test]
fn agents_are_addresses_and_variables_of_the_container() {
    let variable = |name: &str| match name {
        "HOST_IP" => Some("192.168.0.1".to_owned()),
        "HOST_IP6" => Some("fd00::1".to_owned()),
        _ => None,
    };
    for (written, expected) in [
        ("consul.weft-system.svc:8500", "consul.weft-system.svc:8500"),
        ("http://consul:8501/", "consul:8501"),
        ("consul", "consul:8500"),
        ("$(HOST_IP):8500", "192.168.0.1:8500"),
        ("$(HOST_IP6):8500", "[fd00::1]:8500"),
    ] {
        assert_eq!(agent(written, &variable).unwrap(), expected, "{written}");
    }
    for (written, expected) in [
        ("$(NODE):8500", "no variable NODE"),
        ("https://consul:8501", "plain HTTP only"),
        ("unix:///run/consul.sock", "plain HTTP only"),
        ("a b", "expected HOST:PORT"),
        ("", "expected HOST:PORT"),
    ] {
        let message = match ConsulCatalog::new(&settings(&[written]), variable) {
            Ok(_) => panic!("{written} was taken"),
            Err(error) => format!("{error:#}"),
        };
        assert!(message.contains(expected) && message.contains("`consul`"), "{written}: {message}");
    }
}

/// Requests by method, path and token, each with its body.
type Requests = Arc<Mutex<Vec<(String, String)>>>;

/// An agent that answers every request with one status and text, and keeps what it was asked.
async fn fake(status: u16, text: &'static str) -> (String, Requests) {
    let asked = Requests::default();
    let answer = move |State(asked): State<Requests>, request: Asked| async move {
        let token = request.headers().get("x-consul-token").map_or("", |token| token.to_str().unwrap());
        let head = format!("{} {} {token}", request.method(), request.uri());
        let body = to_bytes(request.into_body(), 1 << 20).await.unwrap();
        asked.lock().await.push((head, String::from_utf8(body.to_vec()).unwrap()));
        (StatusCode::from_u16(status).unwrap(), text)
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let router = Router::new().fallback(answer).with_state(Arc::clone(&asked));
    tokio::spawn(async move { axum::serve(listener, router).await });
    (address, asked)
}

/// An address where nobody listens.
fn nobody() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

fn removal() -> Operation {
    Operation::Deregister { node: "k8s-node1".into(), id: "orders:a:8080".into() }
}

#[tokio::test]
async fn another_agent_is_asked_where_one_does_not_answer_and_first_the_next_time() {
    let (broken, asked_broken) = fake(500, "no leader").await;
    let (good, asked_good) = fake(200, "true").await;
    let client = client(&[&nobody(), &broken, &good]);
    client.write(&removal()).await.unwrap();
    client.write(&removal()).await.unwrap();
    assert_eq!((asked_broken.lock().await.len(), asked_good.lock().await.len()), (1, 2));
    let (head, body) = asked_good.lock().await[0].clone();
    assert_eq!(head.trim(), "PUT /v1/catalog/deregister");
    assert_eq!(body, r#"{"Node":"k8s-node1","ServiceID":"orders:a:8080"}"#);
}

#[tokio::test]
async fn a_failure_says_what_and_where_and_a_refusal_is_not_asked_twice() {
    let (refusing, _) = fake(403, "Permission denied").await;
    let (other, asked_other) = fake(200, "true").await;
    let folder = tempfile::tempdir().unwrap();
    let mut settings = settings(&[&refusing, &other]);
    settings.controller.token_file = Some(folder.path().join("token"));
    let client = ConsulCatalog::new(&settings, |_| None).unwrap();

    // Without its file no request is sent.
    let message = format!("{:#}", client.write(&removal()).await.unwrap_err());
    assert!(message.contains("token") && message.contains("cannot be read"), "{message}");

    fs::write(folder.path().join("token"), "secret\n").unwrap();
    let message = format!("{:#}", client.write(&removal()).await.unwrap_err());
    for expected in [
        "instance orders:a:8080 on node k8s-node1: not removed",
        &refusing,
        "Permission denied",
        "service:write",
    ] {
        assert!(message.contains(expected), "{expected}: {message}");
    }
    assert_eq!(asked_other.lock().await.len(), 0);

    let message = format!("{:#}", self::client(&[&nobody()]).read().await.unwrap_err());
    assert!(message.contains("/v1/catalog/nodes"), "{message}");
    let (odd, _) = fake(200, "[{\"Node\": 1}]").await;
    let message = format!("{:#}", self::client(&[&odd]).read().await.unwrap_err());
    assert!(message.contains("[0].Node"), "{message}");
}

#[tokio::test]
async fn an_agent_that_hangs_costs_its_time_limit() {
    let hanging = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = hanging.local_addr().unwrap().to_string();
    let start = tokio::time::Instant::now();
    let message = format!("{:#}", client(&[&address]).write(&removal()).await.unwrap_err());
    assert!(message.contains("no answer within 3s"), "{message}");
    assert!(start.elapsed() < TIME_LIMIT * 2);
}

#[tokio::test]
async fn what_is_written_into_a_real_consul_is_read_again() {
    let [http, serf, wan, server] = [(); 4].map(|()| {
        let address = nobody();
        address.rsplit_once(':').unwrap().1.to_owned()
    });
    let Ok(mut consul) = tokio::process::Command::new("consul")
        .args(["agent", "-dev", "-bind=127.0.0.1", "-dns-port=-1", "-grpc-port=-1", "-http-port", &http])
        .args(["-serf-lan-port", &serf, "-serf-wan-port", &wan, "-server-port", &server])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
    else {
        eprintln!("SKIPPED: there is no consul");
        return;
    };
    let client = client(&[&format!("127.0.0.1:{http}")]);
    let instance = Instance {
        service: "orders_shop".into(),
        address: "10.1.0.1".into(),
        port: 8080,
        meta: [("weft-identity".to_owned(), "spiffe://weft.local/ns/shop/sa/seller".to_owned())].into(),
        status: Status::Passing,
    };
    let other = Instance { status: Status::Critical, address: "fd00::1".into(), ..instance.clone() };
    let register = |node: &str, id: &str, instance: &Instance| Operation::Register {
        node: node.into(),
        address: "192.168.0.1".into(),
        id: id.into(),
        instance: instance.clone(),
    };
    let first = register("k8s-node1", "orders_shop:a:8080", &instance);
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    while let Err(error) = client.write(&first).await {
        assert!(tokio::time::Instant::now() < deadline, "{error:#}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    client.write(&first).await.unwrap();
    client.write(&register("k8s-node1", "orders_shop:b:8080", &other)).await.unwrap();
    client.write(&register("k8s-node2", "orders_shop:c:8080", &other)).await.unwrap();
    let node = |instances: &[(&str, &Instance)]| Node {
        address: "192.168.0.1".into(),
        instances: instances.iter().map(|(id, instance)| ((*id).to_owned(), (*instance).clone())).collect(),
    };
    let both = node(&[("orders_shop:a:8080", &instance), ("orders_shop:b:8080", &other)]);
    let expected: Catalog =
        [("k8s-node1".to_owned(), both), ("k8s-node2".to_owned(), node(&[("orders_shop:c:8080", &other)]))]
            .into();
    assert_eq!(client.read().await.unwrap(), expected);
    assert!(client.nodes().await.unwrap().iter().eq(expected.keys()));

    // Another cluster's is not ours, nor is the agent's own node.
    let mut east = settings(&[&format!("127.0.0.1:{http}")]);
    east.controller.cluster = "east".into();
    let east = ConsulCatalog::new(&east, |_| None).unwrap();
    assert_eq!(east.read().await.unwrap(), Catalog::new());

    client
        .write(&Operation::Deregister { node: "k8s-node1".into(), id: "orders_shop:a:8080".into() })
        .await
        .unwrap();
    client.write(&Operation::DeregisterNode { node: "k8s-node2".into() }).await.unwrap();
    let rest = [("k8s-node1".to_owned(), node(&[("orders_shop:b:8080", &other)]))].into();
    assert_eq!(client.read().await.unwrap(), rest);
    consul.kill().await.unwrap();
}
