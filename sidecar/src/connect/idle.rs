//! For how long a connection that nobody uses is kept. Few are kept for a minute. Of many the longest idle are closed
//! after some seconds, so that a sidecar whose app once called everything comes back down: an open HTTP/2 connection
//! between sidecars holds some 43 KB on each side, a new one costs less than a millisecond of processor
//! time. Pure; the pool closes.

use std::time::Duration;

/// An idle connection is closed after this long.
const TIMEOUT: Duration = Duration::from_secs(60);
/// So many of a pool's idle connections may grow that old.
const KEPT: usize = 128;
/// The longest idle of more are closed after this long.
const TIMEOUT_OF_MORE: Duration = Duration::from_secs(10);

/// Connections that are idle for that long are to be closed. `ages` says how long each of the idle ones is; they are
/// put into another order.
pub(super) fn idle_limit(ages: &mut [Duration]) -> Duration {
    let Some(more) = ages.len().checked_sub(KEPT).filter(|more| *more > 0) else { return TIMEOUT };
    let (_, longest_kept, _) = ages.select_nth_unstable_by(more, |one, other| other.cmp(one));
    (*longest_kept + Duration::from_nanos(1)).clamp(TIMEOUT_OF_MORE, TIMEOUT)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn closed(ages: impl IntoIterator<Item = u64>) -> usize {
        let mut ages: Vec<Duration> = ages.into_iter().map(Duration::from_secs).collect();
        fastrand::Rng::with_seed(7).shuffle(&mut ages);
        let limit = idle_limit(&mut ages);
        ages.iter().filter(|age| **age >= limit).count()
    }

    #[test]
    fn few_are_kept_for_a_minute() {
        assert_eq!(closed([]), 0);
        assert_eq!(closed([0, 59, 60, 61]), 2);
        assert_eq!(closed([59; KEPT]), 0);
        assert_eq!(closed([60; KEPT]), KEPT);
    }

    #[test]
    fn of_many_the_longest_idle_are_closed_sooner() {
        let many = KEPT as u64 + 100;
        let older_than = |count: u64, old: u64, young: u64| {
            closed((0..many).map(|number| if number < count { old } else { young }))
        };
        assert_eq!(older_than(100, 30, 20), 100);
        assert_eq!(older_than(50, 30, 5), 50);
        assert_eq!(older_than(50, 30, 20), 50);
        assert_eq!(older_than(many, 61, 0), many as usize);
        assert_eq!(closed((0..many).map(|number| 11 + number / 8)), 100);
        assert_eq!(closed(vec![9; 10 * KEPT]), 0);
    }
}
