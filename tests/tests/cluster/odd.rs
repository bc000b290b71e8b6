//! Pods that cannot join, or not as they are: refused or left alone, and the user learns why.

use weft_tests::Cluster;

use crate::joining::{ENABLED, client};

#[test]
fn what_would_be_outside_of_the_mesh_in_silence_is_refused_with_the_reason() {
    let Some(cluster) = Cluster::shared() else { return };
    cluster.namespace("refused", &[ENABLED]);
    let pod = client("refused", "one");
    let cases = [
        (
            pod.replace("name: one,", "name: one, annotations: {weft.dev/mtls: \"on\"},"),
            "annotation weft.dev/mtls is \"on\"; expected one of: permissive, strict",
        ),
        (pod.replace("spec:\n", "spec:\n  securityContext: {runAsUser: 1337}\n"), "runAsUser 1337"),
        (pod.replace("name: app,", "name: app, ports: [{containerPort: 15006}],"), "port 15006"),
    ];
    for (document, reason) in cases {
        let answer = cluster.try_apply(&document);
        assert!(!answer.done && answer.text.contains(reason), "{}\n{document}", answer.text);
    }
}

#[test]
fn pod_security_that_forbids_the_rules_is_told_with_the_label_to_set() {
    let Some(cluster) = Cluster::shared() else { return };
    for (level, accepted) in [("restricted", false), ("baseline", false), ("privileged", true)] {
        let namespace = format!("level-{level}");
        let enforce = format!("pod-security.kubernetes.io/enforce={level}");
        cluster.namespace(&namespace, &[ENABLED, &enforce]);
        let answer = cluster.try_apply(&client(&namespace, "one"));
        assert_eq!(answer.done, accepted, "{}", answer.text);
        let told = answer.text.contains("pod-security.kubernetes.io/enforce=privileged");
        assert_eq!(told, !accepted, "{}", answer.text);
    }
}

#[test]
fn a_pod_on_its_nodes_network_is_left_alone_with_a_warning() {
    let Some(cluster) = Cluster::shared() else { return };
    cluster.namespace("on-node", &[ENABLED]);
    let pod = client("on-node", "one").replace("spec:\n", "spec:\n  hostNetwork: true\n");
    let answer = cluster.try_apply(&pod);
    assert!(
        answer.done && answer.text.contains("not injected: the pod uses the network of its node"),
        "{}",
        answer.text
    );
    assert!(cluster.get("on-node", "pod/one")["spec"]["initContainers"].is_null());
}

#[test]
fn a_service_called_weft_stops_no_sidecar() {
    let Some(cluster) = Cluster::shared() else { return };
    cluster.namespace("links", &[ENABLED]);
    cluster.apply("{apiVersion: v1, kind: Service, metadata: {name: weft, namespace: links}, spec: {ports: [{port: 80}]}}");
    cluster.apply("{apiVersion: v1, kind: Service, metadata: {name: weft-ca, namespace: links}, spec: {ports: [{name: grpc, port: 15080}]}}");
    cluster.apply(&client("links", "one"));
    cluster.wait("links", "pod/one", "condition=Ready");
    let variables = cluster.exec("links", "one", &["env"]).text;
    assert!(
        variables.contains("WEFT_PORT=tcp://") && variables.contains("WEFT_CA_SERVICE_PORT_GRPC="),
        "{variables}"
    );
}
