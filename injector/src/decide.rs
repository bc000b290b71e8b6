//! Inject, leave alone or refuse: a pure function of the pod, its namespace and the settings. What is left alone says why,
//! what is refused says what to change. Nothing is injected halfway: a pod of the mesh that cannot join it does not start.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use serde_json::Value;
use weft_proto::names::{SIDECAR_PORTS, SIDECAR_UID};

use crate::{annotations::PodSettings, containers::Plan, names, probes, settings::Settings};

/// What is known of a pod's namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Namespace {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

/// What becomes of a pod.
#[derive(Debug)]
pub enum Decision<'a> {
    /// It joins the mesh.
    Inject(Box<Plan<'a>>),
    /// It stays as it is.
    Leave(Reason),
    /// It must not be created like this: each message says why, and what to change.
    Refuse(Vec<String>),
}

/// Why a pod stays as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Neither its namespace nor the pod is labelled.
    NotLabelled,
    /// The label says `disabled`.
    Disabled,
    /// It uses its node's network, whose rules are not the pod's to change.
    HostNetwork,
    /// A namespace of Kubernetes, or of the mesh itself.
    SystemNamespace,
    /// It is for another operating system.
    NotLinux,
}

impl Reason {
    /// For metrics and logs.
    pub fn label(self) -> &'static str {
        match self {
            Reason::NotLabelled => "not_labelled",
            Reason::Disabled => "disabled",
            Reason::HostNetwork => "host_network",
            Reason::SystemNamespace => "system_namespace",
            Reason::NotLinux => "not_linux",
        }
    }

    /// What kubectl shows to a user who has asked for injection and does not get it.
    pub fn warning(self) -> Option<String> {
        let why = match self {
            Reason::NotLabelled | Reason::Disabled => return None,
            Reason::HostNetwork => "the pod uses the network of its node (hostNetwork)",
            Reason::SystemNamespace => {
                "nothing is injected in namespaces of Kubernetes and of the mesh itself"
            }
            Reason::NotLinux => "the pod is not for Linux",
        };
        Some(format!("weft: not injected: {why}; it is outside of the mesh and talks plaintext"))
    }
}

/// Decides about a pod, as the API server shows it at its creation or as it stands in a template.
pub fn decide<'a>(value: &Value, namespace: &Namespace, settings: &'a Settings) -> Decision<'a> {
    let pod: Pod = match serde_path_to_error::deserialize(value) {
        Ok(pod) => pod,
        Err(error) => return Decision::Refuse(vec![format!("not a pod: {error}")]),
    };
    let Some(spec) = pod.spec.clone().filter(|spec| !spec.containers.is_empty()) else {
        return Decision::Refuse(vec!["not a pod: it has no containers".into()]);
    };
    match asked(&pod, namespace) {
        Ok(true) => {}
        Ok(false) => return Decision::Leave(not_asked(&pod, namespace)),
        Err(message) => return Decision::Refuse(vec![message]),
    }
    if let Some(reason) = impossible(&spec, namespace, settings) {
        return Decision::Leave(reason);
    }
    let mut wrong = obstacles(&spec, namespace, settings);
    let annotations = pod.metadata.annotations.clone().unwrap_or_default();
    if !annotations.contains_key(names::ANNOTATION_STATUS) {
        wrong.extend(reserved_names(&spec));
    }
    let asked = PodSettings::read(&annotations).unwrap_or_else(|messages| {
        wrong.extend(messages);
        PodSettings::default()
    });
    let service = service(&pod, &asked, namespace).unwrap_or_else(|message| {
        wrong.push(message);
        String::new()
    });
    wrong.extend(unreachable_hooks(value, &asked, settings));
    if !wrong.is_empty() {
        return Decision::Refuse(wrong);
    }
    let ports = asked.ports.clone().unwrap_or_else(|| container_ports(&spec));
    Decision::Inject(Box::new(Plan { settings, pod: asked, service, ports }))
}

/// Containers of the app and of others: all but ours.
pub fn app_containers(spec: &PodSpec) -> impl Iterator<Item = &Container> {
    let init = spec.init_containers.iter().flatten();
    spec.containers
        .iter()
        .chain(init)
        .filter(|container| !names::CONTAINERS.contains(&container.name.as_str()))
}

fn label(labels: Option<&BTreeMap<String, String>>) -> Option<&str> {
    labels?.get(names::LABEL_INJECT).map(String::as_str)
}

/// The pod's label counts before the namespace's. The error names a value that is neither.
fn asked(pod: &Pod, namespace: &Namespace) -> Result<bool, String> {
    let own = label(pod.metadata.labels.as_ref());
    match own.or_else(|| label(Some(&namespace.labels))) {
        None | Some("disabled" | "false") => Ok(false),
        Some("enabled" | "true") => Ok(true),
        Some(other) => Err(format!(
            "label {} of the {} is {other:?}; expected `enabled` or `disabled`",
            names::LABEL_INJECT,
            if own.is_some() { "pod" } else { "namespace" },
        )),
    }
}

fn not_asked(pod: &Pod, namespace: &Namespace) -> Reason {
    let labelled = label(pod.metadata.labels.as_ref()).or_else(|| label(Some(&namespace.labels)));
    if labelled.is_some() { Reason::Disabled } else { Reason::NotLabelled }
}

fn impossible(spec: &PodSpec, namespace: &Namespace, settings: &Settings) -> Option<Reason> {
    if namespace.name == settings.namespace || names::SYSTEM_NAMESPACES.contains(&namespace.name.as_str()) {
        return Some(Reason::SystemNamespace);
    }
    if spec.host_network == Some(true) {
        return Some(Reason::HostNetwork);
    }
    let system = spec.os.as_ref().map_or("linux", |os| os.name.as_str());
    (system != "linux").then_some(Reason::NotLinux)
}

/// What keeps a pod from working in the mesh.
fn obstacles(spec: &PodSpec, namespace: &Namespace, settings: &Settings) -> Vec<String> {
    let mut wrong = Vec::new();
    let level = namespace.labels.get(names::POD_SECURITY_ENFORCE).map_or("privileged", String::as_str);
    if level != "privileged" {
        wrong.push(format!(
            "Pod Security of namespace {name} enforces `{level}`, which forbids the init container {} to set iptables rules \
             (NET_ADMIN, NET_RAW); allow it with: kubectl label --overwrite namespace {name} {}=privileged",
            names::REDIRECT_CONTAINER,
            names::POD_SECURITY_ENFORCE,
            name = namespace.name,
        ));
    }
    wrong.extend(reserved_user(spec));
    wrong.extend(reserved_ports(spec));
    if !settings.native_sidecar && spec.restart_policy.as_deref().is_some_and(|policy| policy != "Always") {
        wrong.push(
            "a pod that ends by itself (restartPolicy Never or OnFailure) needs native sidecars, which this installation does \
             not use: the sidecar would keep it from ending; label the pod weft.dev/inject=disabled"
                .into(),
        );
    }
    wrong
}

/// The traffic of the sidecar's user is not redirected: an app with it would be outside of the mesh in silence.
fn reserved_user(spec: &PodSpec) -> Vec<String> {
    let reserved = i64::from(SIDECAR_UID);
    let message = |place: String| {
        format!("{place} has runAsUser {reserved}, which is the sidecar's; choose another user for the app")
    };
    let of_pod = spec.security_context.as_ref().and_then(|context| context.run_as_user);
    let pod = (of_pod == Some(reserved)).then(|| message("the pod's securityContext".into()));
    let containers = app_containers(spec)
        .filter(|container| {
            container.security_context.as_ref().and_then(|context| context.run_as_user) == Some(reserved)
        })
        .map(|container| message(format!("container {}", container.name)));
    pod.into_iter().chain(containers).collect()
}

/// What injection adds has these names, and what has them is taken out with it.
fn reserved_names(spec: &PodSpec) -> Vec<String> {
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let containers =
        containers.map(|container| ("container", container.name.as_str(), &names::CONTAINERS[..]));
    let volumes = spec.volumes.iter().flatten();
    let volumes = volumes.map(|volume| ("volume", volume.name.as_str(), &names::VOLUMES[..]));
    let mut wrong = Vec::new();
    for (kind, name, reserved) in containers.chain(volumes) {
        if reserved.contains(&name) {
            wrong.push(format!("{kind} {name} has a name that the mesh needs; choose another one"));
        }
    }
    wrong
}

/// The kubelet calls hooks itself, in plaintext, which a strict port refuses.
fn unreachable_hooks(pod: &Value, asked: &PodSettings, settings: &Settings) -> Vec<String> {
    let flag = |name: &str| {
        asked.sidecar.iter().rev().find(|(flag, _)| *flag == name).map(|(_, value)| value.as_str())
    };
    let mode = flag("mtls").or_else(|| settings.sidecar.get("mtls").map(String::as_str));
    if mode != Some("strict") || flag("mtls-port").is_some() {
        return Vec::new();
    }
    let containers = pod["spec"]["containers"].as_array().into_iter().flatten();
    let mut wrong = Vec::new();
    for container in containers {
        for hook in probes::http_hooks(container) {
            wrong.push(format!(
                "container {} has {hook} with httpGet, which Kubernetes calls in plaintext and a strict app refuses; use exec, \
                 or allow plaintext on its port with annotation weft.dev/mtls-ports: PORT=permissive",
                container["name"].as_str().unwrap_or_default()
            ));
        }
    }
    wrong
}

fn reserved_ports(spec: &PodSpec) -> Vec<String> {
    let ports = app_containers(spec).flat_map(|container| {
        container.ports.iter().flatten().map(move |port| (container.name.as_str(), port.container_port))
    });
    ports
        .filter(|(_, port)| SIDECAR_PORTS.iter().any(|own| i32::from(*own) == *port))
        .map(|(container, port)| {
            format!("container {container} has port {port}, which the sidecar needs; choose another one for the app")
        })
        .collect()
}

/// TCP ports that containers of the app name, each once, in their order.
fn container_ports(spec: &PodSpec) -> Vec<u16> {
    let mut ports = Vec::new();
    for port in app_containers(spec).flat_map(|container| container.ports.iter().flatten()) {
        let tcp = port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP");
        if let (true, Ok(number)) = (tcp, u16::try_from(port.container_port))
            && !ports.contains(&number)
        {
            ports.push(number);
        }
    }
    ports
}

/// The service of a pod: what its annotation says, else the name of its workload; outside of `default` with the namespace.
fn service(pod: &Pod, asked: &PodSettings, namespace: &Namespace) -> Result<String, String> {
    let name = match &asked.service {
        Some(name) => match name.split_once('_') {
            Some((_, other)) if other != namespace.name => {
                return Err(format!(
                    "annotation weft.dev/service is {name:?}, a service of namespace {other}; expected one of {}",
                    namespace.name
                ));
            }
            Some((name, _)) => name.to_owned(),
            None => name.clone(),
        },
        None => workload(pod).replace('.', "-"),
    };
    if name.is_empty() || name.len() > 63 {
        return Err(format!("{name:?} is no name for a service; give one with annotation weft.dev/service"));
    }
    Ok(if namespace.name == "default" || namespace.name.is_empty() {
        name
    } else {
        format!("{name}_{}", namespace.name)
    })
}

/// The workload that a user has written: `orders` of pod `orders-6f7d9c-x2x4z`.
fn workload(pod: &Pod) -> String {
    let owner = pod.metadata.owner_references.iter().flatten().find(|owner| owner.controller == Some(true));
    let labels = pod.metadata.labels.as_ref();
    match owner {
        Some(owner) if owner.kind == "ReplicaSet" => {
            let hash = labels.and_then(|labels| labels.get("pod-template-hash"));
            let end = hash.map(|hash| format!("-{hash}")).unwrap_or_default();
            owner.name.strip_suffix(&end).unwrap_or(&owner.name).to_owned()
        }
        Some(owner) if owner.kind == "Job" => without_schedule(&owner.name).to_owned(),
        Some(owner) => owner.name.clone(),
        None => {
            let name = pod.metadata.name.as_deref();
            let generated = pod.metadata.generate_name.as_deref().map(|name| name.trim_end_matches('-'));
            name.or(generated).unwrap_or_default().to_owned()
        }
    }
}

/// A Job of a CronJob is called `NAME-MINUTES`, where the minutes since 1970 have eight digits.
fn without_schedule(job: &str) -> &str {
    match job.rsplit_once('-') {
        Some((name, minutes)) if minutes.len() == 8 && minutes.bytes().all(|byte| byte.is_ascii_digit()) => {
            name
        }
        _ => job,
    }
}

#[cfg(test)]
mod tests;
