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
            429 => {
                Error::new(Kind::Unavailable, format!("too many requests ({said}); it is asked again later"))
            }
            404 => Error::new(Kind::NotFound, format!("there is no such thing ({said})")),
            // Consul before 1.11 says this with 500.
            500 if said.contains("Unknown check") || said.contains("Unknown service") => {
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
