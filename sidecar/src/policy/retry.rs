//! May a request be tried again, and after which pause? Anything may where the protocol proves that nothing was
//! processed; safe methods (RFC 9110 9.2.1) after failures of the transport; statuses and further methods where
//! the policy says so. Always within the attempts, the deadline and the budget. Each hop decides for itself: what goes
//! through an app cannot be followed from one to the next. Pure: time and randomness are arguments.

use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::budget::Bucket;
use crate::model::{Failure, Retries};

/// One attempt that is over, with what decides about another.
#[derive(Debug, Clone, Copy)]
pub struct Attempt<'a> {
    /// Its number, counted from 1.
    pub number: u32,
    /// The method of the request.
    pub method: &'a str,
    /// How it ended.
    pub outcome: Outcome<'a>,
    /// Can the body be sent once more? True where there is none or nothing of it was taken.
    pub replayable: bool,
    /// What is left of the request's deadline; none: no limit.
    pub remaining: Option<Duration>,
}

/// How an attempt ended.
#[derive(Debug, Clone, Copy)]
pub enum Outcome<'a> {
    /// Without an answer.
    Failed {
        /// Why.
        failure: Failure,
        /// Is it proven that nothing was processed? By the failure itself, or by the protocol: a request handed
        /// back unsent, REFUSED_STREAM, a GOAWAY below the stream.
        unprocessed: bool,
    },
    /// With the head of an answer.
    Answered {
        /// Its status.
        status: u16,
        /// Its `retry-after` (RFC 9110 10.2.3).
        retry_after: Option<&'a str>,
        /// Its `grpc-retry-pushback-ms` (gRPC proposal A6).
        pushback: Option<&'a str>,
    },
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Try again.
    Again {
        /// What allows it.
        reason: Reason,
        /// The pause before.
        after: Duration,
    },
    /// Give the caller what there is.
    No {
        /// What forbids it.
        reason: Refusal,
    },
}

/// Why a request is tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Nothing was processed.
    Unprocessed,
    /// The transport failed, and the method may be repeated.
    Transport,
    /// The policy names the status.
    Status,
}

/// Why a request is not tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// There is nothing to mend.
    NotNeeded,
    /// The failure is none that another attempt would mend.
    Failure,
    /// Something may have been processed, and the method may not be repeated.
    Method,
    /// The body is no longer at hand.
    Body,
    /// All attempts are used up.
    Attempts,
    /// The server asks to wait longer than we do, or not to come again.
    Pushback,
    /// The deadline would be over.
    Deadline,
    /// The budget of the service is used up.
    Budget,
}

impl Reason {
    /// The word for logs, spans and metrics.
    pub fn label(self) -> &'static str {
        match self {
            Reason::Unprocessed => "unprocessed",
            Reason::Transport => "transport",
            Reason::Status => "status",
        }
    }
}

impl Refusal {
    /// The word for logs, spans and metrics.
    pub fn label(self) -> &'static str {
        match self {
            Refusal::NotNeeded => "not_needed",
            Refusal::Failure => "failure",
            Refusal::Method => "method",
            Refusal::Body => "body",
            Refusal::Attempts => "attempts",
            Refusal::Pushback => "pushback",
            Refusal::Deadline => "deadline",
            Refusal::Budget => "budget",
        }
    }
}

/// The longest pause of ours between attempts.
const LONGEST_BACKOFF: Duration = Duration::from_secs(1);
/// The longest pause that a server may ask for; for a longer one the caller gets the answer and decides.
const LONGEST_PUSHBACK: Duration = Duration::from_secs(10);

/// Decides. Takes a token of the budget only where all else allows the retry. `wall` is for dates in answers.
pub fn decide(
    policy: &Retries,
    attempt: &Attempt<'_>,
    budget: &mut Bucket,
    random: &mut fastrand::Rng,
    now: Instant,
    wall: SystemTime,
) -> Verdict {
    match allowed(policy, attempt, random, wall) {
        Ok(_) if !budget.take(&policy.budget, now) => Verdict::No { reason: Refusal::Budget },
        Ok((reason, after)) => Verdict::Again { reason, after },
        Err(reason) => Verdict::No { reason },
    }
}

/// Everything but the budget.
fn allowed(
    policy: &Retries,
    attempt: &Attempt<'_>,
    random: &mut fastrand::Rng,
    wall: SystemTime,
) -> Result<(Reason, Duration), Refusal> {
    let reason = worth_it(policy, attempt)?;
    if !attempt.replayable {
        return Err(Refusal::Body);
    }
    if attempt.number > u32::from(policy.attempts) {
        return Err(Refusal::Attempts);
    }
    let after = match asked_pause(&attempt.outcome, wall)? {
        Some(asked) => asked,
        // Another endpoint is tried at once: it has nothing to do with the failure.
        None if reason == Reason::Unprocessed && attempt.number == 1 => Duration::ZERO,
        None => backoff(policy, attempt.number, random),
    };
    if attempt.remaining.is_some_and(|remaining| remaining <= after) {
        return Err(Refusal::Deadline);
    }
    Ok((reason, after))
}

/// Is there something that another attempt may mend, and may it be made?
fn worth_it(policy: &Retries, attempt: &Attempt<'_>) -> Result<Reason, Refusal> {
    match attempt.outcome {
        Outcome::Failed { unprocessed: true, .. } => Ok(Reason::Unprocessed),
        Outcome::Failed { failure, .. } if !failure.is_transport() => Err(Refusal::Failure),
        Outcome::Failed { .. } if !is_repeatable(policy, attempt.method) => Err(Refusal::Method),
        Outcome::Failed { .. } => Ok(Reason::Transport),
        Outcome::Answered { status, .. } if !policy.statuses.contains(&status) => Err(Refusal::NotNeeded),
        Outcome::Answered { .. } if !is_repeatable(policy, attempt.method) => Err(Refusal::Method),
        Outcome::Answered { .. } => Ok(Reason::Status),
    }
}

/// Methods are compared as they are written (RFC 9110 9.1).
fn is_repeatable(policy: &Retries, method: &str) -> bool {
    matches!(method, "GET" | "HEAD" | "OPTIONS") || policy.methods.iter().any(|listed| listed == method)
}

/// The pause that the server asks for, if it asks for one.
fn asked_pause(outcome: &Outcome<'_>, wall: SystemTime) -> Result<Option<Duration>, Refusal> {
    let Outcome::Answered { retry_after, pushback, .. } = outcome else { return Ok(None) };
    let asked = match (pushback, retry_after) {
        // A6: a pushback that is negative or no number forbids the retry.
        (Some(text), _) => Some(digits(text).map(Duration::from_millis).ok_or(Refusal::Pushback)?),
        (None, Some(text)) => parse_retry_after(text, wall),
        (None, None) => None,
    };
    match asked {
        Some(pause) if pause > LONGEST_PUSHBACK => Err(Refusal::Pushback),
        pause => Ok(pause),
    }
}

/// Seconds, or a date. What is neither is as good as absent.
fn parse_retry_after(text: &str, wall: SystemTime) -> Option<Duration> {
    match digits(text) {
        Some(seconds) => Some(Duration::from_secs(seconds)),
        None => parse_http_date(text).map(|date| date.duration_since(wall).unwrap_or_default()),
    }
}

/// IMF-fixdate of RFC 9110 5.6.7, the only form that a server may send: `Sun, 06 Nov 1994 08:49:37 GMT`.
fn parse_http_date(text: &str) -> Option<SystemTime> {
    if !text.is_ascii() || text.len() != 29 || !text.ends_with(" GMT") {
        return None;
    }
    // RFC 2822 is the same but for the name of the zone.
    let text = format!("{}+0000", &text[..26]);
    let date = time::OffsetDateTime::parse(&text, &time::format_description::well_known::Rfc2822).ok()?;
    Some(date.into())
}

fn digits(text: &str) -> Option<u64> {
    let plain = (1..=15).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    if plain { text.parse().ok() } else { None }
}

/// Doubles with each attempt; jitter takes away up to a half, so that clients do not come back together.
fn backoff(policy: &Retries, number: u32, random: &mut fastrand::Rng) -> Duration {
    let factor = 2u32.saturating_pow(number.saturating_sub(1));
    let longest = policy.backoff.saturating_mul(factor).min(LONGEST_BACKOFF.max(policy.backoff));
    longest.mul_f64(1.0 - random.f64() / 2.0)
}

#[cfg(test)]
mod tests;
