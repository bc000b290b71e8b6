//! When to ask the authority: pure arithmetic, scaled by what a certificate has left to live.
//!
//! Renewal begins around half of the life, spread so that programs that started together do not renew
//! together. After a failure the pauses double, and stay a small part of the life that is left to save.

use std::time::Duration;

/// The first pause without a certificate: at a start the authority is often a moment behind us.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// No pause is shorter than this with a certificate in hand, whatever its life.
const SHORTEST_CAP: Duration = Duration::from_millis(500);
/// No pause is longer with a certificate in hand.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// No pause is longer without one: a workload without identity carries no traffic.
const LONGEST_WITHOUT: Duration = Duration::from_secs(15);
/// Pauses are at most this part of the life that is left.
const PART_OF_LIFE: u32 = 10;
/// For one attempt.
const LONGEST_ATTEMPT: Duration = Duration::from_secs(10);
const SHORTEST_ATTEMPT: Duration = Duration::from_secs(1);

/// How long to wait with a certificate that has this long to live: 45 to 55 % of it.
pub fn until_renewal(remaining: Duration, random: &mut fastrand::Rng) -> Duration {
    remaining.mul_f64(0.45 + 0.1 * random.f64())
}

/// How long to wait after this many failures in a row (1 or more). `remaining` is the life that the
/// certificate in hand has left, none where there is none. Half of the pause is random.
pub fn pause(failures: u32, remaining: Option<Duration>, random: &mut fastrand::Rng) -> Duration {
    let cap = match remaining {
        Some(remaining) => (remaining / PART_OF_LIFE).clamp(SHORTEST_CAP, LONGEST_PAUSE),
        None => LONGEST_WITHOUT,
    };
    let doubled = FIRST_PAUSE.saturating_mul(1 << failures.saturating_sub(1).min(16));
    doubled.min(cap).mul_f64(0.5 + 0.5 * random.f64())
}

/// How long one attempt may take: no more than half of what the certificate in hand has left.
pub fn attempt(remaining: Option<Duration>) -> Duration {
    remaining.map_or(LONGEST_ATTEMPT, |left| (left / 2).clamp(SHORTEST_ATTEMPT, LONGEST_ATTEMPT))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 3600);

    #[test]
    fn renewal_is_spread_around_half_of_the_life() {
        let mut random = fastrand::Rng::with_seed(7);
        let times: Vec<Duration> = (0..1000).map(|_| until_renewal(DAY, &mut random)).collect();
        assert!(times.iter().all(|time| *time >= DAY.mul_f64(0.45) && *time <= DAY.mul_f64(0.55)));
        let (early, late) = (times.iter().min().unwrap(), times.iter().max().unwrap());
        assert!(*late - *early > DAY.mul_f64(0.09), "all at the same time");
    }

    #[test]
    fn pauses_grow_and_fit_the_life_that_is_left() {
        let mut random = fastrand::Rng::with_seed(7);
        let cases = [
            // failures, remaining, least, most
            (1, None, 100, 200),
            (3, None, 400, 800),
            (50, None, 7_500, 15_000),
            (1, Some(DAY), 100, 200),
            (50, Some(DAY), 30_000, 60_000),
            (50, Some(Duration::from_secs(10)), 500, 1000),
            (50, Some(Duration::from_secs(2)), 250, 500),
            (u32::MAX, Some(Duration::ZERO), 250, 500),
        ];
        for (failures, remaining, least, most) in cases {
            for _ in 0..100 {
                let pause = pause(failures, remaining, &mut random).as_millis();
                assert!((least..=most).contains(&pause), "{failures} {remaining:?}: {pause} ms");
            }
        }
    }

    #[test]
    fn an_attempt_leaves_time_for_another() {
        assert_eq!(attempt(None), LONGEST_ATTEMPT);
        assert_eq!(attempt(Some(DAY)), LONGEST_ATTEMPT);
        assert_eq!(attempt(Some(Duration::from_secs(5))), Duration::from_millis(2500));
        assert_eq!(attempt(Some(Duration::ZERO)), SHORTEST_ATTEMPT);
    }
}
