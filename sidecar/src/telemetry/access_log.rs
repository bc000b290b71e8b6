//! The access log: one JSON object per line for each finished request and opaque connection, or only for those
//! that failed, or for none. Lines go through a bounded queue to a thread of their own: a slow disk or a full
//! pipe costs lines, which are counted, and never holds up a worker. Fields: `docs/observability.md`.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    net::SocketAddr,
    os::{
        fd::AsFd,
        unix::fs::{FileExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel},
    },
    thread,
    time::Duration,
};

use serde::Serialize;
use tokio::{
    sync::oneshot,
    time::{sleep, timeout},
};

use super::metrics::Metrics;
use crate::config::AccessLogMode;

/// Where lines go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccessLogTarget {
    /// The standard output of the sidecar.
    Stdout,
    /// Its standard error, as the command of `exec` has the standard output.
    Stderr,
    /// The end of this file, made with mode 0640 where it is missing.
    File(PathBuf),
}

/// The workers' side. Lines are written until it is dropped.
#[derive(Debug)]
pub struct AccessLog {
    mode: AccessLogMode,
    queue: Option<SyncSender<Message>>,
    metrics: Arc<Metrics>,
}

/// One line; what is unknown or does not apply is left out.
#[derive(Debug, Serialize, Default)]
pub(super) struct Line<'a> {
    /// RFC 3339, UTC: the beginning.
    pub time: String,
    /// `request` or `connection`.
    pub kind: &'static str,
    pub direction: &'static str,
    #[serde(skip_serializing_if = "str::is_empty")]
    pub service: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    pub route: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub authority: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub security: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grpc_status: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attempts: Option<u32>,
    pub peer_address: Option<SocketAddr>,
    /// Always there: a refusal must say that no identity was proven.
    pub peer_identity: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_version: Option<&'static str>,
    pub own_identity: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<SocketAddr>,
    pub request_bytes: u64,
    pub response_bytes: u64,
    pub duration_seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub span_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sampled: Option<bool>,
}

#[derive(Debug)]
enum Message {
    Line(Vec<u8>),
    /// Write what you have, then answer.
    Flush(oneshot::Sender<()>),
}

/// Lines that may wait for the writer.
const QUEUE_LINES: usize = 4096;
/// Bytes that are gathered before they are written, while lines go on coming.
const BUFFER_BYTES: usize = 32 * 1024;
/// How long a flush waits for room in the queue before it looks again.
const FULL_QUEUE_PAUSE: Duration = Duration::from_millis(10);

impl AccessLog {
    /// Opens the target and starts the writer, unless the mode is off.
    pub fn open(
        mode: AccessLogMode,
        target: &AccessLogTarget,
        metrics: &Arc<Metrics>,
    ) -> io::Result<AccessLog> {
        if mode == AccessLogMode::Off {
            return Ok(AccessLog { mode, queue: None, metrics: metrics.clone() });
        }
        // Not the standard library's own stdout: what it keeps of a line that failed would be written later.
        let (output, is_torn) = match target {
            AccessLogTarget::Stdout => (File::from(io::stdout().as_fd().try_clone_to_owned()?), false),
            AccessLogTarget::Stderr => (File::from(io::stderr().as_fd().try_clone_to_owned()?), false),
            AccessLogTarget::File(path) => open_file(path).map_err(|error| {
                io::Error::new(error.kind(), format!("access log {}: {error}", path.display()))
            })?,
        };
        AccessLog::writing_to(mode, Box::new(output), is_torn, metrics)
    }

    fn writing_to(
        mode: AccessLogMode,
        output: Box<dyn Write + Send>,
        is_torn: bool,
        metrics: &Arc<Metrics>,
    ) -> io::Result<AccessLog> {
        let (sender, receiver) = sync_channel(QUEUE_LINES);
        let lines = Lines { output, waiting: Vec::new(), is_torn, metrics: metrics.clone() };
        thread::Builder::new().name("weft-log".to_owned()).spawn(move || write_lines(&receiver, lines))?;
        Ok(AccessLog { mode, queue: Some(sender), metrics: metrics.clone() })
    }

    /// Could a line be written at all? Else nothing needs to be remembered for it.
    pub(super) fn is_on(&self) -> bool {
        self.mode != AccessLogMode::Off
    }

    /// Is a line written for what ended like this?
    pub(super) fn wants(&self, failed: bool) -> bool {
        match self.mode {
            AccessLogMode::Off => false,
            AccessLogMode::Failures => failed,
            AccessLogMode::All => true,
        }
    }

    pub(super) fn write(&self, line: &Line<'_>) {
        let Some(queue) = &self.queue else { return };
        // Our own struct of text and numbers always becomes JSON.
        let Ok(mut bytes) = serde_json::to_vec(line) else { return };
        bytes.push(b'\n');
        if queue.try_send(Message::Line(bytes)).is_err() {
            self.metrics.log_line_dropped();
        }
    }

    /// Waits until the lines so far are written, but not longer than this.
    pub async fn flush(&self, longest: Duration) {
        let Some(queue) = &self.queue else { return };
        let flushed = async {
            let (done, wait) = oneshot::channel();
            let mut message = Message::Flush(done);
            while let Err(TrySendError::Full(back)) = queue.try_send(message) {
                message = back;
                sleep(FULL_QUEUE_PAUSE).await;
            }
            // The error means that the writer is gone: nothing is left to wait for.
            let _ = wait.await;
        };
        let _ = timeout(longest, flushed).await;
    }
}

/// The end of a file, and whether half a line stands there, of a process that ran before.
fn open_file(path: &Path) -> io::Result<(File, bool)> {
    let file = OpenOptions::new().create(true).append(true).mode(0o640).open(path)?;
    let metadata = file.metadata()?;
    let Some(last) = metadata.len().checked_sub(1).filter(|_| metadata.is_file()) else {
        return Ok((file, false));
    };
    let mut byte = [0];
    // A file that may not be read is taken for whole.
    let read = File::open(path).and_then(|file| file.read_at(&mut byte, last));
    Ok((file, read.is_ok_and(|read| read == 1) && byte != *b"\n"))
}

/// Lines on their way into an output. Those that it does not take whole are lost and counted.
struct Lines {
    output: Box<dyn Write + Send>,
    waiting: Vec<u8>,
    /// The output ends in half a line, which the next one must not continue.
    is_torn: bool,
    metrics: Arc<Metrics>,
}

impl Lines {
    fn push(&mut self, line: &[u8]) {
        if self.waiting.len() + line.len() > BUFFER_BYTES {
            self.flush();
        }
        self.waiting.extend_from_slice(line);
    }

    fn flush(&mut self) {
        if self.waiting.is_empty() {
            return;
        }
        if self.is_torn {
            self.is_torn = write_all_of(&mut *self.output, b"\n") == 0;
        }
        let written = if self.is_torn { 0 } else { write_all_of(&mut *self.output, &self.waiting) };
        let (taken, left) = self.waiting.split_at(written);
        self.is_torn |= taken.last().is_some_and(|last| *last != b'\n');
        for _ in left.iter().filter(|byte| **byte == b'\n') {
            self.metrics.log_line_dropped();
        }
        self.waiting.clear();
    }
}

/// How many of these bytes the output took before it failed.
fn write_all_of(output: &mut dyn Write, bytes: &[u8]) -> usize {
    let mut written = 0;
    while written < bytes.len() {
        match output.write(&bytes[written..]) {
            Ok(0) => break,
            Ok(count) => written += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    written
}

/// Writes until every sender is gone. An output that fails loses lines, not the thread.
fn write_lines(queue: &Receiver<Message>, mut output: Lines) {
    loop {
        let message = match queue.try_recv() {
            Ok(message) => message,
            Err(TryRecvError::Disconnected) => break,
            Err(TryRecvError::Empty) => {
                output.flush();
                let Ok(message) = queue.recv() else { break };
                message
            }
        };
        match message {
            Message::Line(line) => output.push(&line),
            Message::Flush(done) => {
                output.flush();
                let _ = done.send(());
            }
        }
    }
    output.flush();
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    struct Stuck(std::sync::mpsc::Receiver<()>);

    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_stuck_output_costs_lines_and_holds_nobody_up() {
        let (release, stuck) = channel();
        let metrics = Arc::new(Metrics::new());
        let log = AccessLog::writing_to(AccessLogMode::All, Box::new(Stuck(stuck)), false, &metrics).unwrap();
        let line = Line { kind: "request", ..Line::default() };
        for _ in 0..QUEUE_LINES * 3 {
            log.write(&line);
        }
        let text = metrics.expose(false);
        let dropped = text.lines().find_map(|line| line.strip_prefix("weft_log_lines_dropped_total "));
        assert!(dropped.unwrap().parse::<usize>().unwrap() > QUEUE_LINES, "{dropped:?}");
        let before = tokio::time::Instant::now();
        log.flush(Duration::from_millis(50)).await;
        assert!(before.elapsed() >= Duration::from_millis(50));
        drop(release);
        log.flush(Duration::from_secs(60)).await;
        assert!(before.elapsed() < Duration::from_secs(60));
    }

    /// A disk with room for so many bytes, as whoever reads it sees it.
    #[derive(Clone, Default)]
    struct Disk(Arc<std::sync::Mutex<(usize, Vec<u8>)>>);

    impl Disk {
        fn make_room(&self, bytes: usize) {
            self.0.lock().unwrap().0 += bytes;
        }

        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().1.clone()).unwrap()
        }
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut disk = self.0.lock().unwrap();
            let room = bytes.len().min(disk.0);
            if room == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            disk.0 -= room;
            disk.1.extend_from_slice(&bytes[..room]);
            Ok(room)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_full_disk_costs_lines_which_are_counted_and_leaves_no_half_line_glued_to_the_next() {
        let (disk, metrics) = (Disk::default(), Arc::new(Metrics::new()));
        let log = AccessLog::writing_to(AccessLogMode::All, Box::new(disk.clone()), false, &metrics).unwrap();
        let write = async |path| {
            log.write(&Line { path: Some(path), ..Line::default() });
            log.flush(Duration::from_secs(60)).await;
        };
        disk.make_room(1 << 20);
        write("/1").await;
        let length = disk.text().len();
        disk.0.lock().unwrap().0 = length / 2;
        write("/2").await;
        write("/3").await;
        // Room for the end of the half line, and no more.
        disk.make_room(1);
        write("/4").await;
        disk.make_room(1 << 20);
        write("/5").await;
        write("/6").await;
        let text = disk.text();
        let paths: Vec<_> = text
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).map(|line| line["path"].clone()))
            .collect();
        let whole: Vec<_> = paths.iter().filter_map(|path| path.as_ref().ok()).collect();
        assert_eq!(whole, ["/1", "/5", "/6"], "{text}");
        assert_eq!(paths.len(), 4, "one half line stands alone: {text}");
        assert!(metrics.expose(false).contains("weft_log_lines_dropped_total 3"), "{text}");
    }

    #[tokio::test]
    async fn half_a_line_that_a_process_before_left_is_not_continued() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("access.log");
        std::fs::write(&path, "{}\n{\"half\":").unwrap();
        let metrics = Arc::new(Metrics::new());
        for _ in 0..2 {
            let target = AccessLogTarget::File(path.clone());
            let log = AccessLog::open(AccessLogMode::All, &target, &metrics).unwrap();
            log.write(&Line { path: Some("/a"), ..Line::default() });
            log.flush(Duration::from_secs(60)).await;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let whole = |line: &&str| serde_json::from_str::<serde_json::Value>(line).is_ok();
        assert_eq!((text.lines().count(), text.lines().filter(whole).count()), (4, 3), "{text}");
    }

    #[tokio::test]
    async fn a_file_is_appended_to() {
        let folder = tempfile::tempdir().unwrap();
        let target = AccessLogTarget::File(folder.path().join("access.log"));
        let metrics = Arc::new(Metrics::new());
        for path in ["/a", "/b\"\n"] {
            let log = AccessLog::open(AccessLogMode::Failures, &target, &metrics).unwrap();
            log.write(&Line { path: Some(path), ..Line::default() });
            log.flush(Duration::from_secs(60)).await;
        }
        let text = std::fs::read_to_string(folder.path().join("access.log")).unwrap();
        let paths: Vec<serde_json::Value> = text
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["path"].take())
            .collect();
        assert_eq!(paths, ["/a", "/b\"\n"]);
        let missing = AccessLogTarget::File(folder.path().join("no/such/folder"));
        let error = AccessLog::open(AccessLogMode::All, &missing, &metrics).unwrap_err();
        assert!(error.to_string().contains("no/such/folder"));
    }
}
