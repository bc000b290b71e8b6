//! What injection changes in a pod. A pod is first stripped of all that an earlier injection added, then changed, and the
//! difference is the patch: so injecting twice changes nothing, another webhook's changes in between are followed, and
//! taking the injection back is the same difference the other way.

use std::collections::BTreeMap;

use json_patch::{
    AddOperation, Patch, PatchOperation, RemoveOperation, ReplaceOperation, jsonptr::PointerBuf,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::{
    containers::{self, Plan},
    names, probes,
};

/// The status annotation: what was done, so that it can be taken back.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// The version of the injector.
    pub version: String,
    /// Is the sidecar an init container that goes on?
    pub native: bool,
    /// Containers that were given a preStop hook which only waits, and how many seconds.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub pre_stop_sleep: BTreeMap<String, u64>,
}

/// The pod with the sidecar.
pub fn inject(pod: &Value, plan: &Plan<'_>) -> Value {
    let mut pod = strip(pod);
    let mut originals = Map::new();
    let mut status = Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        native: plan.settings.native_sidecar,
        pre_stop_sleep: BTreeMap::new(),
    };
    for container in probed_containers(&mut pod) {
        probes::redirect(container, &mut originals);
    }
    let seconds = u64::from(plan.settings.pre_stop_sleep_seconds);
    if (1..grace_seconds(&pod)).contains(&seconds) {
        for container in list(&mut pod, "containers") {
            status.pre_stop_sleep.extend(add_sleep(container, seconds).map(|name| (name, seconds)));
        }
    }
    let sidecar = containers::sidecar(plan, &originals);
    let mut init = vec![containers::redirect(plan)];
    if plan.settings.native_sidecar {
        init.push(sidecar);
    } else {
        insert(&mut pod, "containers", 0, sidecar);
    }
    for (index, container) in init.into_iter().enumerate() {
        insert(&mut pod, "initContainers", index, container);
    }
    for volume in containers::volumes() {
        let end = list(&mut pod, "volumes").len();
        insert(&mut pod, "volumes", end, volume);
    }
    pod["metadata"]["annotations"][names::ANNOTATION_STATUS] = json!(json!(status).to_string());
    pod
}

/// The pod without anything that injection adds. A pod that was never injected comes out as it is.
pub fn strip(pod: &Value) -> Value {
    let mut pod = pod.clone();
    let Some(status) = status(&pod) else { return pod };
    let sidecar = ["initContainers", "containers"]
        .iter()
        .flat_map(|kind| pod["spec"][kind].as_array().into_iter().flatten())
        .find(|container| container["name"] == names::SIDECAR_CONTAINER);
    let originals = sidecar.map(containers::originals).unwrap_or_default();
    for kind in ["initContainers", "containers"] {
        remove_named(&mut pod, kind, &names::CONTAINERS);
    }
    remove_named(&mut pod, "volumes", &names::VOLUMES);
    for container in probed_containers(&mut pod) {
        probes::restore(container, &originals);
    }
    for container in list(&mut pod, "containers") {
        let name = container["name"].as_str().unwrap_or_default();
        if let Some(seconds) = status.pre_stop_sleep.get(name) {
            remove_sleep(container, *seconds);
        }
    }
    if let Some(annotations) = pod.pointer_mut("/metadata/annotations").and_then(Value::as_object_mut) {
        annotations.remove(names::ANNOTATION_STATUS);
        if annotations.is_empty() {
            pod["metadata"].as_object_mut().map(|metadata| metadata.remove("annotations"));
        }
    }
    pod
}

/// What an earlier injection says that it did.
pub fn status(pod: &Value) -> Option<Status> {
    let text = pod["metadata"]["annotations"].get(names::ANNOTATION_STATUS)?.as_str()?;
    Some(serde_json::from_str(text).unwrap_or_default())
}

/// The operations that make `after` of `before`, as few and as small as lists of things with names allow.
pub fn difference(before: &Value, after: &Value) -> Patch {
    let mut operations = Vec::new();
    differ(&PointerBuf::root(), before, after, &mut operations);
    Patch(operations)
}

fn differ(at: &PointerBuf, before: &Value, after: &Value, operations: &mut Vec<PatchOperation>) {
    match (before, after) {
        _ if before == after => {}
        (Value::Object(before), Value::Object(after)) => differ_in_keys(at, before, after, operations),
        (Value::Array(old), Value::Array(new)) if differ_in_items(at, old, new, operations) => {}
        _ => operations
            .push(PatchOperation::Replace(ReplaceOperation { path: at.clone(), value: after.clone() })),
    }
}

fn differ_in_keys(
    at: &PointerBuf,
    before: &Map<String, Value>,
    after: &Map<String, Value>,
    operations: &mut Vec<PatchOperation>,
) {
    for (key, value) in after {
        match before.get(key) {
            Some(old) => differ(&below(at, key), old, value, operations),
            None => {
                let path = below(at, key);
                operations.push(PatchOperation::Add(AddOperation { path, value: value.clone() }));
            }
        }
    }
    for key in before.keys().filter(|key| !after.contains_key(*key)) {
        operations.push(PatchOperation::Remove(RemoveOperation { path: below(at, key) }));
    }
}

/// Lists whose items have names: items go, change in their place, and come. False where the order changes.
fn differ_in_items(
    at: &PointerBuf,
    before: &[Value],
    after: &[Value],
    operations: &mut Vec<PatchOperation>,
) -> bool {
    let name = |item: &Value| item["name"].as_str().map(str::to_owned);
    let names = |items: &[Value]| items.iter().map(name).collect::<Option<Vec<String>>>();
    let (Some(old_names), Some(new_names)) = (names(before), names(after)) else { return false };
    let kept: Vec<&String> = old_names.iter().filter(|name| new_names.contains(name)).collect();
    let expected: Vec<&String> = new_names.iter().filter(|name| old_names.contains(name)).collect();
    let twice = |names: &[String]| (1..names.len()).any(|index| names[..index].contains(&names[index]));
    if kept != expected || twice(&old_names) || twice(&new_names) {
        return false;
    }
    for (index, name) in old_names.iter().enumerate().rev() {
        if !new_names.contains(name) {
            let path = below(at, &index.to_string());
            operations.push(PatchOperation::Remove(RemoveOperation { path }));
        }
    }
    for (index, (name, item)) in new_names.iter().zip(after).enumerate() {
        let path = below(at, &index.to_string());
        match old_names.iter().position(|old| old == name) {
            Some(old) => differ(&path, &before[old], item, operations),
            None => operations.push(PatchOperation::Add(AddOperation { path, value: item.clone() })),
        }
    }
    true
}

fn below(at: &PointerBuf, key: &str) -> PointerBuf {
    let mut path = at.clone();
    path.push_back(key);
    path
}

/// Containers that the kubelet probes: those of the app, and init containers that go on.
fn probed_containers(pod: &mut Value) -> impl Iterator<Item = &mut Value> {
    let Some(spec) = pod.get_mut("spec").and_then(Value::as_object_mut) else {
        return Vec::new().into_iter();
    };
    let mut all = Vec::new();
    for (key, value) in spec.iter_mut() {
        let containers = value.as_array_mut().into_iter().flatten();
        match key.as_str() {
            "containers" => all.extend(containers),
            "initContainers" => all.extend(containers.filter(|one| one["restartPolicy"] == "Always")),
            _ => {}
        }
    }
    all.into_iter()
}

fn list<'a>(pod: &'a mut Value, kind: &str) -> &'a mut [Value] {
    pod["spec"].get_mut(kind).and_then(Value::as_array_mut).map_or(&mut [], Vec::as_mut_slice)
}

fn insert(pod: &mut Value, kind: &str, index: usize, item: Value) {
    let spec = &mut pod["spec"];
    if !spec[kind].is_array() {
        spec[kind] = json!([]);
    }
    if let Some(items) = spec[kind].as_array_mut() {
        items.insert(index, item);
    }
}

/// Takes items out by name, and the list with its last one: an empty list is as good as none.
fn remove_named(pod: &mut Value, kind: &str, gone: &[&str]) {
    let Some(spec) = pod.get_mut("spec").and_then(Value::as_object_mut) else { return };
    let Some(items) = spec.get_mut(kind).and_then(Value::as_array_mut) else { return };
    items.retain(|item| !item["name"].as_str().is_some_and(|name| gone.contains(&name)));
    if items.is_empty() {
        spec.remove(kind);
    }
}

/// Kubernetes' default is 30.
fn grace_seconds(pod: &Value) -> u64 {
    pod.pointer("/spec/terminationGracePeriodSeconds").and_then(Value::as_u64).unwrap_or(30)
}

/// The container's name, if it had no preStop hook.
fn add_sleep(container: &mut Value, seconds: u64) -> Option<String> {
    if container.pointer("/lifecycle/preStop").is_some_and(|hook| !hook.is_null()) {
        return None;
    }
    if !container["lifecycle"].is_object() {
        container["lifecycle"] = json!({});
    }
    container["lifecycle"]["preStop"] = json!({ "sleep": { "seconds": seconds } });
    container["name"].as_str().map(str::to_owned)
}

/// A hook that somebody has changed since is theirs.
fn remove_sleep(container: &mut Value, seconds: u64) {
    let Some(lifecycle) = container.get_mut("lifecycle").and_then(Value::as_object_mut) else { return };
    if lifecycle.get("preStop").is_some_and(|hook| *hook == json!({ "sleep": { "seconds": seconds } })) {
        lifecycle.remove("preStop");
    }
    if lifecycle.is_empty() {
        container.as_object_mut().map(|container| container.remove("lifecycle"));
    }
}

#[cfg(test)]
mod tests;
