//! The webhook's certificate: the authority gives and renews it, and the API server believes it. These tests change what all
//! others need, so each has the cluster for itself.

use std::{collections::BTreeMap, thread, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use serde_json::Value;
use tokio::time::Instant;
use weft_tests::Cluster;

use crate::joining::{ENABLED, client};

const SYSTEM: &str = "weft-system";
const CONFIGURATION: &str = "mutatingwebhookconfiguration/weft-injector";
const DEPLOYMENT: &str = "deployment/weft-injector";

fn certificates(pem: &[u8]) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().expect("PEM")
}

/// The roots of the authority, as its ConfigMap says.
fn roots(cluster: &Cluster) -> Vec<CertificateDer<'static>> {
    of_namespace(cluster, SYSTEM)
}

/// The roots that pods of a namespace pin.
fn of_namespace(cluster: &Cluster, namespace: &str) -> Vec<CertificateDer<'static>> {
    let map = cluster.get(namespace, "configmap/weft-root");
    certificates(map["data"]["root.pem"].as_str().expect("a root").as_bytes())
}

/// Do all webhooks of the configuration believe these roots?
fn believed(cluster: &Cluster, roots: &[CertificateDer<'static>]) -> bool {
    let configuration = cluster.get(SYSTEM, CONFIGURATION);
    let webhooks = configuration["webhooks"].as_array().expect("webhooks");
    let bundle = |webhook: &Value| {
        let text = webhook["clientConfig"]["caBundle"].as_str().unwrap_or_default();
        certificates(&STANDARD.decode(text).expect("base64"))
    };
    webhooks.iter().all(|webhook| roots.iter().all(|root| bundle(webhook).contains(root)))
}

/// Certificates that each running injector has got.
fn obtained(cluster: &Cluster) -> BTreeMap<String, u64> {
    let pods = ["-n", SYSTEM, "get", "pods", "-l", "app.kubernetes.io/name=weft-injector", "-o", "name"];
    let names = cluster.kubectl(&pods);
    let count = |name: &str| {
        let path = format!("/api/v1/namespaces/{SYSTEM}/pods/{name}:15444/proxy/metrics");
        let metrics = cluster.try_kubectl(&["get", "--raw", &path]).text;
        let line = metrics.lines().find_map(|line| line.strip_prefix("weft_injector_certificates_total "));
        line.and_then(|count| count.parse().ok()).unwrap_or(0)
    };
    names
        .lines()
        .filter_map(|line| line.strip_prefix("pod/"))
        .map(|name| (name.to_owned(), count(name)))
        .collect()
}

/// What the API server makes of a pod of a namespace of the mesh, without keeping it; an error where it is not injected.
fn try_inject(cluster: &Cluster, namespace: &str) -> Result<(), String> {
    let answer = cluster.dry_run(&client(namespace, "one"));
    let injected = answer.done && answer.text.contains("\"weft-sidecar\"");
    if injected { Ok(()) } else { Err(answer.text) }
}

#[test]
fn the_bundle_of_the_webhook_holds_the_roots_and_is_mended() {
    let Some(cluster) = Cluster::alone() else { return };
    cluster.namespace("mended", &[ENABLED]);
    assert!(believed(cluster, &roots(cluster)));
    try_inject(cluster, "mended").unwrap();
    let remove = "[{\"op\": \"remove\", \"path\": \"/webhooks/0/clientConfig/caBundle\"}]";
    cluster.kubectl(&["patch", CONFIGURATION, "--type=json", "-p", remove]);
    cluster.until("the bundle is mended", || believed(cluster, &roots(cluster)));
    cluster.until("the webhook is believed", || try_inject(cluster, "mended").is_ok());
}

#[test]
fn the_injector_goes_on_while_the_authority_is_made_anew_with_another_root() {
    let Some(cluster) = Cluster::alone() else { return };
    cluster.namespace("anew", &[ENABLED]);
    let (before, had) = (roots(cluster), obtained(cluster));
    cluster.kubectl(&["-n", SYSTEM, "delete", "pod", "-l", "app.kubernetes.io/name=weft-ca", "--wait=false"]);
    // Both replicas show a certificate of the new root in the end, and no pod is refused on the way.
    let mut tried = 0;
    cluster.until("both replicas have followed the new root", || {
        try_inject(cluster, "anew").unwrap_or_else(|error| panic!("after {tried} pods: {error}"));
        tried += 1;
        let after = roots(cluster);
        let followed =
            || obtained(cluster).iter().all(|(name, count)| had.get(name).is_none_or(|had| count > had));
        after != before && believed(cluster, &after) && followed()
    });
    for _ in 0..10 {
        try_inject(cluster, "anew").unwrap();
    }
    // The old root stays for a while, and a pod of now gets its identity from the new one.
    assert!(believed(cluster, &before));
    cluster
        .until("the new root is copied", || of_namespace(cluster, "anew") == of_namespace(cluster, SYSTEM));
    cluster.apply(&client("anew", "one"));
    cluster.wait("anew", "pod/one", "condition=Ready");
}

#[test]
fn certificates_of_seconds_are_renewed_under_load_and_no_pod_is_refused() {
    let Some(cluster) = Cluster::alone() else { return };
    cluster.namespace("renewed", &[ENABLED]);
    let add = |word: &str| {
        format!(
            "{{\"op\": \"add\", \"path\": \"/spec/template/spec/containers/0/command/-\", \"value\": \"{word}\"}}"
        )
    };
    let short = format!("[{}, {}]", add("--certificate-lifetime"), add("6s"));
    cluster.kubectl(&["-n", SYSTEM, "patch", DEPLOYMENT, "--type=json", "-p", &short]);
    let rolled_out = ["-n", SYSTEM, "rollout", "status", DEPLOYMENT, "--timeout=120s"];
    cluster.kubectl(&rolled_out);
    cluster.until("the old replicas are gone", || {
        obtained(cluster).len() == 2 && try_inject(cluster, "renewed").is_ok()
    });

    let end = Instant::now() + Duration::from_secs(20);
    let load = || {
        let mut refused = Vec::new();
        let mut injected = 0;
        while Instant::now() < end {
            match try_inject(cluster, "renewed") {
                Ok(()) => injected += 1,
                Err(error) => refused.push(error),
            }
        }
        (injected, refused)
    };
    let outcomes: Vec<(u32, Vec<String>)> = thread::scope(|scope| {
        let threads: Vec<_> = (0..3).map(|_| scope.spawn(load)).collect();
        threads.into_iter().map(|thread| thread.join().expect("a thread of the load")).collect()
    });
    let renewals = obtained(cluster);
    cluster.kubectl(&["-n", SYSTEM, "rollout", "undo", DEPLOYMENT]);
    cluster.kubectl(&rolled_out);
    for (injected, refused) in outcomes {
        assert!(refused.is_empty(), "{} of {injected} pods: {refused:?}", refused.len());
        assert!(injected > 10, "{injected}");
    }
    let enough = |count: &u64| *count >= 4;
    assert!(renewals.len() == 2 && renewals.values().all(enough), "{renewals:?}");
}
