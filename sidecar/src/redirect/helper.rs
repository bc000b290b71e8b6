//! The helper inside a namespace of `exec`: a program of one thread, without a runtime, that sets the namespace
//! up, starts the command, makes sockets for the sidecar outside, and ends with it. When the sidecar goes away,
//! however that happens, the command and everything it started go too. Carries no traffic.

use std::{
    env,
    ffi::OsString,
    fs, io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, unshare},
    sys::{
        prctl::set_child_subreaper,
        signal::{SigSet, Signal, kill},
        signalfd::{SfdFlags, SignalFd},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{Pid, dup2_stdout, getegid, geteuid},
};
use socket2::{Domain, Protocol, Socket, Type};
use weft_proto::{lines, names};

use super::{
    apply::apply_plan,
    iptables::{Backend, Tools, find_program},
    message::{FromHelper, MOST_SOCKETS, Preparation, Purpose, Step, ToHelper, parse, send},
    namespace::{self, StartFailed, UserMap},
    plan::{SIDECAR_MARK, namespace_plan},
};

/// Connections that wait to be accepted, per listener.
const BACKLOG: i32 = 4096;
/// How often, and for how many milliseconds each time, a command that was asked to end is waited for when the
/// sidecar is already gone.
const LAST_WAITS: (usize, u16) = (20, 100);
/// What `sendmsg` says where it could send the message without the sockets.
const SOCKETS_REFUSED: [Errno; 3] = [Errno::ETOOMANYREFS, Errno::ENOBUFS, Errno::ENOMEM];
/// A file that every process has for itself: iptables-legacy wants to lock one, and in a network namespace of
/// our own there is nobody to lock against.
const OWN_LOCK_FILE: &str = "/proc/self/comm";

/// What the program does when its first argument is [`super::NAMESPACE_ARGUMENT`]. To be called first in `main`,
/// while the process has one thread.
pub fn namespace_main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            lines::complain(format_args!("weft-sidecar {}: {error:#}", super::NAMESPACE_ARGUMENT));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut arguments = env::args_os().skip(2);
    let number = arguments.next().and_then(|number| number.to_str()?.parse().ok());
    let Some(number) = number else { bail!("this is for `weft-sidecar exec` only") };
    let socket = namespace::take_over(number).context("this is for `weft-sidecar exec` only")?;
    let command: Vec<OsString> = arguments.skip(1).collect();

    // Ctrl-C reaches the whole group; when to end is the sidecar's decision
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    SigSet::all().thread_block()?;
    let children = SignalFd::with_flags(&children, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    set_child_subreaper(true)?;

    let mut helper =
        Helper { socket, children, command, everyone: false, command_descriptors: None, process: None };
    match helper.prepare() {
        Ok(true) => {}
        Ok(false) => return Ok(()), // the sidecar went away
        Err((step, error)) => {
            let reason = format!("{error:#}");
            return Ok(helper.say(&FromHelper::Failed { step, reason })?);
        }
    }
    let served = helper.serve();
    helper.end_everything();
    served
}

struct Helper {
    socket: OwnedFd,
    children: SignalFd,
    command: Vec<OsString>,
    /// All users are mapped, and not only one.
    everyone: bool,
    /// Soft limit of descriptors for the command; none: ours.
    command_descriptors: Option<u64>,
    /// The command, from its start until it was reaped: after that its number may be somebody else's.
    process: Option<Pid>,
}

impl Helper {
    /// Namespaces, users, network, rules, listeners. False if the sidecar went away meanwhile.
    fn prepare(&mut self) -> Result<bool, (Step, anyhow::Error)> {
        let at = |step| move |error: anyhow::Error| (step, error);
        let Some(ToHelper::Prepare(wanted)) = self.hear().map_err(at(Step::Unshare))? else {
            return Ok(false);
        };
        self.command_descriptors = wanted.command_descriptors;
        unshare(CloneFlags::CLONE_NEWUSER).context("user namespace").map_err(at(Step::Unshare))?;
        self.say(&FromHelper::Unshared).map_err(|error| (Step::Users, error.into()))?;
        let Some(ToHelper::Mapped { everyone }) = self.hear().map_err(at(Step::Users))? else {
            return Ok(false);
        };
        self.everyone = everyone;
        // only now: files of a network namespace in /proc belong to who is user 0 when it is made
        unshare(CloneFlags::CLONE_NEWNET).context("network namespace").map_err(at(Step::Unshare))?;
        network(wanted.ipv6).map_err(at(Step::Network))?;
        rules(&wanted).map_err(at(Step::Rules))?;
        self.listeners(&wanted).map_err(at(Step::Listeners))?;
        self.say(&FromHelper::Prepared).map_err(|error| (Step::Listeners, error.into()))?;
        Ok(true)
    }

    fn listeners(&self, wanted: &Preparation) -> Result<()> {
        let hand_over = |purpose, socket: Socket| {
            send(self.socket.as_fd(), &FromHelper::Listener(purpose), &[socket.as_fd()])
                .context("cannot hand over a listener")
        };
        let outbound = loopback(wanted.outbound_port, wanted.ipv6);
        for _ in 0..wanted.workers {
            for address in &outbound {
                hand_over(Purpose::Outbound, listener(*address)?)?;
            }
            for address in &wanted.upstreams {
                hand_over(Purpose::Upstream(*address), listener(*address)?)?;
            }
        }
        for address in loopback(wanted.dns_port, wanted.ipv6) {
            hand_over(Purpose::DnsUdp, datagrams(address)?)?;
            hand_over(Purpose::DnsTcp, listener(address)?)?;
        }
        Ok(())
    }

    /// Does what the sidecar asks until it is gone or the command has ended.
    fn serve(&mut self) -> Result<()> {
        loop {
            let mut wanted = [
                PollFd::new(self.socket.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.children.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut wanted, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                other => other?,
            };
            let [from_sidecar, from_children] = wanted.map(|wanted| wanted.any().unwrap_or(true));
            if from_children && let Some(status) = self.reap()? {
                return Ok(self.say(&FromHelper::Exited { status })?);
            }
            if from_sidecar {
                let Some(message) = self.hear()? else { return Ok(()) };
                self.obey(message)?;
            }
        }
    }

    fn obey(&mut self, message: ToHelper) -> Result<()> {
        match message {
            ToHelper::Start if self.process.is_none() => match self.start_command() {
                Ok(process) => {
                    self.process = Some(process);
                    // Its reader sees the end when the command closes it. Without standard error it stays open.
                    let _ = dup2_stdout(io::stderr());
                    self.say(&FromHelper::Started)?;
                }
                Err(StartFailed { step, error }) => {
                    let errno = error.raw_os_error().unwrap_or(Errno::EIO as i32);
                    // The kernel says so too of a folder of the PATH that this user may not search.
                    let nowhere = step.is_none()
                        && errno == Errno::EACCES as i32
                        && self.command.first().is_some_and(is_nowhere);
                    let errno = if nowhere { Errno::ENOENT as i32 } else { errno };
                    self.say(&FromHelper::NotStarted { step, errno })?;
                }
            },
            ToHelper::Signal(number) => {
                if let (Some(process), Ok(signal)) = (self.process, Signal::try_from(number)) {
                    let _ = kill(process, signal);
                }
            }
            ToHelper::MakeSockets { ipv6, count } => self.make_sockets(ipv6, count.min(MOST_SOCKETS))?,
            ToHelper::Start | ToHelper::Prepare(_) | ToHelper::Mapped { .. } => {
                bail!("the sidecar said {message:?} at the wrong time")
            }
        }
        Ok(())
    }

    fn start_command(&self) -> Result<Pid, StartFailed> {
        let not_executed = |error| StartFailed { step: None, error };
        let command = namespace::c_strings(self.command.iter().cloned()).map_err(not_executed)?;
        let ours = |name: &OsString| name.as_bytes().starts_with(names::ENV_PREFIX.as_bytes());
        let environment = env::vars_os().filter(|(name, _)| !ours(name)).map(|(mut name, value)| {
            name.push("=");
            name.push(value);
            name
        });
        let environment = namespace::c_strings(environment).map_err(not_executed)?;
        let users = self.users().map_err(StartFailed::before(Step::Users))?;
        namespace::start_command(&command, &environment, &users, self.command_descriptors)
    }

    /// The command's users below ours: the same again, or the one that we map as 0 under its own number.
    fn users(&self) -> io::Result<UserMap> {
        if self.everyone {
            return everyone();
        }
        // in our namespace we are 0; what we are outside stands in our map
        let outside = |path| -> io::Result<String> {
            let map = fs::read_to_string(path)?;
            let number = map.split_whitespace().nth(1).unwrap_or("0");
            Ok(format!("{number} 0 1\n"))
        };
        Ok(UserMap {
            uids: outside("/proc/self/uid_map")?,
            gids: outside("/proc/self/gid_map")?,
            deny_setgroups: false, // already, and a namespace below inherits it
        })
    }

    fn make_sockets(&self, ipv6: bool, count: usize) -> Result<()> {
        let (mut sockets, mut errno) = (Vec::new(), 0);
        for _ in 0..count {
            match app_socket(ipv6) {
                Ok(socket) => sockets.push(socket),
                Err(error) => {
                    errno = error.raw_os_error().unwrap_or(Errno::EIO as i32);
                    break;
                }
            }
        }
        let message = |made, errno| FromHelper::Sockets { ipv6, made, missing: count - made, errno };
        let sent = send(self.socket.as_fd(), &message(sockets.len(), errno), &namespace::borrowed(&sockets));
        match sent.as_ref().map_err(io::Error::raw_os_error) {
            // Too many are under way to all receivers of this user, or the kernel has no memory for them now: whoever
            // waits for a socket hears of it, and the command goes on.
            Err(Some(errno)) if SOCKETS_REFUSED.contains(&Errno::from_raw(errno)) => {
                Ok(self.say(&message(0, errno))?)
            }
            _ => Ok(sent?),
        }
    }

    /// Buries every child that has ended; gives the status of the command if it was among them.
    fn reap(&mut self) -> Result<Option<i32>> {
        while self.children.read_signal()?.is_some() {}
        loop {
            let (process, status) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(process, code)) => (process, code << 8),
                Ok(WaitStatus::Signaled(process, signal, core)) => {
                    (process, signal as i32 | if core { 0x80 } else { 0 })
                }
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(None),
                Ok(_) | Err(Errno::EINTR) => continue,
                Err(error) => return Err(error.into()),
            };
            if Some(process) == self.process {
                self.process = None;
                return Ok(Some(status));
            }
        }
    }

    /// Ends the command, kindly first, and then everything that it started.
    fn end_everything(&mut self) {
        if let Some(process) = self.process
            && kill(process, Signal::SIGTERM).is_ok()
        {
            for _ in 0..LAST_WAITS.0 {
                let mut wanted = [PollFd::new(self.children.as_fd(), PollFlags::POLLIN)];
                let _ = poll(&mut wanted, LAST_WAITS.1);
                if !matches!(self.reap(), Ok(None)) {
                    break;
                }
            }
        }
        // what loses its parent becomes our child, so in the end all are
        while let Some(children) = own_children() {
            for child in children {
                let _ = kill(child, Signal::SIGKILL);
            }
            let _ = waitpid(None, None);
        }
    }

    fn say(&self, message: &FromHelper) -> io::Result<()> {
        send(self.socket.as_fd(), message, &[])
    }

    fn hear(&self) -> Result<Option<ToHelper>> {
        let received = namespace::receive(self.socket.as_fd())?;
        Ok(received.map(|received| parse(&received)).transpose()?)
    }
}

/// Is this a name that no folder of the PATH has?
fn is_nowhere(program: &OsString) -> bool {
    let has = |folder: PathBuf| folder.join(program).symlink_metadata().is_ok();
    let is_path = program.as_bytes().contains(&b'/');
    !is_path && env::var_os("PATH").is_some_and(|path| !env::split_paths(&path).any(has))
}

/// The children of this process, if there are any (proc(5): `/proc/PID/task/TID/children`).
fn own_children() -> Option<Vec<Pid>> {
    let text = fs::read_to_string("/proc/thread-self/children").ok()?;
    let children: Vec<Pid> =
        text.split_whitespace().filter_map(|number| number.parse().ok().map(Pid::from_raw)).collect();
    (!children.is_empty()).then_some(children)
}

/// The map that only a process with capabilities may write: every user and group of ours as itself.
pub(super) fn everyone() -> io::Result<UserMap> {
    let same = |path| -> io::Result<String> {
        let map = fs::read_to_string(path)?;
        let ranges = map.lines().filter_map(|line| {
            let mut words = line.split_whitespace();
            let (first, count) = (words.next()?, words.nth(1)?);
            Some(format!("{first} {first} {count}\n"))
        });
        Ok(ranges.collect())
    };
    Ok(UserMap {
        uids: same("/proc/self/uid_map")?,
        gids: same("/proc/self/gid_map")?,
        deny_setgroups: false,
    })
}

/// The map that everybody may write: our own user and group as 0.
pub(super) fn only_us() -> UserMap {
    UserMap {
        uids: format!("0 {} 1\n", geteuid()),
        gids: format!("0 {} 1\n", getegid()),
        deny_setgroups: true,
    }
}

/// Loopback, to which every address leads. Any port may be listened on, as on a machine of one's own.
fn network(ipv6: bool) -> Result<()> {
    let program = find_program("ip", "iproute2")?;
    let mut steps = vec!["link set lo up", "-4 route add local default dev lo"];
    if ipv6 {
        steps.push("-6 route add local default dev lo");
    }
    for step in steps {
        let output = Command::new(&program)
            .args(step.split(' '))
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("cannot start {}", program.display()))?;
        if !output.status.success() {
            bail!("`ip {step}` failed: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
    }
    // without it the command would need a capability for ports below 1024; kernels before 4.11 have no such file
    let _ = fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0");
    Ok(())
}

fn rules(wanted: &Preparation) -> Result<()> {
    let plan = namespace_plan(wanted.outbound_port, wanted.dns_port, wanted.ipv6);
    let backend = Backend::from_str(&wanted.backend, true).map_err(anyhow::Error::msg)?;
    let tools = Tools::choose(backend)?.with_lock_file(Path::new(OWN_LOCK_FILE));
    apply_plan(&plan, &tools)
}

fn loopback(port: u16, ipv6: bool) -> Vec<SocketAddr> {
    let mut addresses = vec![SocketAddr::from((Ipv4Addr::LOCALHOST, port))];
    if ipv6 {
        addresses.push((Ipv6Addr::LOCALHOST, port).into());
    }
    addresses
}

fn listener(address: SocketAddr) -> Result<Socket> {
    let listen = || -> io::Result<Socket> {
        let socket = bound(address, Type::STREAM, Protocol::TCP)?;
        socket.listen(BACKLOG)?;
        Ok(socket)
    };
    listen().with_context(|| format!("cannot listen on {address} in the namespace"))
}

fn datagrams(address: SocketAddr) -> Result<Socket> {
    bound(address, Type::DGRAM, Protocol::UDP)
        .with_context(|| format!("cannot take datagrams on {address} in the namespace"))
}

fn bound(address: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    socket.set_nonblocking(true)?;
    if kind == Type::STREAM {
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
    }
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    Ok(socket)
}

/// A socket for a connection of the sidecar to the app: marked, so that it is not redirected.
fn app_socket(ipv6: bool) -> io::Result<Socket> {
    let domain = if ipv6 { Domain::IPV6 } else { Domain::IPV4 };
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    socket.set_mark(SIDECAR_MARK)?;
    Ok(socket)
}
