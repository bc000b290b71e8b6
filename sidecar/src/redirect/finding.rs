//! What a check found out: shown by an experiment, not known, or wrong, with the way out.

use std::fmt;

use serde::Serialize;

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// An experiment showed that it works.
    Shown,
    /// It could not be tried, or only looked at.
    Unknown,
    /// It does not work.
    Wrong,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How it ended.
    pub outcome: Outcome,
    /// What was looked at, in a few words.
    pub subject: String,
    /// What was seen, and what to change if it is wrong.
    pub detail: String,
}

impl Finding {
    /// It works: an experiment showed it.
    pub fn shown(subject: impl Into<String>, detail: impl Into<String>) -> Self {
        Finding { outcome: Outcome::Shown, subject: subject.into(), detail: detail.into() }
    }

    /// It could not be tried, or only looked at.
    pub fn unknown(subject: impl Into<String>, detail: impl Into<String>) -> Self {
        Finding { outcome: Outcome::Unknown, subject: subject.into(), detail: detail.into() }
    }

    /// It does not work; `detail` says what to change.
    pub fn wrong(subject: impl Into<String>, detail: impl Into<String>) -> Self {
        Finding { outcome: Outcome::Wrong, subject: subject.into(), detail: detail.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self.outcome {
            Outcome::Shown => "ok",
            Outcome::Unknown => "unknown",
            Outcome::Wrong => "WRONG",
        };
        write!(to, "{word:<8}{}: {}", self.subject, self.detail)
    }
}
