//! The one place where the parts meet. [`App::build`] opens every socket and makes every part, so that what
//! cannot work is known before anything runs; [`App::run`] starts the parts in the order in which the sidecar
//! becomes ready, and stops them in the order that loses nothing.

mod build;
mod check;
mod command;
mod descriptors;
mod live;
mod memory;
mod publication;
mod sources;
mod stop;
mod tasks;
mod views;
mod worker;

use std::{ffi::OsString, net::IpAddr, path::Path, process::ExitCode, sync::Arc, time::Duration};

pub use check::check;

use crate::{
    admin::{self, Condition, Leave, Readiness},
    config::Config,
    connect::Dialer,
    discovery::{Asked, Directory, Registry, VirtualAddresses, consul, policies::Policies},
    drain::{Drain, Draining},
    http::BufferBudget,
    identity,
    net::Reclaimer,
    outbound::Upstreams,
    redirect::Namespace,
    serve::{IdleConnections, SilentLimit, WhenFull},
    telemetry::{LogLevel, SpanExport, Telemetry},
    tls::Credentials,
};
use anyhow::anyhow;
use build::Sockets;
use hyper::Method;
use serde_json::Value;
use tasks::Tasks;
use tokio::{
    runtime::{self, Runtime},
    sync::{Semaphore, watch},
    time::{Instant, sleep},
};
use weft_proto::lines::FlushOnDrop;

/// Where the app lives.
pub enum Place {
    /// Where the sidecar lives too; connections come redirected (`run`).
    Host,
    /// In a network namespace of its own, with this command in it (`exec`).
    Namespace(Vec<OsString>),
}

/// A sidecar, ready to run.
pub struct App {
    /// For everything but traffic.
    runtime: Runtime,
    parts: Parts,
    /// Writes the last lines of the log.
    log_end: FlushOnDrop,
}

/// What runs.
struct Parts {
    shared: Arc<Shared>,
    sockets: Sockets,
    /// The command of `exec`.
    command: Option<Arc<Namespace>>,
    senders: Senders,
    span_export: Option<SpanExport>,
    drains: Drains,
    drainings: Drainings,
}

/// What all workers and control tasks have in common.
struct Shared {
    config: Config,
    telemetry: Arc<Telemetry>,
    readiness: Readiness,
    conditions: Conditions,
    log: LogLevel,
    credentials: watch::Receiver<Option<Arc<Credentials>>>,
    identity_status: watch::Receiver<identity::Status>,
    directory: watch::Receiver<Arc<Directory>>,
    /// Where services are asked for by name.
    registry: Arc<Registry>,
    registry_status: watch::Receiver<consul::Status>,
    /// The client of Consul, where it is the registry.
    consul: Option<Arc<consul::Client>>,
    virtual_addresses: Arc<VirtualAddresses>,
    upstreams: Arc<Upstreams>,
    /// The address that peers dial.
    advertised: IpAddr,
    /// How the app is reached.
    app_dialer: Dialer,
    /// Closes idle connections of all workers when descriptors run out.
    reclaimer: Reclaimer,
    tasks: Arc<Tasks>,
    places: Places,
    /// Can others find this workload, as far as it shall be found?
    registered: watch::Sender<bool>,
    /// Leaving the registry before the end.
    leave: Leave,
}

/// What sources publish into.
struct Senders {
    credentials: watch::Sender<Option<Arc<Credentials>>>,
    identity_status: watch::Sender<identity::Status>,
    directory: watch::Sender<Arc<Directory>>,
    policies: watch::Sender<Arc<Policies>>,
    registry_status: watch::Sender<consul::Status>,
    /// What the registry is asked for, where there is one.
    asked: Option<Asked>,
}

/// The groups that finish one after the other.
struct Drains {
    inbound: Drain,
    outbound: Drain,
    /// The threads themselves.
    workers: Drain,
}

/// The other side of [`Drains`], for each worker.
#[derive(Clone)]
struct Drainings {
    inbound: Draining,
    outbound: Draining,
    workers: Draining,
}

impl Drains {
    fn new() -> (Drains, Drainings) {
        let (inbound, inbound_draining) = Drain::new();
        let (outbound, outbound_draining) = Drain::new();
        let (workers, workers_draining) = Drain::new();
        let drainings =
            Drainings { inbound: inbound_draining, outbound: outbound_draining, workers: workers_draining };
        (Drains { inbound, outbound, workers }, drainings)
    }
}

/// What must be met before the sidecar is ready.
struct Conditions {
    /// A valid certificate, where there is an authority.
    identity: Condition,
    /// A first look at services.
    discovery: Condition,
    /// A first look at policies in a registry.
    policies: Condition,
    /// Listeners that are served, and no drain.
    serving: Condition,
}

/// Bounds that all workers share.
struct Places {
    inbound_connections: Arc<Semaphore>,
    outbound_connections: Arc<Semaphore>,
    inbound_requests: Arc<Semaphore>,
    outbound_requests: Arc<Semaphore>,
    inbound_silent: Arc<SilentLimit>,
    inbound_idle: Arc<IdleConnections>,
    inbound_buffers: Arc<BufferBudget>,
    /// What becomes of a connection over the bound.
    when_full: WhenFull,
}

impl App {
    /// Runs until a signal, a drain over the admin socket, or the end of the command. The exit code is that of
    /// the command, where there is one.
    pub fn run(self) -> ExitCode {
        let App { runtime, parts, log_end } = self;
        let code = match runtime.block_on(parts.live()) {
            Ok(code) => ExitCode::from(code),
            Err(error) => {
                tracing::error!("{error:#}");
                ExitCode::FAILURE
            }
        };
        // A file or name that is looked up aside may hang; the end does not wait for it.
        runtime.shutdown_background();
        drop(log_end);
        code
    }
}

/// Waits until a sidecar is ready, which may not even listen yet.
///
/// # Errors
/// It is not ready in time: what is missing, or why it cannot be asked.
pub fn wait(socket: &Path, limit: Duration) -> anyhow::Result<()> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let deadline = Instant::now() + limit;
        loop {
            let missing = match admin::ask(socket, Method::GET, "/status", None).await {
                Ok(status) if status["ready"] == true => return Ok(()),
                Ok(status) => anyhow!("it still misses {}", status["missing"]),
                Err(error) => error,
            };
            if Instant::now() >= deadline {
                return Err(missing.context(format!("the sidecar is not ready after {limit:?}")));
            }
            sleep(WAIT_POLL).await;
        }
    })
}

/// How often [`wait`] asks.
const WAIT_POLL: Duration = Duration::from_millis(50);

/// Asks a running sidecar over its Unix socket; the answer is JSON.
///
/// # Errors
/// Where nobody answers there, or the answer is a refusal.
pub fn ask(socket: &Path, method: Method, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(admin::ask(socket, method, path, body))
}
