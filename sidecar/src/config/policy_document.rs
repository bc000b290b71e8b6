//! The policy document of one service (docs/policy.md), the same for every store: read into `model::Policy`, every
//! key checked for its range, every mistake listed. What the document does not say keeps the value of the
//! defaults. Which service it is for, and where it came from, is the business of the store.

use std::{ops::RangeInclusive, time::Duration};

use super::document::{EXPECTED_IDENTITY, Item, Mistakes, Section, parse};
use crate::model::{Breaker, Budget, MutualTls, Policy, Retries, Timeouts};

const MAX_IDENTITIES: usize = 100;
const MAX_STATUSES: usize = 50;
const MAX_METHODS: usize = 20;
/// Kept per request in flight, so there is a bound.
const MAX_BODY_BYTES: u64 = 16 * 1024 * 1024;

const CONNECT: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(60);
const TIMEOUT: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(24 * 3600);
const BACKOFF: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(10);
const EJECTION: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(3600);

/// Reads a document. None where it is no document at all; otherwise use it only if there are no mistakes.
pub fn read(text: &str, defaults: &Policy, mistakes: &mut Mistakes) -> Option<Policy> {
    let mut root = parse(text, mistakes)?;
    let protocol = root.take("protocol").and_then(|item| item.protocol(mistakes)).or(defaults.protocol);
    let identities = match root.take("identities") {
        Some(item) => {
            all(item, MAX_IDENTITIES, mistakes, |item, mistakes| item.parsed(EXPECTED_IDENTITY, mistakes))
        }
        None => defaults.identities.clone(),
    };
    let mutual_tls = self::mutual_tls(&mut root, "mutual_tls", mistakes).or(defaults.mutual_tls);
    let outbound_mutual_tls =
        self::mutual_tls(&mut root, "outbound_mutual_tls", mistakes).unwrap_or(defaults.outbound_mutual_tls);
    let timeouts = section(&mut root, "timeouts", &defaults.timeouts, mistakes, timeouts);
    let retries = section(&mut root, "retries", &defaults.retries, mistakes, retries);
    let breaker = section(&mut root, "breaker", &defaults.breaker, mistakes, breaker);
    root.finish(mistakes);
    Some(Policy { protocol, identities, mutual_tls, outbound_mutual_tls, timeouts, retries, breaker })
}

fn mutual_tls(root: &mut Section, key: &'static str, mistakes: &mut Mistakes) -> Option<MutualTls> {
    let word = root.take(key)?.word(&["permissive", "strict"], mistakes);
    Some(if word == Some(0) { MutualTls::Permissive } else { MutualTls::Strict })
}

fn timeouts(section: &mut Section, defaults: &Timeouts, mistakes: &mut Mistakes) -> Timeouts {
    let mut limit = |key| section.take(key).and_then(|item| item.duration(TIMEOUT, mistakes));
    let request = limit("request").or(defaults.request);
    let attempt = limit("attempt").or(defaults.attempt);
    let connect = section.take("connect").and_then(|item| item.duration(CONNECT, mistakes));
    Timeouts { connect: connect.unwrap_or(defaults.connect), request, attempt }
}

fn retries(section: &mut Section, defaults: &Retries, mistakes: &mut Mistakes) -> Retries {
    let attempts = number(section, "attempts", 0..=10, mistakes);
    let statuses = section.take("statuses").map(|item| all(item, MAX_STATUSES, mistakes, status));
    let methods = section.take("methods").map(|item| all(item, MAX_METHODS, mistakes, method));
    let budget = self::section(section, "budget", &defaults.budget, mistakes, budget);
    let body_bytes = number(section, "body_bytes", 0..=MAX_BODY_BYTES, mistakes);
    let backoff = section.take("backoff").and_then(|item| item.duration(BACKOFF, mistakes));
    Retries {
        attempts: narrow(attempts, defaults.attempts),
        statuses: statuses.unwrap_or_else(|| defaults.statuses.clone()),
        methods: methods.unwrap_or_else(|| defaults.methods.clone()),
        budget,
        body_bytes: narrow(body_bytes, defaults.body_bytes),
        backoff: backoff.unwrap_or(defaults.backoff),
    }
}

fn budget(section: &mut Section, defaults: &Budget, mistakes: &mut Mistakes) -> Budget {
    let percent = number(section, "percent", 0..=100, mistakes);
    let per_second = number(section, "per_second", 0..=1000, mistakes);
    Budget { percent: narrow(percent, defaults.percent), per_second: narrow(per_second, defaults.per_second) }
}

fn breaker(section: &mut Section, defaults: &Breaker, mistakes: &mut Mistakes) -> Breaker {
    let consecutive_failures = number(section, "consecutive_failures", 0..=1000, mistakes);
    let ejection = section
        .take("ejection")
        .and_then(|item| item.duration(EJECTION, mistakes))
        .unwrap_or(defaults.ejection);
    let longest = section.take("ejection_max");
    let ejection_max = longest
        .as_ref()
        .and_then(|item| item.duration(EJECTION, mistakes))
        .unwrap_or(defaults.ejection_max.max(ejection));
    if let Some(item) = longest.filter(|_| ejection_max < ejection) {
        item.refuse(
            format!("at least `breaker.ejection`, {}", humantime::format_duration(ejection)),
            mistakes,
        );
    }
    let max_ejected_percent = number(section, "max_ejected_percent", 0..=100, mistakes);
    Breaker {
        consecutive_failures: narrow(consecutive_failures, defaults.consecutive_failures),
        ejection,
        ejection_max,
        max_ejected_percent: narrow(max_ejected_percent, defaults.max_ejected_percent),
    }
}

/// A section with all its keys, or the defaults where it is absent.
fn section<T: Clone>(
    parent: &mut Section,
    key: &'static str,
    defaults: &T,
    mistakes: &mut Mistakes,
    read: impl Fn(&mut Section, &T, &mut Mistakes) -> T,
) -> T {
    let Some(mut section) = parent.take(key).and_then(|item| item.section(mistakes)) else {
        return defaults.clone();
    };
    let value = read(&mut section, defaults, mistakes);
    section.finish(mistakes);
    value
}

fn all<T>(
    item: Item,
    most: usize,
    mistakes: &mut Mistakes,
    read: impl Fn(&Item, &mut Mistakes) -> Option<T>,
) -> Vec<T> {
    item.list(most, mistakes).iter().filter_map(|item| read(item, mistakes)).collect()
}

fn number(
    section: &mut Section,
    key: &'static str,
    range: RangeInclusive<u64>,
    mistakes: &mut Mistakes,
) -> Option<u64> {
    section.take(key).and_then(|item| item.number(range, mistakes))
}

/// The ranges are within the types: what is stated fits.
fn narrow<T: TryFrom<u64>>(stated: Option<u64>, default: T) -> T {
    stated.and_then(|number| T::try_from(number).ok()).unwrap_or(default)
}

fn status(item: &Item, mistakes: &mut Mistakes) -> Option<u16> {
    item.number(400..=599, mistakes).and_then(|status| u16::try_from(status).ok())
}

/// Methods are written in capitals, and compared as written (RFC 9110 9.1).
fn method(item: &Item, mistakes: &mut Mistakes) -> Option<String> {
    const EXPECTED: &str = "a method in capitals such as PUT";
    let method: String = item.parsed(EXPECTED, mistakes)?;
    let allowed = |byte: u8| byte.is_ascii_uppercase() || byte == b'-';
    if !(1..=32).contains(&method.len()) || !method.bytes().all(allowed) {
        item.refuse(EXPECTED, mistakes);
        return None;
    }
    Some(method)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::model::Protocol;

    fn read_it(text: &str) -> Result<Policy, Vec<String>> {
        let mut mistakes = Mistakes::new(Path::new("orders.yaml"));
        let policy = read(text, &Policy::default(), &mut mistakes);
        match mistakes.or_else(policy) {
            Ok(policy) => Ok(policy.unwrap()),
            Err(mistakes) => Err(mistakes.iter().map(ToString::to_string).collect()),
        }
    }

    #[test]
    fn what_is_not_said_keeps_the_default() {
        assert_eq!(read_it("{}").unwrap(), Policy::default());
        let policy = read_it("retries: {attempts: 4}").unwrap();
        assert_eq!(policy.retries, Retries { attempts: 4, ..Retries::default() });
        let mut mistakes = Mistakes::new(Path::new("a.yaml"));
        let timeouts = Timeouts { connect: Duration::from_millis(5), ..Timeouts::default() };
        let defaults = Policy { timeouts, ..Policy::default() };
        let policy = read("timeouts: {request: 3s}", &defaults, &mut mistakes).unwrap();
        assert_eq!(policy.timeouts.connect, Duration::from_millis(5));
        assert_eq!(policy.timeouts.request, Some(Duration::from_secs(3)));
    }

    /// The example of the documentation holds every key, and each with another value than its default.
    #[test]
    fn the_documented_example_is_read_in_full() {
        let docs = include_str!("../../../docs/policy.md");
        let (_, rest) = docs.split_once("```yaml\n").expect("an example in docs/policy.md");
        let (example, _) = rest.split_once("```").expect("the end of the example");
        let policy = read_it(example).unwrap();
        let expected = Policy {
            protocol: Some(Protocol::Http1),
            identities: vec!["spiffe://weft.local/ns/shop/sa/orders".parse().unwrap()],
            mutual_tls: Some(MutualTls::Strict),
            outbound_mutual_tls: MutualTls::Strict,
            timeouts: Timeouts {
                connect: Duration::from_millis(500),
                request: Some(Duration::from_secs(10)),
                attempt: Some(Duration::from_secs(3)),
            },
            retries: Retries {
                attempts: 3,
                statuses: vec![502, 503],
                methods: vec!["PUT".into(), "DELETE".into()],
                budget: Budget { percent: 10, per_second: 5 },
                body_bytes: 131_072,
                backoff: Duration::from_millis(25),
            },
            breaker: Breaker {
                consecutive_failures: 3,
                ejection: Duration::from_secs(2),
                ejection_max: Duration::from_secs(120),
                max_ejected_percent: 30,
            },
        };
        assert_eq!(policy, expected);
    }

    #[test]
    fn every_mistake_is_listed_with_its_line_and_range() {
        let text = "protocol: http3
identities: [orders]
mutual_tls: maybe
outbound_mutual_tls: [strict]
timeouts:
  connect: 2m
  request: 0s
  atempt: 1s
retries:
  attempts: -1
  statuses: [200]
  methods: [put]
  budget: {percent: 101, per_second: 1001}
  body_bytes: 1GB
  backoff: 11s
breaker:
  consecutive_failures: many
  ejection: 10ms
  ejection_max: 2h
  max_ejected_percent: 101
colour: red
";
        let found = read_it(text).unwrap_err();
        let lines: Vec<u32> = found.iter().filter_map(|text| text.split(':').nth(1)?.parse().ok()).collect();
        assert_eq!(
            lines,
            [1, 2, 3, 4, 6, 7, 8, 10, 11, 12, 13, 13, 14, 15, 17, 18, 19, 20, 21],
            "{found:#?}"
        );
        assert_eq!(
            found[7],
            "orders.yaml:10: `retries.attempts` is -1; expected a whole number from 0 to 10"
        );
        assert_eq!(
            found[6],
            "orders.yaml:8: `timeouts.atempt` is an unknown key; expected attempt, connect, request"
        );
    }

    #[test]
    fn the_longest_ejection_is_no_shorter_than_the_first() {
        let found = read_it("breaker:\n  ejection: 10s\n  ejection_max: 5s\n").unwrap_err();
        assert_eq!(
            found,
            ["orders.yaml:3: `breaker.ejection_max` is \"5s\"; expected at least `breaker.ejection`, 10s"]
        );
        let policy = read_it("breaker: {ejection: 5m}").unwrap();
        assert_eq!(policy.breaker.ejection_max, Duration::from_secs(300), "raised with the first");
    }
}
