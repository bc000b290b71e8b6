//! Programs that a test starts: their output goes to a file, and they end with the test.

use std::{
    fs,
    io::{Read, Seek},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use nix::{sys::signal::Signal, unistd::Pid};
use tempfile::NamedTempFile;

/// How long a test waits for something that should happen at once.
const PATIENCE: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(20);

/// A running program. Killed when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: NamedTempFile,
}

impl Process {
    /// Starts a program with its standard output and error in one file.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start(name: &str, mut command: Command) -> Process {
        let log = NamedTempFile::with_prefix("weft-test-").expect("a file for the output");
        let [output, errors] = [(); 2].map(|()| log.reopen().expect("the file for the output"));
        // both ends append, so that neither overwrites the other
        let append = |file: &fs::File| {
            nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_APPEND))
                .expect("O_APPEND");
        };
        append(&output);
        append(&errors);
        let child = command
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {name} ({command:?}): {error}"));
        Process { name: name.to_owned(), child, log }
    }

    /// Its process id.
    pub fn id(&self) -> Pid {
        Pid::from_raw(self.child.id().try_into().expect("a process id"))
    }

    /// All it has printed.
    ///
    /// # Panics
    /// If the file cannot be read.
    pub fn log(&self) -> String {
        let mut bytes = Vec::new();
        let mut file = self.log.reopen().expect("the output");
        file.rewind().expect("the beginning of the output");
        file.read_to_end(&mut bytes).expect("the output");
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until it has printed a line that contains `part`, and gives that line.
    ///
    /// # Panics
    /// With all it printed, if it ends before or takes too long.
    pub fn wait_for_line(&mut self, part: &str) -> String {
        let mut found = None;
        let mut ended = false;
        let in_time = happens(|| {
            // asked before reading, so that the last lines count
            ended = self.has_ended();
            found = self.log().lines().find(|line| line.contains(part)).map(str::to_owned);
            found.is_some() || ended
        });
        let why = if in_time { "ended" } else { "took too long" };
        found.unwrap_or_else(|| {
            panic!("{} {why} without printing `{part}`; it printed:\n{}", self.name, self.log())
        })
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        // it may have ended already
        let _ = nix::sys::signal::kill(self.id(), signal);
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// With all it printed, if it takes too long.
    pub fn wait(&mut self) -> ExitStatus {
        assert!(happens(|| self.has_ended()), "{} does not end; it printed:\n{}", self.name, self.log());
        self.child.wait().expect("its status")
    }

    /// Has it ended?
    ///
    /// # Panics
    /// If the kernel does not say.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("its status").is_some()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- {} printed:\n{}", self.name, self.log());
        }
    }
}

/// Runs a program to its end and gives its standard output.
///
/// # Panics
/// With all it printed, if it fails.
pub fn output_of(mut command: Command) -> String {
    let output = command
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{command:?} failed ({}):\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// Waits until something is so.
///
/// # Panics
/// If it takes too long.
pub fn until(what: &str, is_so: impl FnMut() -> bool) {
    assert!(happens(is_so), "waited too long until {what}");
}

fn happens(mut is_so: impl FnMut() -> bool) -> bool {
    let rounds = PATIENCE.as_millis() / PAUSE.as_millis();
    for _ in 0..rounds {
        if is_so() {
            return true;
        }
        pause();
    }
    is_so()
}

/// Gives other programs a moment.
#[expect(clippy::disallowed_methods, reason = "other programs send no event to wait for")]
pub fn pause() {
    std::thread::sleep(PAUSE);
}
