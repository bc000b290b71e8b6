use super::*;

fn settings() -> Settings {
    Settings::of_images("local.test/weft-sidecar:1", "local.test/weft-redirect:1")
}

const SHOP: &str = r#"# the shop
apiVersion: v1
kind: Service
metadata: {name: orders}   # stays
spec: {ports: [{port: 80, targetPort: http}]}
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: orders
  namespace: shop
spec:
  replicas: 2
  template:
    metadata:
      labels: {app: orders}
    spec:
      # the app
      containers:
        - name: app          # odd   spaces
          image: "local.test/orders:1"
          ports:
            - containerPort: 8080
              name: http
          readinessProbe:
            exec: {command: ["true"]}
          lifecycle: {preStop: {exec: {command: ["true"]}}}
      terminationGracePeriodSeconds: 40
---
apiVersion: batch/v1
kind: CronJob
metadata: {name: report}
spec:
  schedule: "* * * * *"
  jobTemplate: {spec: {template: {spec: {restartPolicy: Never, containers: [{name: app, image: i}]}}}}
---
kind: List
apiVersion: v1
items:
- apiVersion: v1
  kind: Pod
  metadata:
    name: alone
  spec:
    containers:
    - name: app
      image: i
      readinessProbe:
        tcpSocket:
          port: 80
- kind: ConfigMap
  apiVersion: v1
  metadata: {name: c}
"#;

fn documents_of(text: &str) -> Vec<Value> {
    documents(text)
        .iter()
        .map(|part| serde_saphyr::from_str(part.trim_start_matches("---")).unwrap())
        .collect()
}

#[test]
fn all_that_has_a_pod_is_injected_and_all_else_is_left_as_it_is() {
    let outcome = inject(SHOP, "default", &settings()).unwrap();
    assert_eq!(
        outcome.report,
        ["Deployment orders: injected", "CronJob report: injected", "Pod alone: injected"]
    );
    let made = documents_of(&outcome.text);
    for pointer in [
        (1, "/spec/template/spec/initContainers/1/args/2"),
        (2, "/spec/jobTemplate/spec/template/spec/initContainers/1/args/2"),
        (3, "/items/0/spec/initContainers/1/args/2"),
    ] {
        let service = made[pointer.0].pointer(pointer.1).unwrap();
        let expected = ["", "orders_shop", "report", "alone"][pointer.0];
        assert_eq!(service, expected);
    }
    let (first, rest) = outcome.text.split_once("---").unwrap();
    assert_eq!(first, SHOP.split_once("---").unwrap().0);
    for line in SHOP.lines().filter(|line| line.contains("# ") || line.contains("odd")) {
        assert!(rest.contains(line) || first.contains(line), "{line}");
    }
}

#[test]
fn taking_out_gives_the_text_back() {
    let injected = inject(SHOP, "default", &settings()).unwrap();
    let back = uninject(&injected.text).unwrap();
    assert_eq!(documents_of(&back.text), documents_of(SHOP));
    // the deployment has no probe that was rewritten: every byte of it is there again
    let part = |text: &str| text.split("---").nth(1).unwrap().to_owned();
    assert_eq!(part(&back.text), part(SHOP));
    assert_eq!(uninject(SHOP).unwrap().text, SHOP);
}

#[test]
fn injecting_twice_is_as_once() {
    let once = inject(SHOP, "default", &settings()).unwrap().text;
    assert_eq!(inject(&once, "default", &settings()).unwrap().text, once);
}

#[test]
fn a_refused_object_is_named_and_nothing_is_written() {
    let text = SHOP.replace("labels: {app: orders}", "annotations: {weft.dev/mtls: \"on\"}");
    let messages = inject(&text, "default", &settings()).unwrap_err();
    assert_eq!(messages.len(), 1);
    assert!(
        messages[0].starts_with("document in line 6: Deployment orders: annotation weft.dev/mtls"),
        "{messages:?}"
    );
}

#[test]
fn json_and_empty_documents_pass() {
    let text = "{\"kind\": \"Pod\", \"metadata\": {\"name\": \"a\"}, \"spec\": {\"containers\": [{\"name\": \"a\", \"image\": \"i\"}]}}\n---\n# nothing\n---\n";
    let outcome = inject(text, "default", &settings()).unwrap();
    let first = outcome.text.split("\n---\n").next().unwrap();
    let pod: Value = serde_json::from_str(first).unwrap();
    assert_eq!(pod["spec"]["initContainers"][1]["name"], "weft-sidecar");
    assert!(outcome.text.ends_with("\n---\n# nothing\n---\n"), "{}", outcome.text);
}

#[test]
fn line_breaks_of_windows_stay() {
    let text = SHOP.replace('\n', "\r\n");
    let injected = inject(&text, "default", &settings()).unwrap().text;
    assert_eq!(injected.matches('\n').count(), injected.matches("\r\n").count());
    assert_eq!(injected.replace("\r\n", "\n"), inject(SHOP, "default", &settings()).unwrap().text);
    let part = |text: &str| text.split("---").nth(1).unwrap().to_owned();
    assert_eq!(part(&uninject(&injected).unwrap().text), part(&text));
}

#[test]
fn what_is_no_pod_is_refused_by_name() {
    for spec in [
        "{template: hi}",
        "{template: {metadata: [], spec: {}}}",
        "{template: null}",
        "{template: {spec: {containers: []}}}",
    ] {
        let text = format!("kind: Deployment\nmetadata: {{name: orders}}\nspec: {spec}\n");
        let messages = inject(&text, "default", &settings()).unwrap_err();
        assert!(messages[0].starts_with("document in line 1: Deployment orders: "), "{spec}: {messages:?}");
    }
}

#[test]
fn what_cannot_be_edited_is_refused_and_never_written_wrongly() {
    // An explicit key, and two volumes of one name.
    let odd = "kind: Pod\nmetadata: {name: odd}\nspec:\n  containers:\n  - name: app\n    readinessProbe:\n      tcpSocket: {port: 80}\n      ? periodSeconds\n      : 3\n";
    let twice = "kind: Pod\nmetadata: {name: odd}\nspec:\n  containers:\n  - name: app\n  volumes:\n  - name: v\n    emptyDir: {}\n  - name: v\n    hostPath: {path: /}\n";
    for text in [odd, twice] {
        if let Ok(outcome) = inject(text, "default", &settings()) {
            let back = uninject(&outcome.text).map(|outcome| documents_of(&outcome.text));
            assert!(back.is_err() || back == Ok(documents_of(text)), "{text}: {back:?}");
        }
    }
}
