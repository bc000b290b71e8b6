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
    known.accept(reading(&[("a", 1, true), ("b", 2, true), ("c", 3, true), ("d", 4, false)]), false, at(0));
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
    let before = Reading { identities: vec![identity("unreadable")], ..reading(&[("critical", 1, false)]) };
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
