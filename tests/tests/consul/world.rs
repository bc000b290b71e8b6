//! What the tests with Consul share: apps that say who they are, sidecars that know of Consul alone, and a cluster
//! of three servers with an agent.

use std::{fs, os::unix::fs::PermissionsExt, time::Duration};

use serde_json::Value;
use tokio::time::Instant;
use weft_tests::{Consul, Mesh, Pod, Process, Sidecar, output_of, pause, until};

/// An app in this pod that answers every request with its name; after three seconds where its path begins with `/slow`,
/// which it tells.
pub fn app(pod: &Pod, name: &str, port: u16) -> Process {
    const PROGRAM: &str = "
import sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    # head and body are two writes: the second must not wait for an acknowledgement
    disable_nagle_algorithm = True
    def do_GET(self):
        if self.path.startswith('/slow'):
            print(self.path, flush=True)
            time.sleep(3)
        self.send_response(200)
        self.send_header('Content-Length', str(len(sys.argv[1])))
        self.end_headers()
        self.wfile.write(sys.argv[1].encode())
    def log_message(self, *_):
        pass
print('serving', flush=True)
ThreadingHTTPServer(('0.0.0.0', int(sys.argv[2])), Handler).serve_forever()
";
    let mut process = pod.start("python3", &["-c", PROGRAM, name, &port.to_string()]);
    process.wait_for_line("serving");
    let address = format!("{}:{port}", pod.ipv4());
    until("the app listens", || {
        let mut curl = pod.command("curl");
        curl.args(["-s", "-o", "/dev/null", "-m", "2", &address]);
        curl.status().is_ok_and(|status| status.success())
    });
    process
}

/// A sidecar that sees no service files but its own, with these flags. It is ready.
pub fn sidecar(mesh: &Mesh, pod: &Pod, service: &str, consul: &str, flags: &[&str]) -> Sidecar {
    let sidecar = start_sidecar(mesh, pod, service, consul, flags);
    sidecar.wait_until_ready(pod);
    sidecar
}

/// The same without waiting.
pub fn start_sidecar(mesh: &Mesh, pod: &Pod, service: &str, consul: &str, flags: &[&str]) -> Sidecar {
    let none = mesh.network.folder().join(format!("files-of-{}", pod.netns().name()));
    fs::create_dir_all(&none).expect("an empty folder");
    fs::set_permissions(&none, fs::Permissions::from_mode(0o777)).expect("its mode");
    let none = none.display().to_string();
    let own = ["--services-dir", &none, "--publish", "false", "--consul", consul, "--probe", "tcp"];
    let own = own.chunks(2).filter(|pair| !flags.contains(&pair[0])).flatten().copied();
    let flags: Vec<&str> = own.chain(flags.iter().copied()).collect();
    mesh.start_sidecar(pod, service, &flags, &[])
}

/// Status and body of a GET; `000` where there was no answer. Of a failure the body is `weft: LABEL`.
pub fn get(pod: &Pod, url: &str) -> String {
    let mut curl = pod.command("sh");
    curl.args(["-c", "curl -s -m 10 -i \"$1\" || echo 'HTTP/1.1 000 nothing'", "curl", url]);
    let answer = output_of(curl);
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split_whitespace().nth(1).unwrap_or_default();
    format!("{status} {}", body.trim())
}

/// What the admin interface shows of the services that the app called.
pub fn endpoints(pod: &Pod, sidecar: &Sidecar) -> Value {
    let mut curl = pod.command("curl");
    curl.arg("--unix-socket").arg(sidecar.socket()).args(["-s", "-m", "5", "http://sidecar/endpoints"]);
    serde_json::from_str(&output_of(curl)).expect("JSON of the admin interface")
}

/// Three servers, and an agent beside the apps of a host.
pub struct Cluster<'a> {
    pub servers: Vec<Consul<'a>>,
    pub agent: Consul<'a>,
}

impl<'a> Cluster<'a> {
    /// Starts all of them, and waits for a leader. `pods` are those of the servers.
    pub fn start(pods: &'a [Pod], host: &'a Pod) -> Self {
        let all: Vec<&Pod> = pods.iter().collect();
        let servers = pods.iter().map(|pod| Consul::server(pod, &all, "")).collect();
        let agent = Consul::agent(host, &all, "");
        until("there is a leader", || leader(&agent).is_some());
        Cluster { servers, agent }
    }

    /// Kills all of them, and takes their state.
    pub fn lose(&mut self) {
        for consul in self.servers.iter_mut().chain([&mut self.agent]) {
            consul.stop();
            consul.wipe();
        }
    }

    /// Starts all of them again, and waits until the agent answers.
    pub fn restart(&mut self) {
        self.servers.iter_mut().for_each(Consul::start);
        self.agent.start();
    }
}

/// The address of the leader, as the agent knows it.
pub fn leader(agent: &Consul<'_>) -> Option<String> {
    let leader = agent.ask("GET", "/v1/status/leader", None)?;
    leader.as_str()?.split_once(':').map(|(address, _)| address.to_owned())
}

/// Waits until something is so, and says how long it took.
pub fn time_until(what: &str, most: Duration, mut is_so: impl FnMut() -> bool) -> Duration {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < most, "waited {most:?} until {what}");
        pause();
    }
    begin.elapsed()
}
