//! How a pod proves itself to the authority.

use weft_tests::Cluster;

use crate::joining::{ENABLED, client};

#[test]
fn an_identity_is_the_service_account_of_the_pod_and_no_other_token_gives_one() {
    let Some(cluster) = Cluster::shared() else { return };
    cluster.namespace("accounts", &[ENABLED]);
    cluster.kubectl(&["-n", "accounts", "create", "serviceaccount", "buyer"]);
    let pod = client("accounts", "one").replace("spec:\n", "spec:\n  serviceAccountName: buyer\n");
    cluster.apply(&pod);
    cluster.wait("accounts", "pod/one", "condition=Ready");
    let shown = cluster.kubectl(&[
        "-n",
        "accounts",
        "exec",
        "one",
        "-c",
        "weft-sidecar",
        "--",
        "weft-sidecar",
        "show",
        "certificate",
        "--admin-socket",
        "/run/weft/admin.sock",
    ]);
    assert!(shown.contains("spiffe://weft.local/ns/accounts/sa/buyer"), "{shown}");

    // A token for another audience proves nothing: the sidecar never becomes ready, and its log and the audit say why.
    let other = pod
        .replace("name: one,", "name: two, labels: {weft.dev/inject: disabled},")
        .replace("  containers:\n", WRONG_AUDIENCE);
    cluster.apply(&other);
    cluster.until("the authority refuses", || {
        let audit = cluster.try_kubectl(&["-n", "weft-system", "logs", "deployment/weft-ca"]).text;
        audit.lines().any(|line| {
            line.contains("\"refused\"") && line.contains("service_account") && line.contains("audience")
        })
    });
}

/// A sidecar by hand, whose token is for somebody else.
const WRONG_AUDIENCE: &str = r#"
  volumes:
    - {name: root, configMap: {name: weft-root}}
    - name: token
      projected: {sources: [{serviceAccountToken: {path: token, audience: somebody, expirationSeconds: 600}}]}
  containers:
    - name: sidecar
      image: local.test/weft-sidecar:1
      imagePullPolicy: Never
      args: [run, --service, two, --authority, "weft-ca.weft-system.svc:15080", --authority-root, /root-of/root.pem,
             --token-file, /token/token, --admin-socket, /tmp/admin.sock]
      volumeMounts: [{name: root, mountPath: /root-of}, {name: token, mountPath: /token}]
"#;
