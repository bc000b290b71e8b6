//! The Helm chart: what it renders is taken by the API server and by the injector, and what it says of values holds.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use weft_tests::{Cluster, program};

/// Sets of values in the chart's folder `ci`, and whether pods then have a sidecar of the new kind.
const SETS: [(&str, bool); 6] = [
    ("default", true),
    ("own-consul", true),
    ("existing-secret", true),
    ("everything", true),
    ("ignore", true),
    ("classic-sidecars", false),
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

/// The injector's settings among the objects, as the injector itself reads them: the names of the containers it adds.
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
    for (set, native) in SETS {
        let folder = tempfile::tempdir().unwrap();
        let values = deploy(&format!("helm/weft/ci/{set}-values.yaml")).display().to_string();
        let lint = cluster.helm(&["lint", "--strict", &chart(), "--values", &values]);
        assert!(lint.done, "{set}: {}", lint.text);
        let documents = template(cluster, "weft-system", &["--values", &values]);
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
        assert!(pod.contains("name: weft-sidecar"), "{set}: {pod}");
        assert_eq!(pod.contains("restartPolicy: Always"), native, "{set}: {pod}");
    }
}

#[test]
fn a_misspelt_value_is_named() {
    let Some(cluster) = Cluster::shared() else { return };
    for (value, name) in [
        ("injector.webhook.failurePolice=Ignore", "failurePolice"),
        ("imagse.registry=registry.example.com", "imagse"),
        ("authority.state.kind=EmptyDir", "/authority/state/kind"),
    ] {
        let answer = cluster.helm(&["template", "weft", &chart(), "--set", value]);
        assert!(!answer.done && answer.text.contains(name), "{value}: {}", answer.text);
    }
    let answer = cluster.helm(&["template", "weft", &chart()]);
    assert!(!answer.done && answer.text.contains("images.registry is empty"), "{}", answer.text);
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
    let root =
        || cluster.try_kubectl(&["-n", namespace, "get", "configmap/weft-root", "-o", "jsonpath={.data}"]);
    cluster.until("the root is published", || root().done);
    let before = root().text;
    assert!(before.contains("BEGIN CERTIFICATE"), "{before}");

    let pod = ["-n", namespace, "delete", "pod", "-l", "app.kubernetes.io/name=weft-ca", "--wait=true"];
    cluster.kubectl(&pod);
    cluster.kubectl(&["-n", namespace, "delete", "configmap/weft-root"]);
    cluster.kubectl(&["-n", namespace, "rollout", "status", "deployment/weft-ca", "--timeout=120s"]);
    cluster.until("the root is published again", || root().done);
    assert_eq!(root().text, before);
}
