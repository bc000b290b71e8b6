//! The command line of the injector.

use std::{
    fs,
    io::{Read, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
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
use tokio::{net::TcpListener, sync::Notify};
use tracing_subscriber::EnvFilter;
use weft_injector::{
    offline,
    roots::Roots,
    settings::Settings,
    webhook::{Certificate, Metrics, Namespaces, Webhook, router, serve},
};

/// Adds the Weft sidecar to every pod of a labelled namespace.
#[derive(Parser)]
#[command(
    name = "weft-injector",
    version,
    after_help = "Examples:\n  \
        weft-injector serve --config /etc/weft/injector.yaml --tls-cert /etc/weft/tls/tls.crt --tls-key /etc/weft/tls/tls.key\n  \
        weft-injector inject -f deployment.yaml | kubectl apply -f -\n  \
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
    /// Serving certificate, PEM, the leaf first; read again when it changes
    #[arg(long, value_name = "FILE")]
    tls_cert: PathBuf,
    /// Its key, PEM
    #[arg(long, value_name = "FILE")]
    tls_key: PathBuf,
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
    let roots =
        Roots { client, own_namespace: settings.namespace.clone(), namespaces: namespaces.store.clone() };
    tokio::spawn(roots.distribute(changed));
    let webhook = Arc::new(Webhook { settings, namespaces, metrics: Metrics::default() });
    let listener = bind(arguments.listen).await?;
    let admin = bind(arguments.admin).await?;
    let certificate = Certificate { chain: arguments.tls_cert.clone(), key: arguments.tls_key.clone() };
    tracing::info!(listen = %arguments.listen, admin = %arguments.admin, version = env!("CARGO_PKG_VERSION"), "started");
    let admin = axum::serve(admin, admin_router(Arc::clone(&webhook)));
    tokio::select! {
        outcome = serve(listener, certificate, router(webhook)) => outcome,
        outcome = async { admin.await } => outcome.context("probes and metrics ended"),
        outcome = asked_to_stop() => outcome,
    }
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

fn admin_router(webhook: Arc<Webhook>) -> Router {
    let metrics = Arc::clone(&webhook);
    Router::new()
        .route("/live", get(|| async { "live\n" }))
        .route(
            "/ready",
            get(move || async move {
                let known = webhook.namespaces.store.state().len();
                if known > 0 {
                    (axum::http::StatusCode::OK, "ready\n")
                } else {
                    (axum::http::StatusCode::SERVICE_UNAVAILABLE, "namespaces are not known yet\n")
                }
            }),
        )
        .route("/metrics", get(move || async move { metrics.metrics.text() }))
}
