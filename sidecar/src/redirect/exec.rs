//! `weft-sidecar exec`, seen from the sidecar: a command in a user and network namespace of its own, whose only way
//! out is the sidecar, which stays outside. A helper in the namespace (`helper.rs`) hands over listeners and sockets.
//! No root is needed. Dropping the [`Namespace`] ends helper, command and all that the command started.

use std::{
    env,
    ffi::OsString,
    fmt, fs, io,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{ffi::OsStrExt, process::ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Child, ExitStatus},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use nix::{
    errno::Errno,
    sys::{
        signal::Signal,
        socket::{Shutdown, shutdown},
    },
    unistd::{Pid, geteuid},
};
use tokio::{net::TcpSocket, sync::watch};
use weft_proto::names;

use super::{
    finding::Finding,
    helper::{everyone, only_us},
    iptables::Backend,
    message::{FromHelper, Preparation, Purpose, Step, ToHelper, parse, send},
    namespace,
    stock::Stock,
};
use crate::telemetry::Metrics;

/// How long the end of the helper is waited for: it gives the command two seconds.
const END_PATIENCE: Duration = Duration::from_secs(4);

/// How a namespace is made.
#[derive(Debug, Clone)]
pub struct NamespaceSettings {
    /// The program that runs as the helper: this one.
    pub program: PathBuf,
    /// Listeners for connections of the app, per address family: one for each worker.
    pub workers: usize,
    /// Where connections of the app go, on the namespace's loopback.
    pub outbound_port: u16,
    /// Where DNS of the app goes, on the namespace's loopback.
    pub dns_port: u16,
    /// With IPv6, where the kernel has it.
    pub ipv6: bool,
    /// Which iptables to use.
    pub backend: Backend,
    /// Addresses on the namespace's loopback where the sidecar listens for explicit upstreams.
    pub upstreams: Vec<SocketAddr>,
    /// Soft limit of open descriptors (`RLIMIT_NOFILE`) that the command gets; none: that of this process.
    pub command_descriptors: Option<u64>,
    /// Counts sockets that were handed out and lost, as this process had no descriptor for them.
    pub metrics: Arc<Metrics>,
}

impl Default for NamespaceSettings {
    fn default() -> Self {
        NamespaceSettings {
            // the same file even if it was replaced, or lies where the user may not look
            program: PathBuf::from("/proc/self/exe"),
            workers: 1,
            outbound_port: names::OUTBOUND_PORT,
            dns_port: names::DNS_PORT,
            ipv6: true,
            backend: Backend::Auto,
            upstreams: Vec::new(),
            command_descriptors: None,
            metrics: Arc::default(),
        }
    }
}

/// Listeners inside the namespace, ready to accept, not blocking.
#[derive(Debug, Default)]
pub struct Listeners {
    /// Redirected connections, with their original destination. Worker by worker: IPv4, then IPv6 if it is on.
    pub outbound: Vec<TcpListener>,
    /// DNS over UDP: IPv4, then IPv6 if it is on.
    pub dns_udp: Vec<UdpSocket>,
    /// DNS over TCP: IPv4, then IPv6 if it is on.
    pub dns_tcp: Vec<TcpListener>,
    /// Worker by worker, in the order of the settings.
    pub upstreams: Vec<(SocketAddr, TcpListener)>,
}

/// A command in namespaces of its own, and the helper that serves it. Usable from any thread and runtime.
/// Dropping it asks a command that still runs to end, and kills it after two seconds.
#[derive(Debug)]
pub struct Namespace {
    shared: Arc<Shared>,
    progress: watch::Receiver<Progress>,
    /// Hears nothing, and that the reader has ended. Never locked: whoever drops this has it alone.
    reader: Mutex<mpsc::Receiver<()>>,
}

#[derive(Debug)]
struct Shared {
    socket: OwnedFd,
    /// IPv4, IPv6.
    stocks: [Stock; 2],
    metrics: Arc<Metrics>,
    is_begun: AtomicBool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    Prepared,
    Started,
    NotStarted {
        step: Option<Step>,
        errno: i32,
    },
    Exited(i32),
    /// The helper ended without a word.
    Gone,
}

/// Why the command does not run.
#[derive(Debug)]
pub enum NotStarted {
    /// The kernel did not execute it, and says why, such as `NotFound`.
    NotExecuted(io::Error),
    /// It did not come to that: what failed, and what to change.
    NoProcess(String),
}

impl fmt::Display for NotStarted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NotStarted::NotExecuted(error) => error.fmt(f),
            NotStarted::NoProcess(reason) => f.write_str(reason),
        }
    }
}

impl Namespace {
    /// Makes the namespaces, with network, rules and listeners. The command does not run yet.
    ///
    /// # Errors
    /// Missing programs, or a kernel or security module that refuses: with what to change.
    pub fn start(command: &[OsString], settings: &NamespaceSettings) -> Result<(Namespace, Listeners)> {
        if command.is_empty() {
            bail!("there is no command to run; expected `weft-sidecar exec … -- COMMAND [ARGUMENT]…`");
        }
        let is_ours = |name: &OsString| {
            name.as_bytes().starts_with(names::ENV_PREFIX.as_bytes())
                || names::CREDENTIAL_VARIABLES.iter().any(|other| name == other)
        };
        let ours = env::vars_os().map(|(name, _)| name).filter(is_ours);
        let (helper, socket) = namespace::spawn_helper(&settings.program, command, ours)
            .with_context(|| format!("cannot start {} as the helper", settings.program.display()))?;
        let starting = Starting { helper: Some(helper), socket: Some(socket) };
        let listeners = starting.prepare(settings)?;
        let (helper, socket) = starting.done()?;

        let shared = Arc::new(Shared {
            socket,
            stocks: [Stock::new(), Stock::new()],
            metrics: settings.metrics.clone(),
            is_begun: AtomicBool::new(false),
        });
        let (progress, receiver) = watch::channel(Progress::Prepared);
        let for_reader = Arc::clone(&shared);
        let (reads, reader) = mpsc::channel();
        thread::Builder::new()
            .name("namespace".to_owned())
            .spawn(move || {
                for_reader.read(&progress, helper);
                drop(reads);
            })
            .context("cannot start a thread")?;
        Ok((Namespace { shared, progress: receiver, reader: Mutex::new(reader) }, listeners))
    }

    /// Starts the command.
    ///
    /// # Errors
    /// Why it does not run.
    pub async fn start_command(&self) -> Result<(), NotStarted> {
        let no_process = |error: io::Error| NotStarted::NoProcess(error.to_string());
        self.shared.is_begun.store(true, Ordering::Relaxed);
        self.shared.say(&ToHelper::Start).map_err(no_process)?;
        match self.when(|now| now != Progress::Prepared).await {
            Progress::NotStarted { step: None, errno } => {
                Err(NotStarted::NotExecuted(io::Error::from_raw_os_error(errno)))
            }
            Progress::NotStarted { step: Some(step), errno } => {
                Err(NotStarted::NoProcess(explain(step, &Errno::from_raw(errno).to_string())))
            }
            Progress::Gone => Err(no_process(gone())),
            Progress::Prepared | Progress::Started | Progress::Exited(_) => Ok(()),
        }
    }

    /// A socket for one connection to the app: it lives on the namespace's network and is not redirected.
    ///
    /// # Errors
    /// If the helper could not make one, or the command has ended.
    pub async fn app_socket(&self, ipv6: bool) -> io::Result<TcpSocket> {
        let ask = |count| self.shared.say(&ToHelper::MakeSockets { ipv6, count });
        let socket = self.shared.stocks[usize::from(ipv6)].take(ask).await?;
        Ok(TcpSocket::from_std_stream(TcpStream::from(socket)))
    }

    /// Was the command started, or tried to?
    pub fn is_begun(&self) -> bool {
        self.shared.is_begun.load(Ordering::Relaxed)
    }

    /// Sends a signal to the command. Nothing happens if it does not run.
    pub fn signal(&self, signal: Signal) {
        // if it cannot be said the command is gone
        let _ = self.shared.say(&ToHelper::Signal(signal as i32));
    }

    /// Waits for the command to end. What it started and left behind ends then too.
    ///
    /// # Errors
    /// If the helper was killed, and the command with it; or if the command never started.
    pub async fn wait(&self) -> io::Result<ExitStatus> {
        let ended = |now| !matches!(now, Progress::Prepared | Progress::Started);
        match self.when(ended).await {
            Progress::Exited(status) => Ok(ExitStatus::from_raw(status)),
            Progress::NotStarted { errno, .. } => Err(io::Error::from_raw_os_error(errno)),
            Progress::Prepared | Progress::Started | Progress::Gone => Err(gone()),
        }
    }

    async fn when(&self, reached: impl Fn(Progress) -> bool) -> Progress {
        let mut progress = self.progress.clone();
        // the sender goes only after it said that all is over
        progress.wait_for(|now| reached(*now)).await.map_or(Progress::Gone, |now| *now)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = shutdown(self.shared.socket.as_raw_fd(), Shutdown::Both);
        // A helper whose command cannot be ended, as it waits for a device, ends some time later.
        if let Ok(reader) = self.reader.get_mut() {
            let _ = reader.recv_timeout(END_PATIENCE);
        }
    }
}

impl Shared {
    fn say(&self, message: &ToHelper) -> io::Result<()> {
        send(self.socket.as_fd(), message, &[])
    }

    /// The thread that hears the helper, until it is gone; then buries it.
    fn read(&self, progress: &watch::Sender<Progress>, mut helper: Child) {
        while let Ok(Some(received)) = namespace::receive(self.socket.as_fd()) {
            match parse(&received) {
                Ok(FromHelper::Started) => drop(progress.send_replace(Progress::Started)),
                Ok(FromHelper::NotStarted { step, errno }) => {
                    progress.send_replace(Progress::NotStarted { step, errno });
                }
                Ok(FromHelper::Exited { status }) => drop(progress.send_replace(Progress::Exited(status))),
                Ok(FromHelper::Sockets { ipv6, made, missing, errno }) => {
                    let lost = made.saturating_sub(received.attached.len());
                    self.metrics.app_sockets_lost(lost);
                    let errno = if lost > 0 { Errno::EMFILE as i32 } else { errno };
                    self.stocks[usize::from(ipv6)].put(received.attached, missing + lost, errno);
                }
                other => {
                    tracing::error!("the helper of the namespace said {other:?}, which is not expected");
                    break;
                }
            }
        }
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
        for stock in &self.stocks {
            stock.close();
        }
        let _ = helper.wait();
        progress.send_if_modified(|now| {
            let silent = matches!(now, Progress::Prepared | Progress::Started);
            if silent {
                *now = Progress::Gone;
            }
            silent
        });
    }
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the helper of the namespace is gone")
}

/// A helper that is not ready yet: dropped, it ends.
struct Starting {
    helper: Option<Child>,
    socket: Option<OwnedFd>,
}

impl Starting {
    fn prepare(&self, settings: &NamespaceSettings) -> Result<Listeners> {
        let wanted = Preparation {
            workers: settings.workers.max(1),
            outbound_port: settings.outbound_port,
            dns_port: settings.dns_port,
            ipv6: settings.ipv6 && Path::new("/proc/sys/net/ipv6").exists(),
            backend: settings.backend.label().to_owned(),
            upstreams: settings.upstreams.clone(),
            command_descriptors: settings.command_descriptors,
        };
        self.say(&ToHelper::Prepare(wanted))?;
        let mut listeners = Listeners::default();
        loop {
            let (message, attached) = self.hear()?;
            match (message, attached) {
                (FromHelper::Unshared, None) => {
                    let everyone = self.map_users()?;
                    self.say(&ToHelper::Mapped { everyone })?;
                }
                (FromHelper::Listener(purpose), Some(socket)) => match purpose {
                    Purpose::Outbound => listeners.outbound.push(socket.into()),
                    Purpose::DnsUdp => listeners.dns_udp.push(socket.into()),
                    Purpose::DnsTcp => listeners.dns_tcp.push(socket.into()),
                    Purpose::Upstream(address) => listeners.upstreams.push((address, socket.into())),
                },
                (FromHelper::Listener(_), None) => bail!(
                    "no descriptor is left for the listeners in the namespace; raise the limit of open files \
                     (`ulimit -n`)"
                ),
                (FromHelper::Prepared, None) => return Ok(listeners),
                (FromHelper::Failed { step, reason }, None) => bail!(explain(step, &reason)),
                (message, _) => bail!("the helper of the namespace said {message:?}, which is not expected"),
            }
        }
    }

    /// As root every user, so that the command may change users; else, or if that is refused, only our own.
    fn map_users(&self) -> Result<bool> {
        let helper = self.helper.as_ref().ok_or_else(gone)?;
        let process = Pid::from_raw(i32::try_from(helper.id())?);
        if geteuid().is_root() && everyone()?.write(process).is_ok() {
            return Ok(true);
        }
        let mapped = only_us().write(process);
        mapped.map_err(|error| anyhow!(explain(Step::Users, &error.to_string()))).map(|()| false)
    }

    fn done(mut self) -> Result<(Child, OwnedFd)> {
        Ok((self.helper.take().ok_or_else(gone)?, self.socket.take().ok_or_else(gone)?))
    }

    fn say(&self, message: &ToHelper) -> Result<()> {
        let socket = self.socket.as_ref().ok_or_else(gone)?;
        send(socket.as_fd(), message, &[]).context("the helper of the namespace is gone")
    }

    fn hear(&self) -> Result<(FromHelper, Option<OwnedFd>)> {
        let socket = self.socket.as_ref().ok_or_else(gone)?;
        let mut received = namespace::receive(socket.as_fd())?.context(
            "the helper of the namespace ended without a word; does `main` call `redirect::namespace_main`?",
        )?;
        Ok((parse(&received)?, received.attached.pop()))
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        drop(self.socket.take());
        if let Some(mut helper) = self.helper.take() {
            let _ = helper.wait();
        }
    }
}

/// Can this user run `exec` here? Makes a namespace with real rules, and ends it again.
pub fn check(settings: &NamespaceSettings) -> Vec<Finding> {
    let subject = "a command in namespaces of its own (`weft-sidecar exec`)";
    let mut findings = vec![match Namespace::start(&["true".into()], settings) {
        Ok(_) => Finding::shown(subject, "namespaces, rules and listeners could be made"),
        Err(error) => Finding::wrong(subject, format!("{error:#}")),
    }];
    let resolver = fs::read_to_string("/etc/nsswitch.conf").unwrap_or_default();
    if asks_resolved(&resolver) && Path::new("/run/systemd/resolve/io.systemd.Resolve").exists() {
        findings.push(Finding::unknown(
            "names of services",
            "/etc/nsswitch.conf asks systemd-resolved over a Unix socket, which no redirect sees, so programs that use \
             the system's resolver may not find mesh services by name; put `dns` before `resolve` in its line `hosts`",
        ));
    }
    findings
}

fn asks_resolved(nsswitch: &str) -> bool {
    let hosts = nsswitch.lines().find_map(|line| line.trim().strip_prefix("hosts:")).unwrap_or_default();
    let mut sources = hosts.split_whitespace().filter(|word| matches!(*word, "resolve" | "dns"));
    sources.next() == Some("resolve")
}

/// Why a step fails, and what to change.
fn explain(step: Step, reason: &str) -> String {
    let what = match step {
        Step::Unshare => "this user may not make a user and a network namespace",
        Step::Users => "the users of the new namespace could not be mapped",
        Step::Network => "the network of the new namespace could not be set up",
        Step::Rules => "the rules in the new namespace could not be applied",
        Step::Listeners => "the listeners in the new namespace could not be opened",
        Step::CommandNamespace => "the user namespace of the command could not be made",
        Step::Command => "the process of the command could not be made",
    };
    let may_be_forbidden = !matches!(step, Step::Listeners | Step::Command);
    let mut text = format!("{what}: {reason}");
    for (name, refusing, change) in SWITCHES {
        let value = fs::read_to_string(Path::new("/proc/sys").join(name.replace('.', "/")));
        if may_be_forbidden && value.is_ok_and(|value| value.trim() == refusing) {
            text.push_str(&format!("\n  {name} is {refusing}: run `sysctl -w {name}={change}` as root"));
        }
    }
    let denied = ["EPERM", "Operation not permitted", "Permission denied"];
    if may_be_forbidden && denied.iter().any(|word| reason.contains(word)) {
        text.push_str(
            "\n  A security module or a container runtime may deny it too: in a container allow user namespaces in \
             its seccomp profile, or use `weft-sidecar redirect apply` and `weft-sidecar run`, as Kubernetes does",
        );
    }
    if matches!(step, Step::Unshare | Step::CommandNamespace) {
        if reason.contains("EINVAL") {
            text.push_str(
                "\n  The kernel may have no such namespaces (CONFIG_USER_NS, CONFIG_NET_NS): use `weft-sidecar redirect \
                 apply` and `weft-sidecar run` there",
            );
        }
        if reason.contains("ENOSPC") {
            text.push_str(
                "\n  The limit of namespaces is reached, here or in what this runs in: raise \
                 user.max_user_namespaces and user.max_net_namespaces as root",
            );
        }
    }
    text
}

/// Kernel settings that refuse namespaces: name, the value that refuses, the value that allows.
const SWITCHES: [(&str, &str, &str); 3] = [
    ("kernel.apparmor_restrict_unprivileged_userns", "1", "0"),
    ("kernel.unprivileged_userns_clone", "0", "1"),
    ("user.max_user_namespaces", "0", "10000"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_sees_when_names_pass_the_redirect_by() {
        assert!(asks_resolved("passwd: files\nhosts: files resolve [!UNAVAIL=return] dns\n"));
        assert!(!asks_resolved("hosts: files dns resolve\n"));
        assert!(!asks_resolved("hosts: files mymachines dns\n"));
        assert!(!asks_resolved(""));
    }

    #[test]
    fn a_refusal_tells_what_to_do() {
        let text = explain(Step::Unshare, "EPERM: Operation not permitted");
        assert!(text.contains("may not make a user") && text.contains("seccomp"), "{text}");
        assert!(!explain(Step::Listeners, "EPERM").contains("seccomp"));
        for (reason, remedy) in [
            ("EACCES: Permission denied", "seccomp"),
            ("EINVAL: Invalid argument", "CONFIG_USER_NS"),
            ("ENOSPC: No space left on device", "user.max_user_namespaces"),
        ] {
            let text = explain(Step::CommandNamespace, reason);
            assert!(text.contains("of the command") && text.contains(remedy), "{text}");
        }
        assert!(!explain(Step::Command, "EACCES: Permission denied").contains("seccomp"));
    }

    #[test]
    fn it_is_shared_between_workers() {
        fn shared<T: Send + Sync>() {}
        shared::<Namespace>();
    }

    #[test]
    fn a_namespace_without_a_command_is_refused() {
        let error = Namespace::start(&[], &NamespaceSettings::default()).unwrap_err().to_string();
        assert!(error.contains("-- COMMAND"), "{error}");
    }
}
