//! The access log: one JSON object per line for each finished request and opaque connection, or only for those
//! that failed, or for none. A slow disk or a full pipe costs lines, which are counted, and never blocks a worker
//! ([`Lines`]). Fields: `docs/observability.md`.

use std::{
    fs::{self, File, OpenOptions},
    io,
    net::SocketAddr,
    os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::Serialize;
use tokio::task::spawn_blocking;
use weft_proto::lines::{Lines, Output};

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
    lines: Option<Arc<Lines>>,
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

/// Bytes that are gathered before they are written into a file, while lines go on coming.
const FILE_BATCH: usize = 32 * 1024;

impl AccessLog {
    /// Opens the target and starts the writer, unless the mode is off.
    pub fn open(
        mode: AccessLogMode,
        target: &AccessLogTarget,
        metrics: &Arc<Metrics>,
    ) -> io::Result<AccessLog> {
        if mode == AccessLogMode::Off {
            return Ok(AccessLog { mode, lines: None });
        }
        let output = match target {
            AccessLogTarget::Stdout => Output::stream(io::stdout())?,
            AccessLogTarget::Stderr => Output::stream(io::stderr())?,
            AccessLogTarget::File(path) => open_file(path).map_err(|error| {
                io::Error::new(error.kind(), format!("access log {}: {error}", path.display()))
            })?,
        };
        let dropped = metrics.log_lines_dropped("access");
        let on_dropped = move || {
            dropped.inc();
        };
        let lines = Lines::start("weft-access-log", output, on_dropped, |_| {})?;
        Ok(AccessLog { mode, lines: Some(Arc::new(lines)) })
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
        let Some(lines) = &self.lines else { return };
        // Our own struct of text and numbers always becomes JSON.
        let Ok(mut bytes) = serde_json::to_vec(line) else { return };
        bytes.push(b'\n');
        lines.push(bytes);
    }

    /// Waits until the lines so far are written, but not longer than this.
    pub async fn flush(&self, longest: Duration) {
        let Some(lines) = self.lines.clone() else { return };
        // The error means that the runtime ends.
        let _ = spawn_blocking(move || lines.flush(longest)).await;
    }
}

/// The end of a file. A process that ran before may have left half a line there.
fn open_file(path: &Path) -> io::Result<Output> {
    // To open a FIFO for writing alone waits for a reader.
    let is_fifo = fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_fifo());
    let file = OpenOptions::new().create(true).read(is_fifo).append(true).mode(0o640).open(path)?;
    let metadata = file.metadata()?;
    let Some(last) = metadata.len().checked_sub(1).filter(|_| metadata.is_file()) else {
        return Ok(Output::new(file, FILE_BATCH, false));
    };
    let mut byte = [0];
    // A file that may not be read is taken for whole.
    let read = File::open(path).and_then(|file| file.read_at(&mut byte, last));
    let is_torn = read.is_ok_and(|read| read == 1) && byte != *b"\n";
    Ok(Output::new(file, FILE_BATCH, is_torn))
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[tokio::test]
    async fn lines_that_are_lost_are_counted() {
        let metrics = Arc::new(Metrics::new());
        let target = AccessLogTarget::File("/dev/full".into());
        let log = AccessLog::open(AccessLogMode::All, &target, &metrics).unwrap();
        log.write(&Line::default());
        log.flush(Duration::from_secs(60)).await;
        let text = metrics.expose(false);
        assert!(text.contains("weft_log_lines_dropped_total{log=\"access\"} 1\n"), "{text}");
    }

    #[tokio::test]
    async fn a_fifo_that_nobody_reads_yet_keeps_nobody_waiting() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let target = AccessLogTarget::File(path.clone());
        let log = AccessLog::open(AccessLogMode::All, &target, &Arc::new(Metrics::new())).unwrap();
        log.write(&Line { path: Some("/a"), ..Line::default() });
        log.flush(Duration::from_secs(60)).await;
        let (mut reader, mut bytes) = (File::open(&path).unwrap(), [0; 1024]);
        let count = reader.read(&mut bytes).unwrap();
        assert!(bytes[..count].ends_with(b"}\n"), "{bytes:?}");
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
