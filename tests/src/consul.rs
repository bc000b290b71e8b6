//! Real Consul agents in pods: one that is everything (`-dev`, with nothing on disk, so that it comes back empty),
//! or servers of a cluster with agents beside the apps. Everything ends with the test.

use std::{fs, path::PathBuf, process::Command};

use serde_json::Value;

use crate::{Need, Pod, Process, output_of, until};

/// A running agent, or a stopped one.
#[derive(Debug)]
pub struct Consul<'a> {
    pod: &'a Pod,
    arguments: Vec<String>,
    process: Option<Process>,
    token: Option<String>,
    folder: tempfile::TempDir,
}

/// The token that may do everything, where there are ACLs.
const MANAGEMENT: &str = "7b1f0c5e-0000-4000-8000-000000000001";

impl<'a> Consul<'a> {
    /// What a test with Consul needs.
    pub const NEEDS: [Need; 6] = [
        Need::Root,
        Need::Program("ip", "iproute2"),
        Need::Program("setpriv", "util-linux"),
        Need::Program("iptables", "iptables"),
        Need::Program("curl", "curl"),
        Need::Program("consul", "consul"),
    ];

    /// An agent that is everything, without ACLs. `settings` is added to its configuration, in HCL.
    ///
    /// # Panics
    /// If it does not come up.
    pub fn dev(pod: &'a Pod, settings: &str) -> Consul<'a> {
        let arguments = ["-dev", "-client", "0.0.0.0", "-bind"].map(str::to_owned).to_vec();
        Consul::start_with(pod, [arguments, vec![pod.ipv4().to_string()]].concat(), settings, None)
    }

    /// The same with ACLs that deny what no policy allows.
    ///
    /// # Panics
    /// If it does not come up.
    pub fn with_acls(pod: &'a Pod) -> Consul<'a> {
        let arguments = ["-dev", "-client", "0.0.0.0", "-bind"].map(str::to_owned).to_vec();
        let settings = format!(
            "acl {{ enabled = true default_policy = \"deny\" tokens {{ master = \"{MANAGEMENT}\" agent = \"{MANAGEMENT}\" }} }}"
        );
        let arguments = [arguments, vec![pod.ipv4().to_string()]].concat();
        Consul::start_with(pod, arguments, &settings, Some(MANAGEMENT.to_owned()))
    }

    /// One of `servers` servers that find each other at these addresses. It keeps its state over a restart.
    ///
    /// # Panics
    /// If it cannot be started. It does not wait for a leader.
    pub fn server(pod: &'a Pod, servers: &[&Pod], settings: &str) -> Consul<'a> {
        let count = servers.len().to_string();
        let mut arguments: Vec<String> = ["-server", "-bootstrap-expect", &count].map(str::to_owned).to_vec();
        arguments.extend(joining(pod, servers));
        let settings = format!("performance {{ raft_multiplier = 1 }} {settings}");
        Consul::start_with(pod, arguments, &settings, None)
    }

    /// An agent without state of its own beside the apps of a pod, a member of the cluster of these servers.
    ///
    /// # Panics
    /// If it cannot be started. It does not wait for a leader.
    pub fn agent(pod: &'a Pod, servers: &[&Pod], settings: &str) -> Consul<'a> {
        Consul::start_with(pod, joining(pod, servers), settings, None)
    }

    fn start_with(
        pod: &'a Pod,
        mut arguments: Vec<String>,
        settings: &str,
        token: Option<String>,
    ) -> Consul<'a> {
        let folder = tempfile::TempDir::with_prefix("weft-consul-").expect("a folder for Consul");
        let file = folder.path().join("settings.hcl");
        fs::write(&file, settings).expect("the settings of Consul");
        let shown = |path: PathBuf| path.display().to_string();
        arguments.extend(["-config-file".to_owned(), shown(file)]);
        // Since 1.14 the plain gRPC port does not start where TLS is set.
        if settings.contains("cert_file") && version() >= (1, 14) {
            let file = folder.path().join("newer.hcl");
            fs::write(&file, "ports { grpc = -1 }").expect("the settings of a newer Consul");
            arguments.extend(["-config-file".to_owned(), shown(file)]);
        }
        arguments.extend(["-node", pod.netns().name(), "-disable-host-node-id"].map(str::to_owned));
        if !arguments.contains(&"-dev".to_owned()) {
            arguments.extend(["-data-dir".to_owned(), shown(folder.path().join("data"))]);
        }
        let mut consul = Consul { pod, arguments, process: None, token, folder };
        consul.start();
        consul
    }

    /// Starts it, again after [`Consul::stop`], and waits until it answers; a `-dev` agent comes back empty.
    ///
    /// # Panics
    /// If it does not come up.
    pub fn start(&mut self) {
        let mut command = self.pod.command("consul");
        command.arg("agent").args(&self.arguments);
        self.process = Some(Process::start("consul", command));
        let is_dev = self.arguments.contains(&"-dev".to_owned());
        until("the Consul agent answers", || {
            let leader = self.ask("GET", "/v1/status/leader", None);
            leader.is_some_and(|leader| !is_dev || leader.as_str().is_some_and(|text| !text.is_empty()))
        });
        if is_dev {
            // Its own node registers a moment after the leader is there; with ACLs, policies may be written then.
            until("the Consul agent is in its catalog", || {
                let nodes = self.ask("GET", "/v1/catalog/nodes", None);
                nodes.is_some_and(|nodes| nodes.as_array().is_some_and(|nodes| !nodes.is_empty()))
            });
        }
    }

    /// Kills it.
    pub fn stop(&mut self) {
        self.process = None;
    }

    /// Forgets all its state, while it is stopped.
    ///
    /// # Panics
    /// If the files cannot be removed.
    pub fn wipe(&mut self) {
        let data = self.folder.path().join("data");
        if data.exists() {
            fs::remove_dir_all(data).expect("the state is removed");
        }
    }

    /// Its process.
    ///
    /// # Panics
    /// If it is stopped.
    pub fn process(&self) -> &Process {
        self.process.as_ref().expect("a running Consul")
    }

    /// The value for `--consul`, from any pod.
    pub fn address(&self) -> String {
        format!("http://{}:8500", self.pod.ipv4())
    }

    /// Asks over HTTP; none where there is no answer, or one with an error status. An answer without JSON is null.
    pub fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> Option<Value> {
        let mut curl = self.pod.command("curl");
        curl.args(["-s", "-f", "-m", "10", "-X", method, &format!("http://127.0.0.1:8500{path}")]);
        if let Some(token) = &self.token {
            curl.args(["-H", &format!("X-Consul-Token: {token}")]);
        }
        if let Some(body) = body {
            curl.args(["-d", &body.to_string()]);
        }
        let output = curl.output().expect("curl");
        output.status.success().then(|| serde_json::from_slice(&output.stdout).unwrap_or_default())
    }

    /// Registers a service with this agent, as another program would. `more` replaces members of the registration.
    ///
    /// # Panics
    /// If the agent refuses.
    pub fn register(&self, name: &str, id: &str, address: &str, port: u16, more: Value) {
        let mut body = serde_json::json!({"Name": name, "ID": id, "Address": address, "Port": port});
        for (key, value) in more.as_object().into_iter().flatten() {
            body[key] = value.clone();
        }
        self.ask("PUT", "/v1/agent/service/register", Some(&body)).expect("the agent takes the registration");
    }

    /// Takes a registration back.
    ///
    /// # Panics
    /// If the agent refuses.
    pub fn deregister(&self, id: &str) {
        self.ask("PUT", &format!("/v1/agent/service/deregister/{id}"), None)
            .expect("the agent takes it back");
    }

    /// The instances of a service whose checks all pass: id, address and port.
    pub fn passing(&self, name: &str) -> Vec<String> {
        let found =
            self.ask("GET", &format!("/v1/health/service/{name}?passing=1"), None).unwrap_or_default();
        let shown = |entry: &Value| {
            let service = &entry["Service"];
            let text = |key: &str| service[key].as_str().unwrap_or_default().to_owned();
            format!("{} {}:{}", text("ID"), text("Address"), service["Port"])
        };
        let mut all: Vec<String> = found.as_array().into_iter().flatten().map(shown).collect();
        all.sort();
        all
    }

    /// Writes a value into the KV store.
    ///
    /// # Panics
    /// If it is refused.
    pub fn put(&self, key: &str, value: &str) {
        let mut curl = self.pod.command("curl");
        curl.args(["-s", "-f", "-m", "10", "-X", "PUT", "--data-binary", value]);
        if let Some(token) = &self.token {
            curl.args(["-H", &format!("X-Consul-Token: {token}")]);
        }
        curl.arg(format!("http://127.0.0.1:8500/v1/kv/{key}"));
        assert_eq!(output_of(curl).trim(), "true", "{key}");
    }

    /// Makes a token with these rules.
    ///
    /// # Panics
    /// If it is refused.
    pub fn token(&self, name: &str, rules: &str) -> String {
        let policy = serde_json::json!({"Name": name, "Rules": rules});
        self.ask("PUT", "/v1/acl/policy", Some(&policy)).expect("a policy");
        let token = serde_json::json!({"Policies": [{"Name": name}]});
        let made = self.ask("PUT", "/v1/acl/token", Some(&token)).expect("a token");
        made["SecretID"].as_str().expect("its secret").to_owned()
    }
}

/// Major and minor version of the agent in the PATH.
fn version() -> (u32, u32) {
    let mut consul = Command::new("consul");
    consul.arg("version");
    version_in(&output_of(consul)).expect("`consul version` says `Consul vX.Y.Z`")
}

fn version_in(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.trim_start().strip_prefix("Consul v")?.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn joining(pod: &Pod, servers: &[&Pod]) -> Vec<String> {
    let bind = pod.ipv4().to_string();
    let mut arguments = ["-client", "0.0.0.0", "-bind", &bind].map(str::to_owned).to_vec();
    for server in servers {
        arguments.extend(["-retry-join".to_owned(), server.ipv4().to_string()]);
    }
    arguments.extend(["-retry-interval", "1s"].map(str::to_owned));
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_read() {
        assert_eq!(version_in("Consul v1.8.7\nProtocol 2 spoken"), Some((1, 8)));
        assert_eq!(version_in("Consul v1.14.11\nRevision a6d7a8d3\n"), Some((1, 14)));
        assert_eq!(version_in("Consul v1.21.0-rc1+ent\n"), Some((1, 21)));
        assert_eq!(version_in("consul"), None);
    }
}
