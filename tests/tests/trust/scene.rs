//! What the tests of trust share: an app behind a sidecar, and a stranger on the same wire.

use weft_tests::{Mesh, Need, Pod, Process, Sidecar, output_of, program};

pub const NEEDS: [Need; 5] = [
    Need::Root,
    Need::Program("ip", "iproute2"),
    Need::Program("setpriv", "util-linux"),
    Need::Program("iptables", "iptables"),
    Need::Program("curl", "curl"),
];

/// The service `orders` behind a sidecar, and a pod that has none.
pub struct Scene {
    pub mesh: Mesh,
    pub server: Pod,
    pub stranger: Pod,
    /// Answers on port 8080 of the server's loopback.
    pub app: Process,
    pub sidecar: Sidecar,
}

impl Scene {
    pub fn new(mesh: Mesh, flags: &[&str]) -> Scene {
        let (server, stranger) = (mesh.network.pod("server"), mesh.network.pod("stranger"));
        let app = start_app(&server, &["127.0.0.1:8080", "[::1]:8080"]);
        let flags: Vec<&str> = ["--port", "8080"].iter().chain(flags).copied().collect();
        let sidecar = mesh.sidecar(&server, "orders", &flags);
        Scene { mesh, server, stranger, app, sidecar }
    }

    /// A port of the server, as the stranger dials it.
    pub fn address(&self, port: u16) -> String {
        format!("{}:{port}", self.server.ipv4())
    }

    pub fn ipv6_address(&self, port: u16) -> String {
        format!("[{}]:{port}", self.server.ipv6())
    }

    /// Connections that the app has seen.
    pub fn accepted(&self) -> usize {
        self.app.log().lines().filter(|line| *line == "accepted").count()
    }
}

/// The app of `mesh-peer` on these addresses.
pub fn start_app(pod: &Pod, addresses: &[&str]) -> Process {
    let arguments: Vec<&str> = ["app"].iter().chain(addresses).copied().collect();
    let mut app = pod.start(program("mesh-peer"), &arguments);
    app.wait_for_line("serving");
    app
}

/// What `mesh-peer` prints, whether it gets an answer or not.
pub fn peer(pod: &Pod, arguments: &[&str]) -> String {
    let mut command = pod.command("sh");
    command.args(["-c", "\"$0\" \"$@\" || true"]).arg(program("mesh-peer")).args(arguments);
    output_of(command)
}

/// Head and body of what curl gets; its exit code where it gets nothing.
pub fn curl(pod: &Pod, arguments: &[&str]) -> String {
    let mut command = pod.command("sh");
    command.args(["-c", "curl -s -i -m 10 \"$@\" || echo \"curl failed $?\"", "curl"]).args(arguments);
    output_of(command)
}
