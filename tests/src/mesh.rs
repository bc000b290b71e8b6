//! A mesh for a test: a network, a certificate authority in a pod of its own, a folder of service files that all
//! sidecars watch, and sidecars in pods as an injector would make them: rules applied, the sidecar as its own user.

use std::{
    fs,
    net::IpAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use nix::unistd::chown;
use tempfile::TempDir;
use weft_proto::names::SIDECAR_UID;

use crate::{Network, Pod, Process, output_of, pause, program, program_for_everyone, until};

/// A running certificate authority, and what sidecars need to join.
#[derive(Debug)]
pub struct Mesh {
    authority: Option<Process>,
    authority_pod: Pod,
    root_sha256: String,
    sidecar: PathBuf,
    _program_folder: TempDir,
    /// The pods' network. Dropped last: processes in it end with it.
    pub network: Network,
}

/// A sidecar in a pod. Killed when dropped.
#[derive(Debug)]
pub struct Sidecar {
    /// The program.
    pub process: Process,
    /// The folder with its socket and state.
    pub folder: PathBuf,
    address: IpAddr,
}

/// How often a log may grow before it is taken as it is, and for how many pauses it must not.
const QUIET_ROUNDS: u32 = 10;
const QUIET_PAUSES: u32 = 5;
/// The trust domain of the tests.
pub const TRUST_DOMAIN: &str = "weft.test";

impl Mesh {
    /// Starts an authority that gives certificates of this lifetime (`24h`, `10s`).
    ///
    /// # Panics
    /// If it does not come up.
    pub fn with_lifetime(lifetime: &str) -> Mesh {
        let network = Network::new();
        // Sidecars run as another user, and share these folders.
        fs::set_permissions(network.folder(), fs::Permissions::from_mode(0o755)).expect("mode of the folder");
        for (name, mode) in [("services", 0o777), ("policies", 0o755)] {
            let folder = network.folder().join(name);
            fs::create_dir(&folder).expect("a folder");
            fs::set_permissions(&folder, fs::Permissions::from_mode(mode)).expect("its mode");
        }
        let authority_pod = network.pod("ca");
        let directory = network.folder().join("ca");
        let mut init = Command::new(program("weft-ca"));
        init.arg("init").arg("--dir").arg(&directory).args(["--trust-domain", TRUST_DOMAIN, "--json"]);
        let made: serde_json::Value = serde_json::from_str(&output_of(init)).expect("JSON of `weft-ca init`");
        let root_sha256 = made["root_sha256"].as_str().expect("the root's SHA-256").to_owned();
        let sidecar = program_for_everyone(&program("weft-sidecar"));
        let (program_folder, sidecar) = sidecar;
        let mut mesh = Mesh {
            authority: None,
            authority_pod,
            root_sha256,
            sidecar,
            _program_folder: program_folder,
            network,
        };
        mesh.start_authority(lifetime);
        mesh
    }

    /// Starts an authority with the default lifetime.
    ///
    /// # Panics
    /// If it does not come up.
    #[expect(clippy::new_without_default, reason = "it takes root and starts programs")]
    pub fn new() -> Mesh {
        Mesh::with_lifetime("24h")
    }

    /// Starts the authority, again after [`Mesh::stop_authority`].
    ///
    /// # Panics
    /// If it does not come up.
    pub fn start_authority(&mut self, lifetime: &str) {
        let directory = self.network.folder().join("ca");
        let listen = self.authority();
        let mut serve = self.authority_pod.command(program("weft-ca"));
        serve.arg("serve").arg("--dir").arg(directory).args(["--listen", &listen, "--lifetime", lifetime]);
        let mut process = Process::start("weft-ca", serve);
        process.wait_for_line("serving");
        self.authority = Some(process);
    }

    /// Kills the authority.
    pub fn stop_authority(&mut self) {
        self.authority = None;
    }

    /// Host and port of the authority.
    pub fn authority(&self) -> String {
        format!("{}:15080", self.authority_pod.ipv4())
    }

    /// The folder of service files that all sidecars watch.
    pub fn services(&self) -> PathBuf {
        self.network.folder().join("services")
    }

    /// The folder of policies that all sidecars watch.
    pub fn policies(&self) -> PathBuf {
        self.network.folder().join("policies")
    }

    /// Writes a service file: `body` is the YAML after the line with the name.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn write_service(&self, name: &str, body: &str) {
        // Renamed into place, so that nobody reads half of it.
        let aside = self.services().join(format!(".{name}"));
        fs::write(&aside, format!("service: {name}\n{body}")).expect("a service file");
        fs::rename(aside, self.services().join(format!("{name}.yaml"))).expect("its place");
    }

    /// Waits until a sidecar has published its workload.
    ///
    /// # Panics
    /// If it takes too long.
    pub fn wait_until_published(&self, service: &str) {
        let start = format!("{service}.");
        until("the workload is published", || {
            let mut files = fs::read_dir(self.services()).expect("the services").flatten();
            files.any(|file| file.file_name().to_string_lossy().starts_with(&start))
        });
    }

    /// Makes a reusable token for a service account of namespace `default`, readable by the sidecar's user.
    ///
    /// # Panics
    /// If the authority's command fails.
    pub fn token(&self, account: &str) -> PathBuf {
        let file = self.network.folder().join(format!("{account}.token"));
        if file.exists() {
            return file;
        }
        let mut create = Command::new(program("weft-ca"));
        create.args(["token", "create", "--reusable", "--dir"]).arg(self.network.folder().join("ca"));
        create.args(["--identity", &identity(account), "--out"]).arg(&file);
        output_of(create);
        give_to_sidecar(&file);
        file
    }

    /// The flags that make a sidecar a member of this mesh under the name of `service`.
    pub fn membership(&self, service: &str) -> Vec<String> {
        let shown = |path: PathBuf| path.display().to_string();
        let flags = [
            ("--service", service.to_owned()),
            ("--authority", self.authority()),
            ("--authority-sha256", self.root_sha256.clone()),
            ("--token-file", shown(self.token(service))),
            ("--services-dir", shown(self.services())),
            ("--policies-dir", shown(self.policies())),
            ("--settle-time", "100ms".to_owned()),
            ("--access-log", "all".to_owned()),
            // The app hears from nobody but those who call it in a test.
            ("--probe", "none".to_owned()),
        ];
        flags.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect()
    }

    /// Puts the rules and a sidecar into a pod and waits until it is ready. `flags` replace those of
    /// the membership.
    ///
    /// # Panics
    /// If it does not become ready.
    pub fn sidecar(&self, pod: &Pod, service: &str, flags: &[&str]) -> Sidecar {
        let sidecar = self.start_sidecar(pod, service, flags, &[]);
        sidecar.wait_until_ready(pod);
        sidecar
    }

    /// The same without waiting, and with environment variables for the sidecar.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start_sidecar(
        &self,
        pod: &Pod,
        service: &str,
        flags: &[&str],
        variables: &[(&str, &str)],
    ) -> Sidecar {
        self.start_sidecar_under(&[], pod, service, flags, variables)
    }

    /// The same with a program and its arguments before the sidecar's, such as `prlimit`.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start_sidecar_under(
        &self,
        wrapper: &[&str],
        pod: &Pod,
        service: &str,
        flags: &[&str],
        variables: &[(&str, &str)],
    ) -> Sidecar {
        pod.resolver("nameserver 10.77.0.254\n");
        let mut apply = pod.command(&self.sidecar);
        apply.args(["redirect", "apply"]);
        output_of(apply);
        let mut run = self.command_under(wrapper, pod);
        let folder = self.arguments(&mut run, "run", pod, service, flags);
        run.envs(variables.iter().copied());
        let process = Process::start(&format!("sidecar of {service}"), run);
        Sidecar { process, folder, address: pod.ipv4() }
    }
}

impl Mesh {
    /// Runs a command under `weft-sidecar exec`, as an ordinary user, and waits until the sidecar is ready. The
    /// pod stands for a host: it needs no rules.
    ///
    /// # Panics
    /// If it does not become ready.
    pub fn exec(&self, pod: &Pod, service: &str, flags: &[&str], command: &[&str]) -> Sidecar {
        let sidecar = self.start_exec_under(&[], pod, service, flags, command);
        sidecar.wait_until_ready(pod);
        sidecar
    }

    /// The same without waiting, and with a program and its arguments before the sidecar's, such as `prlimit`.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start_exec_under(
        &self,
        wrapper: &[&str],
        pod: &Pod,
        service: &str,
        flags: &[&str],
        command: &[&str],
    ) -> Sidecar {
        let mut exec = self.command_under(wrapper, pod);
        let folder = self.arguments(&mut exec, "exec", pod, service, flags);
        exec.args(["--admin", "0.0.0.0:15020"]);
        exec.arg("--").args(command).current_dir("/");
        let process = Process::start(&format!("exec of {service}"), exec);
        Sidecar { process, folder, address: pod.ipv4() }
    }

    /// The sidecar's program in a pod, as its user.
    fn command_under(&self, wrapper: &[&str], pod: &Pod) -> Command {
        let Some((program, arguments)) = wrapper.split_first() else {
            return pod.command_as(SIDECAR_UID, &self.sidecar);
        };
        let mut command = pod.command_as(SIDECAR_UID, program);
        command.args(arguments).arg(&self.sidecar);
        command
    }

    /// Gives a command line its arguments, and the sidecar its folder.
    fn arguments(&self, run: &mut Command, word: &str, pod: &Pod, service: &str, flags: &[&str]) -> PathBuf {
        let folder = self.network.folder().join(pod.netns().name());
        if !folder.exists() {
            fs::create_dir(&folder).expect("a folder for the sidecar");
            give_to_sidecar(&folder);
        }
        let socket = folder.join("admin.sock").display().to_string();
        let advertise = pod.ipv4().to_string();
        run.arg(word);
        for pair in self.membership(service).chunks(2).filter(|pair| !flags.contains(&pair[0].as_str())) {
            run.args(pair);
        }
        run.args(["--admin-socket", &socket, "--advertise", &advertise]).args(flags);
        folder
    }
}

impl Sidecar {
    /// Waits for its readiness, as the kubelet would.
    ///
    /// # Panics
    /// If it takes too long.
    pub fn wait_until_ready(&self, pod: &Pod) {
        let url = format!("http://{}:15020/ready", self.address);
        until("the sidecar is ready", || {
            let mut curl = pod.command_as(SIDECAR_UID, "curl");
            curl.args(["-s", "-f", "-m", "2", "-o", "/dev/null", &url]);
            curl.status().is_ok_and(|status| status.success())
        });
    }

    /// Its Unix socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.join("admin.sock")
    }

    /// Its metrics, as Prometheus reads them from the wire.
    ///
    /// # Panics
    /// If they cannot be read.
    pub fn metrics(&self, pod: &Pod) -> String {
        let mut curl = pod.command_as(SIDECAR_UID, "curl");
        curl.args(["-s", "-f", "-m", "5", &format!("http://{}:15020/metrics", self.address)]);
        output_of(curl)
    }

    /// Waits for a line of its access log with this failure and these words in its detail.
    ///
    /// # Panics
    /// With the log, if there is none.
    pub fn wait_for_failure(&self, label: &str, words: &[&str]) -> serde_json::Value {
        let mut found = None;
        let fits = |line: &serde_json::Value| {
            let detail = line["detail"].as_str().unwrap_or_default();
            line["failure"] == label && words.iter().all(|word| detail.contains(word))
        };
        until(&format!("a line of {label} says {words:?}; the log:\n{}", self.process.log()), || {
            found = self.access_log().into_iter().rfind(|line| fits(line));
            found.is_some()
        });
        found.unwrap_or_default()
    }

    /// The lines of its access log so far, as JSON. Lines are written behind the answers they tell of: it waits
    /// until no more come, for a moment.
    pub fn access_log(&self) -> Vec<serde_json::Value> {
        let mut log = self.process.log();
        for _ in 0..QUIET_ROUNDS {
            (0..QUIET_PAUSES).for_each(|_| pause());
            let later = self.process.log();
            if later.len() == log.len() {
                break;
            }
            log = later;
        }
        log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }
}

/// The identity of a service account of namespace `default`.
pub fn identity(account: &str) -> String {
    format!("spiffe://{TRUST_DOMAIN}/ns/default/sa/{account}")
}

fn give_to_sidecar(path: &Path) {
    chown(path, Some(SIDECAR_UID.into()), Some(SIDECAR_UID.into())).expect("a new owner");
}
