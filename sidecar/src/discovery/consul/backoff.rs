//! When to ask Consul again: pure arithmetic with a seeded source of randomness. Sidecars that lost Consul
//! together must not come back together, so half of every pause is random.

use std::time::Duration;

/// The first pause after a failure.
const FIRST: Duration = Duration::from_millis(500);
/// No pause and no turn is longer.
pub(super) const LONGEST: Duration = Duration::from_secs(30);

/// The pause after this many failures in a row (1 or more), at most `longest`.
pub(super) fn pause(failures: u32, longest: Duration, random: &mut fastrand::Rng) -> Duration {
    let doubled = FIRST.saturating_mul(1 << failures.saturating_sub(1).min(16));
    doubled.min(longest).mul_f64(0.5 + 0.5 * random.f64())
}

/// What the share of one service is, where one sidecar asks for many again.
const SHARE: Duration = Duration::from_millis(100);

/// However few they are, their sidecar is not the only one that lost Consul.
const LEAST: usize = 10;

/// A pause of one of so many services that lost Consul together, where nobody waits for the answer: it makes some
/// ten questions a second of them, in no order, and more only of more than 300. It is a second for those of a sidecar
/// that has few.
pub(super) fn turn(services: usize, random: &mut fastrand::Rng) -> Duration {
    let services = u32::try_from(services.max(LEAST)).unwrap_or(u32::MAX);
    SHARE.saturating_mul(services).min(LONGEST).mul_f64(random.f64())
}

/// A time that is up to a tenth longer.
pub(super) fn spread(time: Duration, random: &mut fastrand::Rng) -> Duration {
    time.mul_f64(1.0 + 0.1 * random.f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_are_spread_and_end_growing() {
        let mut random = fastrand::Rng::with_seed(7);
        for (failures, least, most) in
            [(1, 250, 500), (3, 1000, 2000), (30, 15_000, 30_000), (u32::MAX, 15_000, 30_000)]
        {
            let pauses: Vec<_> =
                (0..200).map(|_| pause(failures, LONGEST, &mut random).as_millis()).collect();
            assert!(pauses.iter().all(|pause| (least..=most).contains(pause)), "{failures}: {pauses:?}");
            let width = pauses.iter().max().unwrap() - pauses.iter().min().unwrap();
            assert!(width > (most - least) * 8 / 10, "{failures}: not spread");
        }
        for (services, most) in [(0, 1000), (1, 1000), (50, 5000), (usize::MAX, 30_000)] {
            let turns: Vec<_> = (0..200).map(|_| turn(services, &mut random).as_millis()).collect();
            assert!(turns.iter().all(|turn| *turn <= most), "{services}: {turns:?}");
            assert!(turns.iter().max().unwrap() >= &(most * 8 / 10), "{services}: not spread");
        }
        let times: Vec<_> = (0..100).map(|_| spread(LONGEST, &mut random)).collect();
        assert!(times.iter().all(|time| (LONGEST..=LONGEST.mul_f64(1.1)).contains(time)));
    }
}
