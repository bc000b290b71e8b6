//! Pods as a node has them: each a network namespace, joined by a bridge in a namespace of its own, the "wire",
//! where a test can capture. Every [`Network`] is a world of its own, so tests run in parallel with the same addresses.

use std::{
    cell::Cell,
    ffi::OsStr,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

use crate::process::{Process, output_of};

const PREFIX: &str = "weft-test";

/// A bridge, and a folder for what a test writes.
#[derive(Debug)]
pub struct Network {
    /// The namespace of the bridge `bridge`, through which all packets between pods go.
    pub wire: Netns,
    folder: TempDir,
    pods: Cell<u8>,
}

/// A network namespace. Deleted, with all processes in it, when dropped.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

/// A namespace with an interface `eth0` on the wire.
#[derive(Debug)]
pub struct Pod {
    netns: Netns,
    ipv4: Ipv4Addr,
    ipv6: Ipv6Addr,
}

impl Network {
    /// Makes a wire without pods.
    ///
    /// # Panics
    /// If the kernel or the `ip` program refuses.
    #[expect(clippy::new_without_default, reason = "it takes root and makes namespaces")]
    pub fn new() -> Network {
        delete_what_dead_tests_left();
        let folder = TempDir::with_prefix("weft-test-").expect("a temporary folder");
        let network = Network { wire: Netns::new(&folder, "wire"), folder, pods: Cell::new(0) };
        network.wire.ip(&[
            "link set lo up",
            "link add bridge type bridge forward_delay 0 mcast_snooping 0",
            &format!("address add {}/24 dev bridge", ipv4(GATEWAY)),
            &format!("address add {}/64 dev bridge nodad", ipv6(GATEWAY)),
            "link set bridge up",
        ]);
        network
    }

    /// Adds a pod. The label is for people; the addresses are 10.77.0.1, 10.77.0.2 and so on, and fd77::1, fd77::2.
    ///
    /// # Panics
    /// If the kernel or the `ip` program refuses.
    pub fn pod(&self, label: &str) -> Pod {
        let number = self.pods.get() + 1;
        assert!(number < GATEWAY, "too many pods in one network");
        self.pods.set(number);
        let pod = Pod { netns: Netns::new(&self.folder, label), ipv4: ipv4(number), ipv6: ipv6(number) };
        self.wire.ip(&[
            &format!("link add eth0 netns {} type veth peer name port{number}", pod.netns.name),
            &format!("link set port{number} master bridge up"),
        ]);
        pod.netns.ip(&[
            "link set lo up",
            &format!("address add {}/24 dev eth0", pod.ipv4),
            &format!("address add {}/64 dev eth0 nodad", pod.ipv6),
            "link set eth0 up",
            &format!("-4 route add default via {}", ipv4(GATEWAY)),
            &format!("-6 route add default via {}", ipv6(GATEWAY)),
        ]);
        pod
    }

    /// A folder for what the test writes; it goes with the network.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}

/// The last number of the bridge's own addresses.
const GATEWAY: u8 = 254;

fn ipv4(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, number)
}

fn ipv6(number: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, number.into())
}

impl Netns {
    fn new(folder: &TempDir, label: &str) -> Netns {
        // the folder's name ends in letters that no other has
        let random = folder.path().to_string_lossy().rsplit('-').next().unwrap_or_default().to_owned();
        let name = format!("{PREFIX}-{}-{random}-{label}", std::process::id());
        let netns = Netns { name };
        let mut add = Command::new("ip");
        add.args(["netns", "add", &netns.name]);
        output_of(add);
        netns
    }

    /// Its name for `ip netns exec`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs something in this namespace: sockets made there belong to it, wherever they are used afterwards.
    ///
    /// # Panics
    /// If it panics, or the namespace cannot be entered.
    pub fn inside<T: Send>(&self, run: impl FnOnce() -> T + Send) -> T {
        let file =
            fs::File::open(Path::new("/var/run/netns").join(&self.name)).expect("the namespace's file");
        let enter = || nix::sched::setns(&file, nix::sched::CloneFlags::CLONE_NEWNET).expect("setns");
        // a thread of its own, as the namespace is the thread's
        let ran = std::thread::scope(|scope| scope.spawn(|| (enter(), run()).1).join());
        ran.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// The processes in it.
    pub fn processes(&self) -> Vec<Pid> {
        processes(&self.name)
    }

    /// A program in this namespace, as root; add its arguments.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }

    /// A program in this namespace as some user, without groups and capabilities; add its arguments.
    pub fn command_as(&self, uid: u32, program: impl AsRef<OsStr>) -> Command {
        let uid = uid.to_string();
        let mut command = self.command("setpriv");
        command.args(["--reuid", &uid, "--regid", &uid, "--clear-groups", "--"]).arg(program);
        command
    }

    /// Runs a line of shell in this namespace, as root, and gives its output.
    ///
    /// # Panics
    /// If it fails.
    pub fn shell(&self, line: &str) -> String {
        let mut command = self.command("sh");
        command.args(["-e", "-c", line]);
        output_of(command)
    }

    fn ip(&self, lines: &[&str]) {
        for line in lines {
            let mut command = Command::new("ip");
            command.args(["-n", &self.name]).args(line.split(' '));
            output_of(command);
        }
    }

    fn own_files(&self) -> PathBuf {
        Path::new("/etc/netns").join(&self.name)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        delete(&self.name);
        let _ = fs::remove_dir_all(self.own_files());
    }
}

impl Pod {
    /// Its namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Its IPv4 address.
    pub fn ipv4(&self) -> IpAddr {
        self.ipv4.into()
    }

    /// Its IPv6 address.
    pub fn ipv6(&self) -> IpAddr {
        self.ipv6.into()
    }

    /// As [`Netns::inside`].
    ///
    /// # Panics
    /// If it panics, or the namespace cannot be entered.
    pub fn inside<T: Send>(&self, run: impl FnOnce() -> T + Send) -> T {
        self.netns.inside(run)
    }

    /// As [`Netns::command`].
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        self.netns.command(program)
    }

    /// As [`Netns::command_as`].
    pub fn command_as(&self, uid: u32, program: impl AsRef<OsStr>) -> Command {
        self.netns.command_as(uid, program)
    }

    /// As [`Netns::shell`].
    ///
    /// # Panics
    /// If it fails.
    pub fn shell(&self, line: &str) -> String {
        self.netns.shell(line)
    }

    /// Starts a program in this pod, as root.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start(&self, program: impl AsRef<OsStr>, arguments: &[&str]) -> Process {
        self.start_as(0, program, arguments)
    }

    /// Starts a program in this pod as some user.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start_as(&self, uid: u32, program: impl AsRef<OsStr>, arguments: &[&str]) -> Process {
        let name = Path::new(program.as_ref()).file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut command = if uid == 0 { self.command(program) } else { self.command_as(uid, program) };
        command.args(arguments);
        Process::start(&name, command)
    }

    /// Gives programs in this pod their own `/etc/resolv.conf`.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn resolver(&self, text: &str) {
        self.own_file("resolv.conf", text);
    }

    /// Gives programs in this pod their own `/etc/hosts`.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn hosts(&self, text: &str) {
        self.own_file("hosts", text);
    }

    fn own_file(&self, name: &str, text: &str) {
        fs::create_dir_all(self.netns.own_files()).expect("a folder below /etc/netns");
        fs::write(self.netns.own_files().join(name), text).expect("a file below /etc/netns");
    }
}

fn processes(name: &str) -> Vec<Pid> {
    let Ok(listed) = Command::new("ip").args(["netns", "pids", name]).output() else { return Vec::new() };
    let numbers = String::from_utf8_lossy(&listed.stdout);
    numbers.lines().filter_map(|line| line.trim().parse().ok().map(Pid::from_raw)).collect()
}

fn delete(name: &str) {
    for process in processes(name) {
        let _ = kill(process, Signal::SIGKILL);
    }
    let _ = Command::new("ip").args(["netns", "delete", name]).stderr(Stdio::null()).status();
}

/// A test that was killed could not delete its namespaces.
fn delete_what_dead_tests_left() {
    let Ok(listed) = Command::new("ip").args(["netns", "list"]).output() else { return };
    for line in String::from_utf8_lossy(&listed.stdout).lines() {
        let name = line.split_whitespace().next().unwrap_or_default();
        let process = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').nth(1)?.parse::<u32>().ok());
        if process.is_some_and(|process| !Path::new("/proc").join(process.to_string()).exists()) {
            delete(name);
            let _ = fs::remove_dir_all(Path::new("/etc/netns").join(name));
        }
    }
}
