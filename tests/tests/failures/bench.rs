//! What the tests of failures share: pods with an app that answers badly, and the check that a failure shows
//! wherever it should.

use std::collections::BTreeSet;

use weft_sidecar::model::Failure;
use weft_tests::{Need, Pod, Process, Sidecar, output_of, program, until};

use super::Test;

pub const NEEDS: [Need; 5] = [
    Need::Root,
    Need::Program("ip", "iproute2"),
    Need::Program("setpriv", "util-linux"),
    Need::Program("iptables", "iptables"),
    Need::Program("curl", "curl"),
];

/// The failures that a test has shown so far.
pub struct Shown<'a> {
    test: Test,
    sidecar: &'a Sidecar,
    pod: &'a Pod,
    labels: BTreeSet<&'static str>,
}

impl<'a> Shown<'a> {
    /// By this sidecar, in this pod.
    pub fn by(test: Test, sidecar: &'a Sidecar, pod: &'a Pod) -> Self {
        Shown { test, sidecar, pod, labels: BTreeSet::new() }
    }

    /// The answer that curl got carries status and label; and as [`Shown::without_answer`] for a request.
    pub fn answered(&mut self, failure: Failure, answer: &str) {
        let answer = answer.to_lowercase();
        let status = format!(" {} ", failure.status());
        assert!(answer.lines().next().is_some_and(|line| line.contains(&status)), "{failure}: {answer}");
        assert!(answer.contains(&format!("x-weft-failure: {failure}\r\n")), "{failure}: {answer}");
        let line = self.without_answer(failure);
        // The requests of a refused connection have no lines of their own.
        if line["kind"] == "request" {
            assert_eq!(line["status"], failure.status(), "{line}");
        }
    }

    /// The access log has a line, and the metric of its kind has counted.
    pub fn without_answer(&mut self, failure: Failure) -> serde_json::Value {
        let line = self.sidecar.wait_for_failure(failure.label(), &[]);
        let detail = line["detail"].as_str().unwrap_or_default();
        assert!(!detail.is_empty(), "no words: {line}");
        let metric = match line["kind"].as_str() {
            Some("request") => "weft_requests_total{",
            _ => "weft_connection_failures_total{",
        };
        let label = format!("failure=\"{failure}\"");
        until(&format!("{metric} counts {failure}"), || {
            self.sidecar
                .metrics(self.pod)
                .lines()
                .any(|sample| sample.starts_with(metric) && sample.contains(&label))
        });
        self.labels.insert(failure.label());
        line
    }

    /// All that the test promised, and nothing else, was shown.
    pub fn complete(self) {
        let promised: BTreeSet<_> = self.test.1.iter().map(|failure| failure.label()).collect();
        assert_eq!(self.labels, promised, "{}", self.test.0);
    }
}

/// The app of `mesh-peer` on this address.
pub fn start_app(pod: &Pod, address: &str) -> Process {
    let mut app = pod.start(program("mesh-peer"), &["app", address]);
    app.wait_for_line("serving");
    app
}

/// Starts `mesh-peer`.
pub fn peer(pod: &Pod, arguments: &[&str]) -> Process {
    pod.start(program("mesh-peer"), arguments)
}

/// Head and body of what curl gets, or that it got nothing.
pub fn curl(pod: &Pod, arguments: &[&str]) -> String {
    let mut command = pod.command("sh");
    command.args(["-c", "curl -s -g -i -m 10 \"$@\" || echo \"curl failed $?\"", "curl"]).args(arguments);
    output_of(command)
}
