//! How much of the traffic to a service may be retries: every request deposits a fraction of a token, every second
//! some more, every retry takes one. Tokens wear away over ten seconds, so that a quiet hour saves up nothing and
//! a burst after busy seconds is covered. Pure: time is an argument, the lock is the caller's.

use std::time::Duration;

use tokio::time::Instant;

use crate::model::Budget;

/// A token is worth 1/e after this time.
const MEMORY: Duration = Duration::from_secs(10);

/// The tokens of one client and service.
#[derive(Debug, Clone, Copy)]
pub struct Bucket {
    tokens: f64,
    at: Instant,
}

impl Bucket {
    /// With what the quiet before was worth.
    pub fn new(budget: &Budget, now: Instant) -> Self {
        Bucket { tokens: reserve(budget), at: now }
    }

    /// A request began (its first attempt).
    pub fn deposit(&mut self, budget: &Budget, now: Instant) {
        self.turn_to(budget, now);
        self.tokens += f64::from(budget.percent) / 100.0;
    }

    /// Takes a token for a retry; false where there is none.
    pub fn take(&mut self, budget: &Budget, now: Instant) -> bool {
        self.turn_to(budget, now);
        // A whole token up to the rounding of many small deposits.
        let enough = self.tokens > 1.0 - 1e-6;
        if enough {
            self.tokens = (self.tokens - 1.0).max(0.0);
        }
        enough
    }

    fn turn_to(&mut self, budget: &Budget, now: Instant) {
        let kept = (-now.saturating_duration_since(self.at).as_secs_f64() / MEMORY.as_secs_f64()).exp();
        self.tokens = self.tokens * kept + reserve(budget) * (1.0 - kept);
        self.at = self.at.max(now);
    }
}

/// Where the tokens come to rest without traffic.
fn reserve(budget: &Budget) -> f64 {
    f64::from(budget.per_second) * MEMORY.as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: Budget = Budget { percent: 20, per_second: 1 };

    fn take_all(bucket: &mut Bucket, budget: &Budget, now: Instant) -> u32 {
        (0..100_000).find(|_| !bucket.take(budget, now)).expect("an end")
    }

    #[test]
    fn without_traffic_some_retries_a_second_are_allowed() {
        let start = Instant::now();
        let mut bucket = Bucket::new(&BUDGET, start);
        assert_eq!(take_all(&mut bucket, &BUDGET, start), 10);
        let seconds = (1..=100).map(|second| start + Duration::from_secs(second));
        let taken: u32 = seconds.map(|now| take_all(&mut bucket, &BUDGET, now)).sum();
        assert!((85..=100).contains(&taken), "{taken} in 100 seconds");
        let later = start + Duration::from_secs(100_000);
        assert_eq!(take_all(&mut bucket, &BUDGET, later), 10, "a long quiet saves up no more");
    }

    #[test]
    fn traffic_earns_its_share() {
        let budget = Budget { percent: 20, per_second: 0 };
        let start = Instant::now();
        let mut bucket = Bucket::new(&budget, start);
        assert!(!bucket.take(&budget, start));
        for _ in 0..100 {
            bucket.deposit(&budget, start);
        }
        assert_eq!(take_all(&mut bucket, &budget, start), 20);
        // 1,000 requests a second, every one wants a retry: a fifth gets one.
        let mut granted = 0;
        for request in 0..60_000 {
            let now = start + Duration::from_millis(request);
            bucket.deposit(&budget, now);
            granted += u32::from(bucket.take(&budget, now));
        }
        assert!((11_900..=12_000).contains(&granted), "{granted}");
    }

    #[test]
    fn a_burst_after_busy_seconds_is_covered_and_an_old_surplus_is_not() {
        let start = Instant::now();
        let mut bucket = Bucket::new(&BUDGET, start);
        for request in 0..30_000 {
            bucket.deposit(&BUDGET, start + Duration::from_millis(request));
        }
        let now = start + Duration::from_secs(30);
        assert!(take_all(&mut bucket.clone(), &BUDGET, now) > 1_500);
        assert!(take_all(&mut bucket, &BUDGET, now + Duration::from_secs(100)) <= 11);
    }

    #[test]
    fn nothing_is_allowed_where_the_budget_is_nothing() {
        let budget = Budget { percent: 0, per_second: 0 };
        let now = Instant::now();
        let mut bucket = Bucket::new(&budget, now);
        for _ in 0..1_000 {
            bucket.deposit(&budget, now);
        }
        assert!(!bucket.take(&budget, now + Duration::from_secs(60)));
    }
}
