//! What `check` says of Consul: reachable, led, permitted, guarded, in time; and whether it says of our workload
//! what is true.

use std::sync::Arc;

use hyper::Method;
use serde_json::Value;
use tokio::time::timeout;

use super::PATIENCE;
use crate::{
    admin,
    config::Config,
    discovery::consul::{self, Examined, Instances},
    redirect::Finding,
    telemetry::Metrics,
};

/// Certificates and tokens are judged by the clock: a difference beyond this many seconds matters.
const CLOCKS_AGREE: i64 = 5;

pub(super) async fn findings(config: &Config) -> Vec<Finding> {
    let Some(settings) = &config.stores.consul else { return Vec::new() };
    let client = match consul::Client::new(settings, Arc::new(Metrics::new())) {
        Ok(client) => client,
        Err(why) => return vec![Finding::wrong("Consul", why)],
    };
    let registers = config.stores.publish && !config.app.ports.is_empty();
    let examined = match timeout(PATIENCE * 2, consul::examine(&client, &config.own.service, registers)).await
    {
        Ok(Ok(examined)) => examined,
        Ok(Err(error)) => return vec![Finding::wrong("Consul", error.to_string())],
        Err(_) => return vec![Finding::wrong("Consul", format!("{} is silent", client.shown()))],
    };
    let mut findings = vec![leader(&examined), permissions(&examined), guard(&examined, config)];
    findings.extend(clock(&examined));
    if examined.leader.is_some() {
        findings.extend(instances(&examined.instances));
    }
    if registers {
        findings.push(registration(&examined, config).await);
    }
    findings
}

fn leader(examined: &Examined) -> Finding {
    match &examined.leader {
        Some(leader) => Finding::shown("Consul", format!("{} answers; {leader} leads", examined.agent)),
        None => Finding::wrong(
            "Consul",
            format!(
                "{} answers, but there is no leader; are the servers running and connected?",
                examined.agent
            ),
        ),
    }
}

fn permissions(examined: &Examined) -> Finding {
    let subject = "Consul's ACLs for this token";
    if examined.missing.is_empty() {
        return Finding::shown(subject, "all that a sidecar needs is allowed");
    }
    let missing = examined.missing.join(", ");
    Finding::wrong(subject, format!("missing: {missing}; docs/consul.md has the policies"))
}

fn guard(examined: &Examined, config: &Config) -> Finding {
    let subject = "Consul's ACLs for strangers";
    let service = &config.own.service;
    match examined.anybody_may_register {
        Some(false) => Finding::shown(subject, format!("nobody registers as `{service}` without a token")),
        Some(true) => Finding::wrong(
            subject,
            format!(
                "whoever reaches Consul may register as `{service}`, and so decide where its traffic goes and \
                 which identity its clients expect; enable ACLs with default_policy = \"deny\", or name the \
                 identities in policies that others cannot write"
            ),
        ),
        None => {
            Finding::unknown(subject, "this Consul does not say; see that acl.default_policy is \"deny\"")
        }
    }
}

fn clock(examined: &Examined) -> Option<Finding> {
    let ahead = examined.clock_ahead?;
    Some(if ahead.abs() <= CLOCKS_AGREE {
        Finding::shown("clock", "it agrees with Consul's")
    } else {
        let detail =
            format!("Consul's is {ahead} seconds ahead of ours; certificates need clocks that agree (NTP)");
        Finding::wrong("clock", detail)
    })
}

/// Instances that no sidecar can read.
fn instances(found: &Result<Instances, String>) -> Vec<Finding> {
    let subject = "services in Consul";
    let found = match found {
        Ok(found) => found,
        Err(why) => return vec![Finding::unknown(subject, format!("they cannot be read: {why}"))],
    };
    let read = format!("{} of {} read", found.read, found.services);
    if found.mistakes.is_empty() && found.read < found.services {
        return vec![Finding::unknown(
            subject,
            format!("{read}, without a mistake; nobody looked at the rest"),
        )];
    }
    if found.mistakes.is_empty() {
        return vec![Finding::shown(subject, format!("{read}, without a mistake"))];
    }
    let wrong =
        |mistake: &String| Finding::wrong(subject, format!("{mistake}; sidecars leave it out ({read})"));
    found.mistakes.iter().map(wrong).collect()
}

/// Compares the registry with the sidecar that runs with these settings, if one does.
async fn registration(examined: &Examined, config: &Config) -> Finding {
    let subject = format!("registration of `{}`", config.own.service);
    let instances = match &examined.own {
        Ok(instances) => instances,
        Err(why) => return Finding::unknown(subject, format!("it cannot be read: {why}")),
    };
    let ask = async |path| {
        admin::ask(&config.ports.admin_socket, Method::GET, path, None).await.unwrap_or_default()
    };
    let (status, certificate): (Value, Value) = (ask("/status").await, ask("/certificate").await);
    let Some(instance) = status["instance"].as_str() else {
        let count = instances.len();
        return Finding::unknown(
            subject,
            format!("{count} instances; no sidecar with these settings runs here"),
        );
    };
    let id = format!("{}-{instance}", config.own.service);
    match (instances.iter().find(|(other, _)| *other == id), certificate["id"].as_str()) {
        (None, _) => Finding::wrong(
            subject,
            format!(
                "a sidecar runs as `{instance}`, but is not registered; its log and `show status` say why"
            ),
        ),
        (Some((_, registered)), Some(own)) if !registered.iter().any(|identity| identity.as_str() == own) => {
            let registered: Vec<&str> = registered.iter().map(|identity| identity.as_str()).collect();
            Finding::wrong(
                subject,
                format!(
                    "the certificate says {own}, but the registry {}; clients would refuse it: restart the sidecar, \
                     and see who else may register there",
                    if registered.is_empty() { "says nothing".to_owned() } else { registered.join(", ") }
                ),
            )
        }
        (Some(_), Some(own)) => Finding::shown(subject, format!("`{id}` is registered as {own}")),
        (Some(_), None) => Finding::shown(subject, format!("`{id}` is registered, without an identity")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::redirect::Outcome;

    #[test]
    fn services_that_nobody_looked_at_are_not_called_right() {
        let of = |read, services| Ok(Instances { read, services, mistakes: Vec::new() });
        for (found, expected) in [
            (of(2, 2), Outcome::Shown),
            (of(200, 201), Outcome::Unknown),
            (Err("no permission".to_owned()), Outcome::Unknown),
        ] {
            assert_eq!(instances(&found)[0].outcome, expected, "{found:?}");
        }
    }
}
