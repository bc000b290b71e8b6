//! What the private face of the admin room shows, as JSON.

use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::{sync::Notify, time::Instant};

use super::Shared;
use crate::{
    admin::{Private, View},
    connect::Security,
};

/// The views of a running sidecar, and its actions.
pub(super) fn private(shared: &Arc<Shared>, drain_asked: Arc<Notify>) -> Private {
    let view = |show: fn(&Shared) -> Value| -> View {
        let shared = shared.clone();
        Arc::new(move || show(&shared))
    };
    let views = BTreeMap::from([
        ("status", view(status)),
        ("endpoints", view(endpoints)),
        ("certificate", view(certificate)),
        ("config", view(config)),
    ]);
    Private {
        views,
        log: shared.log.clone(),
        drain: Arc::new(move || drain_asked.notify_one()),
        leave: shared.leave.clone(),
    }
}

fn status(shared: &Shared) -> Value {
    let missing = shared.readiness.missing();
    let identity = shared.identity_status.borrow();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "service": shared.config.own.service,
        "instance": shared.config.own.instance,
        "ready": missing.is_empty(),
        "missing": missing,
        "identity": {
            "failures": identity.failures,
            "last_error": identity.last_error,
            "obtained": identity.obtained,
            "failed": identity.failed,
            "next_attempt": identity.next_attempt.map(rfc3339),
        },
        "services": shared.directory.borrow().services().len(),
        "registry": shared.registry.is_there().then(|| shared.registry_status.borrow().clone()),
        "log": shared.log.current(),
    })
}

/// The services that the app called, and how their endpoints stand.
fn endpoints(shared: &Shared) -> Value {
    let now = Instant::now();
    let services = shared.upstreams.all().into_iter().map(|upstream| {
        let known = upstream.known();
        let expected = match &known.security {
            Security::Plain | Security::Forbidden => json!(null),
            Security::Mesh(expected) => json!(expected.iter().map(|id| id.as_str()).collect::<Vec<_>>()),
        };
        let endpoints: Vec<Value> = upstream
            .balancer
            .states(now)
            .into_iter()
            .map(|state| {
                json!({
                    "address": state.endpoint.address,
                    "weight": state.endpoint.weight,
                    "zone": state.endpoint.zone,
                    "version": state.endpoint.version,
                    "tags": state.endpoint.tags,
                    "condition": state.condition,
                    "failures": state.failures,
                    "load_seconds": state.load,
                    "in_flight": state.in_flight,
                })
            })
            .collect();
        let shown = json!({
            "protocol": known.protocol(),
            "expected_identities": expected,
            "policy": *known.policy,
            "endpoints": endpoints,
        });
        (upstream.name().to_string(), shown)
    });
    Value::Object(services.collect())
}

fn certificate(shared: &Shared) -> Value {
    let credentials = shared.credentials.borrow().clone();
    credentials.map_or(Value::Null, |credentials| {
        json!({
            "id": credentials.id().as_str(),
            "serial": credentials.serial(),
            "not_before": rfc3339(credentials.not_before()),
            "not_after": rfc3339(credentials.not_after()),
            "trust_domain": credentials.bundle().trust_domain().as_str(),
            "roots": credentials.bundle().roots().len(),
        })
    })
}

fn config(shared: &Shared) -> Value {
    serde_json::to_value(&shared.config).unwrap_or(Value::Null)
}

fn rfc3339(time: SystemTime) -> String {
    OffsetDateTime::from(time).format(&Rfc3339).unwrap_or_default()
}
