//! Until when a request must be done: the least of the policy's limit, the app's `grpc-timeout` (gRPC over HTTP/2,
//! "Requests") and the `x-weft-deadline` of a verified peer; and what is left of it for the next hop. Pure: time
//! is an argument. Whether a header may be believed is decided before.

use std::time::Duration;

use tokio::time::Instant;

/// Until when one request must be done, if there is a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadline {
    at: Option<Instant>,
    started: Instant,
}

/// Longer ones are no limit at all: some 30 years.
const LONGEST: Duration = Duration::from_secs(1_000_000_000);

impl Deadline {
    /// Begins with the request. Texts that are not understood set no limit.
    pub fn start(
        policy: Option<Duration>,
        grpc_timeout: Option<&str>,
        weft_deadline: Option<&str>,
        now: Instant,
    ) -> Self {
        let grpc = grpc_timeout.and_then(parse_grpc_timeout);
        let weft = weft_deadline.and_then(parse_milliseconds);
        let least = [policy, grpc, weft].into_iter().flatten().min();
        Deadline { at: least.filter(|limit| *limit < LONGEST).map(|limit| now + limit), started: now }
    }

    /// When it is over; none: never.
    pub fn at(&self) -> Option<Instant> {
        self.at
    }

    /// What is left; none: no limit.
    pub fn remaining(&self, now: Instant) -> Option<Duration> {
        self.at.map(|at| at.saturating_duration_since(now))
    }

    /// Has the time run out?
    pub fn is_over(&self, now: Instant) -> bool {
        self.at.is_some_and(|at| now >= at)
    }

    /// When an attempt that begins now must have its head: the least of what is left and the limit per attempt.
    pub fn attempt(&self, limit: Option<Duration>, now: Instant) -> Option<Instant> {
        let attempt = limit.filter(|limit| *limit < LONGEST).map(|limit| now + limit);
        [self.at, attempt].into_iter().flatten().min()
    }

    /// The `x-weft-deadline` for the next hop: milliseconds, rounded up, so that little time is not none.
    pub fn weft_header(&self, now: Instant) -> Option<String> {
        self.remaining(now).map(|left| left.as_nanos().div_ceil(1_000_000).to_string())
    }

    /// The `grpc-timeout` for the next hop, where the request had one that we understood.
    pub fn grpc_header(&self, original: Option<&str>, now: Instant) -> Option<String> {
        original.and_then(parse_grpc_timeout)?;
        self.remaining(now).map(format_grpc_timeout)
    }

    /// How long the request has been here.
    pub fn elapsed(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.started)
    }
}

/// `TimeoutValue TimeoutUnit`: one to eight digits and one of H M S m u n.
pub fn parse_grpc_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if !(1..=8).contains(&digits.len()) {
        return None;
    }
    let value = digits_only(digits)?;
    Some(match unit {
        "H" => Duration::from_secs(value * 3600),
        "M" => Duration::from_secs(value * 60),
        "S" => Duration::from_secs(value),
        "m" => Duration::from_millis(value),
        "u" => Duration::from_micros(value),
        "n" => Duration::from_nanos(value),
        _ => return None,
    })
}

/// In the finest unit that fits eight digits, rounded down.
fn format_grpc_timeout(left: Duration) -> String {
    const UNITS: [(u128, char); 6] = [
        (1, 'n'),
        (1_000, 'u'),
        (1_000_000, 'm'),
        (1_000_000_000, 'S'),
        (60_000_000_000, 'M'),
        (3_600_000_000_000, 'H'),
    ];
    let nanos = left.as_nanos();
    let fits = UNITS.into_iter().find(|(unit, _)| nanos / unit <= 99_999_999);
    let (unit, name) = fits.unwrap_or(UNITS[5]);
    format!("{}{name}", (nanos / unit).min(99_999_999))
}

fn parse_milliseconds(text: &str) -> Option<Duration> {
    if text.len() > 15 {
        return None;
    }
    digits_only(text).map(Duration::from_millis)
}

/// Digits and nothing else: `parse` alone would take a sign.
fn digits_only(text: &str) -> Option<u64> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    #[test]
    fn grpc_timeouts_are_read_as_specified() {
        for (text, expected) in [
            ("1H", Some(Duration::from_secs(3600))),
            ("2M", Some(Duration::from_secs(120))),
            ("3S", Some(Duration::from_secs(3))),
            ("4m", Some(ms(4))),
            ("5u", Some(Duration::from_micros(5))),
            ("99999999n", Some(Duration::from_nanos(99_999_999))),
            ("0n", Some(Duration::ZERO)),
            ("100000000n", None),
            ("", None),
            ("S", None),
            ("1", None),
            ("1s", None),
            ("-1S", None),
            ("+1S", None),
            ("1.5S", None),
            (" 1S", None),
            ("1ä", None),
            ("ä", None),
            ("٣S", None),
        ] {
            assert_eq!(parse_grpc_timeout(text), expected, "{text:?}");
        }
    }

    #[test]
    fn grpc_timeouts_are_written_so_that_they_are_read_again() {
        for (left, expected) in [
            (Duration::ZERO, "0n"),
            (Duration::from_nanos(99_999_999), "99999999n"),
            (ms(100), "100000u"),
            (Duration::from_secs(100), "100000m"),
            (Duration::from_secs(100_000), "100000S"),
            (Duration::from_secs(100_000_000), "1666666M"),
            (Duration::MAX, "99999999H"),
        ] {
            let text = format_grpc_timeout(left);
            assert_eq!(text, expected);
            assert!(parse_grpc_timeout(&text).is_some_and(|read| read <= left));
        }
    }

    #[test]
    fn the_least_limit_counts_and_shrinks() {
        let now = Instant::now();
        let left =
            |policy: Option<u64>, grpc, weft| Deadline::start(policy.map(ms), grpc, weft, now).remaining(now);
        assert_eq!(left(None, None, None), None);
        assert_eq!(left(Some(500), None, None), Some(ms(500)));
        assert_eq!(left(Some(500), Some("200m"), Some("300")), Some(ms(200)));
        assert_eq!(left(Some(500), Some("2S"), Some("300")), Some(ms(300)));
        assert_eq!(left(None, Some("nonsense"), Some("-5")), None);
        assert_eq!(left(None, None, Some("999999999999999")), None);
        assert_eq!(left(None, None, Some("9999999999999999999999")), None);
        assert_eq!(left(None, Some("99999999H"), None), None);
        let deadline = Deadline::start(Some(ms(500)), Some("1S"), None, now);
        let later = now + Duration::from_micros(100_500);
        assert_eq!(deadline.remaining(later), Some(Duration::from_micros(399_500)));
        assert_eq!(deadline.weft_header(later).as_deref(), Some("400"));
        assert_eq!(deadline.grpc_header(Some("1S"), later).as_deref(), Some("399500u"));
        assert_eq!(deadline.grpc_header(None, later), None);
        assert_eq!(deadline.grpc_header(Some("nonsense"), later), None);
        assert_eq!(deadline.elapsed(later), Duration::from_micros(100_500));
        assert!(!deadline.is_over(later) && deadline.is_over(now + ms(500)));
        assert_eq!(deadline.remaining(now + ms(900)), Some(Duration::ZERO));
    }

    #[test]
    fn an_attempt_ends_with_the_request_at_the_latest() {
        let now = Instant::now();
        let limited = Deadline::start(Some(ms(500)), None, None, now);
        let free = Deadline::start(None, None, None, now);
        assert_eq!(limited.attempt(Some(ms(200)), now), Some(now + ms(200)));
        assert_eq!(limited.attempt(Some(ms(200)), now + ms(400)), Some(now + ms(500)));
        assert_eq!(limited.attempt(None, now), Some(now + ms(500)));
        assert_eq!(free.attempt(Some(ms(200)), now), Some(now + ms(200)));
        assert_eq!(free.attempt(None, now), None);
        assert_eq!(free.attempt(Some(Duration::MAX), now), None);
    }
}
