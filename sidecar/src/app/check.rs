//! `check`: what would keep the sidecar from working here, each with the next step.

use std::process::ExitCode;

use super::command;
use crate::{
    config::Config,
    redirect::{self, Finding, Outcome},
};

/// Looks, prints, and says by the exit code whether anything failed.
pub fn check(config: &Config) -> ExitCode {
    let mut failed = false;
    for finding in findings(config) {
        failed |= finding.outcome == Outcome::Wrong;
        println!("{finding}");
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn findings(config: &Config) -> Vec<Finding> {
    match command::settings(config) {
        Ok(settings) => redirect::check(&settings),
        Err(_) => Vec::new(),
    }
}
