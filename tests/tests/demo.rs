//! `deploy/local/demo`, as a newcomer runs it: as root and as an ordinary user, to its end and interrupted in the
//! middle. Whatever happens, neither a process nor a file of it may be left.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::{
        fs::{PermissionsExt, chown},
        process::ExitStatusExt,
    },
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
};

use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;
use weft_tests::{Need, Process, can_run, pause, program};

const NEEDS: [Need; 9] = [
    Need::Root,
    Need::Program("python3", "python3"),
    Need::Program("iptables-restore", "iptables"),
    Need::Program("ip", "iproute2"),
    Need::Program("setpriv", "util-linux"),
    Need::Program("curl", "curl"),
    Need::Program("nginx", "nginx-light"),
    Need::Program("redis-server", "redis-server"),
    Need::Program("redis-cli", "redis-tools"),
];

/// "nobody" on Debian and Ubuntu.
const ORDINARY_USER: u32 = 65534;
/// Spans of a request that needed no retry: call and attempt on each of three hops, and three answers.
const CALM_SPANS: usize = 9;

/// A copy of the demo and its programs that every user may run, and a temporary folder for that user alone.
struct Demo {
    folder: TempDir,
    process: Process,
}

impl Demo {
    fn start(uid: u32, options: &[&str]) -> Demo {
        let folder = TempDir::with_prefix("weft-demo-test-").expect("a temporary folder");
        let path = folder.path();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("its mode");
        let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/local");
        for entry in fs::read_dir(deploy).expect("deploy/local") {
            let file = entry.expect("an entry").path();
            if file.is_file() {
                fs::copy(&file, path.join(file.file_name().expect("a name"))).expect("a copy");
            }
        }
        for name in ["weft-sidecar", "weft-ca"] {
            fs::copy(program(name), path.join(name)).expect("a copy of the program");
        }
        fs::create_dir(path.join("own")).expect("a folder");
        chown(path.join("own"), Some(uid), Some(uid)).expect("its owner");
        let id = uid.to_string();
        let mut command = Command::new("setpriv");
        command.args(["--reuid", &id, "--regid", &id, "--clear-groups", "--"]);
        command.arg(path.join("demo")).arg("--binaries").arg(path);
        command.arg("--trace-file").arg(path.join("own/trace.json")).args(options);
        // a user without a home; and settings of somebody else, which must not matter
        command.env("HOME", "/nonexistent").env("TMPDIR", path.join("own"));
        command
            .env("http_proxy", "http://192.0.2.1:1")
            .env("OTEL_SDK_DISABLED", "true")
            .env("WEFT_MTLS", "nonsense");
        Demo { process: Process::start("demo", command), folder }
    }

    fn own(&self) -> PathBuf {
        self.folder.path().join("own")
    }

    /// Waits longer than the helpers do: the demo starts a dozen programs.
    fn end(&mut self) -> ExitStatus {
        for _ in 0..6000 {
            if self.process.has_ended() {
                return self.process.wait();
            }
            pause();
        }
        panic!("the demo does not end; it printed:\n{}", self.process.log())
    }

    fn wait_for(&mut self, part: &str) {
        for _ in 0..3000 {
            if self.process.log().contains(part) {
                return;
            }
            assert!(!self.process.has_ended(), "the demo ended before `{part}`:\n{}", self.process.log());
            pause();
        }
        panic!("the demo does not print `{part}`; it printed:\n{}", self.process.log())
    }

    /// Every process of the demo has its working directory or its output in the demo's folder.
    fn left_running(&self) -> Vec<String> {
        let mut found = Vec::new();
        for process in fs::read_dir("/proc").expect("/proc").flatten() {
            let path = process.path();
            let is_ours =
                |link: &Path| fs::read_link(link).is_ok_and(|target| target.starts_with(self.own()));
            let files = fs::read_dir(path.join("fd")).into_iter().flatten().flatten();
            if is_ours(&path.join("cwd")) || files.map(|file| file.path()).any(|file| is_ours(&file)) {
                let words = fs::read(path.join("cmdline")).unwrap_or_default();
                found.push(String::from_utf8_lossy(&words).replace('\0', " "));
            }
        }
        found
    }

    #[track_caller]
    fn left_nothing(&self, but: &[&str]) {
        assert_eq!(self.left_running(), Vec::<String>::new(), "still running");
        let files: Vec<String> = fs::read_dir(self.own())
            .expect("its folder")
            .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
            .collect();
        assert_eq!(files, but, "files left");
    }
}

fn runs_to_its_end(uid: u32, options: &[&str]) -> String {
    let mut demo = Demo::start(uid, options);
    demo.wait_for("2. One request");
    assert!(
        demo.left_running().len() > 10,
        "the check for leftovers sees too little: {:?}",
        demo.left_running()
    );
    let status = demo.end();
    let log = demo.process.log();
    assert!(status.success(), "{status}:\n{log}");
    assert!(log.contains("All of it worked"), "{log}");
    let too_long: Vec<_> = log.lines().filter(|line| line.chars().count() > 100).collect();
    assert_eq!(too_long, Vec::<&str>::new(), "longer than 100 columns");
    assert!(!log.contains('\x1b'), "colours in a file");
    demo.left_nothing(&["trace.json"]);
    let text = fs::read_to_string(demo.own().join("trace.json")).expect("the trace file");
    traces_are_trees(&serde_json::from_str(&text).expect("JSON"));
    log
}

struct Span<'a> {
    service: &'a str,
    parent: &'a str,
    is_retry: bool,
}

/// The file as the OTLP specification has its JSON: ids in hexadecimal digits, times as text.
fn traces_are_trees(file: &Value) {
    let mut traces: BTreeMap<&str, BTreeMap<&str, Span<'_>>> = BTreeMap::new();
    let list = |value: &'_ Value| value.as_array().cloned().unwrap_or_default();
    assert!(!list(&file["resourceSpans"]).is_empty(), "no spans");
    for resource in file["resourceSpans"].as_array().expect("a list") {
        let attributes = resource["resource"]["attributes"].as_array().expect("attributes");
        let name = attributes.iter().find(|entry| entry["key"] == "service.name").expect("service.name");
        let service = name["value"]["stringValue"].as_str().expect("text");
        for scope in resource["scopeSpans"].as_array().expect("a list") {
            for span in scope["spans"].as_array().expect("a list") {
                let hex = |name: &str, length: usize| {
                    let text = span[name].as_str().expect(name);
                    let fits = text.len() == length && text.bytes().all(|byte| byte.is_ascii_hexdigit());
                    assert!(fits || text.is_empty() && name == "parentSpanId", "{name} is {text}");
                    text
                };
                let time = |name: &str| span[name].as_str().expect(name).parse::<u64>().expect(name);
                assert!(time("startTimeUnixNano") <= time("endTimeUnixNano"));
                assert!(span["kind"].is_u64(), "kind is {}", span["kind"]);
                let is_retry =
                    list(&span["attributes"]).iter().any(|entry| entry["key"] == "weft.retry.reason");
                let read = Span { service, parent: hex("parentSpanId", 16), is_retry };
                let before = traces.entry(hex("traceId", 32)).or_default().insert(hex("spanId", 16), read);
                assert!(before.is_none(), "a span twice");
            }
        }
    }
    assert_eq!(traces.len(), 2, "the calm one and the one with a retry");
    for (id, spans) in &traces {
        let is_root = |span: &Span<'_>| !spans.contains_key(span.parent);
        let roots: Vec<_> = spans.values().filter(|span| is_root(span)).collect();
        assert_eq!(roots.len(), 1, "{id} is no tree");
        assert_eq!((roots[0].service, roots[0].parent.trim_matches('0')), ("visitor", ""));
        let services: BTreeSet<_> = spans.values().map(|span| span.service).collect();
        assert_eq!(services, BTreeSet::from(["orders", "stock", "visitor", "web"]));
    }
    let retries: Vec<_> =
        traces.values().filter(|spans| spans.values().any(|span| span.is_retry)).map(BTreeMap::len).collect();
    assert!(matches!(retries[..], [spans] if spans > CALM_SPANS), "traces with a retry: {retries:?}");
}

fn is_stopped(signal: Signal, at: &str, options: &[&str]) {
    let mut demo = Demo::start(ORDINARY_USER, options);
    demo.wait_for(at);
    demo.process.signal(signal);
    let status = demo.end();
    assert_eq!((status.code(), status.signal()), (Some(128 + signal as i32), None), "{}", demo.process.log());
    demo.left_nothing(&[]);
}

#[test]
fn it_works_as_root() {
    if can_run(&NEEDS) {
        runs_to_its_end(0, &[]);
    }
}

#[test]
fn it_works_as_an_ordinary_user() {
    if can_run(&NEEDS) {
        runs_to_its_end(ORDINARY_USER, &[]);
    }
}

#[test]
fn it_works_on_a_consul_of_its_own_and_takes_it_along() {
    if can_run(&NEEDS) && can_run(&[Need::Program("consul", "consul")]) {
        let log = runs_to_its_end(ORDINARY_USER, &["--consul"]);
        assert_eq!(log.lines().filter(|line| line.contains("  passing  ")).count(), 5, "{log}");
        assert!(log.contains("Consul has orders-1 as critical"), "{log}");
        is_stopped(Signal::SIGINT, "Consul at http://", &["--consul"]);
    }
}

#[test]
fn ctrl_c_in_the_middle_leaves_nothing() {
    if can_run(&NEEDS) {
        is_stopped(Signal::SIGINT, "1. Who is who", &[]);
        is_stopped(Signal::SIGINT, "4. kill -9", &[]);
    }
}

#[test]
fn a_termination_in_the_middle_leaves_nothing() {
    if can_run(&NEEDS) {
        is_stopped(Signal::SIGTERM, "2. One request", &[]);
    }
}

/// Even kill -9: the sidecars notice that the demo is gone. Its folder stays, for nobody is left to remove it.
#[test]
fn nothing_outlives_a_killed_demo() {
    if can_run(&NEEDS) {
        let mut demo = Demo::start(ORDINARY_USER, &[]);
        demo.wait_for("3. Strangers");
        demo.process.signal(Signal::SIGKILL);
        demo.end();
        weft_tests::until("all its processes are gone", || demo.left_running().is_empty());
    }
}
