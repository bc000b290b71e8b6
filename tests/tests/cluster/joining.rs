//! The user's sentence: label a namespace, and its pods are in the mesh.

use weft_tests::Cluster;

pub(crate) const ENABLED: &str = "weft.dev/inject=enabled";

/// A Service, and a Deployment of a web server that answers with the name of its pod.
pub(crate) fn server(namespace: &str, name: &str, rest: &str) -> String {
    format!(
        r#"
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  selector: {{app: {name}}}
  ports: [{{name: http, port: 80, targetPort: http, appProtocol: http}}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  replicas: 2
  selector: {{matchLabels: {{app: {name}}}}}
  template:
    metadata: {{labels: {{app: {name}}}}}
    spec:
      containers:
        - name: app
          image: local.test/busybox:1
          imagePullPolicy: Never
          command: [sh, -c, "mkdir -p /www && hostname > /www/index.html && exec httpd -f -p 8080 -h /www"]
          ports: [{{name: http, containerPort: 8080}}]
{rest}"#
    )
}

/// A pod from which a test calls others.
pub(crate) fn client(namespace: &str, name: &str) -> String {
    format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - {{name: app, image: "local.test/tools:1", imagePullPolicy: Never, command: [sleep, "100000"]}}
"#
    )
}

/// The body of an answer, or what curl says.
pub(crate) fn call(cluster: &Cluster, namespace: &str, pod: &str, url: &str) -> Result<String, String> {
    let answer = cluster.exec(namespace, pod, &["curl", "-sS", "-m", "5", "--fail", url]);
    if answer.done { Ok(answer.text.trim().to_owned()) } else { Err(answer.text) }
}

#[test]
fn a_labelled_namespace_joins_the_mesh_and_plaintext_stays_out() {
    let Some(cluster) = Cluster::shared() else { return };
    cluster.namespace("shop", &[ENABLED]);
    cluster.namespace("outside", &[]);
    cluster.apply(&server("shop", "orders", ""));
    cluster.apply(&client("shop", "web"));
    cluster.apply(&client("outside", "plain"));
    cluster.wait("shop", "deployment/orders", "condition=Available");
    cluster.wait("shop", "pod/web", "condition=Ready");
    cluster.wait("outside", "pod/plain", "condition=Ready");

    // A pod is ready a little before the registry has it.
    cluster.until("the service is known", || {
        call(cluster, "shop", "web", "http://orders.shop.weft:8080/").is_ok()
    });
    let mut answered = std::collections::BTreeSet::new();
    for _ in 0..20 {
        answered.insert(call(cluster, "shop", "web", "http://orders.shop.weft:8080/").expect("an answer"));
    }
    assert!(answered.len() == 2 && answered.iter().all(|name| name.starts_with("orders-")), "{answered:?}");

    // Nobody outside of the mesh: the app's port refuses plaintext, and the probe's port has nothing but probes.
    let pods = cluster.get("shop", "pods");
    let orders = pods["items"]
        .as_array()
        .unwrap()
        .iter()
        .find(|pod| pod["metadata"]["labels"]["app"] == "orders")
        .unwrap();
    let address = orders["status"]["podIP"].as_str().unwrap();
    let refused = call(cluster, "outside", "plain", &format!("http://{address}:8080/")).unwrap_err();
    assert!(refused.contains("Empty reply") || refused.contains("reset"), "{refused}");
    let metrics = call(cluster, "outside", "plain", &format!("http://{address}:15020/metrics")).unwrap();
    let told = metrics.lines().any(|line| line.contains("plaintext_refused") && line.ends_with(" 1"));
    assert!(told, "{metrics}");

    // The pod of the other namespace was never looked at.
    let plain = cluster.get("outside", "pod/plain");
    assert!(
        plain["spec"]["initContainers"].is_null()
            && plain["metadata"]["annotations"]["weft.dev/status"].is_null()
    );
}

#[test]
fn the_label_of_a_pod_counts_before_that_of_its_namespace() {
    let Some(cluster) = Cluster::shared() else { return };
    cluster.namespace("labels-on", &[ENABLED]);
    cluster.namespace("labels-off", &[]);
    let labelled = |namespace: &str, value: &str| {
        client(namespace, "one")
            .replace("name: one,", &format!("name: one, labels: {{weft.dev/inject: {value}}},"))
    };
    cluster.apply(&labelled("labels-on", "disabled"));
    cluster.apply(&labelled("labels-off", "enabled"));
    let injected = |namespace: &str| {
        let pod = cluster.get(namespace, "pod/one");
        pod["spec"]["initContainers"].as_array().map_or(0, Vec::len)
    };
    assert_eq!((injected("labels-on"), injected("labels-off")), (0, 2));
}

#[test]
fn a_job_ends_beside_its_sidecar_and_a_rollout_goes_on() {
    let Some(cluster) = Cluster::shared() else { return };
    cluster.namespace("jobs", &[ENABLED]);
    cluster.apply(
        r#"
apiVersion: batch/v1
kind: Job
metadata: {name: report, namespace: jobs}
spec:
  template:
    spec:
      restartPolicy: Never
      containers:
        - {name: app, image: "local.test/busybox:1", imagePullPolicy: Never, command: [sh, -c, "echo done"]}
"#,
    );
    cluster.apply(&server("jobs", "orders", ""));
    cluster.wait("jobs", "job/report", "condition=Complete");
    cluster.wait("jobs", "deployment/orders", "condition=Available");
    cluster.kubectl(&["-n", "jobs", "rollout", "restart", "deployment/orders"]);
    cluster.kubectl(&["-n", "jobs", "rollout", "status", "deployment/orders", "--timeout=120s"]);
}
