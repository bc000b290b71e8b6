//! `weft-injector inject -f FILE` and `uninject -f FILE`: the webhook's decision and patch, on files. Any YAML or JSON will
//! do: several documents, Lists, and every workload that has a pod template. What is not touched stays byte for byte.

use json_patch::{Patch, PatchOperation, jsonptr::PointerBuf};
use serde_json::{Value, json};

use crate::{
    decide::{Decision, Namespace, decide},
    names,
    patch::{difference, inject as inject_pod, status, strip},
    settings::Settings,
    yaml,
};

/// What became of a file.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The text with its changes.
    pub text: String,
    /// One line for each pod or template: which one, and what was done.
    pub report: Vec<String>,
}

/// Adds the sidecar to every pod and pod template of a text. `namespace` is where objects go that name none.
///
/// # Errors
/// One message for each object that is refused or cannot be read; the text is not changed halfway.
pub fn inject(text: &str, namespace: &str, settings: &Settings) -> Result<Outcome, Vec<String>> {
    change(text, &|object| {
        let pod = object.pod();
        let namespace = Namespace {
            name: object.namespace.unwrap_or(namespace).to_owned(),
            labels: [(names::LABEL_INJECT.to_owned(), "enabled".to_owned())].into(),
        };
        match decide(&pod, &namespace, settings) {
            Decision::Inject(plan) => Ok(Change::To(inject_pod(&pod, &plan), "injected")),
            Decision::Leave(reason) => Ok(Change::None(
                reason.warning().unwrap_or_else(|| format!("left alone: {}", reason.label())),
            )),
            Decision::Refuse(messages) => Err(messages),
        }
    })
}

/// Takes the sidecar out of every pod and pod template of a text.
///
/// # Errors
/// One message for each object that cannot be read.
pub fn uninject(text: &str) -> Result<Outcome, Vec<String>> {
    change(text, &|object| {
        let pod = object.pod();
        Ok(match status(&pod) {
            Some(_) => Change::To(strip(&pod), "taken out"),
            None => Change::None("not injected".into()),
        })
    })
}

/// What is to become of a pod.
enum Change {
    To(Value, &'static str),
    None(String),
}

/// A pod or a template, within a document.
struct Object<'a> {
    kind: &'a str,
    name: &'a str,
    namespace: Option<&'a str>,
    /// Where the pod stands, from the document's root.
    path: PointerBuf,
    /// What stands there.
    template: &'a Value,
}

impl Object<'_> {
    fn is_whole(&self) -> bool {
        let metadata = &self.template["metadata"];
        self.template.is_object() && (metadata.is_object() || metadata.is_null())
    }

    /// As the API server would show it: with a name that its pods would have.
    fn pod(&self) -> Value {
        let mut pod = self.template.clone();
        if !self.path.is_root() {
            pod["metadata"]["generateName"] = json!(format!("{}-", self.name));
        }
        pod
    }
}

fn change(
    text: &str,
    decide: &dyn Fn(&Object<'_>) -> Result<Change, Vec<String>>,
) -> Result<Outcome, Vec<String>> {
    // A file of Windows keeps its line breaks, where all of them are of that kind.
    let is_crlf = text.contains("\r\n") && text.matches('\n').count() == text.matches("\r\n").count();
    if is_crlf {
        let mut outcome = change_lines(&text.replace("\r\n", "\n"), decide)?;
        outcome.text = outcome.text.replace('\n', "\r\n");
        return Ok(outcome);
    }
    change_lines(text, decide)
}

fn change_lines(
    text: &str,
    decide: &dyn Fn(&Object<'_>) -> Result<Change, Vec<String>>,
) -> Result<Outcome, Vec<String>> {
    let mut outcome = Outcome { text: String::new(), report: Vec::new() };
    let mut wrong = Vec::new();
    let mut line = 1;
    for part in documents(text) {
        match change_document(part, decide, &mut outcome.report) {
            Ok(changed) => outcome.text.push_str(&changed),
            Err(messages) => {
                wrong.extend(messages.iter().map(|message| format!("document in line {line}: {message}")));
            }
        }
        line += part.matches('\n').count();
    }
    if wrong.is_empty() { Ok(outcome) } else { Err(wrong) }
}

fn change_document(
    text: &str,
    decide: &dyn Fn(&Object<'_>) -> Result<Change, Vec<String>>,
    report: &mut Vec<String>,
) -> Result<String, Vec<String>> {
    let (separator, body) = text.split_at(if text.starts_with("---") { 3 } else { 0 });
    let document: Value =
        serde_saphyr::from_str(body).map_err(|error| vec![format!("cannot be read: {error}")])?;
    let mut patch = Patch(Vec::new());
    let mut wrong = Vec::new();
    for object in objects(&document) {
        let title = format!("{} {}", object.kind, object.name);
        if !object.is_whole() {
            wrong.push(format!("{title}: its pod is no mapping with a mapping as its metadata"));
            continue;
        }
        match decide(&object) {
            Ok(Change::To(pod, done)) => {
                report.push(format!("{title}: {done}"));
                patch.0.extend(operations(&object, pod));
            }
            Ok(Change::None(why)) => report.push(format!("{title}: {why}")),
            Err(messages) => wrong.extend(messages.iter().map(|message| format!("{title}: {message}"))),
        }
    }
    if !wrong.is_empty() {
        return Err(wrong);
    }
    let changed = yaml::apply(body, &patch).map_err(|message| vec![message])?;
    check(&changed, document, &patch).map_err(|message| vec![message])?;
    Ok(format!("{separator}{changed}"))
}

/// The edited text must say what the patch makes of the document: nothing that was edited wrongly is ever written.
fn check(changed: &str, mut document: Value, patch: &Patch) -> Result<(), String> {
    json_patch::patch(&mut document, patch).map_err(|error| format!("it cannot be changed: {error}"))?;
    let read = serde_saphyr::from_str::<Value>(changed);
    if read.is_ok_and(|read| read == document) {
        return Ok(());
    }
    Err("it is written in a way that cannot be edited without changing more; write it out plainly".into())
}

fn operations(object: &Object<'_>, mut pod: Value) -> Vec<PatchOperation> {
    if !object.path.is_root() {
        let metadata = pod["metadata"].as_object_mut();
        let empty = metadata.is_some_and(|metadata| {
            metadata.remove("generateName");
            metadata.is_empty()
        });
        if empty && object.template["metadata"] != json!({}) {
            pod.as_object_mut().map(|pod| pod.remove("metadata"));
        }
    }
    let mut operations = difference(object.template, &pod).0;
    for operation in &mut operations {
        let (PatchOperation::Add(json_patch::AddOperation { path, .. })
        | PatchOperation::Remove(json_patch::RemoveOperation { path })
        | PatchOperation::Replace(json_patch::ReplaceOperation { path, .. })) = operation
        else {
            continue;
        };
        let mut whole = object.path.clone();
        whole.append(&*path);
        *path = whole;
    }
    operations
}

/// The pods and templates of a document, those of a List too.
fn objects(document: &Value) -> Vec<Object<'_>> {
    let kind = document["kind"].as_str().unwrap_or_default();
    if let (true, Some(items)) = (kind.ends_with("List"), document["items"].as_array()) {
        return items.iter().enumerate().flat_map(|(index, item)| objects_of_item(index, item)).collect();
    }
    let path: &[&str] = match kind {
        "Pod" => &[],
        "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicaSet" | "ReplicationController" | "Job" => {
            &["spec", "template"]
        }
        "CronJob" => &["spec", "jobTemplate", "spec", "template"],
        _ => return Vec::new(),
    };
    let path = PointerBuf::from_tokens(path.iter().copied());
    let Ok(template) = path.resolve(document) else { return Vec::new() };
    let metadata = &document["metadata"];
    let name = metadata["name"].as_str().or_else(|| metadata["generateName"].as_str()).unwrap_or_default();
    vec![Object { kind, name, namespace: metadata["namespace"].as_str(), path, template }]
}

fn objects_of_item(index: usize, item: &Value) -> Vec<Object<'_>> {
    let place = PointerBuf::from_tokens(["items", &index.to_string()]);
    let mut found = objects(item);
    for object in &mut found {
        let mut whole = place.clone();
        whole.append(&object.path);
        object.path = whole;
    }
    found
}

/// The documents of a stream, each with the separator before it: together they are the text.
fn documents(text: &str) -> Vec<&str> {
    let mut starts = vec![0];
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        let separates = line
            .strip_prefix("---")
            .is_some_and(|rest| rest.trim_start().len() < rest.len() || rest.is_empty());
        if separates && at > 0 {
            starts.push(at);
        }
        at += line.len();
    }
    starts
        .iter()
        .enumerate()
        .map(|(index, start)| &text[*start..starts.get(index + 1).copied().unwrap_or(text.len())])
        .collect()
}

#[cfg(test)]
mod tests;
