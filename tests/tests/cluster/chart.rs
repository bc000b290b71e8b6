//! The Helm chart: what it renders is taken by the API server and by the injector, and what it says of values holds.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use weft_tests::{Cluster, program};

/// Sets of values in the chart's folder `ci`, for which Kubernetes, and whether sidecars are then native.
const SETS: [(&str, &str, bool); 6] = [
    ("default", "1.34.0", true),
    ("own-consul", "1.30.0", true),
    ("existing-secret", "1.34.0", true),
    ("everything", "1.34.0", true),
    ("ignore", "1.34.0", true),
    ("classic-sidecars", "1.27.0", false),
];

fn deploy(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("deploy").join(path)
}

fn chart() -> String {
    deploy("helm/weft").display().to_string()
}

/// What `helm template` prints for a namespace, in documents.
fn template(cluster: &Cluster, namespace: &str, rest: &[&str]) -> Vec<String> {
    let chart = chart();
    let answer = cluster.helm(&[&["template", "weft", &chart, "--namespace", namespace], rest].concat());
    assert!(answer.done, "helm template {rest:?}: {}", answer.text);
    answer.text.split("\n---").map(str::to_owned).filter(|text| text.contains("\nkind: ")).collect()
}

fn kind_of(document: &str) -> &str {
    document.lines().find_map(|line| line.strip_prefix("kind: ")).unwrap_or_default()
}

/// A pod that the injector has changed by the settings among the objects.
fn injected(objects: &[Value], folder: &Path) -> String {
    let is_settings =
        |object: &&Value| object["kind"] == "ConfigMap" && object["metadata"]["name"] == "weft-injector";
    let settings = objects.iter().find(is_settings).expect("settings")["data"]["injector.yaml"].clone();
    let (config, pod) = (folder.join("injector.yaml"), folder.join("pod.yaml"));
    fs::write(&config, settings.as_str().expect("text")).unwrap();
    let text =
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: app, image: a}]}\n";
    fs::write(&pod, text).unwrap();
    let output = Command::new(program("weft-injector"))
        .args(["inject", "-f", &pod.display().to_string(), "--config", &config.display().to_string()])
        .output()
        .unwrap();
    assert!(output.status.success(), "{settings}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_api_server_and_the_injector_take_what_the_chart_renders() {
    let Some(cluster) = Cluster::shared() else { return };
    for (set, version, native) in SETS {
        let folder = tempfile::tempdir().unwrap();
        let values = deploy(&format!("helm/weft/ci/{set}-values.yaml")).display().to_string();
        let lint = cluster.helm(&["lint", "--strict", &chart(), "--values", &values]);
        assert!(lint.done, "{set}: {}", lint.text);
        let documents = template(cluster, "weft-system", &["--values", &values, "--kube-version", version]);
        // Its definition is the Prometheus operator's, which is not in this cluster.
        let (monitors, documents): (Vec<_>, Vec<_>) =
            documents.into_iter().partition(|document| kind_of(document) == "PodMonitor");
        assert_eq!(monitors.len(), if set == "everything" { 2 } else { 0 }, "{set}");
        let file = folder.path().join("rendered.yaml");
        fs::write(&file, documents.join("\n---")).unwrap();
        let file = file.display().to_string();
        let text = cluster.kubectl(&["apply", "--dry-run=server", "-o", "json", "-f", &file]);
        // A warning, as of a pod that its namespace's Pod Security would refuse, comes after it and is no JSON.
        let list: Value =
            serde_json::from_str(&text).unwrap_or_else(|error| panic!("{set}: {error}: {text}"));
        let objects = list["items"].as_array().expect("objects");
        assert_eq!(objects.len(), documents.len(), "{set}");
        let pod = injected(objects, folder.path());
        assert!(pod.contains(r#""name":"weft-sidecar""#), "{set}: {pod}");
        assert_eq!(pod.contains(r#""restartPolicy":"Always""#), native, "{set}: {pod}");
    }
}

#[test]
fn values_that_are_misspelt_or_contradict_each_other_are_named() {
    let Some(cluster) = Cluster::shared() else { return };
    for (value, name) in [
        ("injector.webhook.failurePolice=Ignore", "failurePolice"),
        ("imagse.registry=registry.example.com", "imagse"),
        ("authority.state.kind=EmptyDir", "/authority/state/kind"),
    ] {
        let answer = cluster.helm(&["template", "weft", &chart(), "--set", value]);
        assert!(!answer.done && answer.text.contains(name), "{value}: {}", answer.text);
    }
    // What only the templates can tell.
    let registry = "images.registry=registry.example.com";
    for (value, version, remedy) in [
        ("images.tag=v1", "1.34.0", "images.registry is empty"),
        (registry, "1.28.0", "set sidecar.native=false"),
        (registry, "1.29.0", "sidecar.preStopSleepSeconds needs Kubernetes 1.30"),
        (&format!("{registry},consul.install=true,consul.addresses={{a:1}}"), "1.34.0", "choose one"),
        (
            &format!("{registry},injector.webhook.tls.existingSecret=a"),
            "1.34.0",
            "injector.webhook.tls.caBundle",
        ),
    ] {
        let answer = cluster.helm(&["template", "weft", &chart(), "--set", value, "--kube-version", version]);
        assert!(!answer.done && answer.text.contains(remedy), "{value}: {}", answer.text);
    }
}

#[test]
fn the_plain_manifest_is_what_the_chart_renders() {
    let Some(cluster) = Cluster::shared() else { return };
    let answer = cluster.tool(&deploy("kubernetes/render"), &["--check"]);
    assert!(answer.done, "{}", answer.text);
}

#[test]
fn the_root_outlives_the_pod_of_the_authority() {
    let Some(cluster) = Cluster::shared() else { return };
    let namespace = "chart-root";
    cluster.namespace(namespace, &["pod-security.kubernetes.io/enforce=restricted"]);
    let made = cluster.in_node(&["mkdir", "/run/chart-root"]);
    assert!(made.done, "{}", made.text);
    cluster.apply(
        r#"
apiVersion: v1
kind: PersistentVolume
metadata: {name: chart-root}
spec:
  capacity: {storage: 64Mi}
  accessModes: [ReadWriteOnce]
  storageClassName: chart-root
  local: {path: /run/chart-root}
  nodeAffinity:
    required: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [node1]}]}]}
"#,
    );
    let values = [
        "images.control=local.test/weft-control:1",
        "images.registry=local.test",
        "authority.state.storageClass=chart-root",
    ];
    let rest = ["--show-only", "templates/authority.yaml", "--set", &values.join(",")];
    // What belongs to the whole cluster is that of the Weft which runs here.
    let own = template(cluster, namespace, &rest);
    let own: Vec<String> = own.into_iter().filter(|text| !kind_of(text).starts_with("Cluster")).collect();
    cluster.apply(&own.join("\n---"));
    cluster.wait(namespace, "deployment/weft-ca", "condition=Available");
    let root = || {
        let log = cluster.kubectl(&["-n", namespace, "logs", "deployment/weft-ca"]);
        let line = log.lines().find_map(|line| line.split_once("root_sha256="));
        line.unwrap_or_else(|| panic!("no root in {log}")).1.to_owned()
    };
    let before = root();
    // The kubelet sets the owner and the modes of a volume that no other pod of the node has.
    let scale = |to: &str| cluster.kubectl(&["-n", namespace, "scale", "deployment/weft-ca", to]);
    scale("--replicas=0");
    cluster.kubectl(&["-n", namespace, "wait", "--for=delete", "pod", "--all", "--timeout=60s"]);
    scale("--replicas=1");
    cluster.kubectl(&["-n", namespace, "rollout", "status", "deployment/weft-ca", "--timeout=60s"]);
    assert_eq!(root(), before);
}
