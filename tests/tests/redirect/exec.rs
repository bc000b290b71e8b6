//! `exec`: a command in namespaces of its own, as root and as an ordinary user, with a stand-in for the sidecar
//! (`redirect-peer outside`) that uses the real helper of `weft-sidecar`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;
use weft_tests::{Need, Process, can_run, program, program_for_everyone, until};

const NEEDS: [Need; 4] = [
    Need::Root,
    Need::Program("ip", "iproute2"),
    Need::Program("setpriv", "util-linux"),
    Need::Program("iptables-nft", "iptables"),
];
/// Root, and somebody whom the machine does not know.
const USERS: [u32; 2] = [0, 54_321];

/// The programs where every user may run them.
struct Programs {
    peer: PathBuf,
    sidecar: PathBuf,
    _folders: [TempDir; 2],
}

impl Programs {
    fn new() -> Programs {
        let (folder, peer) = program_for_everyone(Path::new(env!("CARGO_BIN_EXE_redirect-peer")));
        let (other, sidecar) = program_for_everyone(&program("weft-sidecar"));
        Programs { peer, sidecar, _folders: [folder, other] }
    }

    /// The stand-in for the sidecar, as some user, around a shell script in which `$peer` is the test's program.
    fn outside(&self, uid: u32, options: &[&str], script: &str) -> Process {
        Process::start("outside", self.command(uid, options, &["bash", "-c", script]))
    }

    fn command(&self, uid: u32, options: &[&str], command: &[&str]) -> Command {
        let mut outside = Command::new("setpriv");
        let uid = uid.to_string();
        outside
            .args(["--reuid", &uid, "--regid", &uid, "--clear-groups", "--"])
            .arg(&self.peer)
            .arg("outside");
        outside.args(options).arg(format!("program={}", self.sidecar.display())).arg("--").args(command);
        outside.env("peer", &self.peer).env("WEFT_SECRET", "hidden").current_dir("/");
        // an ordinary user's PATH has no sbin
        outside.env("PATH", "/usr/local/bin:/usr/bin:/bin");
        outside
    }
}

#[test]
fn what_the_command_sends_arrives_outside() {
    if !can_run(&NEEDS) {
        return;
    }
    let programs = Programs::new();
    for uid in USERS {
        for backend in ["nft", "legacy"] {
            let backend_option = format!("backend={backend}");
            let options = [&backend_option, "upstream=127.0.0.1:3306"];
            let mut outside = programs.outside(
                uid,
                &options,
                "$peer dial 192.0.2.7:80; $peer dial [2001:db8::7]:443; $peer dial 240.0.0.1:1; \
                 $peer ask 0.0.0.0:0 127.0.0.53:53 one?; $peer ask 0.0.0.0:0 10.1.2.3:53 two?; \
                 $peer ask [::]:0 [fd00::53]:53 three?; $peer dial 127.0.0.53:53; $peer dial 127.0.0.1:3306; \
                 $peer dial 127.0.0.1:9999; echo done",
            );
            outside.wait_for_line("done");
            assert!(outside.wait().success(), "{}", outside.log());
            let log = outside.log();
            for line in [
                "outbound listeners: 4", // two workers, two families
                "outside saw 15001 192.0.2.7:80",
                "outside saw 15001 [2001:db8::7]:443",
                "outside saw 15001 240.0.0.1:1",
                "\n15001 192.0.2.7:80",
                "\n15001 [2001:db8::7]:443",
                "15053 one?",
                "15053 two?",
                "15053 three?",
                "outside saw 15053 127.0.0.53:53",
                "outside saw 3306 127.0.0.1:3306",
                "Connection refused", // its own loopback stays its own
            ] {
                assert!(log.contains(line), "{line:?} as user {uid}, {backend}:\n{log}");
            }
        }
    }
}

#[test]
fn the_sidecar_reaches_the_app_on_its_loopback() {
    if !can_run(&NEEDS) {
        return;
    }
    let programs = Programs::new();
    for uid in USERS {
        // 53 would be redirected without the mark; 80 needs no capability there
        let mut outside = programs.outside(
            uid,
            &["app=127.0.0.1:80", "app=[::1]:8080", "app=127.0.0.1:53"],
            "exec $peer serve 127.0.0.1:80 [::1]:8080 0.0.0.0:53",
        );
        for line in ["app said: 80 127.0.0.1:80", "app said: 8080 [::1]:8080", "app said: 53 127.0.0.1:53"] {
            outside.wait_for_line(line);
        }
        outside.signal(Signal::SIGTERM);
        assert_eq!(outside.wait().code(), Some(200), "{}", outside.log());
        assert!(outside.log().contains("ended: code None signal Some(15)"), "{}", outside.log());
    }
}

#[test]
fn the_command_has_no_power_over_its_network() {
    if !can_run(&NEEDS) {
        return;
    }
    let programs = Programs::new();
    for uid in USERS {
        let mut outside = programs.outside(
            uid,
            &[],
            "PATH=$PATH:/usr/sbin:/sbin; id -u; \
             for try in 'iptables -t nat -F' 'iptables-legacy -t nat -F' 'ip link set lo down' \
             'ip route flush table local' \"nsenter --user --net -t $PPID iptables -t nat -F\" \
             \"nsenter --user -t $PPID true\" 'ip link add eth9 type dummy'; do \
             if $try; then echo \"WORKED: $try\"; else echo \"failed: $try\"; fi; done 2>/dev/null; \
             unshare -r iptables -t nat -F && echo WORKED: unshare; \
             sidecar=$(awk '/^PPid/ {print $2}' /proc/$PPID/status); echo sidecar $(cat /proc/$sidecar/comm); \
             for secret in $PPID/environ $PPID/maps $sidecar/environ $sidecar/mem; do \
             head -c 1 /proc/$secret >/dev/null && echo WORKED: reading; done; \
             nsenter --net -t $sidecar true && echo WORKED: nsenter; \
             setpriv --reuid 33 --regid 33 --clear-groups id -u; \
             $peer dial 192.0.2.7:80; echo done",
        );
        outside.wait_for_line("done");
        outside.wait();
        let log = outside.log();
        assert!(!log.contains("WORKED"), "{log}");
        assert!(
            log.contains("failed: iptables -t nat -F") && log.contains("failed: nsenter --user -t"),
            "{log}"
        );
        assert!(log.lines().any(|line| line == uid.to_string()), "the command keeps its user:\n{log}");
        assert!(log.contains("15001 192.0.2.7:80") && log.contains("sidecar redirect-peer"), "{log}");
        // only root may map other users
        assert_eq!(log.lines().any(|line| line == "33"), uid == 0, "{log}");
    }
}

#[test]
fn the_command_inherits_nothing_of_the_sidecar() {
    if !can_run(&NEEDS) {
        return;
    }
    let programs = Programs::new();
    for uid in USERS {
        let run = |command: &[&str]| {
            let inner = programs.command(uid, &[], command);
            // descriptors that whoever started the sidecar left open
            let mut shell = Command::new("bash");
            shell.arg("-c").arg("exec 7</etc/passwd 9</etc/group; exec \"$@\"").arg("bash");
            shell.arg(inner.get_program()).args(inner.get_args());
            shell.envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?)))).current_dir("/");
            let mut outside = Process::start("outside", shell);
            assert!(outside.wait().success());
            outside.log()
        };
        let variables = run(&["env"]);
        assert!(variables.contains("peer=") && !variables.contains("WEFT_"), "{variables}");
        let descriptors = run(&["ls", "-l", "/proc/self/fd"]);
        let (own, others): (Vec<&str>, Vec<&str>) = descriptors
            .lines()
            .filter_map(|line| line.split_once(" -> ")?.0.rsplit_once(' ').map(|found| (found.1, line)))
            .filter(|(_, line)| !line.contains("-> /proc/")) // the folder that ls reads
            .map(|(number, _)| number)
            .partition(|number| ["0", "1", "2"].contains(number));
        assert!(own.len() == 3 && others.is_empty(), "{descriptors}");
        let status = run(&["cat", "/proc/self/status"]);
        assert!(status.contains("SigBlk:\t0000000000000000"), "{status}");
        let ours = fs::read_to_string("/proc/self/status").expect("our own status");
        let ignored = |status: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).expect("SigIgn");
            u64::from_str_radix(line.trim(), 16).expect("a number")
        };
        const PIPE: u64 = 1 << (Signal::SIGPIPE as u64 - 1);
        assert_eq!(ignored(&status), ignored(&ours) & !PIPE, "{status}");
        assert!(uid == 0 || status.contains("CapEff:\t0000000000000000"), "{status}");
        assert_eq!(run(&["pwd"]).lines().filter(|line| *line == "/").count(), 1);
    }
}

#[test]
fn its_end_passes_through() {
    if !can_run(&NEEDS) {
        return;
    }
    let programs = Programs::new();
    for uid in USERS {
        for code in [0, 1, 42, 255] {
            let mut outside = programs.outside(uid, &[], &format!("exit {code}"));
            assert_eq!(outside.wait().code(), Some(code));
        }
        let mut killed = programs.outside(uid, &[], "kill -9 $$");
        killed.wait_for_line("ended: code None signal Some(9)");
        for (command, said) in
            [("/nowhere/to/be/found", "No such file or directory"), ("/etc/passwd", "Permission denied")]
        {
            let mut outside = Process::start("outside", programs.command(uid, &[], &[command]));
            outside.wait_for_line(&format!("not started: {said}"));
            assert_eq!(outside.wait().code(), Some(127));
        }
        // a child that catches the signal decides itself
        let mut kind = programs.outside(
            uid,
            &[],
            "trap 'echo caught; exit 7' TERM; echo up; while :; do sleep 0.05; done",
        );
        kind.wait_for_line("up");
        kind.signal(Signal::SIGTERM);
        assert_eq!(kind.wait().code(), Some(7), "{}", kind.log());
        assert!(kind.log().contains("caught"));
    }
}

/// Script of a command with a child that left it, and a grandchild in a session of its own. Prints their ids.
const FAMILY: &str =
    "setsid sleep 1001 & child=$!; (sleep 1002 & echo orphan $!; echo child $child); echo own $$; ";

fn family(outside: &mut Process) -> Vec<Pid> {
    outside.wait_for_line("own ");
    let log = outside.log();
    let id = |word: &str| {
        let line = log.lines().find(|line| line.starts_with(word)).expect(word);
        Pid::from_raw(line[word.len()..].trim().parse().expect("a process id"))
    };
    ["orphan ", "child ", "own "].map(id).to_vec()
}

fn lives(process: Pid) -> bool {
    fs::read_to_string(format!("/proc/{process}/stat")).is_ok_and(|stat| !stat.contains(") Z"))
}

fn children(process: Pid) -> Vec<Pid> {
    let text = fs::read_to_string(format!("/proc/{process}/task/{process}/children")).unwrap_or_default();
    text.split_whitespace().map(|number| Pid::from_raw(number.parse().expect("a process id"))).collect()
}

#[test]
fn nothing_outlives_the_sidecar_or_the_command() {
    if !can_run(&NEEDS) {
        return;
    }
    let programs = Programs::new();
    for uid in USERS {
        // the sidecar is killed
        let mut outside =
            programs.outside(uid, &[], &format!("{FAMILY} trap '' TERM; while :; do sleep 1; done"));
        let mut all = family(&mut outside);
        let helper = children(outside.id());
        assert_eq!(helper.len(), 1, "{}", outside.log());
        all.extend(&helper);
        assert!(all.iter().all(|process| lives(*process)));
        outside.signal(Signal::SIGKILL);
        until("all are gone", || !all.iter().any(|process| lives(*process)));

        // the helper is killed: the command cannot go on without it, and the sidecar hears of it
        let mut outside = programs.outside(uid, &[], "echo own $$; exec sleep 1003");
        outside.wait_for_line("started");
        let line = outside.wait_for_line("own ");
        let own = Pid::from_raw(line["own ".len()..].parse().expect("a process id"));
        kill(children(outside.id())[0], Signal::SIGKILL).expect("the helper");
        outside.wait_for_line("lost: the helper of the namespace is gone");
        assert_eq!(outside.wait().code(), Some(201));
        until("the command is gone", || !lives(own));

        // the command ends: what it left behind too, and no zombie stays
        let mut outside = programs.outside(uid, &[], &format!("{FAMILY} exit 5"));
        let all = family(&mut outside);
        assert_eq!(outside.wait().code(), Some(5));
        until("all are gone", || !all.iter().any(|process| lives(*process)));
    }
}

#[test]
fn a_machine_that_refuses_is_explained() {
    if !can_run(&NEEDS) {
        return;
    }
    let programs = Programs::new();
    // a user namespace in which none may be made below: what a hardened machine looks like
    let mut command = Command::new("unshare");
    let inner = programs.command(0, &[], &["true"]);
    let script = "echo 0 > /proc/sys/user/max_user_namespaces; exec \"$@\"";
    command.args(["--user", "--map-root-user", "bash", "-c", script, "bash"]);
    command.arg(&programs.peer).args(inner.get_args().skip_while(|word| *word != "outside"));
    let mut outside = Process::start("outside", command);
    assert!(!outside.wait().success());
    let log = outside.log();
    assert!(log.contains("refused: this user may not make a user and a network namespace"), "{log}");
    assert!(log.contains("sysctl -w user.max_user_namespaces=10000"), "{log}");
}
