//! The tasks of the control thread: identity, stores, DNS, both faces of admin, and what readiness and metrics
//! learn from them.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Result;
use tokio::{
    net::TcpListener,
    sync::{Notify, oneshot, watch},
    time::{Instant, sleep},
};

use super::{
    Senders, Shared, build::default_policy, memory, publication::app_addresses, tasks::Tasks, views,
};
use crate::{
    admin::{AppProbes, Public, serve_private, serve_public},
    balance::Condition,
    config::document::Mistake,
    discovery::{self, Asked, Directory, consul, dns, file, policies::Policies},
    identity,
    telemetry::SpanExport,
};

/// The sources of what changes at run time.
pub(super) fn start_sources(shared: &Arc<Shared>, senders: Senders, span_export: Option<SpanExport>) {
    let config = &shared.config;
    if let Some(export) = span_export {
        Tasks::spawn_minor("export of spans", async move {
            if let Err(error) = export.run().await {
                tracing::error!("spans are not exported: {error:#}");
            }
        });
    }
    match config.authority.clone() {
        Some(authority) => {
            let random = fastrand::Rng::new();
            let running = identity::run(authority, senders.credentials, senders.identity_status, random);
            shared.tasks.spawn("identity", running);
        }
        None => {
            shared.conditions.identity.set(true);
            tokio::spawn(keep((senders.credentials, senders.identity_status)));
        }
    }
    let Senders { directory, asked, registry_status, policies, .. } = senders;
    start_services(shared, directory, asked, registry_status);
    start_policies(shared, policies);
    shared.tasks.spawn("services in use", shared.upstreams.clone().follow());
    Tasks::spawn_minor("count of endpoints", count_endpoints(shared.clone()));
    shared.tasks.spawn("readiness of the identity", follow_identity(shared.clone()));
    Tasks::spawn_minor("count of renewals", count_renewals(shared.clone()));
    shared.tasks.spawn("readiness of discovery", follow_directory(shared.clone()));
    Tasks::spawn_minor("memory", memory::give_back());
}

/// Files, and Consul beside them.
fn start_services(
    shared: &Arc<Shared>,
    directory: watch::Sender<Arc<Directory>>,
    asked: Option<Asked>,
    registry_status: watch::Sender<consul::Status>,
) {
    let (mistakes, told) = watch::channel(Vec::new());
    Tasks::spawn_minor("count of mistakes", follow_mistakes(shared.clone(), told));
    let into = match shared.consul.clone().zip(asked) {
        Some((client, asked)) => {
            let (files, found) = watch::channel(Arc::default());
            let random = fastrand::Rng::new();
            let running = consul::run(client, found, asked, directory, registry_status, random);
            shared.tasks.spawn("services in Consul", running);
            files
        }
        None => directory,
    };
    match shared.config.stores.services.clone() {
        Some(folder) => {
            let running = file::run(file::Settings { folder }, into, mistakes);
            shared.tasks.spawn("service files", running);
        }
        None => {
            shared.conditions.discovery.set(true);
            tokio::spawn(keep((into, mistakes)));
        }
    }
}

/// Policies from files, and from Consul beside them.
fn start_policies(shared: &Arc<Shared>, policies: watch::Sender<Arc<Policies>>) {
    let config = &shared.config;
    let (mistakes, told) = watch::channel(Vec::new());
    Tasks::spawn_minor("count of mistakes", follow_mistakes(shared.clone(), told));
    let into = match shared.consul.clone() {
        Some(client) => {
            let (files, found) = watch::channel(Arc::default());
            let (mistakes, told) = watch::channel(Vec::new());
            Tasks::spawn_minor("count of mistakes", follow_mistakes(shared.clone(), told));
            let (looked, first_look) = oneshot::channel();
            shared.tasks.spawn("readiness of policies", follow_first_look(shared.clone(), first_look));
            let settings = consul::PolicySettings { client, defaults: default_policy(config) };
            let random = fastrand::Rng::new();
            let following = consul::follow_policies(settings, found, policies, mistakes, looked, random);
            shared.tasks.spawn("policies in Consul", following);
            files
        }
        None => {
            shared.conditions.policies.set(true);
            policies
        }
    };
    match config.stores.policies.clone() {
        Some(folder) => {
            let settings = discovery::policies::Settings { folder, defaults: default_policy(config) };
            shared.tasks.spawn("policy files", discovery::policies::run(settings, into, mistakes));
        }
        None => drop(tokio::spawn(keep((into, mistakes)))),
    }
}

/// Ready is who has looked at the policies once, with or without success: they may ask for strict mutual TLS.
async fn follow_first_look(shared: Arc<Shared>, first_look: oneshot::Receiver<()>) {
    if first_look.await.is_ok() {
        shared.conditions.policies.set(true);
    }
}

/// How many endpoints stand how, by service.
async fn count_endpoints(shared: Arc<Shared>) {
    loop {
        for upstream in shared.upstreams.all() {
            let conditions = upstream.balancer.conditions(Instant::now());
            for condition in Condition::ALL {
                let count = conditions.iter().filter(|one| **one == condition).count();
                shared.telemetry.metrics().endpoints(upstream.name().as_str(), condition.label(), count);
            }
        }
        sleep(COUNT_ENDPOINTS).await;
    }
}

/// How often endpoints are counted for the metrics.
const COUNT_ENDPOINTS: Duration = Duration::from_secs(2);

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
        let not_after = current.as_ref().map(|current| current.not_after());
        shared.telemetry.metrics().certificate_expires(not_after);
        if let Some(current) = current {
            shared.telemetry.set_identity(current.id());
        }
        if credentials.changed().await.is_err() {
            return;
        }
    }
}

/// Counts requests for a certificate, also those that failed: credentials tell of neither, since they change with the
/// trust bundle and stay while the authority is away.
async fn count_renewals(shared: Arc<Shared>) {
    let (mut status, metrics) = (shared.identity_status.clone(), shared.telemetry.metrics());
    let (mut obtained, mut failed) = (0, 0);
    loop {
        let now = status.borrow_and_update().clone();
        metrics.identity_renewed("ok", now.obtained - obtained);
        metrics.identity_renewed("failed", now.failed - failed);
        (obtained, failed) = (now.obtained, now.failed);
        if status.changed().await.is_err() {
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

pub(super) fn start_dns(
    shared: &Arc<Shared>,
    udp: Vec<std::net::UdpSocket>,
    tcp: Vec<std::net::TcpListener>,
) -> Result<()> {
    let configured = &shared.config.stores.dns;
    let resolvers = if configured.is_empty() { resolvers_of_host() } else { configured.clone() };
    let rebinding_allowed = shared.config.stores.dns_rebinding_allowed.clone();
    let running = dns::run(
        dns::Settings { udp, tcp, resolvers, rebinding_allowed, reclaimer: shared.reclaimer.clone() },
        shared.directory.clone(),
        shared.registry.clone(),
        shared.virtual_addresses.clone(),
        shared.telemetry.metrics().clone(),
    );
    let tasks = shared.tasks.clone();
    shared.tasks.spawn("DNS", async move {
        if let Err(error) = running.await {
            tasks.fail("DNS", &format!("names are not answered: {error}"));
        }
    });
    Ok(())
}

/// The resolvers of `/etc/resolv.conf`; without one, names of others are not answered.
fn resolvers_of_host() -> Vec<SocketAddr> {
    std::fs::read_to_string("/etc/resolv.conf").map(|text| dns::resolvers(&text)).unwrap_or_default()
}

pub(super) fn start_faces(
    shared: &Arc<Shared>,
    public: TcpListener,
    private: tokio::net::UnixListener,
    drain_asked: &Arc<Notify>,
) {
    let advertised = shared.advertised;
    let app = AppProbes::new(
        &shared.config.app.kubelet_probes,
        shared.app_dialer.clone(),
        shared.reclaimer.clone(),
        Arc::new(move |port| app_addresses(advertised, port).to_vec()),
    );
    let face = Public {
        readiness: shared.readiness.clone(),
        metrics: shared.telemetry.metrics().clone(),
        registered: shared.registered.subscribe(),
        app: Arc::new(app),
    };
    shared.tasks.spawn("probes and metrics", serve_public(public, face));
    shared.tasks.spawn("admin socket", serve_private(private, views::private(shared, drain_asked.clone())));
}
