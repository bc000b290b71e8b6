//! What is wrong with single services, in the log: each mistake when it is new, and not more lines than somebody can
//! read. What is left out is counted, and stands in the status all the same.

use std::{collections::HashSet, time::Duration};

use tokio::time::Instant;

/// Lines in one period, of all services together.
const MOST: u32 = 50;
const PERIOD: Duration = Duration::from_secs(60);

/// The lines of this period.
#[derive(Debug, Default)]
pub(super) struct Lines {
    began: Option<Instant>,
    told: u32,
    left_out: u32,
}

impl Lines {
    /// Says which mistakes are new, and takes them over.
    pub(super) fn tell_new(&mut self, known: &mut Vec<String>, now: Vec<String>) {
        let before: HashSet<&String> = known.iter().collect();
        for mistake in now.iter().filter(|mistake| !before.contains(mistake)) {
            if let Some(left_out) = self.may_tell(Instant::now()) {
                if left_out > 0 {
                    tracing::warn!(
                        "registry: {left_out} lines like the next were left out; see `show status`"
                    );
                }
                tracing::warn!("registry: {mistake}; what was last read without mistakes stays in use");
            }
        }
        *known = now;
    }

    /// May a line be written? Then also how many were left out before.
    fn may_tell(&mut self, now: Instant) -> Option<u32> {
        if self.began.is_none_or(|began| now.duration_since(began) >= PERIOD) {
            (self.began, self.told) = (Some(now), 0);
        }
        if self.told == MOST {
            self.left_out = self.left_out.saturating_add(1);
            return None;
        }
        self.told += 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_mistakes_is_a_bounded_number_of_lines() {
        let (mut lines, start) = (Lines::default(), Instant::now());
        let told = (0..1000).filter_map(|_| lines.may_tell(start)).count();
        assert_eq!(told, MOST as usize);
        assert_eq!(lines.may_tell(start + PERIOD / 2), None);
        assert_eq!(lines.may_tell(start + PERIOD), Some(1000 - MOST + 1), "what was left out is told");
        assert_eq!(lines.may_tell(start + PERIOD), Some(0));
    }
}
