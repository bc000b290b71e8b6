//! Counts the questions that reach an agent's HTTP port from other pods, as they arrive: its own log has only those
//! that it has answered, and a blocking query may wait for minutes. tcpdump sees the packets with the heads; whatever
//! it sees twice counts twice, and a packet that it could not see fails the test.

use std::fmt;

use nix::sys::signal::Signal;
use weft_tests::{Consul, Need, Pod, Process};

/// Segments to Consul's port that begin as a head does: `GET `, `PUT ` or `POST`. Its clients send the next head only
/// when the last one is answered, so no segment has two.
const HEADS: &str = "tcp dst port 8500 and (tcp[((tcp[12] & 0xf0) >> 2):4] = 0x47455420 \
                     or tcp[((tcp[12] & 0xf0) >> 2):4] = 0x50555420 \
                     or tcp[((tcp[12] & 0xf0) >> 2):4] = 0x504f5354)";

/// The questions since this began.
pub struct Questions {
    tcpdump: Process,
}

/// How many came when.
pub struct Count {
    /// Within any second, wherever it begins.
    pub busiest: usize,
    /// From second to second since the first.
    pub seconds: Vec<usize>,
    pub all: usize,
}

impl Questions {
    /// What a test that counts needs.
    pub fn needs() -> Vec<Need> {
        [&Consul::NEEDS[..], &[Need::Program("tcpdump", "tcpdump")]].concat()
    }

    /// Counts from now on what comes to the pod of an agent; what it asks itself on loopback does not count.
    pub fn at(pod: &Pod) -> Questions {
        let arguments = ["-i", "eth0", "-Q", "in", "-n", "-q", "-tt", "-l", "--immediate-mode", HEADS];
        let mut tcpdump = pod.start("tcpdump", &arguments);
        tcpdump.wait_for_line("listening on");
        Questions { tcpdump }
    }

    /// Ends, and counts them.
    pub fn count(mut self) -> Count {
        self.tcpdump.signal(Signal::SIGINT);
        self.tcpdump.wait();
        let log = self.tcpdump.log();
        assert!(log.contains("\n0 packets dropped by kernel"), "questions were not seen: {log}");
        let heads = log.lines().filter_map(|line| line.split_once(" IP "));
        let times: Vec<f64> = heads.map(|(time, _)| time.parse().expect(time)).collect();
        let within = |begin: f64| times.iter().filter(|at| (begin..begin + 1.0).contains(*at)).count();
        let busiest = times.iter().map(|begin| within(*begin)).max().unwrap_or_default();
        let (first, last) = (times.first().copied().unwrap_or_default(), times.last().copied());
        let begins = (0..).map(|second| first + f64::from(second));
        let seconds = begins.take_while(|begin| last.is_some_and(|last| *begin <= last)).map(within);
        Count { busiest, seconds: seconds.collect(), all: times.len() }
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Count { busiest, seconds, all } = self;
        write!(f, "{all}, at most {busiest} within a second; from second to second {seconds:?}")
    }
}
