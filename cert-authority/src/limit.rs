//! How many lines of the log strangers may cause: so many a minute. What is more is counted, and the next line that
//! is written says how many were left out.

use std::{sync::Mutex, time::Duration};

use tokio::time::Instant;

/// Lines of one kind.
pub struct Limit {
    per_minute: u32,
    window: Mutex<Window>,
}

struct Window {
    began: Instant,
    written: u32,
    left_out: u64,
}

const MINUTE: Duration = Duration::from_secs(60);

impl Limit {
    /// At most so many lines a minute.
    pub fn new(per_minute: u32) -> Self {
        let window = Window { began: Instant::now(), written: 0, left_out: 0 };
        Limit { per_minute, window: Mutex::new(window) }
    }

    /// May a line be written? Then it says how many were left out since the last one; none where it is left out too.
    pub fn take(&self) -> Option<u64> {
        let mut window = self.window.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if window.began.elapsed() >= MINUTE {
            (window.began, window.written) = (Instant::now(), 0);
        }
        if window.written >= self.per_minute {
            window.left_out += 1;
            return None;
        }
        window.written += 1;
        Some(std::mem::take(&mut window.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_too_much_in_a_minute_is_counted() {
        let limit = Limit::new(2);
        let taken: Vec<_> = (0..5).map(|_| limit.take()).collect();
        assert_eq!(taken, [Some(0), Some(0), None, None, None]);
        tokio::time::advance(MINUTE).await;
        assert_eq!((limit.take(), limit.take(), limit.take()), (Some(3), Some(0), None));
    }
}
