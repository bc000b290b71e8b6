//! The breaker of one endpoint: failures in a row put it out for a time, each time twice as long and with jitter;
//! then one request at a time probes it, and a success closes the breaker. Pure: time is an argument. How many
//! may be out at a time is decided by those who see all of them.

use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;

use crate::model::Breaker;

/// What a breaker says of its endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Condition {
    /// Takes requests.
    Closed,
    /// Out for now.
    Ejected,
    /// Takes one request at a time, as a probe.
    HalfOpen,
}

impl Condition {
    /// All of them.
    pub const ALL: [Condition; 3] = [Condition::Closed, Condition::Ejected, Condition::HalfOpen];

    /// The word for metrics.
    pub fn label(self) -> &'static str {
        match self {
            Condition::Closed => "ready",
            Condition::Ejected => "ejected",
            Condition::HalfOpen => "probing",
        }
    }
}

#[derive(Debug, Clone, Copy, Default)]
pub(super) struct State {
    failures: u32,
    /// Ejections in a row.
    ejections: u32,
    out: Option<Out>,
    /// When a probe last succeeded.
    recovered: Option<Instant>,
}

#[derive(Debug, Clone, Copy)]
struct Out {
    since: Instant,
    until: Instant,
    /// The probe that is under way.
    probe: Option<Probe>,
}

#[derive(Debug, Clone, Copy)]
struct Probe {
    since: Instant,
    /// Its answer has begun, and is no failure so far.
    has_answered: bool,
}

impl Out {
    /// A probe that takes longer than the ejection took (no answer yet, or one without an end) holds up no other.
    fn is_probed(&self, now: Instant) -> bool {
        self.probe.is_some_and(|probe| now < probe.since + self.lasted())
    }

    /// An answer that has gone on for as long as the endpoint was out is as good as one that has ended: there are
    /// streams without an end.
    fn has_proved_itself(&self, now: Instant) -> bool {
        self.probe.is_some_and(|probe| probe.has_answered && now >= probe.since + self.lasted())
    }

    fn lasted(&self) -> Duration {
        self.until - self.since
    }
}

impl State {
    pub(super) fn condition(&self, now: Instant) -> Condition {
        match self.out {
            None => Condition::Closed,
            Some(out) if now < out.until => Condition::Ejected,
            Some(_) => Condition::HalfOpen,
        }
    }

    pub(super) fn failures(&self) -> u32 {
        self.failures
    }

    /// Was it put out, and has not proved itself since?
    pub(super) fn is_out(&self) -> bool {
        self.out.is_some()
    }

    /// May a request be sent there now?
    pub(super) fn is_usable(&self, now: Instant) -> bool {
        self.out.is_none_or(|out| now >= out.until && !out.is_probed(now))
    }

    /// A request is sent there. Says whether it is the probe.
    pub(super) fn chosen(&mut self, now: Instant) -> bool {
        if self.out.is_some_and(|out| out.has_proved_itself(now)) {
            self.close(now);
        }
        let is_probe = self.out.is_some() && self.is_usable(now);
        if let Some(out) = self.out.as_mut().filter(|_| is_probe) {
            out.probe = Some(Probe { since: now, has_answered: false });
        }
        is_probe
    }

    /// The answer of the probe sent at `started` has begun. It says nothing of a newer probe.
    pub(super) fn probe_answered(&mut self, started: Instant) {
        let probe = self.out.as_mut().and_then(|out| out.probe.as_mut());
        if let Some(probe) = probe.filter(|probe| probe.since == started) {
            probe.has_answered = true;
        }
    }

    /// The probe sent at `started` is over, with a verdict or without. A newer one goes on.
    pub(super) fn probe_ended(&mut self, started: Instant) {
        if let Some(out) = &mut self.out {
            out.probe = out.probe.filter(|probe| probe.since != started);
        }
    }

    fn close(&mut self, now: Instant) {
        self.failures = 0;
        if self.out.take().is_some() {
            self.recovered = Some(now);
        }
    }

    /// A request sent at `started` succeeded. From before the ejection it proves nothing about now.
    pub(super) fn succeeded(&mut self, started: Instant, now: Instant) {
        if self.out.is_some_and(|out| started < out.since) {
            return;
        }
        self.close(now);
    }

    /// A request sent at `started` failed. `may_eject` says whether the service can spare one more endpoint.
    /// Gives the time it is out for, if it goes out now, and the how manieth time in a row that is.
    pub(super) fn failed(
        &mut self,
        policy: &Breaker,
        may_eject: bool,
        random: &mut fastrand::Rng,
        started: Instant,
        now: Instant,
    ) -> Option<(Duration, u32)> {
        self.failures = self.failures.saturating_add(1);
        let was_out = self.out.is_some();
        let ejects = match self.out {
            // Sent there because all are out, or before it went out: nothing new.
            Some(out) if now < out.until || started < out.since => false,
            Some(_) => true,
            None => {
                policy.consecutive_failures > 0 && self.failures >= policy.consecutive_failures && may_eject
            }
        };
        if !ejects {
            return None;
        }
        // Who was well for as long as the longest ejection begins anew.
        let relapse = self.recovered.is_some_and(|at| now < at + policy.ejection_max);
        self.ejections = if was_out || relapse { self.ejections.saturating_add(1) } else { 1 };
        let lasts = ejection(policy, self.ejections, random);
        self.out = Some(Out { since: now, until: now + lasts, probe: None });
        Some((lasts, self.ejections))
    }
}

/// Doubles each time up to the maximum; jitter takes away up to a quarter, so that endpoints which went out
/// together do not come back together.
fn ejection(policy: &Breaker, count: u32, random: &mut fastrand::Rng) -> Duration {
    let factor = 2u32.saturating_pow(count.saturating_sub(1));
    let longest = policy.ejection.saturating_mul(factor).min(policy.ejection_max);
    longest.mul_f64(1.0 - random.f64() / 4.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: Breaker = Breaker {
        consecutive_failures: 3,
        ejection: Duration::from_secs(1),
        ejection_max: Duration::from_secs(10),
        max_ejected_percent: 50,
    };

    fn fail(state: &mut State, now: Instant) -> Option<(Duration, u32)> {
        state.failed(&POLICY, true, &mut fastrand::Rng::with_seed(1), now, now)
    }

    #[test]
    fn failures_in_a_row_eject_and_a_success_in_between_does_not() {
        let now = Instant::now();
        let mut state = State::default();
        assert_eq!(fail(&mut state, now), None);
        assert_eq!(fail(&mut state, now), None);
        state.succeeded(now, now);
        assert_eq!(fail(&mut state, now), None);
        assert_eq!(fail(&mut state, now), None);
        let (lasts, count) = fail(&mut state, now).unwrap();
        assert!(lasts > Duration::from_millis(750) && lasts <= Duration::from_secs(1) && count == 1);
        assert_eq!(state.condition(now), Condition::Ejected);
        assert!(!state.is_usable(now));
        assert_eq!(fail(&mut state, now), None, "already out");
    }

    #[test]
    fn a_probe_at_a_time_and_its_result_counts() {
        let mut now = Instant::now();
        let mut state = State::default();
        let mut expected = Duration::from_secs(1);
        for count in 1..8 {
            let ejected = (0..3).find_map(|_| fail(&mut state, now)).unwrap();
            assert_eq!(ejected.1, count);
            assert!(ejected.0 <= expected && ejected.0 >= expected.mul_f64(0.75), "{ejected:?} {expected:?}");
            expected = (expected * 2).min(POLICY.ejection_max);
            assert!(!state.is_usable(now + ejected.0 - Duration::from_millis(1)));
            now += ejected.0;
            assert_eq!(state.condition(now), Condition::HalfOpen);
            assert!(state.is_usable(now));
            assert!(state.chosen(now));
            assert!(!state.is_usable(now) && !state.chosen(now), "a second probe");
            assert!(state.is_usable(now + ejected.0), "the probe takes longer than the ejection took");
            state.probe_ended(now);
            assert!(state.is_usable(now), "the probe's client went away");
            assert!(state.chosen(now));
        }
        state.succeeded(now, now);
        assert_eq!(state.condition(now), Condition::Closed);
    }

    #[test]
    fn an_older_probe_neither_ends_a_newer_one_nor_vouches_for_it() {
        let now = Instant::now();
        for (which, is_over, proves) in [("older", false, false), ("newer", true, true)] {
            let mut state = State::default();
            let (lasts, _) = (0..3).find_map(|_| fail(&mut state, now)).unwrap();
            let (older, newer) = (now + lasts, now + lasts * 2);
            assert!(state.chosen(older) && state.chosen(newer), "the first takes too long");
            let started = if which == "older" { older } else { newer };
            let mut ended = state;
            ended.probe_ended(started);
            assert_eq!(ended.is_usable(newer), is_over, "the {which} one ends");
            state.probe_answered(started);
            state.chosen(newer + lasts);
            let expected = if proves { Condition::Closed } else { Condition::HalfOpen };
            assert_eq!(state.condition(newer + lasts), expected, "the {which} one answers");
        }
    }

    #[test]
    fn a_relapse_goes_on_where_it_was_and_a_long_recovery_begins_anew() {
        let mut now = Instant::now();
        let mut state = State::default();
        let eject = |state: &mut State, now: Instant| (0..3).find_map(|_| fail(state, now)).unwrap();
        let (lasts, _) = eject(&mut state, now);
        now += lasts;
        state.succeeded(now, now);
        let (lasts, count) = eject(&mut state, now);
        assert_eq!(count, 2);
        now += lasts;
        state.succeeded(now, now);
        assert_eq!(eject(&mut state, now + POLICY.ejection_max).1, 1);
    }

    #[test]
    fn what_was_sent_before_the_ejection_proves_nothing() {
        let start = Instant::now();
        let now = start + Duration::from_millis(1);
        let mut state = State::default();
        let (lasts, _) = (0..3).find_map(|_| fail(&mut state, now)).unwrap();
        state.succeeded(start, now);
        assert_eq!(state.condition(now), Condition::Ejected);
        let later = now + lasts;
        let old = state.failed(&POLICY, true, &mut fastrand::Rng::with_seed(1), start, later);
        assert_eq!((old, state.condition(later)), (None, Condition::HalfOpen));
    }

    #[test]
    fn switched_off_or_not_to_be_spared_it_does_not_eject() {
        let now = Instant::now();
        let off = Breaker { consecutive_failures: 0, ..POLICY };
        let mut random = fastrand::Rng::with_seed(1);
        let mut state = State::default();
        for _ in 0..100 {
            assert_eq!(state.failed(&off, true, &mut random, now, now), None);
            assert_eq!(state.failed(&POLICY, false, &mut random, now, now), None);
        }
        assert!(state.failed(&POLICY, true, &mut random, now, now).is_some(), "as soon as it can be spared");
    }
}
