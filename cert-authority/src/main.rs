//! The command line of the certificate authority: `init`, `serve`, `token`, `root`.
//!
//! Exit code 2: the command, the state or an address is wrong, and nothing ran. 1: it ran and failed. The log goes
//! to standard error, so that standard output holds answers, or the audit. A log that cannot be written, or that nobody
//! reads, is no reason to stop or to wait: nothing here prints with macros that panic, and a thread of its own writes.

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    fmt::Display,
    io::{Write, stderr, stdout},
    net::SocketAddr,
    panic::{self, PanicHookInfo},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, Parser, Subcommand};
use humantime::{format_duration, format_rfc3339_seconds, parse_duration};
use prometheus_client::metrics::counter::Counter;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::Notify,
};
use tracing_subscriber::EnvFilter;
use weft_ca::{
    authority::{Authority, Known, ROOTS_FILE},
    directory::{Directory, write_private},
    server::{Options, Server},
    service::Lifetimes,
    token::{Tokens, name_of},
};
use weft_proto::{
    lines::{FlushOnDrop, Lines, Output, complain},
    names::{AUTHORITY_ADMIN_PORT, AUTHORITY_PORT},
    spiffe::{SpiffeId, TrustDomain, authority_id},
};

/// The certificate authority of the Weft service mesh.
#[derive(Parser)]
#[command(name = "weft-ca", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a new authority in an empty directory, and print the SHA-256 of its root
    Init(Init),
    /// Sign for the workloads of the mesh
    Serve(Serve),
    /// Join tokens: the first proof of a workload
    #[command(subcommand)]
    Token(TokenCommand),
    /// Print the root that workloads pin
    Root(Root),
}

#[derive(Args)]
struct State {
    /// Where root, issuing certificate and tokens are kept (mode 0700)
    #[arg(long, env = "WEFT_CA_DIR")]
    dir: PathBuf,
}

#[derive(Args)]
struct Init {
    #[command(flatten)]
    state: State,
    /// The name that all identities of this mesh begin with, for example weft.local
    #[arg(long)]
    trust_domain: TrustDomain,
    /// Answer in JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct Serve {
    #[command(flatten)]
    state: State,
    /// Where workloads ask, by gRPC over TLS; port 0 takes any free one
    #[arg(long, env = "WEFT_CA_LISTEN", default_value_t = SocketAddr::from(([127, 0, 0, 1], AUTHORITY_PORT)))]
    listen: SocketAddr,
    /// Probes and metrics: /live, /ready, /metrics over plain HTTP
    #[arg(
        long,
        env = "WEFT_CA_ADMIN",
        default_value_t = SocketAddr::from(([127, 0, 0, 1], AUTHORITY_ADMIN_PORT))
    )]
    admin: SocketAddr,
    /// How long a certificate lives where the workload asks for nothing else
    #[arg(long, env = "WEFT_CA_LIFETIME", default_value = "24h", value_parser = parse_duration)]
    lifetime: Duration,
    /// How long a certificate lives at most [default: the same as --lifetime]
    #[arg(long, env = "WEFT_CA_MAX_LIFETIME", value_parser = parse_duration)]
    max_lifetime: Option<Duration>,
    /// Append the audit to this file (mode 0600) instead of standard output
    #[arg(long, env = "WEFT_CA_AUDIT")]
    audit: Option<PathBuf>,
    /// Take tokens of service accounts of the Kubernetes cluster that this runs in (audience weft-ca), and keep the roots in
    /// its ConfigMap weft-root
    #[arg(long)]
    kubernetes: bool,
    /// May have the DNS names of the Service of its own name and namespace in its certificate, with the token of its service
    /// account as proof; may be given more than once
    #[arg(long, value_name = "SPIFFE_ID", requires = "kubernetes")]
    serving_identity: Vec<SpiffeId>,
    /// Connections at a time, 1 or more; the hard limit of descriptors bounds them too
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..))]
    max_connections: u32,
    /// Write the addresses as JSON to this file once both stand
    #[arg(long)]
    address_file: Option<PathBuf>,
    /// Make a new authority first where the directory is missing or empty; needs --trust-domain
    #[arg(long, requires = "trust_domain")]
    init: bool,
    /// For --init only
    #[arg(long)]
    trust_domain: Option<TrustDomain>,
}

#[derive(Subcommand)]
enum TokenCommand {
    /// Make a token; a running authority knows it at once
    Create(TokenCreate),
    /// Show all tokens, by the beginning of their hash
    List(TokenList),
    /// Take a token back
    Revoke(TokenRevoke),
}

#[derive(Args)]
struct TokenCreate {
    #[command(flatten)]
    state: State,
    /// Whom it stands for: spiffe://DOMAIN/ns/NAMESPACE/sa/ACCOUNT
    #[arg(long)]
    identity: SpiffeId,
    /// May be used more than once
    #[arg(long)]
    reusable: bool,
    /// From now on
    #[arg(long, default_value = "1h", value_parser = parse_duration)]
    expires: Duration,
    /// Write the token to this file (mode 0600) instead of standard output
    #[arg(short, long)]
    out: Option<PathBuf>,
    /// Answer in JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct TokenList {
    #[command(flatten)]
    state: State,
    /// Answer in JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct TokenRevoke {
    #[command(flatten)]
    state: State,
    /// The beginning of the hash, as `token list` shows it
    token: String,
}

#[derive(Args)]
struct Root {
    #[command(flatten)]
    state: State,
    /// Only the SHA-256 of our own root
    #[arg(long, conflicts_with = "json")]
    sha256: bool,
    /// Answer in JSON
    #[arg(long)]
    json: bool,
}

/// The command, the state or an address is wrong.
const REFUSED: u8 = 2;
/// It ran and failed.
const FAILED: u8 = 1;

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Init(command) => init(&command),
        Command::Serve(command) => {
            let (outcome, code) = serve(command);
            return exit_code(outcome, code);
        }
        Command::Token(TokenCommand::Create(command)) => create_token(&command),
        Command::Token(TokenCommand::List(command)) => list_tokens(&command),
        Command::Token(TokenCommand::Revoke(command)) => revoke_token(&command),
        Command::Root(command) => show_root(&command),
    };
    exit_code(outcome, REFUSED)
}

fn exit_code(outcome: Result<()>, code: u8) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(format_args!("weft-ca: {error:#}"));
            ExitCode::from(code)
        }
    }
}

/// A line on standard output.
fn answer(line: impl Display) -> Result<()> {
    writeln!(stdout(), "{line}").context("standard output")
}

fn init(command: &Init) -> Result<()> {
    let directory = Directory::create(&command.state.dir)?;
    let authority = Authority::init(&directory, command.trust_domain.clone(), SystemTime::now())?;
    if command.json {
        return answer(describe(&authority.known()));
    }
    answer(authority.root_sha256())?;
    complain(format_args!(
        "The line above is the SHA-256 of the new root of {}: what workloads pin. The root itself: {}. Keep \
         a copy of {} where nobody else can read it.",
        authority.trust_domain(),
        directory.path(ROOTS_FILE).display(),
        command.state.dir.display()
    ));
    Ok(())
}

/// Serves until the end; the exit code is for an error. All lines of the log are out before it is told.
fn serve(command: Serve) -> (Result<()>, u8) {
    let dropped = Counter::default();
    let _log_end = match log(dropped.clone()) {
        Ok(log_end) => log_end,
        Err(error) => return (Err(error), REFUSED),
    };
    let started = runtime().and_then(|runtime| {
        let (signals, server) = runtime.block_on(async {
            let signals = Signals::new()?;
            anyhow::Ok((signals, Server::start(options(command, dropped)?).await?))
        })?;
        Ok((runtime, signals, server))
    });
    match started {
        Err(error) => (Err(error), REFUSED),
        Ok((runtime, signals, server)) => {
            let reread = Arc::new(Notify::new());
            let ended = runtime.block_on(server.run(signals.until_stop(reread.clone()), reread));
            // A line of the audit that nobody takes would keep a thread, and the process, for ever.
            runtime.shutdown_timeout(LAST_WRITES);
            (ended, FAILED)
        }
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    Ok(builder.enable_all().max_blocking_threads(BLOCKING_THREADS).build()?)
}

/// Reads the settings, and makes a new authority where that is asked for.
fn options(command: Serve, log_lines_dropped: Counter) -> Result<Options> {
    let maximum = command.max_lifetime.unwrap_or(command.lifetime);
    if command.lifetime < MIN_LIFETIME || maximum < command.lifetime || maximum > MAX_LIFETIME {
        bail!(
            "--lifetime is {} and --max-lifetime {}; expected {} to {}, and the maximum not below the other",
            format_duration(command.lifetime),
            format_duration(maximum),
            format_duration(MIN_LIFETIME),
            format_duration(MAX_LIFETIME)
        );
    }
    if command.init && is_new(&command.state.dir)? {
        let directory = Directory::create(&command.state.dir)?;
        // clap has made sure that it is there.
        let trust_domain = command.trust_domain.context("--init needs --trust-domain")?;
        Authority::init(&directory, trust_domain, SystemTime::now())?;
        tracing::info!(dir = %command.state.dir.display(), "made a new authority");
    }
    Ok(Options {
        dir: command.state.dir,
        listen: command.listen,
        admin: command.admin,
        lifetimes: Lifetimes { default: command.lifetime, maximum },
        audit: command.audit,
        kubernetes: command.kubernetes,
        serving_identities: command.serving_identity,
        max_connections: usize::try_from(command.max_connections).unwrap_or(usize::MAX),
        address_file: command.address_file,
        log_lines_dropped,
    })
}

/// What an operator asks for by a signal. SIGWINCH is ignored by default.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    quit: Signal,
    hangup: Signal,
    user_1: Signal,
    user_2: Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            quit: signal(SignalKind::quit())?,
            hangup: signal(SignalKind::hangup())?,
            user_1: signal(SignalKind::user_defined1())?,
            user_2: signal(SignalKind::user_defined2())?,
        })
    }

    /// Returns at the first signal that asks for the end. What means something else, or nothing, to us never ends
    /// the program.
    async fn until_stop(mut self, reread: Arc<Notify>) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return tracing::info!("SIGTERM"),
                _ = self.interrupt.recv() => return tracing::info!("SIGINT"),
                _ = self.quit.recv() => return tracing::info!("SIGQUIT"),
                _ = self.hangup.recv() => reread.notify_one(),
                _ = self.user_1.recv() => tracing::info!("SIGUSR1 means nothing here and is ignored"),
                _ = self.user_2.recv() => tracing::info!("SIGUSR2 means nothing here and is ignored"),
            }
        }
    }
}

/// Threads that read and write files for requests; each has few descriptors open.
const BLOCKING_THREADS: usize = 32;
/// For what is being written when everything else has ended.
const LAST_WRITES: Duration = Duration::from_secs(1);
/// Shorter certificates could not be renewed in time.
const MIN_LIFETIME: Duration = Duration::from_secs(5);
/// Half of an issuing certificate's life: longer ones would be cut short by their issuer.
const MAX_LIFETIME: Duration = Duration::from_secs(45 * 24 * 3600);
/// A token that is good for longer is a password.
const MAX_TOKEN_LIFE: Duration = Duration::from_secs(366 * 24 * 3600);

/// The end of the year 9999, the last that RFC 3339 can write.
const LAST_SECOND: u64 = 253_402_300_799;

fn is_new(dir: &std::path::Path) -> Result<bool> {
    Ok(!dir.exists() || Directory::open(dir)?.names()?.is_empty())
}

fn create_token(command: &TokenCreate) -> Result<()> {
    let (directory, known) = load(&command.state)?;
    if command.identity.trust_domain() != known.trust_domain.as_str() {
        bail!(
            "{} is not of this authority's trust domain, {}; nobody could use such a token",
            command.identity,
            known.trust_domain
        );
    }
    let own = authority_id(&known.trust_domain).map_err(|error| anyhow!("{error}"))?;
    if command.identity == own {
        bail!("{} is the authority itself; no workload may have that identity", command.identity);
    }
    if command.expires > MAX_TOKEN_LIFE {
        bail!("--expires is longer than a year; expected at most 366days");
    }
    let tokens = Tokens::open(&directory)?;
    let text =
        tokens.create(command.identity.clone(), command.reusable, command.expires, SystemTime::now())?;
    if let Some(path) = &command.out {
        write_private(path, text.as_bytes()).with_context(|| format!("writing {}", path.display()))?;
    }
    let shown = if command.out.is_none() { Some(&text) } else { None };
    if command.json {
        let answer = serde_json::json!({
            "token": shown,
            "name": name_of(&text),
            "identity": command.identity,
            "reusable": command.reusable,
            "expires": format_rfc3339_seconds(SystemTime::now() + command.expires).to_string(),
        });
        return self::answer(answer);
    }
    shown.map_or(Ok(()), answer)
}

fn list_tokens(command: &TokenList) -> Result<()> {
    let (directory, _) = load(&command.state)?;
    for (name, state, token) in Tokens::open(&directory)?.list(SystemTime::now())? {
        let expires = SystemTime::UNIX_EPOCH + Duration::from_secs(token.expires.min(LAST_SECOND));
        let expires = format_rfc3339_seconds(expires).to_string();
        if command.json {
            let answer = serde_json::json!({
                "name": name,
                "state": state,
                "identity": token.identity,
                "reusable": token.reusable,
                "expires": expires,
            });
            self::answer(answer)?;
        } else {
            let uses = if token.reusable { "reusable" } else { "once" };
            let state = serde_json::to_value(state)?;
            let state = state.as_str().unwrap_or_default();
            answer(format_args!("{name}  {state:<8}{uses:<10}{expires}  {}", token.identity))?;
        }
    }
    Ok(())
}

fn revoke_token(command: &TokenRevoke) -> Result<()> {
    let (directory, _) = load(&command.state)?;
    Tokens::open(&directory)?.revoke(&command.token)
}

fn show_root(command: &Root) -> Result<()> {
    let (directory, known) = load(&command.state)?;
    if command.sha256 {
        return answer(known.root_sha256);
    }
    if command.json {
        return answer(describe(&known));
    }
    let pem = directory.read(ROOTS_FILE)?.context("roots.pem is missing")?;
    stdout().write_all(&pem).context("standard output")
}

/// For commands that only tell or keep tokens: a running authority mends its issuing certificate itself.
fn load(state: &State) -> Result<(Directory, Known)> {
    let directory = Directory::open(&state.dir).context("no authority here; `weft-ca init` makes one")?;
    let known = Known::read(&directory, SystemTime::now())?;
    Ok((directory, known))
}

fn describe(known: &Known) -> serde_json::Value {
    let time = |at| format_rfc3339_seconds(at).to_string();
    serde_json::json!({
        "trust_domain": known.trust_domain,
        "root_sha256": known.root_sha256,
        "roots": known.roots,
        "root_not_after": time(known.root_not_after),
        "issuing_not_after": known.issuing_not_after.map(time),
    })
}

/// The log on standard error; `WEFT_CA_LOG` takes the directives of `tracing`, for example `debug`.
fn log(dropped: Counter) -> Result<FlushOnDrop> {
    let filter = EnvFilter::try_from_env("WEFT_CA_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let output = Output::stream(stderr()).context("cannot open standard error for the log")?;
    let on_dropped = move || {
        dropped.inc();
    };
    let lines = Lines::start("weft-log", output, on_dropped, log_resumed).context("cannot start the log")?;
    let lines = Arc::new(lines);
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_target(false)
        // It would be printed to standard error with a macro that panics where that cannot be written.
        .log_internal_errors(false)
        .with_writer(lines.clone())
        .init();
    panic::set_hook(Box::new(log_panic));
    Ok(FlushOnDrop(lines))
}

fn log_resumed(total: u64) {
    tracing::warn!("standard error takes lines again; {total} lines of this log were lost since the start");
}

/// The standard library's own would block on a standard error that nobody reads.
fn log_panic(panic: &PanicHookInfo<'_>) {
    let backtrace = Backtrace::capture();
    match backtrace.status() {
        BacktraceStatus::Captured => tracing::error!("{panic}\n{backtrace}"),
        _ => tracing::error!("{panic}"),
    }
}
