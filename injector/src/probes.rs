//! Probes and hooks of the kubelet. It is no part of the mesh: in strict mode its HTTP probes would be refused, and its TCP
//! probes would find the sidecar's listener, app or no app. So they go to the sidecar's port 15020, which asks the app.
//!
//! `httpGet`, `tcpSocket` and `grpc` are replaced; `exec` is left alone, and so is an `httpGet` with a `host` of its own,
//! which asks somebody else. Named ports become numbers, for the sidecar knows no names.

use serde_json::{Map, Value, json};
use weft_proto::names::ADMIN_PORT;

/// Kinds of probes, as keys of a container.
const PROBES: [&str; 3] = ["startupProbe", "livenessProbe", "readinessProbe"];
/// Kinds of hooks, as keys of a container's `lifecycle`.
const HOOKS: [&str; 2] = ["postStart", "preStop"];
/// Handlers that are sent to the sidecar.
const HANDLERS: [&str; 3] = ["httpGet", "tcpSocket", "grpc"];

/// Where a probe or hook stands in a container: its path as keys, and the name by which the sidecar is asked.
struct Place {
    keys: Vec<&'static str>,
    name: String,
}

/// Sends the probes and hooks of a container to the sidecar. What they were is added to `originals`, which the sidecar gets.
pub fn redirect(container: &mut Value, originals: &mut Map<String, Value>) {
    let ports = container.get("ports").cloned().unwrap_or(Value::Null);
    for place in places(container) {
        let Some(action) = action(container, &place) else { continue };
        let Some((kind, handler)) = redirectable(action) else { continue };
        let mut original = json!({ kind: with_number(handler, &ports) });
        if let Some(timeout) = action.get("timeoutSeconds") {
            original["timeoutSeconds"] = timeout.clone();
        }
        action.as_object_mut().map(|action| action.remove(kind));
        action["httpGet"] = json!({ "path": path(&place.name), "port": ADMIN_PORT });
        originals.insert(place.name, original);
    }
}

/// Puts the probes and hooks of a container back as they were, up to the names of ports.
pub fn restore(container: &mut Value, originals: &Map<String, Value>) {
    for place in places(container) {
        let Some(action) = action(container, &place) else { continue };
        if action.pointer("/httpGet/path").and_then(Value::as_str) != Some(&path(&place.name)) {
            continue;
        }
        let Some(Value::Object(original)) = originals.get(&place.name) else { continue };
        let Some(action) = action.as_object_mut() else { continue };
        action.remove("httpGet");
        for kind in HANDLERS {
            if let Some(handler) = original.get(kind) {
                action.insert(kind.to_owned(), handler.clone());
            }
        }
    }
}

fn path(name: &str) -> String {
    format!("/probe/{name}")
}

fn places(container: &Value) -> Vec<Place> {
    let name = container["name"].as_str().unwrap_or_default();
    let probes = PROBES.map(|kind| Place { keys: vec![kind], name: format!("{name}/{kind}") });
    let hooks = HOOKS.map(|kind| Place { keys: vec!["lifecycle", kind], name: format!("{name}/{kind}") });
    probes.into_iter().chain(hooks).collect()
}

fn action<'a>(container: &'a mut Value, place: &Place) -> Option<&'a mut Value> {
    place.keys.iter().try_fold(container, |value, key| value.get_mut(*key))
}

/// The handler that asks this pod over the network.
fn redirectable(action: &Value) -> Option<(&'static str, Value)> {
    let kind = HANDLERS.into_iter().find(|kind| action.get(kind).is_some_and(Value::is_object))?;
    let handler = &action[kind];
    let elsewhere = handler.get("host").and_then(Value::as_str).is_some_and(|host| !host.is_empty());
    let ours = handler["port"] == json!(ADMIN_PORT);
    (!elsewhere && !ours).then(|| (kind, handler.clone()))
}

/// The handler with the number of its port, where it had a name of the container's.
fn with_number(mut handler: Value, ports: &Value) -> Value {
    let number = handler["port"].as_str().map(|name| {
        let named = ports.as_array().into_iter().flatten().find(|port| port["name"].as_str() == Some(name));
        named.map_or_else(
            || name.parse::<u16>().map_or(json!(name), |port| json!(port)),
            |port| port["containerPort"].clone(),
        )
    });
    if let Some(number) = number {
        handler["port"] = number;
    }
    handler
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
            "lifecycle": { "preStop": { "httpGet": { "path": "/stop", "port": 8080 } } },
        });
        let (changed, originals) = redirected(container.clone());
        for (pointer, path) in [
            ("/startupProbe", "/probe/app/startupProbe"),
            ("/livenessProbe", "/probe/app/livenessProbe"),
            ("/readinessProbe", "/probe/app/readinessProbe"),
            ("/lifecycle/preStop", "/probe/app/preStop"),
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
            "lifecycle": { "preStop": { "sleep": { "seconds": 3 } } },
        });
        let (changed, originals) = redirected(container.clone());
        assert_eq!((changed, originals.len()), (container, 0));
    }

    #[test]
    fn twice_is_as_once() {
        let container = json!({ "name": "app", "readinessProbe": { "tcpSocket": { "port": 8080 } } });
        let (once, _) = redirected(container);
        let (twice, originals) = redirected(once.clone());
        assert_eq!((twice, originals.len()), (once, 0));
    }
}
