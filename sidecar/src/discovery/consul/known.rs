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
mod tests {
    use super::*;
    use crate::model::Protocol;

    fn instance(id: &str, last: u8, is_well: bool) -> Instance {
        Instance {
            key: ("node".into(), id.into()),
            endpoint: Endpoint::at(([10, 0, 0, last], 80).into()),
            identities: vec![format!("spiffe://d/ns/default/sa/{id}").parse().unwrap()],
            protocol: None,
            is_well,
            is_cut_off: false,
        }
    }

    fn reading(instances: &[(&str, u8, bool)]) -> Reading {
        let instances = instances.iter().map(|(id, last, well)| instance(id, *last, *well)).collect();
        Reading { instances, ..Reading::default() }
    }

    fn endpoints(known: &Known) -> Vec<u8> {
        let last = |endpoint: &Endpoint| match endpoint.address.ip() {
            std::net::IpAddr::V4(address) => address.octets()[3],
            std::net::IpAddr::V6(_) => 0,
        };
        known.service().0.endpoints.iter().map(last).collect()
    }

    #[test]
    fn only_the_well_are_called_and_identities_add_up() {
        let mut known = Known::new("orders".parse().unwrap());
        assert_eq!(known.service().0.registered, Registered::No);
        known.accept(reading(&[("a", 1, true), ("b", 2, false)]), false, Instant::now());
        assert_eq!(endpoints(&known), [1]);
        assert_eq!(known.service().0.identities.len(), 2);
        known.accept(reading(&[("b", 2, false)]), false, Instant::now());
        assert_eq!(endpoints(&known), [0; 0]);
        assert_eq!(known.service().0.registered, Registered::Yes);
        known.accept(reading(&[]), false, Instant::now());
        assert_eq!(known.service().0.registered, Registered::No);
    }

    #[test]
    fn those_that_are_cut_off_are_called_where_nobody_is_well() {
        let mut known = Known::new("orders".parse().unwrap());
        let cut_off = |wells: &[(&str, u8, bool)]| {
            let mut all = reading(wells);
            all.instances.push(Instance { is_cut_off: true, ..instance("far", 9, false) });
            all
        };
        known.accept(cut_off(&[("a", 1, true)]), false, Instant::now());
        assert_eq!(endpoints(&known), [1]);
        known.accept(cut_off(&[("a", 1, false)]), false, Instant::now());
        assert_eq!(endpoints(&known), [9]);
        // Consul loses its state: who was called last stays for the grace.
        known.accept(reading(&[("a", 1, false)]), true, Instant::now());
        assert_eq!(endpoints(&known), [9]);
    }

    #[test]
    fn those_that_are_cut_off_stay_out_while_others_are_kept() {
        let start = Instant::now();
        let cut_off = |id, last| Instance { is_cut_off: true, ..instance(id, last, false) };
        let with = |instances| Reading { instances, ..Reading::default() };
        let mut known = Known::new("orders".parse().unwrap());
        known.accept(with(vec![instance("a", 1, true), cut_off("far", 9)]), false, start);
        known.accept(with(vec![cut_off("far", 9)]), true, start);
        assert_eq!(endpoints(&known), [1]);
        // Who is well, and cut off later, goes on.
        known.accept(with(vec![cut_off("far", 9), instance("b", 2, true)]), false, start);
        known.accept(with(vec![cut_off("far", 9), cut_off("b", 2)]), false, start);
        assert_eq!(endpoints(&known), [1, 2]);
        known.expire(start + GRACE);
        assert_eq!(endpoints(&known), [2, 9], "nobody is kept any more");
    }

    #[test]
    fn after_a_gap_old_and_new_are_united_for_a_grace() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut known = Known::new("orders".parse().unwrap());
        known.accept(
            reading(&[("a", 1, true), ("b", 2, true), ("c", 3, true), ("d", 4, false)]),
            false,
            at(0),
        );
        // Consul is back, and empty.
        known.accept(reading(&[]), true, at(10));
        assert_eq!(endpoints(&known), [1, 2, 3]);
        assert_eq!(known.service().0.registered, Registered::Yes);
        // Registrations come back: one under another id, one not well yet.
        known.accept(
            reading(&[("a", 1, true), ("other", 2, true), ("c", 3, false), ("e", 5, true)]),
            false,
            at(20),
        );
        assert_eq!(endpoints(&known), [1, 2, 3, 5]);
        // Who was seen well since and left, is gone at once.
        known.accept(reading(&[("other", 2, true), ("c", 3, false), ("e", 5, true)]), false, at(30));
        assert_eq!(endpoints(&known), [2, 3, 5]);
        assert!(!known.expire(at(309)));
        assert!(known.expire(at(310)));
        assert_eq!(endpoints(&known), [2, 5]);
        assert_eq!(known.kept_until(), None);
    }

    #[test]
    fn a_second_gap_loses_nobody_and_makes_no_grace_longer() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut known = Known::new("orders".parse().unwrap());
        known.accept(reading(&[("a", 1, true)]), false, at(0));
        known.accept(reading(&[("b", 2, true)]), true, at(100));
        known.accept(reading(&[]), true, at(200));
        assert_eq!(endpoints(&known), [1, 2]);
        assert_eq!(known.kept_until(), Some(at(400)));
        assert!(known.expire(at(400)));
        assert_eq!(endpoints(&known), [2]);
        assert_eq!(known.kept_until(), Some(at(500)));
    }

    #[test]
    fn however_often_a_gap_comes_who_left_vanishes() {
        let start = Instant::now();
        let mut known = Known::new("orders".parse().unwrap());
        for minutes in 0..60_u8 {
            // Each is replaced by another, in a gap of its own.
            let now = start + Duration::from_secs(60) * u32::from(minutes);
            known.accept(reading(&[(&format!("i{minutes}"), minutes, true)]), minutes > 0, now);
        }
        assert_eq!(endpoints(&known), [54, 55, 56, 57, 58, 59]);
    }

    #[test]
    fn so_many_are_kept_and_no_more() {
        let (mut known, now) = (Known::new("orders".parse().unwrap()), Instant::now());
        for gap in 0..3_u32 {
            let all = (0..12_000_u32).map(|number| {
                let [_, _, high, low] = number.to_be_bytes();
                let address = ([10, u8::try_from(gap).unwrap(), high, low], 80).into();
                let key = ("node".into(), format!("{gap}-{number}").into());
                Instance { key, endpoint: Endpoint::at(address), ..instance("any", 1, true) }
            });
            known.accept(Reading { instances: all.collect(), ..Reading::default() }, gap > 0, now);
        }
        assert_eq!(known.kept.len(), MAX_INSTANCES);
    }

    #[test]
    fn what_can_no_longer_be_read_stays_as_it_was() {
        let mut known = Known::new("orders".parse().unwrap());
        known.accept(reading(&[("a", 1, true), ("b", 2, true)]), false, Instant::now());
        let unreadable = [("node".into(), "a".into()), ("node".into(), "new".into())].into();
        let broken = Reading { unreadable, ..reading(&[("b", 2, true)]) };
        known.accept(broken, false, Instant::now());
        assert_eq!(endpoints(&known), [1, 2]);
    }

    #[test]
    fn what_cannot_be_read_says_whom_to_expect_all_the_same() {
        let mut known = Known::new("orders".parse().unwrap());
        let plain = || {
            let instances = vec![Instance { identities: Vec::new(), ..instance("a", 1, true) }];
            Reading { instances, ..Reading::default() }
        };
        let identities = instance("b", 2, true).identities;
        known.accept(Reading { identities: identities.clone(), ..plain() }, false, Instant::now());
        let service = known.service().0;
        assert_eq!((service.identities, service.is_identity_unreadable), (identities, false));
        known.accept(Reading { is_identity_unreadable: true, ..plain() }, false, Instant::now());
        let service = known.service().0;
        assert_eq!((service.identities, service.is_identity_unreadable), (vec![], true));
        known.accept(plain(), false, Instant::now());
        assert!(!known.service().0.is_identity_unreadable);
    }

    #[test]
    fn identities_of_instances_that_were_not_called_survive_a_gap() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let identity = |name: &str| format!("spiffe://d/ns/default/sa/{name}").parse::<SpiffeId>().unwrap();
        let plain = || {
            let instances = vec![Instance { identities: Vec::new(), ..instance("new", 9, true) }];
            Reading { instances, ..Reading::default() }
        };
        let mut known = Known::new("orders".parse().unwrap());
        let before =
            Reading { identities: vec![identity("unreadable")], ..reading(&[("critical", 1, false)]) };
        known.accept(before, false, at(0));
        // Consul is back without its state, and the only instance that it knows states no identity.
        known.accept(plain(), true, at(10));
        let both = vec![identity("critical"), identity("unreadable")];
        assert_eq!(known.service().0.identities, both);
        assert_eq!(endpoints(&known), [9]);
        // A further gap makes their grace no longer, unless an answer stated them again.
        known.accept(reading(&[("critical", 1, false)]), false, at(100));
        known.accept(plain(), true, at(200));
        assert_eq!(known.kept_until(), Some(at(310)));
        assert!(!known.expire(at(309)) && known.service().0.identities == both);
        assert!(known.expire(at(310)));
        assert_eq!(known.service().0.identities, [identity("critical")]);
        assert!(known.expire(at(500)));
        assert_eq!((known.service().0.identities, known.kept_until()), (vec![], None));
    }

    #[test]
    fn an_identity_that_cannot_be_read_forbids_plaintext_after_a_gap_too() {
        let start = Instant::now();
        let mut known = Known::new("orders".parse().unwrap());
        known.accept(Reading { is_identity_unreadable: true, ..Reading::default() }, false, start);
        known.accept(Reading::default(), true, start);
        assert!(known.service().0.is_identity_unreadable);
        assert_eq!(known.kept_until(), Some(start + GRACE));
        assert!(known.expire(start + GRACE));
        assert!(!known.service().0.is_identity_unreadable);
    }

    #[test]
    fn a_service_of_which_nothing_can_be_read_is_registered_all_the_same() {
        let mut known = Known::new("orders".parse().unwrap());
        let unreadable = [("node".into(), "a".into())].into();
        known.accept(Reading { unreadable, ..Reading::default() }, false, Instant::now());
        assert_eq!((endpoints(&known), known.service().0.registered), (vec![], Registered::Yes));
        known.accept(Reading::default(), false, Instant::now());
        assert_eq!(known.service().0.registered, Registered::No);
    }

    #[test]
    fn of_two_protocols_the_first_counts_and_it_is_told() {
        let mut known = Known::new("orders".parse().unwrap());
        let mut both = reading(&[("a", 1, true), ("b", 2, true)]);
        both.instances[0].protocol = Some(Protocol::Http1);
        both.instances[1].protocol = Some(Protocol::Opaque);
        known.accept(both, false, Instant::now());
        let (service, contradiction) = known.service();
        assert_eq!(service.protocol, Some(Protocol::Http1));
        let contradiction = contradiction.unwrap();
        assert!(contradiction.contains("instance `b`") && contradiction.contains("tcp"), "{contradiction}");
    }
}
