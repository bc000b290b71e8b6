use super::*;
use crate::{
    decide::{Decision, Namespace, decide},
    settings::Settings,
};

fn settings() -> Settings {
    let mut settings = Settings::of_images("local.test/weft-sidecar:1", "local.test/weft-redirect:1");
    settings.consul = vec!["$(HOST_IP):8500".into()];
    settings
}

fn namespace() -> Namespace {
    Namespace { name: "shop".into(), labels: [("weft.dev/inject".to_owned(), "enabled".to_owned())].into() }
}

#[track_caller]
fn injected(pod: &Value, settings: &Settings) -> Value {
    match decide(pod, &namespace(), settings) {
        Decision::Inject(plan) => inject(pod, &plan),
        other => panic!("{other:?}"),
    }
}

fn orders() -> Value {
    json!({
        "metadata": { "name": "orders", "annotations": { "team": "a" } },
        "spec": {
            "initContainers": [{ "name": "migrate", "image": "i" }],
            "containers": [{
                "name": "app", "image": "i",
                "ports": [{ "name": "http", "containerPort": 8080 }],
                "readinessProbe": { "httpGet": { "path": "/$(ready)", "port": 8080 } },
            }, { "name": "other", "image": "i", "lifecycle": { "preStop": { "exec": { "command": ["x"] } } } }],
            "volumes": [{ "name": "data", "emptyDir": {} }],
        },
    })
}

fn names_of(pod: &Value, kind: &str) -> Vec<String> {
    let items = pod["spec"][kind].as_array();
    items.into_iter().flatten().map(|item| item["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn the_redirect_and_the_sidecar_come_first_and_next_to_each_other() {
    let pod = injected(&orders(), &settings());
    assert_eq!(names_of(&pod, "initContainers"), ["weft-redirect", "weft-sidecar", "migrate"]);
    assert_eq!(names_of(&pod, "containers"), ["app", "other"]);
    assert_eq!(names_of(&pod, "volumes"), ["data", "weft-token", "weft-root", "weft-run"]);
}

#[test]
fn a_classic_sidecar_is_the_first_container_and_holds_the_others_back() {
    let pod = injected(&orders(), &Settings { native_sidecar: false, ..settings() });
    assert_eq!(names_of(&pod, "initContainers"), ["weft-redirect", "migrate"]);
    assert_eq!(names_of(&pod, "containers"), ["weft-sidecar", "app", "other"]);
    let sidecar = &pod["spec"]["containers"][0];
    assert_eq!(sidecar["lifecycle"]["postStart"]["exec"]["command"][1], "wait");
    assert_eq!((&sidecar["restartPolicy"], &sidecar["startupProbe"]), (&Value::Null, &Value::Null));
}

#[test]
fn only_the_redirect_has_capabilities_and_only_two() {
    let pod = injected(&orders(), &settings());
    let context = |index: usize| &pod["spec"]["initContainers"][index]["securityContext"];
    assert_eq!(context(0)["capabilities"], json!({ "drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW"] }));
    assert_eq!(context(1)["capabilities"], json!({ "drop": ["ALL"] }));
    assert_eq!((&context(0)["runAsUser"], &context(1)["runAsUser"]), (&json!(0), &json!(1337)));
    for index in [0, 1] {
        assert_eq!(context(index)["readOnlyRootFilesystem"], true);
        assert_eq!(context(index)["allowPrivilegeEscalation"], false);
    }
}

#[test]
fn containers_without_a_hook_wait_at_their_end() {
    let pod = injected(&orders(), &settings());
    assert_eq!(pod["spec"]["containers"][0]["lifecycle"]["preStop"], json!({ "sleep": { "seconds": 4 } }));
    assert_eq!(pod["spec"]["containers"][1]["lifecycle"]["preStop"], json!({ "exec": { "command": ["x"] } }));
    let mut short = orders();
    short["spec"]["terminationGracePeriodSeconds"] = json!(4);
    assert_eq!(injected(&short, &settings())["spec"]["containers"][0]["lifecycle"], Value::Null);
}

#[test]
fn injecting_twice_changes_nothing() {
    for settings in [settings(), Settings { native_sidecar: false, ..settings() }] {
        let once = injected(&orders(), &settings);
        assert_eq!(injected(&once, &settings), once);
        assert_eq!(difference(&once, &injected(&once, &settings)).0.len(), 0);
    }
}

#[test]
fn stripping_gives_back_what_was_there() {
    let bare =
        json!({ "metadata": { "name": "a" }, "spec": { "containers": [{ "name": "a", "image": "i" }] } });
    for pod in [orders(), bare] {
        for settings in [settings(), Settings { native_sidecar: false, ..settings() }] {
            assert_eq!(strip(&injected(&pod, &settings)), pod);
        }
        assert_eq!(strip(&pod), pod);
    }
}

#[test]
fn what_another_webhook_adds_in_between_is_followed() {
    let mut pod = injected(&orders(), &settings());
    let other = json!({ "name": "theirs", "image": "i", "restartPolicy": "Always", "livenessProbe": { "tcpSocket": { "port": 1 } } });
    pod["spec"]["initContainers"].as_array_mut().unwrap().insert(1, other);
    let again = injected(&pod, &settings());
    assert_eq!(names_of(&again, "initContainers"), ["weft-redirect", "weft-sidecar", "theirs", "migrate"]);
    assert_eq!(again["spec"]["initContainers"][2]["livenessProbe"]["httpGet"]["port"], 15020);
    let originals = containers::originals(&again["spec"]["initContainers"][1]);
    assert_eq!(originals.keys().collect::<Vec<_>>(), ["app/readinessProbe", "theirs/livenessProbe"]);
}

#[test]
fn the_patch_makes_the_one_of_the_other() {
    let pod = orders();
    let after = injected(&pod, &settings());
    for (from, to) in [(&pod, &after), (&after, &pod)] {
        let patch = difference(from, to);
        let mut made = from.clone();
        json_patch::patch(&mut made, &patch).unwrap();
        assert_eq!(&made, to);
    }
    let touched: Vec<String> =
        difference(&pod, &after).0.iter().map(|operation| operation.path().to_string()).collect();
    assert_eq!(
        touched,
        [
            "/metadata/annotations/weft.dev~1status",
            "/spec/containers/0/lifecycle",
            "/spec/containers/0/readinessProbe/httpGet/path",
            "/spec/containers/0/readinessProbe/httpGet/port",
            "/spec/initContainers/0",
            "/spec/initContainers/1",
            "/spec/volumes/1",
            "/spec/volumes/2",
            "/spec/volumes/3",
        ]
    );
}

#[test]
fn lists_that_change_their_order_are_replaced() {
    let before = json!({ "l": [{ "name": "a" }, { "name": "b" }] });
    let after = json!({ "l": [{ "name": "b" }, { "name": "a" }] });
    let patch = difference(&before, &after);
    let mut made = before;
    json_patch::patch(&mut made, &patch).unwrap();
    assert_eq!(made, after);
}

#[test]
fn a_hook_that_somebody_has_changed_since_is_theirs() {
    let mut pod = injected(&orders(), &settings());
    pod["spec"]["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"] = json!(20);
    let again = injected(&pod, &settings());
    assert_eq!(again["spec"]["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"], 20);
    assert_eq!(strip(&pod)["spec"]["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"], 20);
}

#[test]
fn items_of_one_name_are_replaced_as_a_list() {
    let before = json!({ "l": [{ "name": "v", "a": 1 }, { "name": "v", "a": 2 }] });
    let after = json!({ "l": [{ "name": "v", "a": 1 }, { "name": "v", "a": 3 }, { "name": "w" }] });
    let mut made = before.clone();
    json_patch::patch(&mut made, &difference(&before, &after)).unwrap();
    assert_eq!(made, after);
}

#[test]
fn a_sidecar_registers_its_pod_only_where_no_controller_does() {
    let publishes_nothing = |settings: &Settings| {
        let pod = injected(&orders(), settings);
        let args = pod["spec"]["initContainers"][1]["args"].as_array().unwrap().clone();
        args.windows(2).any(|pair| pair == ["--publish", "false"])
    };
    let mut settings = settings();
    assert!(publishes_nothing(&settings));
    settings.controller.enabled = false;
    assert!(!publishes_nothing(&settings));
}
