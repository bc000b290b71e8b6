//! The injector's settings: what stands in every pod that it changes. One YAML file, in camelCase as everything in
//! Kubernetes; every key has a default but the images.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde::Deserialize;
use weft_proto::spiffe::TrustDomain;

/// All settings.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Settings {
    /// The images of the two containers.
    pub images: Images,
    /// The namespace of the mesh's own programs: nothing is injected there.
    #[serde(default = "own_namespace")]
    pub namespace: String,
    /// `HOST:PORT` of the authority.
    #[serde(default = "authority")]
    pub authority: String,
    /// Consul agents, as `--consul` takes them. `$(HOST_IP):8500` is the agent of the pod's node. None: no registry.
    #[serde(default)]
    pub consul: Vec<String>,
    /// The trust domain of the authority: the beginning of every identity.
    #[serde(default = "trust_domain")]
    pub trust_domain: TrustDomain,
    /// What registers the pods of the mesh in Consul.
    #[serde(default)]
    pub controller: Controller,
    /// Is the sidecar an init container that goes on (Kubernetes 1.29 and later)?
    #[serde(default = "yes")]
    pub native_sidecar: bool,
    /// Seconds that a container of the app waits at its end, if it has no preStop hook of its own, so that callers know
    /// first that the pod leaves (Kubernetes 1.30 and later). 0: no such hook is added.
    #[serde(default = "pre_stop_sleep")]
    pub pre_stop_sleep_seconds: u32,
    /// Flags of the sidecar, without `--`, that hold where no annotation says otherwise: `mtls: strict`.
    #[serde(default)]
    pub sidecar: BTreeMap<String, String>,
    /// Variables of the sidecar's container, for telemetry: `OTEL_EXPORTER_OTLP_ENDPOINT`.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    /// What the sidecar may use where no annotation says otherwise.
    #[serde(default)]
    pub resources: Resources,
}

/// The images of the two containers.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Images {
    /// With `weft-sidecar` as its entry point.
    pub sidecar: String,
    /// With iptables too.
    pub redirect: String,
    /// `Always`, `IfNotPresent` or `Never`.
    #[serde(default = "pull_policy")]
    pub pull_policy: String,
}

/// Quantities of Kubernetes; an empty one is not set.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Resources {
    /// Share of a processor that is kept free for it.
    pub cpu_request: String,
    /// Most that it gets.
    pub cpu_limit: String,
    /// Memory that is kept free for it.
    pub memory_request: String,
    /// With more it is ended.
    pub memory_limit: String,
}

/// What registers the pods of the mesh in Consul, in place of their sidecars.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Controller {
    /// Off: every sidecar registers its own pod. Without `consul` it is always off.
    pub enabled: bool,
    /// Marks what this cluster owns in Consul, and begins the names of its nodes there: one name for each cluster that
    /// shares a Consul.
    pub cluster: String,
    /// `HOST:PORT` of the agents that it writes to. None: those of the sidecars. `$(NAME)` is a variable of the
    /// injector's own container.
    pub consul: Vec<String>,
    /// File with the ACL token, read again at every request.
    pub token_file: Option<PathBuf>,
}

impl Default for Controller {
    fn default() -> Self {
        Controller { enabled: true, cluster: "k8s".into(), consul: Vec::new(), token_file: None }
    }
}

impl Default for Resources {
    fn default() -> Self {
        Resources {
            cpu_request: "10m".into(),
            cpu_limit: String::new(),
            memory_request: "24Mi".into(),
            memory_limit: "128Mi".into(),
        }
    }
}

impl Settings {
    /// Reads the file.
    ///
    /// # Errors
    /// It cannot be read, or says something else than settings; the message names file and line.
    pub fn read(file: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(file).with_context(|| format!("{}: cannot be read", file.display()))?;
        serde_saphyr::from_str(&text)
            .with_context(|| format!("{}: not settings of the injector", file.display()))
    }

    /// Does the controller register the pods? Their sidecars must not do it too.
    pub fn controller_registers(&self) -> bool {
        self.controller.enabled && !self.consul.is_empty()
    }

    /// Settings that name the given version's public images and nothing else.
    pub fn of_images(sidecar: &str, redirect: &str) -> Self {
        Settings {
            images: Images { sidecar: sidecar.into(), redirect: redirect.into(), pull_policy: pull_policy() },
            namespace: own_namespace(),
            authority: authority(),
            consul: Vec::new(),
            trust_domain: trust_domain(),
            controller: Controller::default(),
            native_sidecar: true,
            pre_stop_sleep_seconds: pre_stop_sleep(),
            sidecar: BTreeMap::new(),
            environment: BTreeMap::new(),
            resources: Resources::default(),
        }
    }
}

fn own_namespace() -> String {
    "weft-system".into()
}

fn authority() -> String {
    "weft-ca.weft-system.svc:15080".into()
}

fn trust_domain() -> TrustDomain {
    "weft.local".parse().expect("a valid trust domain")
}

fn yes() -> bool {
    true
}

fn pre_stop_sleep() -> u32 {
    4
}

fn pull_policy() -> String {
    "IfNotPresent".into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_needs_only_the_images() {
        let settings: Settings = serde_saphyr::from_str(
            "images: {sidecar: 'weft.example/sidecar:1', redirect: 'weft.example/redirect:1'}",
        )
        .unwrap();
        assert_eq!(settings, Settings::of_images("weft.example/sidecar:1", "weft.example/redirect:1"));
    }

    #[test]
    fn the_controller_is_on_where_there_is_a_consul() {
        let read = |rest: &str| -> Settings {
            serde_saphyr::from_str(&format!("images: {{sidecar: a, redirect: b}}\n{rest}")).unwrap()
        };
        for (rest, on) in [
            ("", false),
            ("consul: ['consul:8500']", true),
            ("consul: ['consul:8500']\ncontroller: {cluster: east}", true),
            ("consul: ['consul:8500']\ncontroller: {enabled: false}", false),
            ("controller: {enabled: true}", false),
        ] {
            assert_eq!(read(rest).controller_registers(), on, "{rest}");
        }
    }

    #[test]
    fn a_key_that_is_unknown_is_named_with_its_line() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("injector.yaml");
        std::fs::write(&file, "images: {sidecar: a, redirect: b}\nauthorty: x\n").unwrap();
        let message = format!("{:#}", Settings::read(&file).unwrap_err());
        assert!(message.contains("injector.yaml") && message.contains("authorty"), "{message}");
        assert!(message.contains("line 2"), "{message}");
    }
}
