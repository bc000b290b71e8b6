//! What can go wrong with a question to Consul: a kind for whoever decides, and words for whoever reads the log:
//! which agent, what was asked, what came, and the way out.

use std::fmt;

use hyper::StatusCode;

/// A question that got no useful answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// For decisions.
    pub kind: Kind,
    /// For people.
    pub text: String,
}

/// What kind of error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Nobody answers, or not in time, or the connection broke.
    Unreachable,
    /// An agent answers that it cannot: no leader, no servers, too many requests.
    Unavailable,
    /// The index that was waited for went back: the same is asked anew.
    WentBack,
    /// The token may not do this.
    Denied,
    /// There is no such thing (404, and how Consul says it elsewhere).
    NotFound,
    /// The agent refuses the question.
    Refused,
    /// The answer is not what Consul answers.
    BadAnswer,
}

impl Kind {
    /// The word in logs and metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Kind::Unreachable => "unreachable",
            Kind::Unavailable => "unavailable",
            Kind::WentBack => "went_back",
            Kind::Denied => "denied",
            Kind::NotFound => "not_found",
            Kind::Refused => "refused",
            Kind::BadAnswer => "bad_answer",
        }
    }

    /// Might another agent do better?
    pub(super) const fn is_of_the_agent(self) -> bool {
        matches!(self, Kind::Unreachable | Kind::Unavailable)
    }
}

impl Error {
    pub(super) fn new(kind: Kind, text: impl Into<String>) -> Self {
        Error { kind, text: text.into() }
    }

    /// What an answer with an error status means. `permission` is what the question needed.
    pub(super) fn of_status(status: StatusCode, body: &[u8], permission: &str) -> Self {
        let said = said(body);
        match status.as_u16() {
            403 => Error::new(
                Kind::Denied,
                format!("permission denied ({said}); the token needs {permission}, see docs/consul.md"),
            ),
            429 if said.contains("concurrent connections") => Error::new(
                Kind::Unavailable,
                format!(
                    "too many connections from this address ({said}); raise limits.http_max_conns_per_client there, \
                     see docs/consul.md"
                ),
            ),
            429 => {
                Error::new(Kind::Unavailable, format!("too many requests ({said}); it is asked again later"))
            }
            404 => Error::new(Kind::NotFound, format!("there is no such thing ({said})")),
            // Consul before 1.11 says this with 500; the last of them without ACLs.
            500 if ["Unknown check", "Unknown service", "does not have associated TTL"]
                .iter()
                .any(|words| said.contains(words)) =>
            {
                Error::new(Kind::NotFound, said)
            }
            500 if said.contains("ACL not found") || said.contains("Permission denied") => {
                Error::new(Kind::Denied, format!("permission denied ({said}); the token needs {permission}"))
            }
            500 if said.contains("No cluster leader") || said.contains("No known Consul servers") => {
                Error::new(
                    Kind::Unavailable,
                    format!("Consul has no leader ({said}); are its servers running and connected?"),
                )
            }
            500..=599 => Error::new(Kind::Unavailable, format!("status {status} ({said})")),
            _ => Error::new(Kind::Refused, format!("status {status} ({said})")),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Error {}

/// At most this much of a foreign text is repeated.
const SHOWN: usize = 200;

/// The first words of an answer, without control characters.
pub(super) fn said(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(&body[..body.len().min(SHOWN * 4)]);
    let short: String = text.trim().chars().take(SHOWN).collect();
    if short.is_empty() { "without a word".to_owned() } else { short.escape_debug().to_string() }
}

/// The beginning of a text that repeats a stranger's words among ours, without control characters.
pub(super) fn printable(text: &str) -> String {
    let mut short = String::new();
    for one in text.chars().take(SHOWN) {
        if one.is_control() { short.extend(one.escape_debug()) } else { short.push(one) }
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_means_what_consul_means_by_it() {
        for (status, body, kind, words) in [
            (
                403,
                "ACL not found",
                Kind::Denied,
                "permission denied (ACL not found); the token needs key:read",
            ),
            (
                403,
                "Permission denied: Missing service:write on a",
                Kind::Denied,
                "Missing service:write on a",
            ),
            (500, "rpc error making call: Permission denied", Kind::Denied, "the token needs key:read"),
            (500, "No cluster leader", Kind::Unavailable, "no leader (No cluster leader); are its servers"),
            (500, "No known Consul servers", Kind::Unavailable, "no leader"),
            (500, "Unknown check \"service:x\"", Kind::NotFound, "Unknown check"),
            (500, "CheckID \"x\" does not have associated TTL", Kind::NotFound, "associated TTL"),
            (404, "Unknown check ID", Kind::NotFound, "Unknown check ID"),
            (503, "", Kind::Unavailable, "status 503 Service Unavailable (without a word)"),
            (429, "a\u{7}b", Kind::Unavailable, "too many requests (a\\u{7}b)"),
            (400, "Bad request", Kind::Refused, "status 400"),
        ] {
            let status = StatusCode::from_u16(status).unwrap();
            let error = Error::of_status(status, body.as_bytes(), "key:read");
            assert_eq!(error.kind, kind, "{error}");
            assert!(error.text.contains(words), "{error}");
        }
        assert!(said(&[b'x'; 10_000]).len() <= SHOWN);
        assert!(printable(&"x".repeat(10_000)).len() <= SHOWN);
        assert_eq!(printable("string \"a\u{7f}\nb\""), "string \"a\\u{7f}\\nb\"");
    }
}
