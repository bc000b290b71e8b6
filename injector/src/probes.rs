//! Probes of the kubelet. It is no part of the mesh: in strict mode its HTTP probes would be refused, and its TCP probes
//! would find the sidecar's listener, app or no app. So they go to the sidecar's port 15020, which asks the app.
//!
//! `httpGet`, `tcpSocket` and `grpc` are replaced; `exec` is left alone, and so is an `httpGet` with a `host` of its own,
//! which asks somebody else. Named ports become numbers, for the sidecar knows no names. Hooks are not sent there: they
//! change what they ask, and everybody may ask port 15020.

use serde_json::{Map, Value, json};
use weft_proto::names::ADMIN_PORT;

/// Kinds of probes, as keys of a container.
const PROBES: [&str; 3] = ["startupProbe", "livenessProbe", "readinessProbe"];
/// Kinds of hooks, as keys of a container's `lifecycle`.
const HOOKS: [&str; 2] = ["postStart", "preStop"];
/// No time at all would be a failure each time; Kubernetes takes it for a second.
const NO_TIME: u64 = 0;
/// Handlers that are sent to the sidecar.
const HANDLERS: [&str; 3] = ["httpGet", "tcpSocket", "grpc"];

/// Sends the probes of a container to the sidecar. What they were is added to `originals`, which the sidecar gets.
pub fn redirect(container: &mut Value, originals: &mut Map<String, Value>) {
    let ports = container.get("ports").cloned().unwrap_or(Value::Null);
    let names = PROBES.map(|kind| (kind, name(container, kind)));
    for (kind, name) in names {
        let Some(probe) = container.get_mut(kind).and_then(Value::as_object_mut) else { continue };
        let Some((handler, original)) = redirectable(probe, &ports) else { continue };
        let mut original = json!({ handler: original });
        if let Some(seconds) =
            probe.get("timeoutSeconds").and_then(Value::as_u64).filter(|time| *time > NO_TIME)
        {
            original["timeoutSeconds"] = json!(seconds);
        }
        probe.remove(handler);
        probe.insert("httpGet".to_owned(), json!({ "path": path(&name), "port": ADMIN_PORT }));
        originals.insert(name, original);
    }
}

/// Puts the probes of a container back as they were, up to the names of ports and what had no meaning.
pub fn restore(container: &mut Value, originals: &Map<String, Value>) {
    let names = PROBES.map(|kind| (kind, name(container, kind)));
    for (kind, name) in names {
        let Some(probe) = container.get_mut(kind).and_then(Value::as_object_mut) else { continue };
        let Some(Value::Object(original)) = originals.get(&name) else { continue };
        if probe.get("httpGet").and_then(|get| get["path"].as_str()) != Some(&path(&name)) {
            continue;
        }
        probe.remove("httpGet");
        for handler in HANDLERS {
            if let Some(value) = original.get(handler) {
                probe.insert(handler.to_owned(), value.clone());
            }
        }
    }
}

/// Hooks of a container that ask it over HTTP, as `lifecycle.preStop`.
pub fn http_hooks(container: &Value) -> Vec<String> {
    let asks = |kind: &&&str| container["lifecycle"][**kind]["httpGet"].is_object();
    HOOKS.iter().filter(asks).map(|kind| format!("lifecycle.{kind}")).collect()
}

fn name(container: &Value, kind: &str) -> String {
    format!("{}/{kind}", container["name"].as_str().unwrap_or_default())
}

fn path(name: &str) -> String {
    format!("/probe/{name}")
}

/// The handler that asks this pod over the network, with what the sidecar needs of it. One that the kubelet itself could not
/// use is left to it.
fn redirectable(probe: &Map<String, Value>, ports: &Value) -> Option<(&'static str, Value)> {
    let kind = HANDLERS.into_iter().find(|kind| probe.get(*kind).is_some_and(Value::is_object))?;
    let handler = &probe[kind];
    let text = |key: &str| handler[key].as_str().filter(|text| !text.is_empty());
    let port = number(&handler["port"], ports)?;
    if text("host").is_some() || port == json!(ADMIN_PORT) {
        return None;
    }
    let mut original = json!({ "port": port });
    for key in ["path", "scheme", "service"] {
        if let Some(text) = text(key) {
            original[key] = json!(text);
        }
    }
    if let Some(headers) = handler["httpHeaders"].as_array().filter(|headers| !headers.is_empty()) {
        original["httpHeaders"] = json!(headers);
    }
    Some((kind, original))
}

/// A port as it is, or that of this name in the container.
fn number(port: &Value, ports: &Value) -> Option<Value> {
    let Some(name) = port.as_str() else { return port.as_u64().map(|port| json!(port)) };
    let mut named = ports.as_array().into_iter().flatten().filter(|port| port["name"].as_str() == Some(name));
    named
        .next()
        .map(|port| port["containerPort"].clone())
        .or_else(|| name.parse::<u16>().ok().map(|port| json!(port)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn redirected(mut container: Value) -> (Value, Map<String, Value>) {
        let mut originals = Map::new();
        redirect(&mut container, &mut originals);
        (container, originals)
    }

    #[test]
    fn each_kind_of_probe_is_sent_to_the_sidecar_and_put_back() {
        let container = json!({
            "name": "app",
            "startupProbe": { "tcpSocket": { "port": 8080 }, "periodSeconds": 1 },
            "livenessProbe": { "httpGet": { "path": "/live", "port": 8080, "scheme": "HTTPS" }, "timeoutSeconds": 3 },
            "readinessProbe": { "grpc": { "port": 9090, "service": "orders" } },
        });
        let (changed, originals) = redirected(container.clone());
        for (pointer, path) in [
            ("/startupProbe", "/probe/app/startupProbe"),
            ("/livenessProbe", "/probe/app/livenessProbe"),
            ("/readinessProbe", "/probe/app/readinessProbe"),
        ] {
            let handler = changed.pointer(&format!("{pointer}/httpGet")).unwrap();
            assert_eq!(handler, &json!({ "path": path, "port": 15020 }), "{pointer}");
        }
        assert_eq!(changed["startupProbe"]["periodSeconds"], 1);
        assert_eq!(originals["app/livenessProbe"]["timeoutSeconds"], 3);
        assert_eq!(originals["app/readinessProbe"], json!({ "grpc": { "port": 9090, "service": "orders" } }));
        let mut back = changed;
        restore(&mut back, &originals);
        assert_eq!(back, container);
    }

    #[test]
    fn a_port_by_name_becomes_its_number() {
        let (_, originals) = redirected(json!({
            "name": "app",
            "ports": [{ "name": "http", "containerPort": 8080 }],
            "readinessProbe": { "httpGet": { "port": "http" } },
            "livenessProbe": { "tcpSocket": { "port": "9090" } },
        }));
        assert_eq!(originals["app/readinessProbe"]["httpGet"]["port"], 8080);
        assert_eq!(originals["app/livenessProbe"]["tcpSocket"]["port"], 9090);
    }

    #[test]
    fn what_asks_no_port_of_the_app_is_left_alone() {
        let container = json!({
            "name": "app",
            "readinessProbe": { "exec": { "command": ["true"] } },
            "livenessProbe": { "httpGet": { "host": "10.1.2.3", "port": 80 } },
            "startupProbe": { "tcpSocket": { "port": "unknown" } },
            "lifecycle": { "preStop": { "httpGet": { "path": "/stop", "port": 8080 } } },
        });
        assert_eq!(http_hooks(&container), ["lifecycle.preStop"]);
        let (changed, originals) = redirected(container.clone());
        assert_eq!((changed, originals.len()), (container, 0));
    }

    #[test]
    fn what_has_no_meaning_for_the_kubelet_is_left_out() {
        let (_, originals) = redirected(json!({
            "name": "app",
            "livenessProbe": {
                "httpGet": { "port": 80, "host": "", "path": null, "scheme": "", "httpHeaders": null },
                "timeoutSeconds": 0,
            },
            "readinessProbe": { "grpc": { "port": 80, "service": "" } },
        }));
        assert_eq!(originals["app/livenessProbe"], json!({ "httpGet": { "port": 80 } }));
        assert_eq!(originals["app/readinessProbe"], json!({ "grpc": { "port": 80 } }));
    }

    #[test]
    fn twice_is_as_once() {
        let container = json!({ "name": "app", "readinessProbe": { "tcpSocket": { "port": 8080 } } });
        let (once, _) = redirected(container);
        let (twice, originals) = redirected(once.clone());
        assert_eq!((twice, originals.len()), (once, 0));
    }
}
