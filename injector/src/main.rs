//! The command line of the injector.

use std::{
    fs,
    io::{Read, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result};
use axum::{Router, routing::get};
use clap::{Args, Parser, Subcommand};
use futures_util::StreamExt;
use k8s_openapi::api::core::v1::Namespace;
use kube::{
    Api, Client,
    runtime::{WatchStreamExt, reflector, watcher},
};
use tokio::{net::TcpListener, sync::Notify, task::JoinHandle};
use tracing_subscriber::EnvFilter;
use weft_injector::{
    certificate::{Files, Serving},
    controller::Controller,
    identity::{Identity, Pin},
    metrics::Metrics,
    offline,
    roots::Roots,
    settings::Settings,
    webhook::{Namespaces, Webhook, router, serve},
};

/// Adds the Weft sidecar to every pod of a labelled namespace.
#[derive(Parser)]
#[command(
    name = "weft-injector",
    version,
    after_help = "Examples:\n  \
        weft-injector serve --config /etc/weft/injector.yaml --token-file /run/token/token\n  \
        weft-injector inject -f deployment.yaml --config injector.yaml | kubectl apply -f -\n  \
        weft-injector uninject -f deployment.yaml\n\n\
        Exit codes: 0 done; 1 failed, or an object was refused; 2 wrong usage or settings."
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve the admission webhook of a cluster
    Serve(Serve),
    /// Add the sidecar to the pods and templates of a file, as the webhook would
    Inject(Inject),
    /// Take the sidecar out of the pods and templates of a file
    Uninject {
        /// YAML or JSON; `-` is standard input
        #[arg(short, long, value_name = "FILE")]
        file: PathBuf,
    },
}

#[derive(Args)]
struct Serve {
    /// YAML file with the injector's settings
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Where the API server asks
    #[arg(long, value_name = "ADDRESS", default_value = "[::]:15443")]
    listen: SocketAddr,
    /// Probes and metrics, in plain HTTP
    #[arg(long, value_name = "ADDRESS", default_value = "[::]:15444")]
    admin: SocketAddr,
    /// Token of the injector's service account, for the audience weft-ca: the authority of the settings gives the serving
    /// certificate for it
    #[arg(long, value_name = "FILE", required_unless_present = "tls_cert", conflicts_with = "tls_cert")]
    token_file: Option<PathBuf>,
    /// Root of the authority, PEM [default: ConfigMap weft-root of the injector's own namespace]
    #[arg(long, value_name = "FILE", conflicts_with = "tls_cert")]
    authority_root: Option<PathBuf>,
    /// How long the serving certificate shall live; the authority may give less
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration, conflicts_with = "tls_cert")]
    certificate_lifetime: Option<Duration>,
    /// The Service under which the API server knows the webhook; the service account must have the same name
    #[arg(long, value_name = "NAME", default_value = "weft-injector")]
    service: String,
    /// The MutatingWebhookConfiguration whose CA bundle follows the roots of the authority
    #[arg(long, value_name = "NAME", default_value = "weft-injector")]
    webhook_configuration: String,
    /// A serving certificate of your own instead, PEM, the leaf first; read again when it changes. The CA bundle of the
    /// webhook is then left alone
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Its key, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// The injector's own log: error, warn, info, debug or a filter
    #[arg(long, value_name = "FILTER", default_value = "info")]
    log: String,
}

#[derive(Args)]
struct Inject {
    /// YAML or JSON, several documents too; `-` is standard input
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// YAML file with the injector's settings, as the cluster's injector has it
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Namespace of objects that name none
    #[arg(short, long, value_name = "NAME", default_value = "default")]
    namespace: String,
}

const FAILED: u8 = 1;
const WRONG: u8 = 2;

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Serve(arguments) => run(&arguments),
        Command::Inject(arguments) => match Settings::read(&arguments.config) {
            Ok(settings) => {
                on_file(&arguments.file, |text| offline::inject(text, &arguments.namespace, &settings))
            }
            Err(error) => failed(WRONG, &[format!("{error:#}")]),
        },
        Command::Uninject { file } => on_file(&file, offline::uninject),
    }
}

/// The changed text goes to standard output, what was done to standard error.
fn on_file(file: &Path, change: impl FnOnce(&str) -> Result<offline::Outcome, Vec<String>>) -> ExitCode {
    let text = match read(file) {
        Ok(text) => text,
        Err(error) => return failed(FAILED, &[format!("{error:#}")]),
    };
    match change(&text) {
        Ok(outcome) => {
            for line in outcome.report {
                eprintln!("{line}");
            }
            match std::io::stdout().write_all(outcome.text.as_bytes()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => failed(FAILED, &[format!("standard output cannot be written: {error}")]),
            }
        }
        Err(messages) => failed(FAILED, &messages),
    }
}

fn read(file: &Path) -> Result<String> {
    if file == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).context("standard input cannot be read")?;
        return Ok(text);
    }
    fs::read_to_string(file).with_context(|| format!("{}: cannot be read", file.display()))
}

fn failed(code: u8, messages: &[String]) -> ExitCode {
    for message in messages {
        eprintln!("weft-injector: {message}");
    }
    ExitCode::from(code)
}

fn run(arguments: &Serve) -> ExitCode {
    let settings = match Settings::read(&arguments.config) {
        Ok(settings) => settings,
        Err(error) => return failed(WRONG, &[format!("{error:#}")]),
    };
    let filter = match EnvFilter::try_new(&arguments.log) {
        Ok(filter) => filter,
        Err(error) => return failed(WRONG, &[format!("`log` is {:?}: {error}", arguments.log)]),
    };
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let outcome = runtime
        .context("no runtime can be started")
        .and_then(|runtime| runtime.block_on(serve_cluster(arguments, settings)));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(FAILED, &[format!("{error:#}")]),
    }
}

/// Serves until SIGTERM or SIGINT.
async fn serve_cluster(arguments: &Serve, settings: Settings) -> Result<()> {
    let client = Client::try_default().await.context("no cluster: neither in a pod nor by KUBECONFIG")?;
    let changed = Arc::new(Notify::new());
    let namespaces = watch_namespaces(&client, &changed);
    let roots = Roots {
        client: client.clone(),
        own_namespace: settings.namespace.clone(),
        namespaces: namespaces.store.clone(),
    };
    tokio::spawn(roots.distribute(changed));
    let (serving, metrics) = (Arc::new(Serving::default()), Arc::new(Metrics::default()));
    let controller = start_controller(&client, &settings, &metrics)?;
    let certificate = keep_certificate(arguments, &settings, client, &serving, &metrics)?;
    let webhook = Arc::new(Webhook { settings, namespaces, metrics });
    let listener = bind(arguments.listen).await?;
    let admin = bind(arguments.admin).await?;
    tracing::info!(listen = %arguments.listen, admin = %arguments.admin, version = env!("CARGO_PKG_VERSION"), "started");
    let admin = axum::serve(admin, admin_router(Arc::clone(&webhook), Arc::clone(&serving)));
    let outcome = tokio::select! {
        outcome = serve(listener, serving, router(webhook)) => outcome,
        outcome = certificate => outcome.context("the renewal of the serving certificate ended"),
        outcome = async { admin.await } => outcome.context("probes and metrics ended"),
        outcome = asked_to_stop() => outcome,
    };
    if let Some(controller) = controller {
        controller.stop().await;
    }
    outcome
}

/// The controller, where the settings want it.
fn start_controller(
    client: &Client,
    settings: &Settings,
    metrics: &Arc<Metrics>,
) -> Result<Option<Controller>> {
    if !settings.controller_registers() {
        return Ok(None);
    }
    // In a pod its name: a container that is started anew goes on where it was.
    let identity = std::env::var("HOSTNAME").unwrap_or_else(|_| format!("process-{}", std::process::id()));
    Controller::start(client.clone(), settings, &identity, Arc::clone(metrics)).map(Some)
}

/// The certificate comes from the operator's files, or else from the authority. The task never ends by itself.
fn keep_certificate(
    arguments: &Serve,
    settings: &Settings,
    client: Client,
    serving: &Arc<Serving>,
    metrics: &Arc<Metrics>,
) -> Result<JoinHandle<()>> {
    if let (Some(chain), Some(key)) = (&arguments.tls_cert, &arguments.tls_key) {
        let files = Files { chain: chain.clone(), key: key.clone() };
        files.read(serving)?;
        return Ok(tokio::spawn(files.follow(Arc::clone(serving))));
    }
    let identity = Identity {
        client,
        authority: settings.authority.clone(),
        pin: match &arguments.authority_root {
            Some(file) => Pin::File(file.clone()),
            None => Pin::ConfigMap(settings.namespace.clone()),
        },
        // clap has made sure that it is there.
        token_file: arguments.token_file.clone().context("--token-file is missing")?,
        dns_names: vec![format!("{}.{}.svc", arguments.service, settings.namespace)],
        lifetime: arguments.certificate_lifetime,
        configuration: arguments.webhook_configuration.clone(),
        serving: Arc::clone(serving),
        metrics: Arc::clone(metrics),
    };
    Ok(tokio::spawn(identity.run()))
}

async fn bind(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("{address} cannot be listened on"))
}

async fn asked_to_stop() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! { _ = term.recv() => (), _ = int.recv() => () }
    tracing::info!("stopping");
    Ok(())
}

fn watch_namespaces(client: &Client, changed: &Arc<Notify>) -> Namespaces {
    let api = Api::<Namespace>::all(client.clone());
    let (store, writer) = reflector::store();
    let watch = watcher(api.clone(), watcher::Config::default()).default_backoff().reflect(writer);
    let changed = Arc::clone(changed);
    tokio::spawn(watch.for_each(move |event| {
        if let Err(error) = event {
            tracing::warn!(%error, "namespaces cannot be watched; what is known of them goes on");
        }
        changed.notify_one();
        std::future::ready(())
    }));
    Namespaces { store, api }
}

fn admin_router(webhook: Arc<Webhook>, serving: Arc<Serving>) -> Router {
    let metrics = Arc::clone(&webhook);
    Router::new()
        .route("/live", get(|| async { "live\n" }))
        .route(
            "/ready",
            get(move || async move {
                let unavailable = axum::http::StatusCode::SERVICE_UNAVAILABLE;
                if webhook.namespaces.store.state().is_empty() {
                    (unavailable, "namespaces are not known yet\n")
                } else if serving.remaining(SystemTime::now()).is_none() {
                    (unavailable, "there is no valid serving certificate\n")
                } else {
                    (axum::http::StatusCode::OK, "ready\n")
                }
            }),
        )
        .route("/metrics", get(move || async move { metrics.metrics.text() }))
}
