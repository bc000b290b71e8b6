use serde_json::json;

use super::*;

fn settings() -> Settings {
    Settings::of_images("local.test/weft-sidecar:1", "local.test/weft-redirect:1")
}

fn namespace(labels: &[(&str, &str)]) -> Namespace {
    Namespace {
        name: "shop".into(),
        labels: labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
    }
}

fn enabled() -> Namespace {
    namespace(&[("weft.dev/inject", "enabled")])
}

fn pod(metadata: Value, spec: Value) -> Value {
    let mut spec = spec;
    if spec.get("containers").is_none() {
        spec["containers"] = json!([{ "name": "app", "image": "local.test/app:1" }]);
    }
    json!({ "metadata": metadata, "spec": spec })
}

#[track_caller]
fn plan_of(pod: &Value, namespace: &Namespace, check: impl FnOnce(Plan<'_>)) {
    match decide(pod, namespace, &settings()) {
        Decision::Inject(plan) => check(*plan),
        other => panic!("expected a plan, got {other:?}"),
    }
}

#[track_caller]
fn refusal(pod: &Value, namespace: &Namespace) -> Vec<String> {
    match decide(pod, namespace, &settings()) {
        Decision::Refuse(messages) => messages,
        other => panic!("expected a refusal, got {other:?}"),
    }
}

#[test]
fn the_label_of_the_pod_counts_before_that_of_the_namespace() {
    let labelled =
        |value: &str| pod(json!({ "name": "a", "labels": { "weft.dev/inject": value } }), json!({}));
    let plain = pod(json!({ "name": "a" }), json!({}));
    let none = namespace(&[]);
    let disabled = namespace(&[("weft.dev/inject", "disabled")]);
    let cases = [
        (&plain, &none, Some(Reason::NotLabelled)),
        (&plain, &disabled, Some(Reason::Disabled)),
        (&plain, &enabled(), None),
        (&labelled("enabled"), &none, None),
        (&labelled("true"), &disabled, None),
        (&labelled("disabled"), &enabled(), Some(Reason::Disabled)),
        (&labelled("false"), &enabled(), Some(Reason::Disabled)),
    ];
    for (number, (pod, namespace, expected)) in cases.into_iter().enumerate() {
        match (decide(pod, namespace, &settings()), expected) {
            (Decision::Inject(_), None) => {}
            (Decision::Leave(reason), Some(expected)) => assert_eq!(reason, expected, "case {number}"),
            (other, _) => panic!("case {number}: {other:?}"),
        }
    }
    assert!(refusal(&labelled("yes"), &none)[0].contains("of the pod is \"yes\""));
}

#[test]
fn what_cannot_join_is_left_alone_with_a_warning() {
    let host = pod(json!({ "name": "a" }), json!({ "hostNetwork": true }));
    let windows = pod(json!({ "name": "a" }), json!({ "os": { "name": "windows" } }));
    let plain = pod(json!({ "name": "a" }), json!({}));
    let system = Namespace { name: "kube-system".into(), ..enabled() };
    let own = Namespace { name: "weft-system".into(), ..enabled() };
    for (pod, namespace, expected) in [
        (&host, &enabled(), Reason::HostNetwork),
        (&windows, &enabled(), Reason::NotLinux),
        (&plain, &system, Reason::SystemNamespace),
        (&plain, &own, Reason::SystemNamespace),
    ] {
        match decide(pod, namespace, &settings()) {
            Decision::Leave(reason) => {
                assert_eq!(reason, expected);
                assert!(reason.warning().is_some_and(|text| text.contains("outside of the mesh")));
            }
            other => panic!("{expected:?}: {other:?}"),
        }
    }
}

#[test]
fn what_would_be_outside_of_the_mesh_in_silence_is_refused() {
    let cases = [
        (json!({ "securityContext": { "runAsUser": 1337 } }), "the pod's securityContext has runAsUser 1337"),
        (
            json!({ "containers": [{ "name": "app", "securityContext": { "runAsUser": 1337 } }] }),
            "container app has runAsUser 1337",
        ),
        (
            json!({ "initContainers": [{ "name": "migrate", "securityContext": { "runAsUser": 1337 } }] }),
            "container migrate has runAsUser 1337",
        ),
        (
            json!({ "containers": [{ "name": "app", "ports": [{ "containerPort": 15006 }] }] }),
            "container app has port 15006",
        ),
    ];
    for (spec, expected) in cases {
        let messages = refusal(&pod(json!({ "name": "a" }), spec), &enabled());
        assert!(messages.len() == 1 && messages[0].contains(expected), "{messages:?}");
    }
}

#[test]
fn a_service_of_another_namespace_is_not_claimed() {
    let pod = pod(json!({ "name": "a", "annotations": { "weft.dev/service": "cart_other" } }), json!({}));
    assert!(refusal(&pod, &enabled())[0].contains("a service of namespace other; expected one of shop"));
}

#[test]
fn names_of_the_mesh_are_not_the_users() {
    for spec in [
        json!({ "initContainers": [{ "name": "weft-redirect" }] }),
        json!({ "containers": [{ "name": "weft-sidecar" }] }),
        json!({ "volumes": [{ "name": "weft-run", "emptyDir": {} }] }),
    ] {
        let messages = refusal(&pod(json!({ "name": "a" }), spec), &enabled());
        assert!(messages.len() == 1 && messages[0].contains("a name that the mesh needs"), "{messages:?}");
    }
}

#[test]
fn a_hook_over_http_needs_a_port_that_takes_plaintext() {
    let strict = Settings { sidecar: [("mtls".to_owned(), "strict".to_owned())].into(), ..settings() };
    let hook = json!({ "preStop": { "httpGet": { "path": "/stop", "port": 8080 } } });
    let spec = json!({ "containers": [{ "name": "app", "lifecycle": hook }] });
    let with = |annotations: Value| pod(json!({ "name": "a", "annotations": annotations }), spec.clone());
    let Decision::Refuse(messages) = decide(&with(json!({})), &enabled(), &strict) else {
        panic!("it is taken")
    };
    assert!(messages[0].contains("container app has lifecycle.preStop with httpGet"), "{messages:?}");
    for annotations in
        [json!({ "weft.dev/mtls": "permissive" }), json!({ "weft.dev/mtls-ports": "8080=permissive" })]
    {
        assert!(matches!(decide(&with(annotations), &enabled(), &strict), Decision::Inject(_)));
    }
    assert!(matches!(decide(&with(json!({})), &enabled(), &settings()), Decision::Inject(_)));
}

#[test]
fn pod_security_that_forbids_the_rules_is_named_with_the_command_that_allows_them() {
    let plain = pod(json!({ "name": "a" }), json!({}));
    for level in ["baseline", "restricted"] {
        let namespace =
            namespace(&[("weft.dev/inject", "enabled"), ("pod-security.kubernetes.io/enforce", level)]);
        let message = refusal(&plain, &namespace).remove(0);
        assert!(
            message.contains(level)
                && message.contains(
                    "kubectl label --overwrite namespace shop pod-security.kubernetes.io/enforce=privileged"
                ),
            "{message}"
        );
    }
}

#[test]
fn all_mistakes_are_told_at_once() {
    let pod = pod(
        json!({ "name": "a", "annotations": { "weft.dev/mtls": "on", "weft.dev/prots": "80" } }),
        json!({ "securityContext": { "runAsUser": 1337 } }),
    );
    assert_eq!(refusal(&pod, &enabled()).len(), 3);
}

#[test]
fn the_service_is_the_workload_that_the_user_has_written() {
    let owned = |kind: &str, name: &str| {
        json!({
            "generateName": "x-",
            "labels": { "pod-template-hash": "6f7d9c" },
            "ownerReferences": [{ "apiVersion": "v1", "kind": kind, "name": name, "uid": "1", "controller": true }],
        })
    };
    for (metadata, expected) in [
        (owned("ReplicaSet", "orders-6f7d9c"), "orders_shop"),
        (owned("ReplicaSet", "orders"), "orders_shop"),
        (owned("StatefulSet", "db"), "db_shop"),
        (owned("Job", "report-29402880"), "report_shop"),
        (owned("Job", "report-2"), "report-2_shop"),
        (json!({ "name": "web.v2" }), "web-v2_shop"),
        (json!({ "generateName": "web-" }), "web_shop"),
        (json!({ "name": "a", "annotations": { "weft.dev/service": "cart" } }), "cart_shop"),
        (json!({ "name": "a", "annotations": { "weft.dev/service": "cart_shop" } }), "cart_shop"),
    ] {
        plan_of(&pod(metadata.clone(), json!({})), &enabled(), |plan| {
            assert_eq!(plan.service, expected, "{metadata}");
        });
    }
    let default = Namespace { name: "default".into(), ..enabled() };
    plan_of(&pod(json!({ "name": "web" }), json!({})), &default, |plan| assert_eq!(plan.service, "web"));
}

#[test]
fn ports_are_those_of_the_containers_unless_an_annotation_names_them() {
    let spec = json!({
        "containers": [
            { "name": "app", "ports": [{ "containerPort": 8080 }, { "containerPort": 53, "protocol": "UDP" }] },
            { "name": "metrics", "ports": [{ "containerPort": 9100 }, { "containerPort": 8080 }] },
        ],
    });
    plan_of(&pod(json!({ "name": "a" }), spec.clone()), &enabled(), |plan| {
        assert_eq!(plan.ports, [8080, 9100]);
    });
    let annotated = json!({ "name": "a", "annotations": { "weft.dev/ports": "9090" } });
    plan_of(&pod(annotated, spec), &enabled(), |plan| assert_eq!(plan.ports, [9090]));
}

#[test]
fn a_pod_that_ends_needs_native_sidecars() {
    let job = pod(json!({ "name": "a" }), json!({ "restartPolicy": "Never" }));
    let classic = Settings { native_sidecar: false, ..settings() };
    assert!(matches!(decide(&job, &enabled(), &settings()), Decision::Inject(_)));
    assert!(matches!(decide(&job, &enabled(), &classic), Decision::Refuse(_)));
}

#[test]
fn what_is_no_pod_is_refused_with_its_place() {
    let wrong = json!({ "metadata": { "labels": { "weft.dev/inject": 7 } }, "spec": { "containers": [] } });
    assert!(refusal(&json!({ "spec": { "containers": [] } }), &enabled())[0].contains("no containers"));
    assert!(refusal(&wrong, &enabled())[0].contains("metadata.labels"));
}
