//! The latency of an endpoint as a peak-EWMA: a slower answer counts at once and whole, faster ones wear it down
//! over ten seconds, and so does silence, so that an endpoint that was slow is tried again. Pure: time is an
//! argument. After Finagle's `PeakEwma`.

use std::time::Duration;

use tokio::time::Instant;

/// After this time an old latency weighs 1/e.
const DECAY: Duration = Duration::from_secs(10);

/// Decayed latency. Empty before the first answer.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Load {
    latest: Option<(f64, Instant)>,
}

impl Load {
    /// An answer took so long.
    pub(super) fn observe(&mut self, latency: Duration, now: Instant) {
        let seen = latency.as_secs_f64();
        let seconds = match self.latest {
            Some((seconds, _)) if seen >= seconds => seen,
            Some((seconds, at)) => {
                let kept = kept_since(at, now);
                seconds * kept + seen * (1.0 - kept)
            }
            None => seen,
        };
        self.latest = Some((seconds, now));
    }

    /// A failure took so long, or a caller waited so long in vain: it may show that the endpoint is slow, never that it
    /// is fast.
    pub(super) fn observe_at_least(&mut self, latency: Duration, now: Instant) {
        if latency.as_secs_f64() > self.seconds(now).unwrap_or(0.0) {
            self.observe(latency, now);
        }
    }

    /// Seconds of latency to expect; none before the first answer.
    pub(super) fn seconds(&self, now: Instant) -> Option<f64> {
        self.latest.map(|(seconds, at)| seconds * kept_since(at, now))
    }
}

fn kept_since(at: Instant, now: Instant) -> f64 {
    (-now.saturating_duration_since(at).as_secs_f64() / DECAY.as_secs_f64()).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn milliseconds(load: &Load, now: Instant) -> Option<f64> {
        load.seconds(now).map(|seconds| (seconds * 1e6).round() / 1e3)
    }

    #[test]
    fn peaks_count_at_once_and_wear_down_slowly() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut load = Load::default();
        assert_eq!(load.seconds(at(0)), None);
        load.observe(Duration::from_millis(10), at(0));
        assert_eq!(milliseconds(&load, at(0)), Some(10.0));
        load.observe(Duration::from_millis(100), at(0));
        assert_eq!(milliseconds(&load, at(0)), Some(100.0));
        // Ten seconds later a fast answer: 1/e of the old, the rest of the new.
        load.observe(Duration::from_millis(10), at(10));
        assert_eq!(milliseconds(&load, at(10)), Some(43.109));
        // And ten seconds of silence.
        assert_eq!(milliseconds(&load, at(20)), Some(15.859));
    }

    #[test]
    fn a_quick_failure_makes_nobody_attractive() {
        let now = Instant::now();
        let mut load = Load::default();
        load.observe(Duration::from_millis(10), now);
        load.observe_at_least(Duration::ZERO, now + DECAY);
        assert_eq!(milliseconds(&load, now), Some(10.0));
        load.observe_at_least(Duration::from_secs(1), now + DECAY);
        assert_eq!(milliseconds(&load, now + DECAY), Some(1000.0));
    }
}
