//! How much unread uploads may hold in all HTTP/2 connections of clients without an identity together. A connection gets
//! its window when it begins and gives it back when it ends: as usual while there are few, less and less when there are
//! many. A window once given cannot be taken back (RFC 9113 6.9.2), so what is left is never given to one alone.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// Every HTTP/2 connection has this window, and none less (RFC 9113 6.9.2). It is not part of the budget.
const SMALLEST_WINDOW: u32 = 65_535;
/// Of what is left one connection gets one part of so many at most.
const PARTS: u64 = 16;

/// The bytes that are left for all of them.
#[derive(Debug)]
pub struct BufferBudget(AtomicU64);

impl BufferBudget {
    /// So many bytes for all connections.
    pub fn new(bytes: u64) -> Arc<Self> {
        Arc::new(BufferBudget(AtomicU64::new(bytes)))
    }

    /// The window of a connection that begins now: the usual one, or what there is for it.
    pub fn grant(self: &Arc<Self>, usual: u32) -> BufferGrant {
        let share = |left: u64| {
            let share = (left / PARTS).min(usual.into());
            // The smallest window is there without the budget.
            if share > SMALLEST_WINDOW.into() { share } else { 0 }
        };
        let take = |left: u64| left.checked_sub(share(left));
        let before = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        BufferGrant { budget: self.clone(), taken: before.map_or(0, share) }
    }
}

/// The window of one connection; dropping it gives it back.
#[derive(Debug)]
pub struct BufferGrant {
    budget: Arc<BufferBudget>,
    taken: u64,
}

impl BufferGrant {
    /// The bytes of the window.
    pub fn window(&self) -> u32 {
        u32::try_from(self.taken).unwrap_or(u32::MAX).max(SMALLEST_WINDOW)
    }
}

impl Drop for BufferGrant {
    fn drop(&mut self) {
        self.budget.0.fetch_add(self.taken, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u32 = 1024 * 1024;

    #[test]
    fn windows_never_hold_more_than_the_budget_and_the_smallest_of_each() {
        for budget in [0, 1, 65_535 * PARTS, 64 << 20, 256 << 20] {
            let budget_of_all = BufferBudget::new(budget);
            let mut grants = Vec::new();
            let mut sum = 0;
            for count in 1..=20_000 {
                let grant = budget_of_all.grant(MIB);
                assert!((SMALLEST_WINDOW..=MIB).contains(&grant.window()));
                sum += u64::from(grant.window());
                assert!(sum <= budget + count * u64::from(SMALLEST_WINDOW), "{count} of {budget}");
                grants.push(grant);
            }
            assert_eq!(grants.last().map(BufferGrant::window), Some(SMALLEST_WINDOW));
            drop(grants);
            assert_eq!(budget_of_all.0.load(Ordering::Relaxed), budget, "all is given back");
        }
    }

    #[test]
    fn few_get_what_is_usual_and_nobody_takes_all() {
        let budget = BufferBudget::new(256 << 20);
        let usual: Vec<_> = (0..240).map(|_| budget.grant(MIB)).collect();
        assert!(usual.iter().all(|grant| grant.window() == MIB));
        assert!(budget.grant(MIB).window() <= MIB);
        assert_eq!(budget.grant(u32::MAX).window(), MIB, "one part of 16 MiB");
        drop(usual);
        assert_eq!(budget.grant(MIB).window(), MIB);
    }
}
