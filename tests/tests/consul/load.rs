//! Calls without an end: some clients, each with a new connection for every GET, and a line for each answer.

use std::collections::BTreeMap;

use weft_tests::{Pod, Process, until};

/// The clients of one pod.
pub struct Load {
    process: Process,
}

/// What one GET got.
pub struct Answer {
    /// When its answer was complete, in seconds of the machine's clock.
    pub at: f64,
    /// How long it took, in seconds.
    pub took: f64,
    /// The service that was called.
    pub service: String,
    /// Status and body; what broke where there was none.
    pub said: String,
}

const CLIENTS: &str = "
import http.client, sys, threading, time
def client(names):
    while True:
        for name in names:
            begin = time.time()
            try:
                connection = http.client.HTTPConnection(name, timeout=8)
                connection.request('GET', '/')
                answer = connection.getresponse()
                said = str(answer.status) + ' ' + answer.read().decode().strip()
                connection.close()
            except Exception as error:
                said = '000 ' + repr(error)
            now = time.time()
            print(f'{now:.4f} {now - begin:.4f} {name} {said}\\n', end='', flush=True)
            time.sleep(0.02)
for at in range(2):
    threading.Thread(target=client, args=(sys.argv[1:],)).start()
";

impl Load {
    /// Calls these services in turn, some 70 times per second together.
    pub fn start(pod: &Pod, services: &[&str]) -> Load {
        Load { process: pod.start("python3", &[&["-c", CLIENTS], services].concat()) }
    }

    /// All answers so far.
    pub fn answers(&self) -> Vec<Answer> {
        let log = self.process.log();
        let whole = log.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let read = |line: &str| {
            let mut words = line.splitn(4, ' ');
            let mut word = || words.next().map(str::to_owned);
            let (at, took) = (word()?.parse().ok()?, word()?.parse().ok()?);
            Some(Answer { at, took, service: word()?, said: word()? })
        };
        whole.lines().map(|line| read(line).unwrap_or_else(|| panic!("the load says {line:?}"))).collect()
    }

    /// Waits for so many more answers.
    pub fn more(&self, count: usize) {
        let before = self.answers().len();
        until("more calls are made", || self.answers().len() >= before + count);
    }

    /// The answers by service, status and body.
    pub fn tally(&self) -> BTreeMap<String, usize> {
        let mut tally = BTreeMap::new();
        for answer in self.answers() {
            *tally.entry(format!("{}: {}", answer.service, answer.said)).or_default() += 1;
        }
        tally
    }

    /// The body that came most often.
    pub fn busiest(&self) -> String {
        let tally = self.tally().into_iter().max_by_key(|(_, count)| *count);
        let (answer, _) = tally.expect("an answer");
        answer.rsplit_once(' ').map_or(answer.as_str(), |(_, body)| body).to_owned()
    }

    /// Says that no GET failed; gives how many there were, and the longest of them in seconds.
    pub fn all_well(&self) -> (usize, f64) {
        let answers = self.answers();
        let failed: Vec<String> = answers
            .iter()
            .filter(|answer| !answer.said.starts_with("200 "))
            .map(|answer| format!("{:.3} {}: {}", answer.at, answer.service, answer.said))
            .collect();
        assert!(failed.is_empty(), "{} of {} GETs failed: {failed:#?}", failed.len(), answers.len());
        (answers.len(), answers.iter().map(|answer| answer.took).fold(0.0, f64::max))
    }
}
