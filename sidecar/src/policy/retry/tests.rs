use super::*;
use crate::model::Budget;

const ATTEMPT: Attempt<'static> =
    Attempt { number: 1, method: "GET", outcome: failed(Failure::Reset), replayable: true, remaining: None };

const fn failed(failure: Failure) -> Outcome<'static> {
    Outcome::Failed { failure, unprocessed: failure.nothing_processed() }
}

const fn answered(status: u16) -> Outcome<'static> {
    Outcome::Answered { status, retry_after: None, pushback: None }
}

/// 1994-11-06 08:49:37 UTC.
fn wall() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777)
}

fn decide_with(policy: &Retries, attempt: &Attempt<'_>) -> Verdict {
    let now = Instant::now();
    let mut budget = Bucket::new(&policy.budget, now);
    decide(policy, attempt, &mut budget, &mut fastrand::Rng::with_seed(1), now, wall())
}

fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Again { reason, .. } => reason.label(),
        Verdict::No { reason } => reason.label(),
    }
}

fn pause(policy: &Retries, attempt: &Attempt<'_>) -> Duration {
    match decide_with(policy, attempt) {
        Verdict::Again { after, .. } => after,
        refused => panic!("{refused:?}"),
    }
}

#[test]
fn what_may_be_tried_again() {
    let policy = Retries { statuses: vec![503], methods: vec!["PUT".into()], ..Retries::default() };
    for (method, outcome, expected) in [
        ("GET", failed(Failure::Reset), "transport"),
        ("HEAD", failed(Failure::AttemptTimeout), "transport"),
        ("OPTIONS", failed(Failure::AppReset), "transport"),
        ("PUT", failed(Failure::Reset), "transport"),
        ("POST", failed(Failure::Reset), "method"),
        ("get", failed(Failure::Reset), "method"),
        ("POST", failed(Failure::ConnectRefused), "unprocessed"),
        ("POST", failed(Failure::WrongIdentity), "unprocessed"),
        ("POST", failed(Failure::AppRefused), "unprocessed"),
        ("POST", Outcome::Failed { failure: Failure::Reset, unprocessed: true }, "unprocessed"),
        // the trust in a peer ended while it was working
        ("POST", Outcome::Failed { failure: Failure::UntrustedPeer, unprocessed: false }, "method"),
        ("GET", Outcome::Failed { failure: Failure::UntrustedPeer, unprocessed: false }, "transport"),
        ("GET", failed(Failure::ClientGone), "failure"),
        ("GET", failed(Failure::BodyCut), "failure"),
        ("GET", failed(Failure::RequestTimeout), "failure"),
        ("GET", failed(Failure::NoEndpoint), "failure"),
        ("GET", failed(Failure::PlaintextRefused), "failure"),
        ("GET", answered(200), "not_needed"),
        ("GET", answered(500), "not_needed"),
        ("GET", answered(503), "status"),
        ("PUT", answered(503), "status"),
        ("POST", answered(503), "method"),
    ] {
        let attempt = Attempt { method, outcome, ..ATTEMPT };
        assert_eq!(word(decide_with(&policy, &attempt)), expected, "{method} {outcome:?}");
    }
    let attempt = Attempt { outcome: answered(503), ..ATTEMPT };
    assert_eq!(word(decide_with(&Retries::default(), &attempt)), "not_needed", "by default no status is");
}

#[test]
fn what_stands_in_the_way() {
    let policy = Retries { statuses: vec![503], ..Retries::default() };
    let second = Duration::from_secs(1);
    for (attempt, expected) in [
        (Attempt { number: 2, ..ATTEMPT }, "transport"),
        (Attempt { number: 3, ..ATTEMPT }, "attempts"),
        (Attempt { replayable: false, ..ATTEMPT }, "body"),
        (Attempt { replayable: false, outcome: failed(Failure::ConnectRefused), ..ATTEMPT }, "body"),
        (Attempt { remaining: Some(second), ..ATTEMPT }, "transport"),
        (Attempt { remaining: Some(Duration::from_millis(1)), ..ATTEMPT }, "deadline"),
        (
            Attempt { remaining: Some(Duration::ZERO), outcome: failed(Failure::ConnectRefused), ..ATTEMPT },
            "deadline",
        ),
    ] {
        assert_eq!(word(decide_with(&policy, &attempt)), expected, "{attempt:?}");
    }
    let none = Retries { attempts: 0, ..policy };
    assert_eq!(word(decide_with(&none, &ATTEMPT)), "attempts");
}

#[test]
fn the_budget_is_asked_last_and_then_it_counts() {
    let policy = Retries { budget: Budget { percent: 0, per_second: 1 }, ..Retries::default() };
    let now = Instant::now();
    let mut budget = Bucket::new(&policy.budget, now);
    let mut random = fastrand::Rng::with_seed(1);
    let mut ask =
        |attempt: &Attempt<'_>| word(decide(&policy, attempt, &mut budget, &mut random, now, wall()));
    for _ in 0..100 {
        assert_eq!(ask(&Attempt { method: "POST", ..ATTEMPT }), "method");
    }
    let words: Vec<_> = (0..12).map(|_| ask(&ATTEMPT)).collect();
    assert_eq!(words, [&["transport"; 10][..], &["budget"; 2]].concat());
}

#[test]
fn a_server_that_asks_for_a_pause_gets_it() {
    let policy = Retries { statuses: vec![503], ..Retries::default() };
    let of = |retry_after, pushback| Attempt {
        outcome: Outcome::Answered { status: 503, retry_after, pushback },
        ..ATTEMPT
    };
    for (attempt, expected) in [
        (of(Some("2"), None), 2_000),
        (of(Some("0"), None), 0),
        (of(Some("Sun, 06 Nov 1994 08:49:40 GMT"), None), 3_000),
        (of(Some("Sun, 06 Nov 1994 08:49:00 GMT"), None), 0),
        (of(None, Some("150")), 150),
        (of(Some("2"), Some("150")), 150),
    ] {
        assert_eq!(pause(&policy, &attempt), Duration::from_millis(expected), "{attempt:?}");
    }
    for attempt in [
        of(Some("3600"), None),
        of(Some("Mon, 07 Nov 1994 08:49:40 GMT"), None),
        of(None, Some("-1")),
        of(None, Some("")),
        of(None, Some("soon")),
        of(None, Some("99999")),
    ] {
        assert_eq!(word(decide_with(&policy, &attempt)), "pushback", "{attempt:?}");
    }
    for strange in ["", "-1", "soon", "1.5", "Sunday, 06-Nov-94 08:49:37 GMT", "99999999999999999999", "ä"] {
        assert!(pause(&policy, &of(Some(strange), None)) <= policy.backoff, "{strange:?}");
    }
    let short = Attempt { remaining: Some(Duration::from_secs(1)), ..of(Some("2"), None) };
    assert_eq!(word(decide_with(&policy, &short)), "deadline");
}

#[test]
fn pauses_grow_with_jitter_and_have_an_end() {
    let policy = Retries { attempts: 10, ..Retries::default() };
    for (number, longest) in [(1, 10), (2, 20), (3, 40), (8, 1_000), (10, 1_000)] {
        let after = pause(&policy, &Attempt { number, ..ATTEMPT });
        let longest = Duration::from_millis(longest);
        assert!(after <= longest && after >= longest / 2, "{number}: {after:?}");
    }
    let unprocessed = Attempt { outcome: failed(Failure::ConnectRefused), ..ATTEMPT };
    assert_eq!(pause(&policy, &unprocessed), Duration::ZERO, "another endpoint at once");
    assert!(pause(&policy, &Attempt { number: 2, ..unprocessed }) > Duration::ZERO);
}
