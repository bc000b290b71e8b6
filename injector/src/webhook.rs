//! The admission webhook: an HTTPS server that the API server asks at the creation of each pod of the mesh. It answers from
//! memory: a review is a decision and a patch, both pure. What it cannot answer in time costs an injection or a pod of the
//! mesh, as the failure policy of the webhook configuration says, and never a pod of another namespace: selectors keep
//! those away.
//!
//! Admission reviews: <https://kubernetes.io/docs/reference/access-authn-authz/extensible-admission-controllers/>.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, State},
    http::StatusCode,
    routing::{get, post},
};
use k8s_openapi::api::core::v1::Namespace as NamespaceObject;
use kube::{
    Api,
    core::admission::{AdmissionRequest, AdmissionResponse, AdmissionReview, Operation},
    core::{DynamicObject, ObjectMeta},
    runtime::reflector::{ObjectRef, Store},
};
use serde_json::Value;

use crate::{
    decide::{Decision, Namespace, decide},
    metrics::Metrics,
    patch::{difference, inject},
    settings::Settings,
};

pub use server::serve;

mod server;

/// A review holds an object twice, and the API server takes none above 1.5 MiB.
const BODY_BYTES: usize = 4 << 20;

/// What a review needs.
pub struct Webhook {
    /// What is injected.
    pub settings: Settings,
    /// Labels of namespaces.
    pub namespaces: Namespaces,
    /// The numbers.
    pub metrics: Arc<Metrics>,
}

/// The labels of namespaces: from a watch, and from the API server where the watch does not know one yet.
pub struct Namespaces {
    /// Kept up to date by a watch.
    pub store: Store<NamespaceObject>,
    /// For a namespace that has just been made.
    pub api: Api<NamespaceObject>,
}

impl Namespaces {
    async fn get(&self, name: &str) -> Result<Namespace, String> {
        if let Some(object) = self.store.get(&ObjectRef::new(name)) {
            return Ok(namespace(name, object.metadata.clone()));
        }
        let object = self.api.get(name).await;
        object
            .map(|object| namespace(name, object.metadata))
            .map_err(|error| format!("the labels of namespace {name} cannot be read: {error}"))
    }
}

fn namespace(name: &str, metadata: ObjectMeta) -> Namespace {
    Namespace { name: name.to_owned(), labels: metadata.labels.unwrap_or_default() }
}

/// The routes: `/mutate` for the API server, `/live` for the kubelet.
pub fn router(webhook: Arc<Webhook>) -> Router {
    Router::new()
        .route("/mutate", post(mutate))
        .route("/live", get(|| async { "live\n" }))
        .layer(DefaultBodyLimit::max(BODY_BYTES))
        .with_state(webhook)
}

async fn mutate(
    State(webhook): State<Arc<Webhook>>,
    Json(asked): Json<AdmissionReview<DynamicObject>>,
) -> Result<Json<AdmissionReview<DynamicObject>>, (StatusCode, String)> {
    let request: AdmissionRequest<DynamicObject> =
        asked.try_into().map_err(|error| (StatusCode::BAD_REQUEST, format!("not a review: {error}")))?;
    let name = request.namespace.clone().unwrap_or_default();
    let namespace = webhook.namespaces.get(&name).await.map_err(|message| {
        tracing::warn!(namespace = name, "{message}");
        (StatusCode::INTERNAL_SERVER_ERROR, message)
    })?;
    let (response, outcome) = review(&request, &namespace, &webhook.settings);
    webhook.metrics.reviewed(outcome);
    log(&request, &response, outcome);
    Ok(Json(response.into_review()))
}

/// Answers a review. The second value is the outcome, for metrics and logs.
pub fn review(
    request: &AdmissionRequest<DynamicObject>,
    namespace: &Namespace,
    settings: &Settings,
) -> (AdmissionResponse, &'static str) {
    let response = AdmissionResponse::from(request);
    let pod = request.object.as_ref().map(serde_json::to_value);
    let (Some(Ok(pod)), Operation::Create, "Pod") = (pod, &request.operation, request.kind.kind.as_str())
    else {
        return (response, "not_a_new_pod");
    };
    match decide(&pod, namespace, settings) {
        Decision::Leave(reason) => {
            let mut response = response;
            response.warnings = reason.warning().map(|warning| vec![warning]);
            (response, reason.label())
        }
        Decision::Refuse(messages) => (response.deny(format!("weft: {}", messages.join("; "))), "refused"),
        Decision::Inject(plan) => match patched(response, &pod, &inject(&pod, &plan)) {
            Ok(response) => (response, "injected"),
            Err(message) => (AdmissionResponse::from(request).deny(message), "failed"),
        },
    }
}

fn patched(response: AdmissionResponse, before: &Value, after: &Value) -> Result<AdmissionResponse, String> {
    let patch = difference(before, after);
    if patch.0.is_empty() {
        return Ok(response);
    }
    response.with_patch(patch).map_err(|error| format!("weft: the patch cannot be written: {error}"))
}

fn log(request: &AdmissionRequest<DynamicObject>, response: &AdmissionResponse, outcome: &str) {
    let metadata = request.object.as_ref().map(|object| object.metadata.clone()).unwrap_or_default();
    let pod = metadata.name.or(metadata.generate_name).unwrap_or_default();
    let namespace = request.namespace.as_deref().unwrap_or_default();
    let message = response.result.message.as_str();
    match outcome {
        "injected" => tracing::info!(namespace, pod, dry_run = request.dry_run, "injected"),
        "refused" | "failed" => tracing::warn!(namespace, pod, message, "refused"),
        _ => tracing::debug!(namespace, pod, outcome, "left alone"),
    }
}

#[cfg(test)]
mod tests;
