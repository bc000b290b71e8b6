//! When to wake: a time by two clocks, whichever comes there first. How long to wait stands in [`weft_proto::schedule`].

use std::time::{Duration, SystemTime};

use tokio::time::Instant;

/// Nobody sleeps longer without looking at the clock.
const LONGEST_SLEEP: Duration = Duration::from_secs(10);

/// A time to wait for, by two clocks: whichever comes there first. The monotonic clock stands still while the machine
/// is suspended, and the wall clock may be set back.
pub(super) struct Wake {
    monotonic: Instant,
    wall: SystemTime,
}

impl Wake {
    /// After this pause.
    pub(super) fn after(pause: Duration, monotonic: Instant, wall: SystemTime) -> Self {
        Wake { monotonic: monotonic + pause, wall: wall + pause }
    }

    /// How long to sleep before the next look at the clocks; none where the time has come.
    pub(super) fn sleep(&self, monotonic: Instant, wall: SystemTime) -> Option<Duration> {
        let left = self.wall.duration_since(wall).unwrap_or_default();
        let left = left.min(self.monotonic.saturating_duration_since(monotonic));
        (!left.is_zero()).then(|| left.min(LONGEST_SLEEP))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 3600);

    #[test]
    fn a_wait_ends_by_the_clock_that_is_there_first() {
        let (start, wall) = (Instant::now(), SystemTime::UNIX_EPOCH + DAY);
        let wake = Wake::after(DAY / 2, start, wall);
        let second = Duration::from_secs(1);
        let cases = [
            // what the monotonic and the wall clock have gone on by
            (Duration::ZERO, Duration::ZERO, Some(LONGEST_SLEEP)),
            (DAY / 2 - second, DAY / 2 - second, Some(second)),
            (DAY / 2, DAY / 2, None),
            // a suspended machine
            (second, DAY / 2, None),
            (second, DAY * 3, None),
            (second, DAY / 2 - second, Some(second)),
        ];
        for (monotonic, passed, expected) in cases {
            assert_eq!(wake.sleep(start + monotonic, wall + passed), expected, "{monotonic:?} {passed:?}");
        }
        // a wall clock that was set back
        assert_eq!(wake.sleep(start + DAY / 2, wall - DAY), None);
    }
}
