//! What these tests share: a mesh with one client pod and instances of `orders`, and what a client does in it.

use std::{fs, path::PathBuf, process::Command};

use weft_tests::{Mesh, Need, Pod, Process, Sidecar, can_run, output_of, until};

/// A mesh and its client. Fields are dropped in this order: processes before the network that they live in.
pub struct World {
    pub sidecar: Sidecar,
    pub client: Pod,
    pub mesh: Mesh,
}

/// A pod with an app and its sidecar.
pub struct Instance {
    pub app: Process,
    pub sidecar: Sidecar,
    pub pod: Pod,
}

/// What all of these tests need.
pub fn can_run_here() -> bool {
    can_run(&[
        Need::Root,
        Need::Program("ip", "iproute2"),
        Need::Program("curl", "curl"),
        Need::Program("h2load", "nghttp2-client"),
        Need::Program("python3", "python3"),
    ])
}

impl World {
    pub fn new() -> World {
        World::in_mesh(Mesh::new())
    }

    /// A client in a mesh, the service `web`, without an app of its own.
    pub fn in_mesh(mesh: Mesh) -> World {
        let client = mesh.network.pod("client");
        let sidecar = mesh.sidecar(&client, "web", &[]);
        World { sidecar, client, mesh }
    }

    /// An instance of `orders` whose app gives this name in its answers; in the services folder when this returns.
    pub fn instance(&self, name: &str, flags: &[&str]) -> Instance {
        self.instance_of("orders", name, flags)
    }

    pub fn instance_of(&self, service: &str, name: &str, flags: &[&str]) -> Instance {
        let pod = self.mesh.network.pod(name);
        let app = self.start_app(&pod, name);
        let mut all = vec!["--port", "8080", "--instance", name];
        all.extend(flags);
        let sidecar = self.mesh.sidecar(&pod, service, &all);
        let document = self.document(service, name);
        until("the workload is published", || document.exists());
        self.until_known(service, &pod);
        Instance { app, sidecar, pod }
    }

    /// Starts the app of a pod and waits until it listens.
    pub fn start_app(&self, pod: &Pod, name: &str) -> Process {
        let mut app = pod.start("python3", &[&self.app(), "8080", name]);
        app.wait_for_line("listening");
        app
    }

    /// The file of the app.
    pub fn app(&self) -> String {
        let file = self.mesh.network.folder().join("app.py");
        if !file.exists() {
            fs::write(&file, include_str!("app.py")).expect("the app's file");
        }
        file.display().to_string()
    }

    pub fn document(&self, service: &str, instance: &str) -> PathBuf {
        self.mesh.services().join(format!("{service}.{instance}.yaml"))
    }

    /// Waits until the client's sidecar has the address among those of the service.
    fn until_known(&self, service: &str, pod: &Pod) {
        let url = format!("http://{service}/");
        let address = format!("{}:8080", pod.ipv4());
        until("the client knows the instance", || {
            // a service is watched from the first call on
            let called = self.curl(&["-o", "/dev/null", &url]).status();
            called.is_ok_and(|status| status.success()) && self.endpoints().contains(&address)
        });
    }

    /// What the client's sidecar knows of endpoints, as JSON.
    pub fn endpoints(&self) -> String {
        let mut show = Command::new(weft_tests::program("weft-sidecar"));
        show.args(["show", "endpoints", "--admin-socket"]).arg(self.sidecar.socket());
        output_of(show)
    }

    /// curl in the client's pod, silent, at most 20 seconds.
    pub fn curl(&self, arguments: &[&str]) -> Command {
        let mut curl = self.client.command("curl");
        curl.args(["-s", "-S", "-m", "20"]).args(arguments);
        curl
    }

    /// The body and status of a call.
    pub fn call(&self, arguments: &[&str]) -> (String, u16) {
        let mut curl = self.curl(arguments);
        curl.args(["-w", "\n%{http_code}"]);
        let text = String::from_utf8(curl.output().expect("curl").stdout).expect("text");
        let (body, status) = text.rsplit_once('\n').expect("a status");
        (body.to_owned(), status.parse().expect("a status"))
    }

    /// Starts clients that call for so many seconds, paced, over connections that they keep.
    pub fn load(&self, seconds: u32, arguments: &[&str]) -> Process {
        let mut load = self.client.command("h2load");
        load.args(["--h1", "-c", "8", "--rps", "25", "-D", &seconds.to_string()]).args(arguments);
        Process::start("h2load", load)
    }
}

/// Waits for a load's end and asserts that every request was answered with 2xx. Gives the number of requests.
pub fn assert_all_answered(mut load: Process) -> u64 {
    assert!(load.wait().success(), "{}", load.log());
    let log = load.log();
    let number = |line: &str, word: &str| -> u64 {
        let line =
            log.lines().find(|text| text.starts_with(line)).unwrap_or_else(|| panic!("{line}:\n{log}"));
        let (before, _) = line.split_once(&format!(" {word}")).unwrap_or_else(|| panic!("{word}:\n{log}"));
        before.rsplit(' ').next().and_then(|digits| digits.parse().ok()).unwrap_or_else(|| panic!("{log}"))
    };
    let answered = number("status codes:", "2xx");
    for (line, word) in [
        ("status codes:", "4xx"),
        ("status codes:", "5xx"),
        ("requests:", "failed"),
        ("requests:", "errored"),
        ("requests:", "timeout"),
    ] {
        assert_eq!(number(line, word), 0, "{word} of {line}\n{log}");
    }
    answered
}
