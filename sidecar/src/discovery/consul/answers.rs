//! What answers of a registry come to, without a registry: the parsers behind the watches, for who has only bytes
//! (the fuzzer, tests/fuzz, and its test). Nothing here asks anybody, and the sidecar itself does not use it.

use hyper::StatusCode;
use tokio::time::Instant;

use super::{error::Error, examine, health, known::Known, policies::Store, watch};
use crate::{
    config::document::Mistake,
    discovery::policies::Policies,
    model::{Policy, Service, ServiceName},
};

/// A service after these answers to `/v1/health/service/NAME`, each but the first the first one after an outage;
/// and what is wrong with the answers, for people. An answer that cannot be read changes nothing.
pub fn service_after(name: &ServiceName, answers: &[&[u8]], now: Instant) -> (Service, Vec<String>) {
    let (mut known, mut mistakes) = (Known::new(name.clone()), Vec::new());
    for (count, answer) in answers.iter().enumerate() {
        match health::read(name, answer) {
            Ok(reading) => {
                mistakes.extend(reading.mistakes.iter().cloned());
                known.accept(reading, count > 0, now);
            }
            Err(error) => mistakes.push(error.text),
        }
    }
    let (service, contradiction) = known.service();
    mistakes.extend(contradiction);
    (service, mistakes)
}

/// The policies after these answers to `/v1/kv/weft/policies/`, with their indices; and what is wrong with them.
/// An answer that cannot be read changes nothing.
pub fn policies_after(answers: &[(u64, &[u8])]) -> (Policies, Vec<Mistake>) {
    let mut store = Store::new(Policy::default());
    for (index, answer) in answers {
        if let Ok(entries) = super::policies::read(answer) {
            store.take(Some(*index), entries, false);
        }
    }
    store.policies(&Policies::default())
}

/// What an answer with this status means, for people. None where the number is no status.
pub fn refusal(status: u16, body: &[u8], permission: &str) -> Option<String> {
    let status = StatusCode::from_u16(status).ok()?;
    Some(Error::of_status(status, body, permission).text)
}

/// The first permission that is missing, after an answer to `/v1/internal/acl/authorize`.
pub fn missing_permission(answer: &[u8]) -> Option<&'static str> {
    watch::first_denied(answer)
}

/// By how many seconds the `Date` of an answer is ahead of our clock.
pub fn clock_ahead(date: &str) -> Option<i64> {
    examine::ahead(date)
}
