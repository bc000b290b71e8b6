//! Where the parts of the authority meet: listeners, TLS, limits, upkeep, drain.
//!
//! The order of the start is that of readiness: state, addresses, then service. On a stop the probes turn first,
//! then nobody is accepted, streams of the bundle are told, and what is under way may finish. Where one of the tasks
//! ends by itself the program ends with an error: it would look alive and give nothing.

use std::{
    future::Future,
    io,
    net::SocketAddr,
    panic::AssertUnwindSafe,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use anyhow::{Context, Error, Result, anyhow, bail};
use futures_util::FutureExt;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use prometheus_client::metrics::counter::Counter;
use tokio::{
    net::TcpListener,
    sync::{Notify, mpsc, watch},
    task::JoinSet,
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server as Grpc;
use weft_proto::{ca::certificate_authority_server::CertificateAuthorityServer, spiffe::SpiffeId};

use crate::{
    admin::{self, Admin},
    audit::Audit,
    authority::Authority,
    connections::Connections,
    directory::{Directory, write_private},
    dns_names,
    kubernetes::Cluster,
    limit::Limit,
    listener::{Accepting, Connection, accept},
    metrics::Metrics,
    service::{Face, Guesses, Lifetimes, Service, Streams},
    token::Tokens,
    upkeep::{Tls, Upkeep, make_tls},
};

/// How `weft-ca serve` was asked to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where root, issuing certificate and tokens are kept.
    pub dir: PathBuf,
    /// Where workloads ask.
    pub listen: SocketAddr,
    /// Probes and metrics.
    pub admin: SocketAddr,
    /// How long certificates live.
    pub lifetimes: Lifetimes,
    /// The audit file; standard output without one.
    pub audit: Option<PathBuf>,
    /// Are the service accounts of a Kubernetes cluster workloads?
    pub kubernetes: bool,
    /// Who may have DNS names in its certificate, besides the identity.
    pub serving_identities: Vec<SpiffeId>,
    /// Connections at a time; fewer where the process may open too few descriptors.
    pub max_connections: usize,
    /// Where the addresses are written as JSON once the listeners stand.
    pub address_file: Option<PathBuf>,
    /// Lines of the log that were lost.
    pub log_lines_dropped: Counter,
}

/// For one Issue request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection is asked to end after this long; a workload connects again.
const CONNECTION_AGE: Duration = Duration::from_secs(3600);
/// A silent connection is probed after this long.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// For what is under way when the program stops.
const DRAIN: Duration = Duration::from_secs(10);
/// A request is a CSR and a token.
const MAX_MESSAGE: usize = 16 * 1024;
/// Streams on one connection: a renewal and the bundle.
const MAX_STREAMS: u32 = 8;
/// Header bytes of a request.
const MAX_HEADERS: u32 = 8 * 1024;

/// Secured connections that wait for the service.
const WAITING: usize = 16;
/// Descriptors beside the connections: probes, files of tokens, and what a program has open anyway.
const RESERVED: u64 = admin::CONNECTIONS as u64 + 128;
/// Lines of the log about certificates that could not be given.
const LINES_PER_MINUTE: u32 = 60;

/// An authority whose state is good and whose addresses are bound.
pub struct Server {
    options: Options,
    directory: Directory,
    authority: Arc<Authority>,
    tls: Tls,
    tokens: Tokens,
    audit: Arc<Audit>,
    cluster: Option<Cluster>,
    max_connections: usize,
    listener: TcpListener,
    admin_listener: TcpListener,
}

impl Server {
    /// Takes up the state and binds the addresses.
    ///
    /// # Errors
    /// The state is refused, an address cannot be bound, or the process may open too few descriptors.
    pub async fn start(options: Options) -> Result<Self> {
        let directory = Directory::open(&options.dir)
            .with_context(|| "no authority here; `weft-ca init` makes one".to_owned())?;
        let authority = Arc::new(Authority::load(&directory, SystemTime::now())?);
        for id in &options.serving_identities {
            dns_names::check_identity(id, authority.trust_domain())?;
        }
        let tokens = Tokens::open(&directory)?;
        let audit = Arc::new(Audit::open(options.audit.as_deref())?);
        let cluster = match options.kubernetes {
            true => Some(Cluster::connect(authority.trust_domain().clone()).await?),
            false => None,
        };
        let max_connections = fitting(raise_descriptors()?, options.max_connections)?;
        let tls = make_tls(&authority, SystemTime::now())?;
        let (listener, admin_listener) = (bind(options.listen).await?, bind(options.admin).await?);
        announce(&options, &authority, &listener, &admin_listener)?;
        Ok(Server {
            options,
            directory,
            authority,
            tls,
            tokens,
            audit,
            cluster,
            max_connections,
            listener,
            admin_listener,
        })
    }

    /// Serves until the future ends, then drains. `reread` tells that files are to be read again.
    ///
    /// # Errors
    /// One of the tasks has ended by itself.
    pub async fn run(self, stop: impl Future<Output = ()>, reread: Arc<Notify>) -> Result<()> {
        let metrics = Arc::new(Metrics::new(self.options.log_lines_dropped.clone()));
        metrics.set_ends(self.authority.root_not_after(), self.authority.issuing_not_after());
        let (stopping_sender, stopping) = watch::channel(false);
        let (authority_sender, authority) = watch::channel(self.authority);
        let (tls_sender, tls) = watch::channel(Arc::new(self.tls));
        let serving = Arc::new(AtomicBool::new(true));
        let admin = Admin {
            metrics: metrics.clone(),
            authority: authority.clone(),
            audit: self.audit.clone(),
            serving: serving.clone(),
        };
        let roots = authority.clone();
        let service = Service {
            authority,
            stopping: stopping.clone(),
            tokens: self.tokens.clone(),
            cluster: self.cluster.clone(),
            audit: self.audit.clone(),
            metrics: metrics.clone(),
            lifetimes: self.options.lifetimes,
            serving_identities: self.options.serving_identities,
            guesses: Guesses::default(),
            streams: Streams::new(self.max_connections),
            lines: Limit::new(LINES_PER_MINUTE),
        };
        let upkeep = Upkeep {
            directory: self.directory,
            tokens: self.tokens,
            audit: self.audit,
            metrics: metrics.clone(),
            reread,
            authority_sender,
            tls_sender,
        };
        let accepting = Accepting {
            listener: self.listener,
            tls,
            connections: Connections::new(self.max_connections, metrics.clone()),
            metrics,
            stopping: stopping.clone(),
        };
        let (secured, connections) = mpsc::channel(WAITING);
        let mut tasks = JoinSet::new();
        tasks.spawn(essential("probes and metrics", admin::serve(self.admin_listener, admin)));
        tasks.spawn(essential("the upkeep", upkeep.run()));
        if let Some(cluster) = self.cluster {
            tasks.spawn(essential("the ConfigMap of the roots", cluster.publish_roots(roots)));
        }
        tasks.spawn(essential("the accept loop", accept(accepting, secured)));
        let mut grpc = tokio::spawn(essential("the service", serve_grpc(service, connections, stopping)));
        tokio::select! {
            () = stop => {}
            Some(ended) = tasks.join_next() => return Err(ended?),
            ended = &mut grpc => return Err(ended?),
        }
        tracing::info!("stopping");
        serving.store(false, Ordering::Relaxed);
        let _ = stopping_sender.send(true);
        if timeout(DRAIN, grpc).await.is_err() {
            tracing::warn!("connections were cut after {} s", DRAIN.as_secs());
        }
        Ok(())
    }
}

/// Runs what must not end before the program does, and says what has ended all the same.
async fn essential(name: &'static str, task: impl Future<Output = ()>) -> Error {
    match AssertUnwindSafe(task).catch_unwind().await {
        Ok(()) => anyhow!("{name} ended by itself; nothing would be given any more"),
        Err(_) => anyhow!("{name} ended with a panic, a bug of ours; nothing would be given any more"),
    }
}

/// Raises the number of descriptors that this process may open as far as the system allows, and says how many.
fn raise_descriptors() -> Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("the limit of descriptors")?;
    match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => Ok(hard),
        Err(error) => {
            tracing::warn!(
                "the limit of descriptors stays at {soft}, as it cannot be raised to {hard}: {error}"
            );
            Ok(soft)
        }
    }
}

/// How many connections fit beside what else takes descriptors.
fn fitting(descriptors: u64, wanted: usize) -> Result<usize> {
    let fit = usize::try_from(descriptors.saturating_sub(RESERVED)).unwrap_or(usize::MAX);
    if fit == 0 {
        bail!(
            "this process may open {descriptors} descriptors, and {RESERVED} are needed beside the connections; \
             raise the hard limit (`ulimit -Hn`, `LimitNOFILE=` of systemd)"
        );
    }
    if fit < wanted {
        tracing::warn!(
            "--max-connections is {wanted}, and {descriptors} descriptors are enough for {fit}; raise the hard limit \
             (`ulimit -Hn`, `LimitNOFILE=` of systemd)"
        );
    }
    Ok(fit.min(wanted))
}

async fn bind(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("listening on {address}"))
}

fn announce(
    options: &Options,
    authority: &Authority,
    listener: &TcpListener,
    admin: &TcpListener,
) -> Result<()> {
    let (listen, admin) = (listener.local_addr()?, admin.local_addr()?);
    tracing::info!(
        %listen,
        %admin,
        trust_domain = %authority.trust_domain(),
        root_sha256 = authority.root_sha256(),
        "serving"
    );
    if let Some(path) = &options.address_file {
        let text = serde_json::json!({ "listen": listen, "admin": admin }).to_string();
        write_private(path, text.as_bytes()).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

async fn serve_grpc(
    service: Service,
    connections: mpsc::Receiver<Connection>,
    mut stopping: watch::Receiver<bool>,
) {
    let service =
        CertificateAuthorityServer::new(Face(Arc::new(service))).max_decoding_message_size(MAX_MESSAGE);
    let incoming = tokio_stream::StreamExt::map(ReceiverStream::new(connections), Ok::<_, io::Error>);
    let served = Grpc::builder()
        .max_concurrent_streams(MAX_STREAMS)
        .http2_max_header_list_size(MAX_HEADERS)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .max_connection_age(CONNECTION_AGE)
        .max_connection_age_grace(DRAIN)
        .timeout(REQUEST_TIMEOUT)
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, async move {
            let _ = stopping.wait_for(|stopping| *stopping).await;
        })
        .await;
    if let Err(error) = served {
        tracing::error!("the service failed: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_ends_is_named_however_it_ended() {
        let ended = essential("the upkeep", async {}).await.to_string();
        assert!(ended.starts_with("the upkeep ended by itself"), "{ended}");
        let panicked = essential("the upkeep", async { panic!("for the test") }).await.to_string();
        assert!(panicked.starts_with("the upkeep ended with a panic"), "{panicked}");
    }

    #[test]
    fn connections_leave_descriptors_for_probes_and_files() {
        assert_eq!(fitting(1 << 20, 10_000).unwrap(), 10_000);
        assert_eq!(fitting(1024, 10_000).unwrap(), 1024 - RESERVED as usize);
        assert_eq!(fitting(u64::MAX, 10_000).unwrap(), 10_000);
        let error = fitting(RESERVED, 1).unwrap_err().to_string();
        assert!(error.contains("ulimit"), "{error}");
    }
}
