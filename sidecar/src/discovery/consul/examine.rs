//! What `check` wants to know of Consul: is it there, has it a leader, what may we do, what may anybody do, do the
//! clocks agree, what does it say of our own workload, and which instances of any service cannot be read. It reads
//! only.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use hyper::Method;
use serde::de::IgnoredAny;
use serde_json::Value;
use time::{OffsetDateTime, format_description::well_known::Rfc2822};
use tokio::time::timeout;
use weft_proto::{names::POLICIES_PREFIX, spiffe::SpiffeId};

use super::{
    client::{Client, Question},
    error::Error,
    health::{self, Reading},
    watch::{Access, denied},
};
use crate::model::ServiceName;

/// Services whose instances are read, in the order of their names; a registry may hold thousands.
const MAX_SERVICES: usize = 200;
/// Mistakes in them that are told: a person mends no more at a time.
const MAX_MISTAKES: usize = 50;
/// For all of them.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the instances of all services say.
#[derive(Debug, Default)]
pub struct Instances {
    /// Services that were read.
    pub read: usize,
    /// Services that there are and that can be called by name.
    pub services: usize,
    /// What cannot be read in them, and so is left out by every sidecar; bounded.
    pub mistakes: Vec<String>,
}

/// What was found.
#[derive(Debug)]
pub struct Examined {
    /// The agent that answered.
    pub agent: String,
    /// The address of the leader; none: there is none.
    pub leader: Option<String>,
    /// How far Consul's clock is ahead of ours, in seconds; none where it does not say.
    pub clock_ahead: Option<i64>,
    /// May whoever has no token register under our name? None where this Consul does not say.
    pub anybody_may_register: Option<bool>,
    /// What our token may not do, as `service:read on …`.
    pub missing: Vec<String>,
    /// Identities of our own service, by instance; or why they could not be read.
    pub own: Result<Vec<(String, Vec<SpiffeId>)>, String>,
    /// What all services have registered; or why their names could not be read.
    pub instances: Result<Instances, String>,
}

/// Asks Consul what `check` wants to know. `registers`: our workload is to be registered.
///
/// # Errors
/// Where no agent answers.
pub async fn examine(client: &Client, own: &ServiceName, registers: bool) -> Result<Examined, Error> {
    let leader = client.ask(&Question::get("/v1/status/leader".to_owned(), "")).await?;
    let address = serde_json::from_slice::<String>(&leader.body).unwrap_or_default();
    let address = Some(address).filter(|address| !address.is_empty());
    // Without a leader Consul holds each question back for seconds, and answers none.
    let instances = if address.is_some() { instances(client).await } else { Ok(Instances::default()) };
    Ok(Examined {
        agent: client.shown(),
        leader: address,
        clock_ahead: leader.date.as_deref().and_then(ahead),
        anybody_may_register: anybody_may_register(client, own).await,
        missing: missing(client, own, registers).await,
        own: own_instances(client, own).await.map_err(|error| error.text),
        instances: instances.map_err(|error| error.text),
    })
}

async fn missing(client: &Client, own: &ServiceName, registers: bool) -> Vec<String> {
    let wanted = [
        ("service:read", "service", "read", ""),
        ("node:read", "node", "read", ""),
        ("key:read", "key", "read", POLICIES_PREFIX),
        ("service:write", "service", "write", own.as_str()),
    ];
    let mut missing = Vec::new();
    for (named, resource, access, segment) in &wanted[..if registers { 4 } else { 3 }] {
        if let Ok(Some(_)) = denied(client, &[Access { resource, access, segment }]).await {
            let place = if segment.is_empty() { "everything" } else { segment };
            missing.push(format!("{named} on {place}"));
        }
    }
    missing
}

/// Consul without ACLs answers that they are off, and then anybody may.
async fn anybody_may_register(client: &Client, own: &ServiceName) -> Option<bool> {
    let access = [Access { resource: "service", access: "write", segment: own.as_str() }];
    let body = serde_json::to_vec(&access).ok()?;
    let path = "/v1/internal/acl/authorize".to_owned();
    let question = Question { method: Method::POST, is_anonymous: true, ..Question::put(path, body, "") };
    match client.ask(&question).await {
        Ok(answer) => serde_json::from_slice::<Value>(&answer.body).ok()?[0]["Allow"].as_bool(),
        Err(error) if error.text.contains("ACL support disabled") => Some(true),
        Err(_) => None,
    }
}

async fn own_instances(client: &Client, own: &ServiceName) -> Result<Vec<(String, Vec<SpiffeId>)>, Error> {
    let instances = reading(client, own).await?.instances.into_iter();
    Ok(instances.map(|instance| (instance.key.1.to_string(), instance.identities)).collect())
}

async fn reading(client: &Client, name: &ServiceName) -> Result<Reading, Error> {
    let path = format!("/v1/health/service/{name}?stale");
    let question = Question { most: 64 * 1024 * 1024, ..Question::get(path, "") };
    health::read(name, &client.ask(&question).await?.body)
}

/// Reads the instances of all services, as far as there is time.
async fn instances(client: &Client) -> Result<Instances, Error> {
    let mut found = Instances::default();
    let path = "/v1/catalog/services?stale".to_owned();
    let question = Question { most: 64 * 1024 * 1024, ..Question::get(path, "") };
    let answer = client.ask(&question).await?;
    let names: BTreeMap<String, IgnoredAny> = serde_json::from_slice(&answer.body)
        .map_err(|_| health::explain::<BTreeMap<String, IgnoredAny>>("names of services", &answer.body))?;
    // Others cannot be called by name, so nobody misses what they say.
    let names: Vec<ServiceName> = names.keys().filter_map(|name| name.parse().ok()).collect();
    found.services = names.len();
    let all = async {
        for name in names.iter().take(MAX_SERVICES) {
            match reading(client, name).await {
                Ok(reading) => found.mistakes.extend(reading.mistakes),
                Err(error) => found.mistakes.push(error.text),
            }
            found.read += 1;
            if found.mistakes.len() >= MAX_MISTAKES {
                break;
            }
        }
    };
    // What was not read in time is missing in the count.
    let _ = timeout(PATIENCE, all).await;
    found.mistakes.truncate(MAX_MISTAKES);
    Ok(found)
}

/// How many seconds this HTTP date is ahead of our clock.
pub(super) fn ahead(date: &str) -> Option<i64> {
    let theirs = OffsetDateTime::parse(date, &Rfc2822).ok()?;
    Some((theirs - OffsetDateTime::from(SystemTime::now())).whole_seconds())
}

#[cfg(test)]
mod tests {
    use super::{super::fake, *};

    #[tokio::test]
    async fn what_could_not_be_asked_is_not_taken_for_empty() {
        let names = r#"{"cart": [], "orders": [], "No Name": []}"#;
        for (status, body, expected) in [
            (500, "no", None),
            (403, "Permission denied", None),
            (200, "[1]", None),
            (200, names, Some((2, 2))),
        ] {
            let answer = move |path: &str, _| match path.starts_with("/v1/catalog/services") {
                true => Some((status, 1, body)),
                false => Some((200, 1, "[]")),
            };
            let found = instances(&fake::agent(answer).await.0).await.ok();
            assert_eq!(found.map(|found| (found.read, found.services)), expected, "{status} {body}");
        }
    }

    #[test]
    fn a_date_of_http_is_read() {
        let ahead = ahead("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        assert!(ahead < -900_000_000, "{ahead}");
        assert_eq!(super::ahead("yesterday"), None);
    }
}
