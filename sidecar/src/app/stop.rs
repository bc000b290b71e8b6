//! Running and stopping, in the order in which the sidecar becomes ready and in the one that loses nothing.
//!
//! A drain: say that we are not ready and leave the registry; go on for the settle time, until peers have heard;
//! let inbound requests finish; then tell the command to stop, whose last calls still go out; at last outbound.

use std::{sync::Arc, thread, time::Duration};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::{Notify, mpsc, watch},
    time::{Instant, sleep, timeout},
};

use super::{
    Drains, Parts, Senders, Shared,
    build::{Sockets, default_policy},
    views, worker,
};
use crate::{
    admin::{Public, serve_private, serve_public},
    balance::Condition,
    config::document::Mistake,
    discovery::{
        self, dns,
        publish::{Published, Workload, publish},
    },
    identity,
    model::Endpoint,
    redirect::Namespace,
    telemetry::SpanExport,
};

/// The longest wait for the first certificate and the first look at services before the command starts anyway.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// How long the command may take to stop after its signal.
const COMMAND_PATIENCE: Duration = Duration::from_secs(10);
/// The longest wait for the last spans and log lines.
const FLUSH_PATIENCE: Duration = Duration::from_secs(3);
/// How often a host's sidecar looks whether its app is gone.
const APP_GONE_POLL: Duration = Duration::from_millis(200);

/// Why the sidecar ends.
enum End {
    /// A signal, or a drain over the admin socket.
    Asked,
    /// The command ended by itself, with this exit code.
    Command(u8),
}

impl Parts {
    pub(super) async fn live(self) -> Result<u8> {
        let Parts { shared, sockets, command, senders, span_export, drains, drainings } = self;
        let drain_asked = Arc::new(Notify::new());
        let mut signals = signals()?;
        let Sockets { workers, dns_udp, dns_tcp, admin, admin_socket, delivery, advertised } = sockets;
        start_control(&shared, senders, span_export);
        start_dns(&shared, dns_udp, dns_tcp)?;
        let admin_address = admin.local_addr()?;
        start_faces(&shared, TcpListener::from_std(admin)?, admin_socket, &drain_asked);
        let mut threads = Vec::new();
        for (number, listeners) in workers.into_iter().enumerate() {
            let (shared, delivery, drainings) = (shared.clone(), delivery.clone(), drainings.clone());
            let thread = thread::Builder::new().name(format!("worker-{number}"));
            threads.push(thread.spawn(move || worker::run(&shared, listeners, delivery, drainings))?);
        }
        drop(drainings);
        shared.conditions.serving.set(true);
        tracing::info!(
            service = %shared.config.own.service,
            instance = %shared.config.own.instance,
            admin = %admin_address,
            admin_socket = %shared.config.ports.admin_socket.display(),
            "started"
        );
        let early = tokio::select! {
            () = ready(&shared) => None,
            () = asked(&mut signals, &drain_asked) => Some(End::Asked),
        };
        let published = if early.is_none() { publish_workload(&shared, advertised)? } else { None };
        let end = match early {
            Some(end) => end,
            None => running(command.as_deref(), &mut signals, &drain_asked).await?,
        };
        let code = drain(&shared, drains, published, command.as_deref(), end, &mut signals).await;
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a worker ended with a panic");
            }
        }
        shared.telemetry.flush(FLUSH_PATIENCE).await;
        let _ = std::fs::remove_file(&shared.config.ports.admin_socket);
        Ok(code)
    }
}

/// The sources of what changes at run time.
fn start_control(shared: &Arc<Shared>, senders: Senders, span_export: Option<SpanExport>) {
    let config = &shared.config;
    if let Some(export) = span_export {
        tokio::spawn(async move {
            if let Err(error) = export.run().await {
                tracing::error!("spans are not exported: {error:#}");
            }
        });
    }
    match config.authority.clone() {
        Some(authority) => {
            let random = fastrand::Rng::new();
            tokio::spawn(identity::run(authority, senders.credentials, senders.identity_status, random));
        }
        None => {
            shared.conditions.identity.set(true);
            tokio::spawn(keep((senders.credentials, senders.identity_status)));
        }
    }
    let (service_mistakes, told) = watch::channel(Vec::new());
    tokio::spawn(follow_mistakes(shared.clone(), told));
    match config.stores.services.clone() {
        Some(folder) => {
            let settings = discovery::file::Settings { folder };
            tokio::spawn(discovery::file::run(settings, senders.directory, service_mistakes));
        }
        None => {
            shared.conditions.discovery.set(true);
            tokio::spawn(keep(senders.directory));
        }
    }
    let (policy_mistakes, told) = watch::channel(Vec::new());
    tokio::spawn(follow_mistakes(shared.clone(), told));
    match config.stores.policies.clone() {
        Some(folder) => {
            let settings = discovery::policies::Settings { folder, defaults: default_policy(config) };
            tokio::spawn(discovery::policies::run(settings, senders.policies, policy_mistakes));
        }
        None => drop(tokio::spawn(keep(senders.policies))),
    }
    tokio::spawn(shared.upstreams.clone().follow());
    tokio::spawn(count_endpoints(shared.clone()));
    tokio::spawn(follow_identity(shared.clone()));
    tokio::spawn(follow_directory(shared.clone()));
}

/// How many endpoints stand how, by service.
async fn count_endpoints(shared: Arc<Shared>) {
    loop {
        for upstream in shared.upstreams.all() {
            let states = upstream.balancer.states(Instant::now());
            for (condition, label) in CONDITIONS {
                let count = states.iter().filter(|state| state.condition == condition).count();
                shared.telemetry.metrics().endpoints(upstream.name().as_str(), label, count);
            }
        }
        sleep(COUNT_ENDPOINTS).await;
    }
}

/// How often endpoints are counted for the metrics.
const COUNT_ENDPOINTS: Duration = Duration::from_secs(2);
const CONDITIONS: [(Condition, &str); 3] =
    [(Condition::Closed, "ready"), (Condition::Ejected, "ejected"), (Condition::HalfOpen, "probing")];

/// Keeps a sender alive, so that whoever watches goes on waiting.
async fn keep<Sender>(sender: Sender) {
    std::future::pending::<()>().await;
    drop(sender);
}

/// Counts looks at a store: `ok`, or `refused` while a document in it has mistakes.
async fn follow_mistakes(shared: Arc<Shared>, mut mistakes: watch::Receiver<Vec<Mistake>>) {
    while mistakes.changed().await.is_ok() {
        let result = if mistakes.borrow_and_update().is_empty() { "ok" } else { "refused" };
        shared.telemetry.metrics().config_reloaded(result);
    }
}

/// Readiness and metrics of our identity.
async fn follow_identity(shared: Arc<Shared>) {
    let mut credentials = shared.credentials.clone();
    if shared.config.authority.is_none() {
        return;
    }
    loop {
        let current = credentials.borrow_and_update().clone();
        shared.conditions.identity.set(current.is_some());
        if let Some(current) = current {
            shared.telemetry.set_identity(current.id());
            shared.telemetry.metrics().certificate_expires(current.not_after());
            shared.telemetry.metrics().identity_renewed("ok");
        }
        if credentials.changed().await.is_err() {
            return;
        }
    }
}

async fn follow_directory(shared: Arc<Shared>) {
    let mut directory = shared.directory.clone();
    if directory.changed().await.is_ok() {
        shared.conditions.discovery.set(true);
    }
}

fn start_dns(
    shared: &Arc<Shared>,
    udp: Vec<std::net::UdpSocket>,
    tcp: Vec<std::net::TcpListener>,
) -> Result<()> {
    let configured = &shared.config.stores.dns;
    let resolvers = if configured.is_empty() { resolvers_of_host() } else { configured.clone() };
    let running = dns::run(
        dns::Settings { udp, tcp, resolvers },
        shared.directory.clone(),
        shared.virtual_addresses.clone(),
        shared.telemetry.metrics().clone(),
    );
    tokio::spawn(async move {
        if let Err(error) = running.await {
            tracing::error!("DNS is not answered: {error}");
        }
    });
    Ok(())
}

/// The resolvers of `/etc/resolv.conf`; without one, names of others are not answered.
fn resolvers_of_host() -> Vec<std::net::SocketAddr> {
    std::fs::read_to_string("/etc/resolv.conf").map(|text| dns::resolvers(&text)).unwrap_or_default()
}

fn start_faces(
    shared: &Arc<Shared>,
    public: TcpListener,
    private: tokio::net::UnixListener,
    drain_asked: &Arc<Notify>,
) {
    let face = Public {
        readiness: shared.readiness.clone(),
        metrics: shared.telemetry.metrics().clone(),
        probes: Vec::new(),
        quit: None,
    };
    tokio::spawn(serve_public(public, face));
    tokio::spawn(serve_private(private, views::private(shared, drain_asked.clone())));
}

/// Waits until every condition is met.
async fn ready(shared: &Shared) {
    let start = Instant::now();
    let mut told = false;
    loop {
        let missing = shared.readiness.missing();
        if missing.is_empty() {
            return tracing::info!(took = ?start.elapsed(), "ready");
        }
        if start.elapsed() > START_PATIENCE && !told {
            tracing::warn!(?missing, "still not ready");
            told = true;
        }
        sleep(Duration::from_millis(2)).await;
    }
}

/// Writes our own workload where peers look for it.
fn publish_workload(shared: &Shared, advertised: std::net::IpAddr) -> Result<Option<Published>> {
    let config = &shared.config;
    let (Some(folder), Some(port)) = (&config.stores.services, config.app.ports.first()) else {
        return Ok(None);
    };
    if !config.stores.publish {
        return Ok(None);
    }
    let identities = shared.credentials.borrow().iter().map(|credentials| credentials.id().clone()).collect();
    let endpoint = Endpoint {
        zone: config.own.zone.as_deref().map(Into::into),
        ..Endpoint::at((advertised, *port).into())
    };
    let workload = Workload {
        service: config.own.service.clone(),
        instance: config.own.instance.clone(),
        protocol: config.app.protocol,
        identities,
        endpoint,
    };
    let published = publish(folder, &workload)
        .with_context(|| format!("cannot publish this workload in {}", folder.display()))?;
    Ok(Some(published))
}

/// Runs until somebody asks for the end, or the command has ended.
async fn running(
    command: Option<&Namespace>,
    signals: &mut mpsc::Receiver<Signal>,
    drain_asked: &Notify,
) -> Result<End> {
    let Some(command) = command else {
        asked(signals, drain_asked).await;
        return Ok(End::Asked);
    };
    command.start_command().await.context("cannot start the command")?;
    tokio::select! {
        ended = command.wait() => Ok(End::Command(exit_code(ended.context("lost the command")?))),
        () = asked(signals, drain_asked) => Ok(End::Asked),
    }
}

async fn asked(signals: &mut mpsc::Receiver<Signal>, drain_asked: &Notify) {
    tokio::select! {
        signal = signals.recv() => tracing::info!(?signal, "asked to stop"),
        () = drain_asked.notified() => tracing::info!("asked to stop over the admin socket"),
    }
}

/// Finishes what is under way. A second signal ends it at once.
async fn drain(
    shared: &Arc<Shared>,
    drains: Drains,
    published: Option<Published>,
    command: Option<&Namespace>,
    end: End,
    signals: &mut mpsc::Receiver<Signal>,
) -> u8 {
    let Drains { inbound, outbound, workers } = drains;
    let times = &shared.config.drain;
    shared.conditions.serving.set(false);
    let orderly = async {
        if let Some(published) = published
            && let Err(error) = published.withdraw().await
        {
            tracing::warn!("this workload cannot be taken back: {error}");
        }
        if let End::Command(code) = end {
            return code;
        }
        sleep(times.settle).await;
        let deadline = Instant::now() + times.timeout;
        tracing::info!("draining: {:?}", inbound.finished(deadline).await);
        let code = match command {
            Some(command) => stop_command(command).await,
            None => {
                app_gone(shared, deadline).await;
                0
            }
        };
        tracing::info!("the app's calls: {:?}", outbound.finished(deadline.max(Instant::now())).await);
        code
    };
    let code = tokio::select! {
        code = orderly => code,
        signal = signals.recv() => {
            tracing::warn!(?signal, "asked again: stopping at once");
            if let Some(command) = command {
                command.signal(Signal::SIGKILL);
            }
            1
        }
    };
    workers.start();
    code
}

/// Asks the command to stop, and makes it.
async fn stop_command(command: &Namespace) -> u8 {
    command.signal(Signal::SIGTERM);
    match timeout(COMMAND_PATIENCE, command.wait()).await {
        Ok(Ok(status)) => exit_code(status),
        Ok(Err(_)) => 1,
        Err(_) => {
            tracing::warn!("the command did not stop within {COMMAND_PATIENCE:?} and is killed");
            command.signal(Signal::SIGKILL);
            command.wait().await.map_or(1, exit_code)
        }
    }
}

/// Waits until the app on this host is gone: its ports refuse connections and it has no connection open.
async fn app_gone(shared: &Shared, deadline: Instant) {
    let open = || shared.config.limits.connections - shared.places.outbound_connections.available_permits();
    while Instant::now() < deadline {
        let mut listens = false;
        for port in &shared.config.app.ports {
            let address = std::net::SocketAddr::from(([127, 0, 0, 1], *port));
            listens |= tokio::net::TcpStream::connect(address).await.is_ok();
        }
        if !listens && open() == 0 {
            return;
        }
        sleep(APP_GONE_POLL).await;
    }
}

fn exit_code(status: std::process::ExitStatus) -> u8 {
    use std::os::unix::process::ExitStatusExt;
    let code = status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}

fn signals() -> Result<mpsc::Receiver<Signal>> {
    let (tell, told) = mpsc::channel(4);
    for (kind, name) in
        [(SignalKind::terminate(), Signal::SIGTERM), (SignalKind::interrupt(), Signal::SIGINT)]
    {
        let mut stream = signal(kind)?;
        let tell = tell.clone();
        tokio::spawn(async move {
            while stream.recv().await.is_some() {
                if tell.send(name).await.is_err() {
                    return;
                }
            }
        });
    }
    Ok(told)
}
