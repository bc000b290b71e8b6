use std::collections::BTreeMap;

use super::*;

const POLICY: Breaker = Breaker {
    consecutive_failures: 3,
    ejection: Duration::from_secs(1),
    ejection_max: Duration::from_secs(60),
    max_ejected_percent: 50,
};

fn address(number: u16) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, 1], number))
}

fn weighted(weights: &[u16]) -> Vec<Endpoint> {
    let endpoint = |(at, weight): (usize, &u16)| Endpoint {
        weight: *weight,
        ..Endpoint::at(address(u16::try_from(at).unwrap() + 1))
    };
    weights.iter().enumerate().map(endpoint).collect()
}

fn service(endpoints: Vec<Endpoint>) -> Arc<Service> {
    Arc::new(Service { endpoints, ..Service::named("orders".parse().unwrap()) })
}

fn balancer(weights: &[u16]) -> Balancer {
    let balancer = Balancer::new(POLICY, 42);
    balancer.update(service(weighted(weights)));
    balancer
}

/// Picks until this endpoint is chosen; the others are let go at once.
fn pick_this(balancer: &Balancer, wanted: SocketAddr, now: Instant) -> Picked {
    (0..1000)
        .find_map(|_| balancer.pick(&[], now).filter(|picked| picked.address() == wanted))
        .expect("picked")
}

fn eject(balancer: &Balancer, wanted: SocketAddr, now: Instant) -> Option<Ejection> {
    (0..3).find_map(|_| balancer.pick_only(wanted, now).expect("in the set").failed(now))
}

fn conditions(balancer: &Balancer, now: Instant) -> Vec<Condition> {
    balancer.states(now).iter().map(|state| state.condition).collect()
}

/// Sends `count` requests one after the other, each taking what `latency` says; counts them by port.
fn shares(
    balancer: &Balancer,
    count: u32,
    mut now: Instant,
    latency: impl Fn(SocketAddr) -> Duration,
) -> BTreeMap<u16, u32> {
    let mut shares = BTreeMap::new();
    for _ in 0..count {
        let mut picked = balancer.pick(&[], now).unwrap();
        now += latency(picked.address());
        picked.succeeded(now);
        *shares.entry(picked.address().port()).or_default() += 1;
    }
    shares
}

#[test]
fn nobody_is_chosen_from_nobody_and_one_from_one() {
    let now = Instant::now();
    assert!(balancer(&[]).pick(&[], now).is_none());
    let one = balancer(&[100]);
    assert_eq!(one.pick(&[address(1)], now).unwrap().address(), address(1));
    assert!(one.pick_only(address(2), now).is_none());
}

#[test]
fn equal_endpoints_share_equally() {
    let now = Instant::now();
    let shares = shares(&balancer(&[100; 4]), 8_000, now, |_| Duration::from_millis(5));
    assert!(shares.len() == 4 && shares.values().all(|count| (1_800..2_200).contains(count)), "{shares:?}");
}

#[test]
fn a_slow_endpoint_gets_little() {
    let now = Instant::now();
    let slow = |at: SocketAddr| Duration::from_millis(if at.port() == 1 { 200 } else { 5 });
    let shares = shares(&balancer(&[100; 3]), 20_000, now, slow);
    assert!(shares[&1] < 200, "{shares:?}");
    assert!(shares[&1] > 1, "never tried again: {shares:?}");
}

#[test]
fn a_busy_endpoint_gets_less() {
    let now = Instant::now();
    let balancer = balancer(&[100; 2]);
    for port in [1, 2] {
        pick_this(&balancer, address(port), now).succeeded(now + Duration::from_millis(5));
    }
    let _stuck: Vec<Picked> = (0..3).map(|_| balancer.pick_only(address(1), now).unwrap()).collect();
    for _ in 0..100 {
        assert_eq!(balancer.pick(&[], now).unwrap().address(), address(2));
    }
}

#[test]
fn weights_are_respected() {
    for (weights, expected) in [
        (&[100u16, 300][..], &[0.25, 0.75][..]),
        (&[100, 100, 800], &[0.1, 0.1, 0.8]),
        (&[1, 10_000], &[0.0, 1.0]),
    ] {
        let now = Instant::now();
        let shares = shares(&balancer(weights), 20_000, now, |_| Duration::from_millis(5));
        for (port, expected) in (1u16..).zip(expected) {
            let share = f64::from(*shares.get(&port).unwrap_or(&0)) / 20_000.0;
            assert!((share - expected).abs() < 0.04, "{weights:?}: {shares:?}");
        }
    }
}

#[test]
fn a_slow_heavy_endpoint_gets_little_too() {
    let now = Instant::now();
    let slow = |at: SocketAddr| Duration::from_millis(if at.port() == 2 { 500 } else { 5 });
    let shares = shares(&balancer(&[100, 300]), 2_000, now, slow);
    assert!(shares[&2] < 100, "{shares:?}");
}

#[test]
fn a_new_endpoint_gets_one_request_until_it_has_answered() {
    let now = Instant::now();
    let balancer = balancer(&[100; 2]);
    pick_this(&balancer, address(1), now).succeeded(now + Duration::from_millis(5));
    let probe = pick_this(&balancer, address(2), now);
    for _ in 0..100 {
        assert_eq!(balancer.pick(&[], now).unwrap().address(), address(1));
    }
    drop(probe);
    pick_this(&balancer, address(2), now);
}

#[test]
fn the_order_of_endpoints_makes_no_difference() {
    let now = Instant::now();
    let mut endpoints = weighted(&[1, 2, 3]);
    let balancer = Balancer::new(POLICY, 42);
    balancer.update(service(endpoints.clone()));
    eject(&balancer, address(2), now).unwrap();
    endpoints.reverse();
    endpoints.push(Endpoint::at(address(1)));
    balancer.update(service(endpoints));
    let weights: Vec<u16> = balancer.states(now).iter().map(|state| state.endpoint.weight).collect();
    assert_eq!(weights, [1, 2, 3]);
    assert_eq!(conditions(&balancer, now), [Condition::Closed, Condition::Ejected, Condition::Closed]);
    assert_eq!(balancer.conditions(now), conditions(&balancer, now));
}

#[test]
fn an_update_keeps_what_is_known_of_those_that_stay() {
    let now = Instant::now();
    let balancer = balancer(&[100; 3]);
    let held = balancer.pick_only(address(1), now).unwrap();
    balancer.pick_only(address(2), now).unwrap().succeeded(now + Duration::from_millis(80));
    eject(&balancer, address(1), now).unwrap();
    let mut changed = weighted(&[7, 100, 100, 100]);
    changed.remove(2);
    changed[0].zone = Some("b".into());
    balancer.update(service(changed.clone()));
    let states = balancer.states(now + Duration::from_millis(80));
    assert_eq!(states.iter().map(|state| state.endpoint.clone()).collect::<Vec<_>>(), changed);
    assert_eq!((states[0].condition, states[0].in_flight), (Condition::Ejected, 1));
    assert!((states[1].load - 0.08).abs() < 1e-9, "{states:?}");
    assert_eq!(states[2].load, 0.0);
    // Gone and back again is a new endpoint: the old attempt has no part in it.
    balancer.update(service(Vec::new()));
    assert!(balancer.pick(&[], now).is_none());
    balancer.update(service(changed.clone()));
    drop(held);
    assert!(balancer.states(now).iter().all(|state| state.in_flight == 0));
    assert!(conditions(&balancer, now).iter().all(|condition| *condition == Condition::Closed));
}

#[test]
fn attempts_count_until_they_are_dropped() {
    let now = Instant::now();
    let balancer = balancer(&[100]);
    let in_flight = || balancer.states(now)[0].in_flight;
    let mut one = balancer.pick(&[], now).unwrap();
    let other = balancer.pick(&[], now).unwrap();
    one.succeeded(now);
    assert_eq!(in_flight(), 2);
    drop(one);
    assert_eq!(in_flight(), 1);
    drop(other);
    assert_eq!(in_flight(), 0);
    assert_eq!(balancer.states(now)[0].failures, 0, "dropped without a verdict");
}

#[test]
fn an_endpoint_that_fails_is_put_out_probed_and_taken_back() {
    let now = Instant::now();
    let balancer = balancer(&[100; 2]);
    let ejection = eject(&balancer, address(1), now).unwrap();
    assert_eq!((ejection.address, ejection.count), (address(1), 1));
    for _ in 0..100 {
        assert_eq!(balancer.pick(&[], now).unwrap().address(), address(2));
    }
    let later = now + ejection.lasts;
    assert_eq!(conditions(&balancer, later), [Condition::HalfOpen, Condition::Closed]);
    let mut probe = balancer.pick(&[], later).unwrap();
    assert_eq!(probe.address(), address(1), "the next request is the probe");
    for _ in 0..100 {
        assert_eq!(balancer.pick(&[], later).unwrap().address(), address(2), "one probe at a time");
    }
    let second = probe.failed(later).unwrap();
    assert!(second.count == 2 && second.lasts > Duration::from_millis(1400), "{second:?}");
    drop(probe);
    let later = later + second.lasts;
    let mut probe = balancer.pick(&[], later).unwrap();
    assert_eq!(probe.address(), address(1));
    probe.succeeded(later);
    assert_eq!(conditions(&balancer, later), [Condition::Closed, Condition::Closed]);
}

/// An attempt whose answer has begun.
fn answered(balancer: &Balancer, wanted: SocketAddr, now: Instant) -> Picked {
    let mut picked = balancer.pick_only(wanted, now).expect("in the set");
    picked.answered(now + Duration::from_millis(5));
    picked
}

#[test]
fn answers_that_break_off_put_an_endpoint_out_and_whole_ones_do_not() {
    let now = Instant::now();
    let balancer = balancer(&[100; 2]);
    for _ in 0..POLICY.consecutive_failures - 1 {
        assert_eq!(answered(&balancer, address(1), now).failed(now), None);
    }
    answered(&balancer, address(1), now).completed(now);
    assert_eq!(balancer.states(now)[0].failures, 0, "a whole answer between them");
    let broken = (0..POLICY.consecutive_failures).map(|_| answered(&balancer, address(1), now).failed(now));
    assert_eq!(broken.flatten().count(), 1);
    assert_eq!(conditions(&balancer, now), [Condition::Ejected, Condition::Closed]);
    assert!(balancer.states(now).iter().all(|state| state.in_flight == 0));
}

#[test]
fn an_answer_that_its_client_leaves_is_neither_success_nor_failure() {
    let now = Instant::now();
    let balancer = balancer(&[100; 2]);
    let later = now + Duration::from_secs(3600);
    for _ in 0..POLICY.consecutive_failures - 1 {
        answered(&balancer, address(1), now).failed(now);
    }
    for _ in 0..10 {
        drop(answered(&balancer, address(1), now));
    }
    assert_eq!(balancer.states(later)[0].failures, POLICY.consecutive_failures - 1);
    assert!(answered(&balancer, address(1), now).failed(now).is_some());
}

#[test]
fn the_latency_is_that_of_the_head() {
    let now = Instant::now();
    let balancer = balancer(&[100; 2]);
    let much_later = now + Duration::from_secs(3600);
    answered(&balancer, address(1), now).completed(much_later);
    answered(&balancer, address(2), now).failed(much_later);
    for state in balancer.states(now + Duration::from_millis(5)) {
        assert!((state.load - 0.005).abs() < 1e-9, "{state:?}");
    }
}

#[test]
fn a_failure_is_told_once_and_not_taken_back() {
    let now = Instant::now();
    let balancer = balancer(&[100; 2]);
    let mut bad_head = balancer.pick_only(address(1), now).unwrap();
    bad_head.failed(now);
    assert_eq!(bad_head.failed(now), None);
    assert_eq!(balancer.states(now)[0].failures, 1);
    assert_eq!(balancer.states(now)[0].in_flight, 1, "its answer goes on");
    bad_head.completed(now);
    assert_eq!((balancer.states(now)[0].failures, balancer.states(now)[0].in_flight), (1, 0));
}

#[test]
fn a_probe_is_judged_by_its_end_and_a_stream_by_its_length() {
    let now = Instant::now();
    let balancer = balancer(&[100; 2]);
    let first = eject(&balancer, address(1), now).unwrap();
    let back = now + first.lasts;
    let probe = |now: Instant| {
        let mut probe = balancer.pick(&[], now).unwrap();
        assert_eq!(probe.address(), address(1), "the next request is the probe");
        probe.answered(now);
        probe
    };
    let second = probe(back).failed(back).expect("a good head, and then it broke off");
    let back = back + second.lasts;
    drop(probe(back));
    assert_eq!(conditions(&balancer, back)[0], Condition::HalfOpen, "its client went away");
    let stream = probe(back);
    assert_eq!(balancer.pick(&[], back).unwrap().address(), address(2), "one at a time");
    let later = back + second.lasts;
    assert_eq!(balancer.pick(&[], later).unwrap().address(), address(1), "the stream goes on");
    assert_eq!(conditions(&balancer, later)[0], Condition::Closed);
    drop(stream);
    assert_eq!(conditions(&balancer, later)[0], Condition::Closed);
}

#[test]
fn a_retry_goes_elsewhere_and_is_no_probe_if_it_can_be_helped() {
    let now = Instant::now();
    let balancer = balancer(&[100; 3]);
    let later = now + eject(&balancer, address(1), now).unwrap().lasts;
    for _ in 0..50 {
        assert_eq!(balancer.pick(&[address(2)], later).unwrap().address(), address(3));
    }
    // All that are closed were tried: now the probe, and while it runs one of the tried ones.
    let tried = [address(2), address(3)];
    let probe = balancer.pick(&tried, later).unwrap();
    assert_eq!(probe.address(), address(1));
    assert!(tried.contains(&balancer.pick(&tried, later).unwrap().address()));
}

#[test]
fn the_last_endpoint_is_never_put_out() {
    let now = Instant::now();
    let one = balancer(&[100]);
    for _ in 0..20 {
        assert_eq!(eject(&one, address(1), now), None);
    }
    let all = Breaker { max_ejected_percent: 100, ..POLICY };
    let two = Balancer::new(all, 1);
    two.update(service(weighted(&[100; 2])));
    assert!(eject(&two, address(1), now).is_some());
    assert_eq!(eject(&two, address(2), now), None);
    assert_eq!(two.pick(&[], now).unwrap().address(), address(2));
}

#[test]
fn no_more_than_the_share_is_out() {
    let now = Instant::now();
    for (endpoints, percent, expected) in
        [(10, 50, 5), (10, 30, 3), (3, 50, 1), (3, 10, 1), (2, 0, 1), (4, 100, 3)]
    {
        let balancer = Balancer::new(Breaker { max_ejected_percent: percent, ..POLICY }, 1);
        balancer.update(service(weighted(&vec![100; endpoints])));
        for port in 1..=u16::try_from(endpoints).unwrap() {
            eject(&balancer, address(port), now);
        }
        let out = conditions(&balancer, now).iter().filter(|one| **one == Condition::Ejected).count();
        assert_eq!(out, expected, "{endpoints} endpoints, {percent} percent");
    }
}

#[test]
fn when_all_are_out_all_are_tried_and_a_success_counts() {
    let now = Instant::now();
    let balancer = balancer(&[100; 2]);
    eject(&balancer, address(1), now).unwrap();
    balancer.update(service(weighted(&[100])));
    let mut picked = balancer.pick(&[], now).unwrap();
    assert_eq!(picked.address(), address(1));
    assert_eq!(picked.failed(now), None);
    balancer.pick(&[], now).unwrap().succeeded(now);
    assert_eq!(conditions(&balancer, now), [Condition::Closed]);
}

#[test]
fn the_same_seed_gives_the_same_choices() {
    let now = Instant::now();
    let run = |seed| {
        let balancer = Balancer::new(POLICY, seed);
        balancer.update(service(weighted(&[100; 5])));
        (0..50).map(|_| balancer.pick(&[], now).unwrap().address().port()).collect::<Vec<_>>()
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

#[test]
fn balancers_are_shared_between_threads() {
    fn is_shared<T: Send + Sync>() {}
    is_shared::<Balancer>();
    is_shared::<Picked>();
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_that_callers_give_up_on_is_slow_and_not_idle() {
    let balancer = balancer(&[100, 100]);
    let mut given_up = 0;
    for _ in 0..100 {
        let mut picked = balancer.pick(&[], Instant::now()).unwrap();
        if picked.address() == address(1) {
            // It never answers; the callers wait for a second.
            tokio::time::advance(Duration::from_secs(1)).await;
            given_up += 1;
        } else {
            tokio::time::advance(Duration::from_millis(5)).await;
            picked.succeeded(Instant::now());
        }
    }
    assert!(given_up <= 2, "{given_up} of 100");
    assert_eq!(conditions(&balancer, Instant::now()), [Condition::Closed; 2], "slow is not broken");
}
