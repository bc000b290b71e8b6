//! A real Kubernetes with Weft in it, for all tests of a process: made at the first use from `tests/cluster`, gone with the
//! process. Each test makes namespaces of its own.

use std::{
    cell::RefCell,
    env,
    fmt::Write as _,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::Duration,
};

use serde_json::Value;
use tokio::time::Instant;

use crate::{pause, program};

/// A running cluster.
#[derive(Debug)]
pub struct Cluster {
    folder: PathBuf,
}

/// What `kubectl` did.
#[derive(Debug)]
pub struct Answer {
    /// Was it what was asked for?
    pub done: bool,
    /// Standard output, then standard error.
    pub text: String,
}

/// How a test, which is a thread, has the cluster until it ends.
#[expect(dead_code, reason = "held for its drop")]
enum Turn {
    Shared(RwLockReadGuard<'static, ()>),
    Alone(RwLockWriteGuard<'static, ()>),
}

static TURNS: RwLock<()> = RwLock::new(());

thread_local! {
    static TURN: RefCell<Option<Turn>> = const { RefCell::new(None) };
}

/// A pod may take so long until it is ready, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

impl Cluster {
    /// The cluster, beside other tests; none where there is none, which is printed as a skipped test.
    ///
    /// # Panics
    /// If it is built and cannot be started.
    pub fn shared() -> Option<&'static Cluster> {
        take_turn(|| Turn::Shared(TURNS.read().unwrap_or_else(PoisonError::into_inner)));
        Self::get_or_start()
    }

    /// The cluster, for a test that changes what all others need.
    ///
    /// # Panics
    /// As [`Cluster::shared`].
    pub fn alone() -> Option<&'static Cluster> {
        take_turn(|| Turn::Alone(TURNS.write().unwrap_or_else(PoisonError::into_inner)));
        Self::get_or_start()
    }

    fn get_or_start() -> Option<&'static Cluster> {
        static CLUSTER: OnceLock<Option<Cluster>> = OnceLock::new();
        let cluster = CLUSTER
            .get_or_init(|| env::var_os("WEFT_TESTS_CLUSTER").map(|folder| Cluster::start(folder.into())));
        if cluster.is_none() {
            let name = std::thread::current().name().unwrap_or("a test").to_owned();
            let reason =
                "there is no cluster: `tests/run cluster` builds one where Go is (tests/cluster/README.md)";
            let _ = writeln!(std::io::stderr(), "SKIPPED: {name}: {reason}");
        }
        cluster.as_ref()
    }

    fn start(folder: PathBuf) -> Cluster {
        let cluster = Cluster { folder };
        cluster.make_images();
        cluster.run("./up", &[]);
        cluster.end_with_this_process();
        let install = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("deploy/kubernetes/install");
        let mut command = cluster.command(install);
        for (name, image) in
            [("SIDECAR", "sidecar"), ("REDIRECT", "redirect"), ("CONTROL", "control"), ("CONSUL", "consul")]
        {
            command.env(format!("WEFT_{name}_IMAGE"), format!("local.test/weft-{image}:1"));
        }
        finished(&mut command);
        cluster
    }

    /// Images of the programs as they were built; every start of the cluster loads all that are there.
    fn make_images(&self) {
        let programs = ["weft-sidecar", "weft-ca", "weft-injector"].map(|name| {
            let stripped = self.folder.join("images").join(name);
            finished(Command::new("strip").arg("-o").arg(&stripped).arg(program(name)));
            format!("{}=/usr/local/bin/{name}", stripped.display())
        });
        let [sidecar, authority, injector] = &programs;
        let entry = ["--entrypoint", "[\"weft-sidecar\"]"];
        let image = |name: &str, rest: &[&str]| {
            let (tag, file) = (format!("local.test/weft-{name}:1"), format!("images/weft-{name}.tar"));
            self.run("./mkimage.py", &[&[tag.as_str(), file.as_str()], rest].concat());
        };
        image("sidecar", &[&["--bin", sidecar], &entry[..]].concat());
        image("redirect", &[&["--from", "images/tools.tar", "--bin", sidecar], &entry[..]].concat());
        image("control", &["--bin", authority, "--bin", injector]);
        image("load", &["--from", "images/tools.tar", "--bin", "/usr/bin/wrk=/usr/bin/wrk"]);
        image("consul", &["--bin", "/usr/bin/consul=/usr/local/bin/consul"]);
    }

    /// A shell that waits for the end of this process, however it ends.
    fn end_with_this_process(&self) {
        let script = "while kill -0 $0 2>/dev/null; do sleep 0.5; done; exec ./down";
        let mut command = self.command("setsid".into());
        command.args(["--fork", "sh", "-c", script, &std::process::id().to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        assert!(command.status().is_ok_and(|status| status.success()), "a shell cannot be started");
    }

    fn run(&self, program: &str, arguments: &[&str]) {
        finished(self.command(self.folder.join(program)).args(arguments));
    }

    fn command(&self, program: PathBuf) -> Command {
        let mut command = Command::new(program);
        let path = env::var("PATH").unwrap_or_default();
        command
            .current_dir(&self.folder)
            .env("KUBECONFIG", self.folder.join("admin.conf"))
            .env("PATH", format!("{}:{path}:/usr/sbin", self.folder.join("bin").display()));
        command
    }

    /// Runs `kubectl`, whatever comes of it.
    pub fn try_kubectl(&self, arguments: &[&str]) -> Answer {
        let mut command = self.command(self.folder.join("bin/kubectl"));
        answer(command.args(arguments).output().expect("kubectl"))
    }

    /// Runs `kubectl`, and gives its standard output.
    ///
    /// # Panics
    /// With what it says, if it fails.
    pub fn kubectl(&self, arguments: &[&str]) -> String {
        let answer = self.try_kubectl(arguments);
        assert!(answer.done, "kubectl {arguments:?}: {}", answer.text);
        answer.text
    }

    /// Runs `helm`, whatever comes of it.
    pub fn helm(&self, arguments: &[&str]) -> Answer {
        self.tool(&self.folder.join("bin/helm"), arguments)
    }

    /// Runs a program of this machine beside `kubectl` and `helm`, whatever comes of it.
    pub fn tool(&self, program: &Path, arguments: &[&str]) -> Answer {
        answer(self.command(program.to_owned()).args(arguments).output().expect("it is there"))
    }

    /// Runs a command inside the first node, whatever comes of it.
    pub fn in_node(&self, command: &[&str]) -> Answer {
        self.tool(&self.folder.join("in"), command)
    }

    /// Applies a document, whatever comes of it.
    pub fn try_apply(&self, document: &str) -> Answer {
        self.piped(&["apply", "-f", "-"], document)
    }

    /// What the API server would make of a new object, as JSON, whatever comes of it.
    pub fn dry_run(&self, document: &str) -> Answer {
        self.piped(&["create", "--dry-run=server", "-o", "json", "-f", "-"], document)
    }

    fn piped(&self, arguments: &[&str], document: &str) -> Answer {
        let mut command = self.command(self.folder.join("bin/kubectl"));
        let mut child = command
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("kubectl");
        child.stdin.take().expect("its input").write_all(document.as_bytes()).expect("its input");
        answer(child.wait_with_output().expect("kubectl"))
    }

    /// Applies a document.
    ///
    /// # Panics
    /// With what `kubectl` says, if it is refused.
    pub fn apply(&self, document: &str) {
        let answer = self.try_apply(document);
        assert!(answer.done, "{}\n{document}", answer.text);
    }

    /// A new namespace with labels, and the mesh's root in it where it is of the mesh.
    pub fn namespace(&self, name: &str, labels: &[&str]) {
        self.kubectl(&["create", "namespace", name]);
        for label in labels {
            self.kubectl(&["label", "namespace", name, label]);
        }
    }

    /// An object.
    pub fn get(&self, namespace: &str, kind_and_name: &str) -> Value {
        let text = self.kubectl(&["-n", namespace, "get", kind_and_name, "-o", "json"]);
        serde_json::from_str(&text).expect("JSON of kubectl")
    }

    /// Waits for a condition of an object.
    ///
    /// # Panics
    /// With the object and the log of its sidecars, if it takes too long.
    pub fn wait(&self, namespace: &str, kind_and_name: &str, condition: &str) {
        let patience = format!("--timeout={}s", PATIENCE.as_secs());
        let condition = format!("--for={condition}");
        let answer = self.try_kubectl(&["-n", namespace, "wait", kind_and_name, &condition, &patience]);
        if !answer.done {
            let mut text = answer.text;
            let _ = write!(text, "\n{}", self.try_kubectl(&["-n", namespace, "describe", "pods"]).text);
            let _ = write!(text, "\n{}", self.try_kubectl(&["-n", namespace, "get", "events"]).text);
            panic!("{kind_and_name}: {condition}: {text}");
        }
    }

    /// Runs a command in the container `app` of a pod, and gives what it prints.
    pub fn exec(&self, namespace: &str, pod: &str, command: &[&str]) -> Answer {
        self.try_kubectl(&[&["-n", namespace, "exec", pod, "-c", "app", "--"], command].concat())
    }

    /// Waits until something holds.
    ///
    /// # Panics
    /// If it takes too long.
    pub fn until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let start = Instant::now();
        while !holds() {
            assert!(start.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
            pause();
        }
    }
}

/// The turn before, of the same thread, ends first.
fn take_turn(turn: impl FnOnce() -> Turn) {
    TURN.set(None);
    TURN.set(Some(turn()));
}

fn answer(output: Output) -> Answer {
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() || !output.stderr.is_empty() {
        text.push_str(&String::from_utf8_lossy(&output.stderr));
    }
    Answer { done: output.status.success(), text }
}

fn finished(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let answer = answer(output);
    assert!(answer.done, "{command:?}: {}", answer.text);
}
