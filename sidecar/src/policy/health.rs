//! Is the app well? Pure: it counts answers and failures in a row, and says how long to wait until the next probe.
//! One lost answer does not take a workload out of the registry, and an app that is down is asked less and less
//! often.

use std::time::Duration;

/// The pause after the first probe; it doubles until the app was well once.
const AT_THE_START: Duration = Duration::from_millis(50);
/// An app that has not started yet is asked at least so often: somebody waits for it.
const LONGEST_PAUSE_AT_THE_START: Duration = Duration::from_secs(2);
/// An app that is down is asked at least so often.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// What is known of the app's health.
#[derive(Debug, Clone)]
pub struct Health {
    rise: u32,
    fall: u32,
    interval: Duration,
    is_well: bool,
    was_well: bool,
    /// Results in a row that speak against `is_well`.
    against: u32,
    /// Failures in a row since it is down.
    down: u32,
}

impl Health {
    /// An app that was not asked yet: not well. The first answer makes it well; later `rise` answers in a row do,
    /// and `fall` failures in a row end it.
    pub fn new(rise: u32, fall: u32, interval: Duration) -> Self {
        Health { rise, fall, interval, is_well: false, was_well: false, against: 0, down: 0 }
    }

    /// Takes the result of a probe.
    pub fn observe(&mut self, has_answered: bool) {
        if has_answered == self.is_well {
            self.against = 0;
        } else {
            self.against += 1;
        }
        self.down = if has_answered || self.is_well { 0 } else { self.down.saturating_add(1) };
        let needed = match (self.is_well, self.was_well) {
            (true, _) => self.fall,
            (false, true) => self.rise,
            (false, false) => 1,
        };
        if self.against >= needed {
            self.is_well = !self.is_well;
            self.was_well = true;
            self.against = 0;
        }
    }

    /// Is it well?
    pub fn is_well(&self) -> bool {
        self.is_well
    }

    /// How long to wait until the next probe.
    pub fn pause(&self) -> Duration {
        let (first, longest) = if self.was_well {
            (self.interval, LONGEST_PAUSE)
        } else {
            (self.interval.min(AT_THE_START), LONGEST_PAUSE_AT_THE_START)
        };
        first.saturating_mul(1 << self.down.saturating_sub(1).min(16)).min(longest.max(self.interval))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `+` an answer, `-` a failure; then the state, and the pause in milliseconds.
    fn after(results: &str) -> (bool, u128) {
        let mut health = Health::new(2, 3, Duration::from_secs(1));
        results.chars().for_each(|result| health.observe(result == '+'));
        (health.is_well(), health.pause().as_millis())
    }

    #[test]
    fn it_rises_and_falls_by_what_comes_in_a_row() {
        for (results, expected) in [
            ("", (false, 50)),
            ("-", (false, 50)),
            ("--", (false, 100)),
            ("---", (false, 200)),
            ("-------------------------", (false, 2_000)),
            ("+", (true, 1_000)),
            ("---+", (true, 1_000)),
            ("+--", (true, 1_000)),
            ("+--+--", (true, 1_000)),
            ("+---", (false, 1_000)),
            ("+-----", (false, 2_000)),
            ("+---------------", (false, 30_000)),
            ("+---+", (false, 1_000)),
            ("+---+-+", (false, 1_000)),
            ("+---++", (true, 1_000)),
            ("+---++--+", (true, 1_000)),
        ] {
            assert_eq!(after(results), expected, "{results}");
        }
    }
}
