//! A standard error that stays open and that nobody reads, as of a log collector that is stuck: calls, probes, views and
//! the end of the sidecar do not wait for it.

use std::{
    fs::{self, File, Permissions},
    io::{BufRead, BufReader},
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::Command,
    sync::mpsc::channel,
    thread,
    time::Duration,
};

use nix::{
    sys::{signal::Signal, stat::Mode},
    unistd::mkfifo,
};
use weft_tests::{Mesh, Pod, Sidecar, output_of, program, until};

use super::world::{World, can_run_here};

/// A pipe with a name, which this test keeps open.
struct Pipe {
    path: PathBuf,
    reader: File,
}

impl Pipe {
    fn new(mesh: &Mesh) -> Pipe {
        let path = mesh.network.folder().join("stderr");
        mkfifo(&path, Mode::S_IRWXU).expect("a pipe");
        fs::set_permissions(&path, Permissions::from_mode(0o622)).expect("its mode");
        let reader = File::options().read(true).write(true).open(&path).expect("the pipe");
        Pipe { path, reader }
    }

    /// A shell's command line that makes it the standard error of the sidecar, with a log that fills it.
    fn shell(&self) -> String {
        format!("WEFT_LOG=trace exec \"$@\" 2>{}", self.path.display())
    }

    /// Reads until a line has these words.
    fn read_until(&self, words: &'static str) {
        let reader = BufReader::new(self.reader.try_clone().expect("the pipe"));
        let (found, is_found) = channel();
        thread::spawn(move || {
            let mut lines = reader.lines().map_while(Result::ok);
            let _ = found.send(lines.find(|line| line.contains(words)));
        });
        is_found.recv_timeout(Duration::from_secs(20)).expect(words);
    }
}

fn lost(sidecar: &Sidecar, pod: &Pod) -> u64 {
    let metrics = sidecar.metrics(pod);
    let mut lines = metrics.lines();
    let count = lines.find_map(|line| line.strip_prefix("weft_log_lines_dropped_total{log=\"own\"} "));
    count.and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("{metrics}"))
}

/// Makes calls until lines of the log are lost.
fn fill(sidecar: &Sidecar, pod: &Pod) {
    let before = lost(sidecar, pod);
    until("lines are lost", || {
        let mut curl = pod.command("curl");
        let urls = ["-s", "-S", "-f", "-m", "20", "-o", "/dev/null", "http://orders/[1-200]"];
        output_of({
            curl.args(urls);
            curl
        });
        lost(sidecar, pod) > before
    });
}

fn assert_well(sidecar: &Sidecar, pod: &Pod) {
    sidecar.wait_until_ready(pod);
    let mut show = Command::new("timeout");
    show.arg("5")
        .arg(program("weft-sidecar"))
        .args(["show", "status", "--admin-socket"])
        .arg(sidecar.socket());
    output_of(show);
}

#[test]
fn a_log_that_nobody_reads_stops_nothing() {
    if !can_run_here() {
        return;
    }
    let world = World::new();
    let _orders = world.instance("one", &[]);
    let pipe = Pipe::new(&world.mesh);
    let pod = world.mesh.network.pod("stuck");
    let under = ["sh", "-c", &pipe.shell(), "sh"];
    let mut sidecar = world.mesh.start_sidecar_under(&under, &pod, "caller", &[], &[]);
    sidecar.wait_until_ready(&pod);
    fill(&sidecar, &pod);
    assert_well(&sidecar, &pod);
    pipe.read_until("lines of this log were lost since the start");
    fill(&sidecar, &pod);
    sidecar.process.signal(Signal::SIGTERM);
    assert_eq!(sidecar.process.wait().code(), Some(0));
}

#[test]
fn a_log_of_exec_that_nobody_reads_stops_neither_calls_nor_the_end() {
    if !can_run_here() {
        return;
    }
    let world = World::new();
    let _orders = world.instance("one", &[]);
    let pipe = Pipe::new(&world.mesh);
    let pod = world.mesh.network.pod("host");
    let under = ["sh", "-c", &pipe.shell(), "sh"];
    let command =
        "until curl -s -f -m 5 -o /dev/null 'http://orders/[1-1000]'; do :; done; echo done; exec sleep 1000";
    let mut exec = world.mesh.start_exec_under(&under, &pod, "batch", &[], &["sh", "-c", command]);
    exec.process.wait_for_line("done");
    until("lines are lost", || lost(&exec, &pod) > 0);
    assert_well(&exec, &pod);
    exec.process.signal(Signal::SIGTERM);
    assert_eq!(exec.process.wait().code(), Some(128 + Signal::SIGTERM as i32));
}
