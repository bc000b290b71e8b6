//! The containers and volumes that are added to a pod, as data. The sidecar runs as user 1337 with nothing; only the init
//! container that sets the rules has capabilities. Settings travel as flags, never as `WEFT_*` variables: Kubernetes writes
//! variables of that kind itself where a Service is called `weft`.

use serde_json::{Map, Value, json};
use weft_proto::names::{ADMIN_PORT, SIDECAR_UID};

use crate::{annotations::PodSettings, names, settings::Settings};

/// All that decides how the two containers look.
#[derive(Debug, Clone)]
pub struct Plan<'a> {
    /// The injector's settings.
    pub settings: &'a Settings,
    /// The pod's annotations.
    pub pod: PodSettings,
    /// The service of this pod in the mesh: `orders`, or `orders_shop` outside of namespace `default`.
    pub service: String,
    /// Ports of the app.
    pub ports: Vec<u16>,
}

const RUN_FOLDER: &str = "/run/weft";
const TOKEN_FOLDER: &str = "/var/run/secrets/weft.dev/token";
const ROOT_FOLDER: &str = "/etc/weft/authority";
const SOCKET: &str = "/run/weft/admin.sock";
/// The token is renewed by the kubelet long before.
const TOKEN_SECONDS: u32 = 3600;
/// So long may a sidecar wait for its first certificate before its pod is started anew.
const START_SECONDS: u32 = 120;

/// The init container that sets the rules.
pub fn redirect(plan: &Plan<'_>) -> Value {
    let mut args = vec!["redirect".to_owned(), "apply".to_owned()];
    for (flag, value) in &plan.pod.redirect {
        args.extend([format!("--{flag}"), value.clone()]);
    }
    let mut security = restricted();
    security["runAsUser"] = json!(0);
    security["runAsGroup"] = json!(0);
    security["runAsNonRoot"] = json!(false);
    security["capabilities"]["add"] = json!(["NET_ADMIN", "NET_RAW"]);
    json!({
        "name": names::REDIRECT_CONTAINER,
        "image": plan.settings.images.redirect,
        "imagePullPolicy": plan.settings.images.pull_policy,
        "args": args,
        "securityContext": security,
        "resources": { "requests": { "cpu": "10m", "memory": "16Mi" }, "limits": { "memory": "64Mi" } },
        "terminationMessagePolicy": "FallbackToLogsOnError",
    })
}

/// The sidecar. `originals` are the app's probes, which it asks in the kubelet's place.
pub fn sidecar(plan: &Plan<'_>, originals: &Map<String, Value>) -> Value {
    let mut container = json!({
        "name": names::SIDECAR_CONTAINER,
        "image": plan.settings.images.sidecar,
        "imagePullPolicy": plan.settings.images.pull_policy,
        "args": arguments(plan, originals),
        "env": environment(plan),
        "ports": [{ "name": "weft-admin", "containerPort": ADMIN_PORT }],
        "readinessProbe": probe("/registered", 3),
        "lifecycle": { "preStop": { "exec": { "command": ["weft-sidecar", "leave", "--admin-socket", SOCKET] } } },
        "securityContext": sidecar_security(),
        "resources": resources(plan),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts(),
    });
    if plan.settings.native_sidecar {
        container["restartPolicy"] = json!("Always");
        container["startupProbe"] = probe("/ready", START_SECONDS);
    } else {
        // The kubelet starts the next container when this hook has ended.
        let wait =
            ["weft-sidecar", "wait", "--admin-socket", SOCKET, "--timeout", &format!("{START_SECONDS}s")];
        container["lifecycle"]["postStart"] = json!({ "exec": { "command": wait } });
    }
    container
}

/// The volumes of the sidecar.
pub fn volumes() -> Vec<Value> {
    let token = json!({
        "serviceAccountToken": { "path": "token", "audience": names::TOKEN_AUDIENCE, "expirationSeconds": TOKEN_SECONDS }
    });
    vec![
        json!({ "name": names::TOKEN_VOLUME, "projected": { "sources": [token] } }),
        json!({ "name": names::ROOT_VOLUME, "configMap": { "name": names::ROOT_CONFIG_MAP } }),
        json!({ "name": names::RUN_VOLUME, "emptyDir": { "medium": "Memory", "sizeLimit": "16Mi" } }),
    ]
}

/// What the sidecar's flag `--app-probes` gets. The kubelet replaces `$(NAME)` in arguments: `$$(` stands for itself.
fn app_probes(originals: &Map<String, Value>) -> String {
    Value::Object(originals.clone()).to_string().replace("$(", "$$(")
}

/// The probes that a sidecar of ours asks, read from its arguments.
pub fn originals(sidecar: &Value) -> Map<String, Value> {
    let args: Vec<&str> =
        sidecar["args"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    args.windows(2)
        .find(|pair| pair[0] == "--app-probes")
        .and_then(|pair| serde_json::from_str(&pair[1].replace("$$(", "$(")).ok())
        .unwrap_or_default()
}

fn arguments(plan: &Plan<'_>, originals: &Map<String, Value>) -> Vec<String> {
    let settings = plan.settings;
    let mut flags: Vec<(&str, String)> = vec![
        ("service", plan.service.clone()),
        ("instance", "$(POD_NAME)".into()),
        ("advertise", "$(POD_IP)".into()),
        ("authority", settings.authority.clone()),
        ("authority-root", format!("{ROOT_FOLDER}/{}", names::ROOT_KEY)),
        ("token-file", format!("{TOKEN_FOLDER}/token")),
        ("state-dir", format!("{RUN_FOLDER}/state")),
        ("admin", format!("0.0.0.0:{ADMIN_PORT}")),
        ("admin-socket", SOCKET.into()),
    ];
    flags.extend(plan.ports.iter().map(|port| ("port", port.to_string())));
    flags.extend(settings.consul.iter().map(|agent| ("consul", agent.clone())));
    if settings.controller_registers() && !settings.sidecar.contains_key("publish") {
        flags.push(("publish", "false".into()));
    }
    let asked = |flag: &str| plan.pod.sidecar.iter().any(|(name, _)| *name == flag);
    flags.extend(
        settings
            .sidecar
            .iter()
            .filter(|(flag, _)| !asked(flag))
            .map(|(flag, value)| (flag.as_str(), value.clone())),
    );
    flags.extend(plan.pod.sidecar.iter().cloned());
    if !originals.is_empty() {
        flags.push(("app-probes", app_probes(originals)));
    }
    let mut args = vec!["run".to_owned()];
    args.extend(flags.into_iter().flat_map(|(flag, value)| [format!("--{flag}"), value]));
    args
}

fn environment(plan: &Plan<'_>) -> Vec<Value> {
    let field =
        |name: &str, path: &str| json!({ "name": name, "valueFrom": { "fieldRef": { "fieldPath": path } } });
    let mut variables = vec![
        field("POD_NAME", "metadata.name"),
        field("POD_NAMESPACE", "metadata.namespace"),
        field("POD_UID", "metadata.uid"),
        field("POD_IP", "status.podIP"),
        field("HOST_IP", "status.hostIP"),
        field("NODE_NAME", "spec.nodeName"),
        json!({
            "name": "OTEL_RESOURCE_ATTRIBUTES",
            "value": "k8s.namespace.name=$(POD_NAMESPACE),k8s.pod.name=$(POD_NAME),k8s.pod.uid=$(POD_UID),k8s.node.name=$(NODE_NAME),service.instance.id=$(POD_UID)",
        }),
    ];
    let mut values: std::collections::BTreeMap<&str, &str> =
        plan.settings.environment.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    values.extend(plan.pod.environment.iter().map(|(name, value)| (*name, value.as_str())));
    variables.extend(values.into_iter().map(|(name, value)| json!({ "name": name, "value": value })));
    variables
}

fn resources(plan: &Plan<'_>) -> Value {
    let defaults = &plan.settings.resources;
    let mut resources = json!({});
    for (path, default) in [
        ("requests/cpu", &defaults.cpu_request),
        ("requests/memory", &defaults.memory_request),
        ("limits/cpu", &defaults.cpu_limit),
        ("limits/memory", &defaults.memory_limit),
    ] {
        let quantity = plan.pod.resources.get(path).unwrap_or(default);
        if let (false, Some((kind, name))) = (quantity.is_empty(), path.split_once('/')) {
            resources[kind][name] = json!(quantity);
        }
    }
    resources
}

fn sidecar_security() -> Value {
    let mut security = restricted();
    security["runAsUser"] = json!(SIDECAR_UID);
    security["runAsGroup"] = json!(SIDECAR_UID);
    security["runAsNonRoot"] = json!(true);
    security
}

/// What both containers have in common.
fn restricted() -> Value {
    json!({
        "allowPrivilegeEscalation": false,
        "readOnlyRootFilesystem": true,
        "capabilities": { "drop": ["ALL"] },
        "seccompProfile": { "type": "RuntimeDefault" },
    })
}

fn mounts() -> Value {
    json!([
        { "name": names::TOKEN_VOLUME, "mountPath": TOKEN_FOLDER, "readOnly": true },
        { "name": names::ROOT_VOLUME, "mountPath": ROOT_FOLDER, "readOnly": true },
        { "name": names::RUN_VOLUME, "mountPath": RUN_FOLDER },
    ])
}

fn probe(path: &str, failures: u32) -> Value {
    json!({ "httpGet": { "path": path, "port": ADMIN_PORT }, "periodSeconds": 1, "failureThreshold": failures })
}
