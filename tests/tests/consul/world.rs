//! What the tests with Consul share: apps that say who they are, and sidecars that know of Consul alone.

use std::{fs, os::unix::fs::PermissionsExt};

use weft_tests::{Mesh, Pod, Process, Sidecar, output_of, until};

/// An app in this pod that answers every request with its name.
pub fn app(pod: &Pod, name: &str, port: u16) -> Process {
    const PROGRAM: &str = "
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def do_GET(self):
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

/// A sidecar that sees no service files but its own, with these flags.
pub fn sidecar(mesh: &Mesh, pod: &Pod, service: &str, consul: &str, flags: &[&str]) -> Sidecar {
    let none = mesh.network.folder().join(format!("files-of-{}", pod.netns().name()));
    fs::create_dir_all(&none).expect("an empty folder");
    fs::set_permissions(&none, fs::Permissions::from_mode(0o777)).expect("its mode");
    let none = none.display().to_string();
    let own = ["--services-dir", &none, "--publish", "false", "--consul", consul];
    let own = own.chunks(2).filter(|pair| !flags.contains(&pair[0])).flatten().copied();
    let flags: Vec<&str> = own.chain(flags.iter().copied()).collect();
    mesh.sidecar(pod, service, &flags)
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
