use serde_json::json;

use super::*;

fn settings() -> Settings {
    Settings::of_images("local.test/weft-sidecar:1", "local.test/weft-redirect:1")
}

fn shop() -> Namespace {
    Namespace { name: "shop".into(), labels: [("weft.dev/inject".to_owned(), "enabled".to_owned())].into() }
}

fn request(pod: Value) -> AdmissionRequest<DynamicObject> {
    let review: AdmissionReview<DynamicObject> = serde_json::from_value(json!({
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "request": {
            "uid": "1", "operation": "CREATE", "namespace": "shop", "dryRun": false,
            "kind": { "group": "", "version": "v1", "kind": "Pod" },
            "resource": { "group": "", "version": "v1", "resource": "pods" },
            "userInfo": {},
            "object": pod,
        },
    }))
    .unwrap();
    review.try_into().unwrap()
}

fn pod(labels: Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "generateName": "orders-", "labels": labels },
        "spec": { "containers": [{ "name": "app", "image": "i" }] },
    })
}

#[test]
fn a_pod_of_the_mesh_gets_a_patch() {
    let (response, outcome) = review(&request(pod(json!({}))), &shop(), &settings());
    assert_eq!((outcome, response.allowed), ("injected", true));
    let patch: json_patch::Patch = serde_json::from_slice(&response.patch.unwrap()).unwrap();
    let mut made = pod(json!({}));
    json_patch::patch(&mut made, &patch).unwrap();
    assert_eq!(made["spec"]["initContainers"][1]["name"], "weft-sidecar");
    let (again, outcome) = review(&request(made), &shop(), &settings());
    assert_eq!((outcome, again.allowed, again.patch), ("injected", true, None));
}

#[test]
fn a_pod_that_is_left_alone_is_allowed_as_it_is() {
    let (response, outcome) =
        review(&request(pod(json!({ "weft.dev/inject": "disabled" }))), &shop(), &settings());
    assert_eq!((outcome, response.allowed, response.patch), ("disabled", true, None));
    let mut host = pod(json!({}));
    host["spec"]["hostNetwork"] = json!(true);
    let (response, _) = review(&request(host), &shop(), &settings());
    assert!(response.allowed && response.warnings.unwrap()[0].contains("hostNetwork"));
}

#[test]
fn a_wrong_annotation_refuses_the_pod_by_name() {
    let mut wrong = pod(json!({}));
    wrong["metadata"]["annotations"] = json!({ "weft.dev/mtls": "on" });
    let (response, outcome) = review(&request(wrong), &shop(), &settings());
    assert_eq!((outcome, response.allowed), ("refused", false));
    assert!(response.result.message.contains("weft.dev/mtls is \"on\""), "{}", response.result.message);
}
