//! The size of a connection's future: what every open connection costs beside its buffers.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
};

use super::{Outbound, Upstreams};
use crate::{
    config::{AccessLogMode, Mode},
    connect::{Connector, Dialer, Pool},
    discovery::{Directory, Registry, VirtualAddresses, policies::Policies},
    drain::Drain,
    http::{BufferBudget, HttpLimits},
    inbound::{Delivery, Inbound, Meaning},
    model::{MutualTls, Policy, ServiceName},
    serve::SilentLimit,
    telemetry::{AccessLog, AccessLogTarget, Direction, Metrics, Telemetry, TraceSettings},
};

/// Raising these is a decision: 10,000 connections cost 10,000 times as much.
const MOST_INBOUND_BYTES: usize = 9 * 1024;
const MOST_OUTBOUND_BYTES: usize = 6 * 1024 + 256;

fn stories() -> (Arc<Inbound>, Arc<Outbound>) {
    stories_of(Directory::default(), HashMap::new(), Policy::default())
}

/// With these services, listeners that stand for one, and a policy for all.
pub(super) fn stories_of(
    directory: Directory,
    explicit: HashMap<SocketAddr, ServiceName>,
    policy: Policy,
) -> (Arc<Inbound>, Arc<Outbound>) {
    let metrics = Arc::new(Metrics::new());
    let log = AccessLog::open(AccessLogMode::Off, &AccessLogTarget::Stdout, &metrics).unwrap();
    let (settings, _) = TraceSettings::read(|_| None, "test");
    let (telemetry, _) = Telemetry::new(&settings, log, metrics);
    let credentials = watch::channel(None).1;
    let connector = Connector::new(Dialer::Direct, credentials.clone(), Duration::from_secs(1));
    let policies = watch::channel(Arc::new(Policies::default())).1;
    let delivery = Delivery {
        meaning: Meaning::Listener,
        addresses: vec![IpAddr::from([127, 0, 0, 1])],
        own_ports: Vec::new(),
        registered: Default::default(),
        protocol: None,
        mutual_tls: MutualTls::Permissive,
        mutual_tls_ports: Default::default(),
        service: "test".parse().unwrap(),
        policies: policies.clone(),
    };
    let inbound = Arc::new(Inbound {
        delivery,
        pool: Pool::new(connector.clone(), telemetry.metrics().clone()),
        connector: connector.clone(),
        credentials,
        limits: HttpLimits::default(),
        requests: Arc::new(Semaphore::new(1)),
        silent: SilentLimit::new(1),
        buffers: BufferBudget::new(0),
        idle: Arc::default(),
        metrics: telemetry.metrics().service(Direction::Inbound, "test", ""),
        telemetry: telemetry.clone(),
    });
    let directory = watch::channel(Arc::new(directory)).1;
    let registry = Arc::new(Registry::none(directory.clone()));
    let outbound = Arc::new(Outbound {
        directory: directory.clone(),
        virtual_addresses: Arc::new(VirtualAddresses::in_memory()),
        explicit,
        registry: registry.clone(),
        upstreams: Upstreams::new(directory, policies, registry, policy, telemetry.clone()),
        pool: Pool::new(connector.clone(), telemetry.metrics().clone()),
        connector,
        inbound: inbound.clone(),
        mode: Mode::AllowAny,
        own_ports: Vec::new(),
        limits: HttpLimits::default(),
        requests: Arc::new(Semaphore::new(100)),
        telemetry,
    });
    (inbound, outbound)
}

#[tokio::test]
async fn the_future_of_a_connection_stays_small() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (inbound, outbound) = stories();
    let (_drain, draining) = Drain::new();
    let dial = || async { TcpStream::connect(address).await.unwrap() };
    let inbound = inbound.connection(dial().await, address, draining.clone());
    let outbound = outbound.connection(dial().await, address, draining);
    let sizes = (size_of_val(&inbound), size_of_val(&outbound));
    assert!(sizes.0 <= MOST_INBOUND_BYTES && sizes.1 <= MOST_OUTBOUND_BYTES, "inbound, outbound: {sizes:?}");
}
