//! Two pods, a client and a server, that talk first directly and then through two sidecars: the same command line
//! both times, so that what a program sees can be compared.

use std::{fmt::Write, fs, path::PathBuf, process::Command};

use weft_tests::{Mesh, Need, Pod, Process, Sidecar, identity, output_of, until};

pub use weft_tests::can_run;

/// What every test here needs.
pub const ROOT: Need = Need::Root;
pub const CURL: Need = Need::Program("curl", "curl");
pub const NGINX: Need = Need::Program("nginx", "nginx-light");
pub const PYTHON: Need = Need::Program("python3", "python3");

/// Header fields that may differ through two sidecars, and why: the table of docs/differences.md.
pub const DOCUMENTED_DIFFERENCES: [(&str, &str); 7] = [
    (
        "connection",
        "belongs to one hop; the sidecar keeps its clients' connections where an app would close them",
    ),
    ("keep-alive", "belongs to one hop"),
    ("proxy-connection", "belongs to one hop"),
    ("transfer-encoding", "belongs to one hop: a body of unknown length is framed anew"),
    ("te", "belongs to one hop, apart from `trailers`"),
    ("trailer", "announces the trailers of one hop's framing"),
    ("date", "time has passed; it is the app's own"),
];

#[test]
fn the_differences_are_documented() {
    let docs = include_str!("../../../docs/differences.md");
    for (name, reason) in DOCUMENTED_DIFFERENCES {
        assert!(
            docs.contains(&format!("| `{name}` | {reason} |\n")),
            "docs/differences.md lacks `{name}`: {reason}"
        );
    }
}

/// A client and a server with the same service account names in every test: `web` calls `orders`.
pub struct Pair {
    pub client: Pod,
    pub server: Pod,
    pub from: Option<Sidecar>,
    pub to: Option<Sidecar>,
    pub mesh: Mesh,
}

impl Pair {
    /// Pods without sidecars. These names mean the server, on the port that is dialled.
    pub fn direct(names: &[&str]) -> Pair {
        let mesh = Mesh::new();
        let (client, server) = (mesh.network.pod("client"), mesh.network.pod("server"));
        let names = names.join(" ");
        client.hosts(&format!("127.0.0.1 localhost\n{} {names}\n", server.ipv4()));
        Pair { client, server, from: None, to: None, mesh }
    }

    /// Adds the sidecars. From now on the names are those of services of the mesh, each on its port.
    pub fn weave(&mut self, services: &[(&str, u16)]) {
        self.weave_with(services, &[], &[]);
    }

    /// The same with further flags for the client's and the server's sidecar.
    pub fn weave_with(&mut self, services: &[(&str, u16)], client: &[&str], server: &[&str]) {
        self.weave_in(services, client, server, &[]);
    }

    /// The same with environment variables for both sidecars.
    pub fn weave_in(
        &mut self,
        services: &[(&str, u16)],
        client: &[&str],
        server: &[&str],
        variables: &[(&str, &str)],
    ) {
        for (name, port) in services {
            self.publish(name, &format!("{}:{port}", self.server.ipv4()));
        }
        let ports: Vec<String> =
            services.iter().flat_map(|(_, port)| ["--port".to_owned(), port.to_string()]).collect();
        let mut flags: Vec<&str> = ports.iter().map(String::as_str).collect();
        flags.extend(["--publish", "false"]);
        flags.extend(server);
        self.client.hosts("127.0.0.1 localhost\n");
        let to = self.mesh.start_sidecar(&self.server, "orders", &flags, variables);
        to.wait_until_ready(&self.server);
        let from = self.mesh.start_sidecar(&self.client, "web", client, variables);
        from.wait_until_ready(&self.client);
        (self.to, self.from) = (Some(to), Some(from));
        for (name, _) in services {
            self.wait_for_name(name);
        }
    }

    /// Writes a service file: a service of this one endpoint, with the identity of `orders`.
    pub fn publish(&self, name: &str, endpoint: &str) {
        let folder = self.mesh.services();
        let text = format!(
            "service: {name}\nidentities: [{}]\nendpoints: [{{address: '{endpoint}'}}]\n",
            identity("orders")
        );
        fs::write(folder.join(format!(".{name}")), text).unwrap();
        fs::rename(folder.join(format!(".{name}")), folder.join(format!("{name}.yaml"))).unwrap();
    }

    /// Waits until the client's sidecar knows a service.
    pub fn wait_for_name(&self, name: &str) {
        until(&format!("{name} has an address"), || {
            let mut getent = self.client.command("getent");
            getent.args(["ahostsv4", name]).output().is_ok_and(|output| !output.stdout.is_empty())
        });
    }

    /// A folder for this test.
    pub fn folder(&self, name: &str) -> PathBuf {
        let folder = self.mesh.network.folder().join(name);
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    /// Starts one of the apps beside this file in the server's pod and waits until it listens.
    pub fn start_app(&self, name: &str, port: u16) -> Process {
        start_app(&self.server, "python3", name, port, &[])
    }

    /// Starts nginx in the server's pod with these `server` blocks, and waits until it listens on that port.
    pub fn start_nginx(&self, servers: &str, port: u16) -> Process {
        start_nginx(&self.server, &self.folder("nginx"), servers, port)
    }

    /// All that reached the server so far came over mutual TLS from `web`, and something did.
    pub fn assert_secured(&self) {
        let to = self.to.as_ref().expect("a sidecar");
        let mut inbound = Vec::new();
        until("the server's sidecar has logged what reached it", || {
            inbound = to.access_log().into_iter().filter(|line| line["direction"] == "inbound").collect();
            !inbound.is_empty()
        });
        for line in inbound {
            assert_eq!(line["peer_identity"], identity("web"), "{line}");
        }
    }
}

/// The path of a Python program beside this file.
pub fn app(name: &str) -> String {
    format!("{}/tests/programs/apps/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Starts one of the apps in a pod and waits until it listens.
pub fn start_app(pod: &Pod, python: &str, name: &str, port: u16, arguments: &[&str]) -> Process {
    let mut command = pod.command(python);
    command.args([&app(name), &port.to_string()]).args(arguments);
    let process = Process::start(name, command);
    wait_for_port(pod, port);
    process
}

/// Starts nginx in a pod.
pub fn start_nginx(pod: &Pod, folder: &std::path::Path, servers: &str, port: u16) -> Process {
    let f = folder.display();
    let mut conf = format!(
        "daemon off; user root; pid {f}/pid; error_log stderr;\nevents {{}}\nhttp {{\naccess_log off;\n"
    );
    for kind in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"] {
        writeln!(conf, "{kind}_temp_path {f}/{kind};").unwrap();
    }
    writeln!(conf, "{servers}\n}}").unwrap();
    fs::write(folder.join("conf"), conf).unwrap();
    let nginx = pod.start("nginx", &["-c", &format!("{f}/conf")]);
    wait_for_port(pod, port);
    nginx
}

/// Waits until something listens on a port of a pod.
pub fn wait_for_port(pod: &Pod, port: u16) {
    until(&format!("something listens on port {port}"), || {
        !pod.shell(&format!("ss -Hltn sport = :{port}")).is_empty()
    });
}

/// Says bytes to a server from a pod, as `say.py` explains, and gives all it answered.
pub fn say(pod: &Pod, host: &str, port: u16, words: &[&str]) -> String {
    let mut command = pod.command("python3");
    command.args([&app("say.py"), host, &port.to_string()]).args(words);
    output_of(command)
}

/// An answer as curl saw it.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// curl's exit code, the status, how many connections it took.
    pub outcome: String,
    /// Names in small letters, sorted; without the documented differences.
    pub headers: Vec<(String, String)>,
    /// SHA-256 of the body.
    pub sha256: String,
}

/// Runs curl in a pod; the answer is the last one where there are several.
pub fn curl(pod: &Pod, folder: &std::path::Path, arguments: &[&str]) -> Answer {
    let (head, body) = (folder.join("head"), folder.join("body"));
    for file in [&head, &body] {
        fs::write(file, "").unwrap();
    }
    let mut command = pod.command("curl");
    command.args(["-s", "-S", "-m", "15", "-w", "%{http_code} HTTP/%{http_version} %{num_connects}\n"]);
    command.arg("-D").arg(&head).arg("-o").arg(&body).args(arguments);
    let output = command.output().unwrap();
    // to a client of HTTP/1.0 hyper answers in its version, where nginx says HTTP/1.1: either is allowed
    let written = String::from_utf8_lossy(&output.stdout).replace("HTTP/1.1", "HTTP/1");
    let code = output.status.code().unwrap_or(-1);
    let outcome = format!("{} exit {code} {}", written.trim(), String::from_utf8_lossy(&output.stderr));
    if arguments.contains(&"-I") {
        // curl writes the head there, with its date
        fs::write(&body, "").unwrap();
    }
    Answer { outcome, headers: headers(&fs::read(&head).unwrap()), sha256: sha256(&body) }
}

/// The header fields of the last of several heads, comparable.
pub fn headers(bytes: &[u8]) -> Vec<(String, String)> {
    // header values may be any bytes: each stands for its own character
    let text: String = bytes.iter().map(|byte| char::from(*byte)).collect();
    // trailers come after the heads, as a block without a status
    let last = text.split("\r\n\r\n").filter(|block| block.starts_with("HTTP/")).last().unwrap_or_default();
    let fields = last.lines().skip(1).filter_map(|line| line.split_once(':'));
    comparable(fields.map(|(name, value)| (name.to_owned(), value.trim().to_owned())))
}

/// Header fields in small letters and sorted, without those that may differ.
pub fn comparable(fields: impl Iterator<Item = (String, String)>) -> Vec<(String, String)> {
    let may_differ = |name: &str| DOCUMENTED_DIFFERENCES.iter().any(|(differs, _)| *differs == name);
    let mut fields: Vec<_> = fields.map(|(name, value)| (name.to_lowercase(), value)).collect();
    fields.retain(|(name, _)| !may_differ(name));
    fields.sort();
    fields
}

/// The SHA-256 of a file.
pub fn sha256(file: &std::path::Path) -> String {
    let mut openssl = Command::new("openssl");
    openssl.args(["dgst", "-sha256", "-r"]).arg(file);
    output_of(openssl).split(' ').next().unwrap_or_default().to_owned()
}
