//! What is known of one service, from answer to answer. Pure, with time as an argument. After a gap (an outage,
//! or an index that went back) the registry may have forgotten who is alive: then the endpoints of before stay
//! beside the new ones for a grace, until each was seen well again, and the breakers decide who is called. Further
//! gaps make nobody's grace longer. All identities of before stay for the same grace, also those of instances that were
//! not called: a service that has identities is never called in plaintext. The breakers decide too where no instance is well, nobody is kept, and some are
//! cut off: Consul's servers do not reach the agents of their nodes, which says nothing about the apps.

use std::{
    collections::{BTreeMap, HashSet},
    time::Duration,
};

use tokio::time::Instant;
use weft_proto::spiffe::SpiffeId;

use super::health::{Instance, InstanceKey, MAX_INSTANCES, Reading};
use crate::model::{Endpoint, Registered, Service, ServiceName};

/// How long endpoints of before an outage stay.
pub(super) const GRACE: Duration = Duration::from_secs(300);

/// The instances of one service.
#[derive(Debug)]
pub(super) struct Known {
    name: ServiceName,
    instances: BTreeMap<InstanceKey, Instance>,
    /// Called before a gap, and not seen well since.
    kept: BTreeMap<InstanceKey, Kept>,
    /// Known before a gap, each with the end of its grace: also the identities of instances that are not kept, because
    /// they were critical or could not be read.
    kept_identities: BTreeMap<SpiffeId, Instant>,
    /// An identity could not be read before a gap: until then plaintext stays forbidden.
    identity_unreadable_until: Option<Instant>,
    /// Instances that are registered, as the last answer had it, and cannot be read.
    unreadable: usize,
    /// The identities that they state: they are the service's too.
    identities: Vec<SpiffeId>,
    /// One of them states identities that cannot be read either.
    is_identity_unreadable: bool,
}

#[derive(Debug)]
struct Kept {
    instance: Instance,
    /// The end of its grace.
    until: Instant,
}

impl Known {
    pub(super) fn new(name: ServiceName) -> Self {
        Known {
            name,
            instances: BTreeMap::new(),
            kept: BTreeMap::new(),
            kept_identities: BTreeMap::new(),
            identity_unreadable_until: None,
            unreadable: 0,
            identities: Vec::new(),
            is_identity_unreadable: false,
        }
    }

    /// Is nothing known, or nothing left?
    pub(super) fn is_empty(&self) -> bool {
        self.instances.is_empty() && self.kept.is_empty()
    }

    /// When the first of the kept endpoints or identities must go.
    pub(super) fn kept_until(&self) -> Option<Instant> {
        let endpoints = self.kept.values().map(|kept| kept.until);
        let identities = self.kept_identities.values().copied().chain(self.identity_unreadable_until);
        endpoints.chain(identities).min()
    }

    /// Takes an answer; `after_gap`: the first one after an outage, or with an index that went back.
    pub(super) fn accept(&mut self, reading: Reading, after_gap: bool, now: Instant) {
        let mut newer: BTreeMap<InstanceKey, Instance> =
            reading.instances.into_iter().map(|instance| (instance.key.clone(), instance)).collect();
        if after_gap {
            self.keep_identities(now);
        }
        self.unreadable = reading.unreadable.len();
        self.identities = reading.identities;
        self.is_identity_unreadable = reading.is_identity_unreadable;
        let is_called = self.called();
        let older = std::mem::take(&mut self.instances);
        // One that can no longer be read stays as it was last read.
        for key in &reading.unreadable {
            if let Some(before) = older.get(key) {
                newer.entry(key.clone()).or_insert_with(|| before.clone());
            }
        }
        // Whoever was called until now and is cut off goes on beside those that are kept.
        let is_anybody_well = newer.values().any(|instance| instance.is_well);
        let is_lost = |key: &InstanceKey| newer.get(key).is_some_and(|now| now.is_cut_off);
        let joins_kept = !self.kept.is_empty() && !is_anybody_well;
        for (key, instance) in older.into_iter().filter(|(_, instance)| is_called(instance)) {
            if after_gap || joins_kept && is_lost(&key) {
                self.keep(key, instance, now);
            }
        }
        self.instances = newer;
        if !self.kept.is_empty() {
            let well = self.instances.values().filter(|instance| instance.is_well);
            let (keys, addresses): (HashSet<_>, HashSet<_>) =
                well.map(|instance| (instance.key.clone(), instance.endpoint.address)).unzip();
            self.kept.retain(|key, kept| {
                !keys.contains(key) && !addresses.contains(&kept.instance.endpoint.address)
            });
        }
        self.expire(now);
    }

    /// Who is kept already stays as it was, and no longer.
    fn keep(&mut self, key: InstanceKey, instance: Instance, now: Instant) {
        if self.kept.len() < MAX_INSTANCES {
            self.kept.entry(key).or_insert(Kept { instance, until: now + GRACE });
        }
    }

    /// Keeps the identities of the last answer before a gap. A service that had some must not be called in plaintext
    /// because the registry forgot the instance that stated them.
    fn keep_identities(&mut self, now: Instant) {
        let until = now + GRACE;
        let of_instances = self.instances.values().flat_map(|instance| &instance.identities);
        for identity in of_instances.chain(&self.identities) {
            if let Some(kept) = self.kept_identities.get_mut(identity) {
                *kept = until;
            } else if self.kept_identities.len() < MAX_INSTANCES {
                self.kept_identities.insert(identity.clone(), until);
            }
        }
        if self.is_identity_unreadable {
            self.identity_unreadable_until = Some(until);
        }
    }

    /// Drops what was kept long enough; returns whether anything was.
    pub(super) fn expire(&mut self, now: Instant) -> bool {
        let count = |known: &Known| {
            let flags = usize::from(known.identity_unreadable_until.is_some());
            known.kept.len() + known.kept_identities.len() + flags
        };
        let before = count(self);
        self.kept.retain(|_, kept| now < kept.until);
        self.kept_identities.retain(|_, until| now < *until);
        self.identity_unreadable_until = self.identity_unreadable_until.filter(|until| now < *until);
        count(self) < before
    }

    /// The service as it is called now, and where its instances contradict each other.
    pub(super) fn service(&self) -> (Service, Option<String>) {
        let mut service = Service::named(self.name.clone());
        let kept = || self.kept.values().map(|kept| &kept.instance);
        let all = || self.instances.values().chain(kept());
        let mut contradiction = None;
        for instance in all() {
            service.identities.extend_from_slice(&instance.identities);
            match (service.protocol, instance.protocol) {
                (None, stated) => service.protocol = stated,
                (Some(first), Some(other)) if first != other => {
                    contradiction.get_or_insert_with(|| {
                        format!(
                            "service `{}`, instance `{}` on node `{}`: it declares {other}, others {first}; \
                             the first counts",
                            self.name,
                            instance.key.1.escape_debug(),
                            instance.key.0.escape_debug()
                        )
                    });
                }
                _ => {}
            }
        }
        service.identities.extend_from_slice(&self.identities);
        service.identities.extend(self.kept_identities.keys().cloned());
        service.is_identity_unreadable =
            self.is_identity_unreadable || self.identity_unreadable_until.is_some();
        service.identities.sort();
        service.identities.dedup();
        let is_called = self.called();
        let called = self.instances.values().filter(|instance| is_called(instance)).chain(kept());
        service.endpoints = called.map(|instance| instance.endpoint.clone()).collect();
        sort(&mut service.endpoints);
        let is_nobody = self.is_empty() && self.unreadable == 0;
        service.registered = if is_nobody { Registered::No } else { Registered::Yes };
        (service, contradiction)
    }

    /// Which instances are called beside the kept ones: the well ones, and where there is nobody else, those that
    /// are cut off.
    fn called(&self) -> fn(&Instance) -> bool {
        match (self.instances.values().any(|instance| instance.is_well), self.kept.is_empty()) {
            (true, _) => |instance| instance.is_well,
            (false, true) => |instance| instance.is_cut_off,
            (false, false) => |_| false,
        }
    }
}

/// By address, each once; of two entries for one endpoint the heavier counts.
fn sort(endpoints: &mut Vec<Endpoint>) {
    endpoints.sort_by_key(|endpoint| (endpoint.address, u16::MAX - endpoint.weight));
    endpoints.dedup_by_key(|endpoint| endpoint.address);
}

#[cfg(test)]
mod tests;
