//! The audit: one line of JSON for every certificate given or refused, on standard output or in a file.
//!
//! A certificate that cannot be written down is not given. What strangers cause is bounded: of refusals so many are
//! written in a minute, in all and from one address; the others are summed up by reason. Secrets never stand here: a
//! token appears by the beginning of its hash, as `weft-ca token list` shows it.
//!
//! A write may block for as long as somebody does not read (a pipe). Whoever writes here does so on a thread that may
//! block; [`Audit::is_failing`] and [`Audit::has_stalled`] never wait for a write.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{File, OpenOptions},
    io::{ErrorKind, Read, Seek, SeekFrom, Write, stdout},
    net::{IpAddr, SocketAddr},
    os::{
        fd::AsFd,
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use tokio::time::Instant;

/// Where the lines go.
pub struct Audit {
    path: Option<PathBuf>,
    /// Held while a line is written, which may block.
    out: Mutex<Out>,
    /// The last line could not be written.
    failing: AtomicBool,
    /// Since when a line is being written; held for a moment only.
    writing: Mutex<Option<Instant>>,
    refusals: Mutex<Refusals>,
}

struct Out {
    file: File,
    /// The last line was written in part: the next one begins on a line of its own.
    torn: bool,
}

/// The refusals of this minute.
struct Refusals {
    began: Instant,
    written: u32,
    by_address: HashMap<IpAddr, u32>,
    /// By reason: those that were not written and are not summed up yet.
    left_out: BTreeMap<&'static str, u64>,
}

/// Refusals that are written in a minute: some 80 MB a day.
const REFUSALS: u32 = 120;
/// Of one address, so that no stranger hides what others do.
const REFUSALS_OF_ADDRESS: u32 = 20;
const MINUTE: Duration = Duration::from_secs(60);
/// A line that takes longer waits for somebody who does not read.
const STALLED: Duration = Duration::from_secs(3);

/// One line.
#[derive(Debug, Default, Serialize)]
pub struct Line {
    /// When, as RFC 3339; set when it is written.
    pub time: String,
    /// `issued` or `refused`.
    pub event: &'static str,
    /// The identity that was proven, or for which the token was made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
    /// `token`, `service_account`, `certificate` or `none`.
    pub proof: &'static str,
    /// The pod that the service account's token is bound to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// The token's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// The serial of the certificate that proved the caller.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proof_serial: Option<String>,
    /// From where.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<SocketAddr>,
    /// The new certificate's serial.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// The new certificate's beginning.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_before: Option<String>,
    /// The new certificate's end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_after: Option<String>,
    /// The DNS names that were asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub dns_names: Vec<String>,
    /// SHA-256 of the key that was to be signed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub public_key_sha256: Option<String>,
    /// Why it was refused: a label, and the words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'static str>,
    /// The words to the label.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// A line about the audit itself.
#[derive(Serialize)]
struct Note<'a> {
    time: String,
    event: &'static str,
    /// Refusals that were not written, by reason.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    left_out: &'a BTreeMap<&'static str, u64>,
}

impl Audit {
    /// Appends to a file of mode 0600, or writes to standard output.
    ///
    /// # Errors
    /// The file cannot be opened, or others may reach it.
    pub fn open(path: Option<&Path>) -> Result<Self> {
        let refusals = Refusals {
            began: Instant::now(),
            written: 0,
            by_address: HashMap::new(),
            left_out: BTreeMap::new(),
        };
        let (path, out) = (path.map(Path::to_owned), Mutex::new(Out::open(path)?));
        Ok(Audit {
            path,
            out,
            failing: AtomicBool::new(false),
            writing: Mutex::new(None),
            refusals: Mutex::new(refusals),
        })
    }

    /// Opens the file by its name again: whoever rotates it has moved the old one away. False where there is none, as
    /// the lines go to standard output.
    ///
    /// # Errors
    /// As [`Audit::open`]; then the old one is written to as before.
    pub fn reopen(&self) -> Result<bool> {
        let Some(path) = &self.path else { return Ok(false) };
        let opened = Out::open(Some(path))?;
        let mut out = lock(&self.out);
        *out = opened;
        self.failing.store(false, Ordering::Relaxed);
        Ok(true)
    }

    /// Writes a line.
    ///
    /// # Errors
    /// It could not be written.
    pub fn write(&self, mut line: Line, now: SystemTime) -> Result<()> {
        line.time = rfc3339(now);
        self.append(&line)
    }

    /// Writes the line of a refusal, or only counts it where there were too many in this minute.
    ///
    /// # Errors
    /// It could not be written; then it is counted.
    pub fn refused(&self, line: Line, now: SystemTime) -> Result<()> {
        let reason = line.reason.unwrap_or_default();
        let address = line.address.map(|address| address.ip());
        let written = if lock(&self.refusals).may_write(address) {
            self.write(line, now).map(|()| true)
        } else {
            Ok(false)
        };
        if !matches!(written, Ok(true)) {
            self.leave_out(reason);
        }
        written.map(drop)
    }

    /// Counts a refusal that is not written, for the next sum.
    pub fn leave_out(&self, reason: &'static str) {
        *lock(&self.refusals).left_out.entry(reason).or_default() += 1;
    }

    /// Can a line be written? After one that could not, a line is tried that says that the audit goes on.
    ///
    /// # Errors
    /// It still cannot be written.
    pub fn check(&self, now: SystemTime) -> Result<()> {
        if !self.failing.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.append(&Note { time: rfc3339(now), event: "resumed", left_out: &BTreeMap::new() })
    }

    /// Could the last line not be written, or does it wait for somebody who does not read?
    pub fn is_failing(&self) -> bool {
        self.failing.load(Ordering::Relaxed) || self.has_stalled()
    }

    /// Does a line wait for somebody who does not read?
    pub fn has_stalled(&self) -> bool {
        lock(&self.writing).is_some_and(|began| began.elapsed() >= STALLED)
    }

    /// Writes the sum of the refusals that were left out, once their minute is over.
    ///
    /// # Errors
    /// It could not be written; then they are kept for the next sum.
    pub fn sum_up(&self, now: SystemTime) -> Result<()> {
        let left_out = {
            let mut refusals = lock(&self.refusals);
            if refusals.left_out.is_empty() || refusals.began.elapsed() < MINUTE {
                return Ok(());
            }
            refusals.begin();
            std::mem::take(&mut refusals.left_out)
        };
        let written =
            self.append(&Note { time: rfc3339(now), event: "refusals_left_out", left_out: &left_out });
        if written.is_err() {
            let mut refusals = lock(&self.refusals);
            for (reason, count) in left_out {
                *refusals.left_out.entry(reason).or_default() += count;
            }
        }
        written
    }

    fn append(&self, line: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        let mut out = lock(&self.out);
        *lock(&self.writing) = Some(Instant::now());
        let written = out.append(&text);
        *lock(&self.writing) = None;
        match (&written, self.failing.swap(written.is_err(), Ordering::Relaxed)) {
            (Err(error), false) => tracing::error!("the audit cannot be written, nothing is given: {error}"),
            (Ok(()), true) => tracing::info!("the audit is written again"),
            _ => {}
        }
        written.context("the audit cannot be written")
    }
}

impl Out {
    fn open(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path else {
            // Not through the buffer of the standard library, which keeps a line that could not be written.
            let file = File::from(stdout().as_fd().try_clone_to_owned().context("audit on standard output")?);
            return Ok(Out { file, torn: false });
        };
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)
            .with_context(|| format!("audit file {}", path.display()))?;
        let mode = file.metadata()?.mode() & 0o7777;
        if mode & 0o077 != 0 {
            bail!("audit file {} has mode {mode:04o}; `chmod 0600 {}`", path.display(), path.display());
        }
        let torn = ends_within_line(&mut file).with_context(|| format!("audit file {}", path.display()))?;
        Ok(Out { file, torn })
    }

    fn append(&mut self, line: &[u8]) -> std::io::Result<()> {
        let bytes = if self.torn { [b"\n", line].concat() } else { line.to_vec() };
        let mut written = 0;
        while written < bytes.len() {
            match self.file.write(&bytes[written..]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => written += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            self.torn = bytes[written - 1] != b'\n';
        }
        Ok(())
    }
}

/// A former run may have left half a line. What is no regular file (a pipe, a device) has no end to look at.
fn ends_within_line(file: &mut File) -> std::io::Result<bool> {
    let data = file.metadata()?;
    if !data.is_file() || data.len() == 0 {
        return Ok(false);
    }
    file.seek(SeekFrom::End(-1))?;
    let mut last = [0];
    file.read_exact(&mut last)?;
    Ok(last != *b"\n")
}

impl Refusals {
    fn begin(&mut self) {
        (self.began, self.written) = (Instant::now(), 0);
        self.by_address.clear();
    }

    fn may_write(&mut self, address: Option<IpAddr>) -> bool {
        // A minute whose refusals were left out ends with their sum.
        if self.left_out.is_empty() && self.began.elapsed() >= MINUTE {
            self.begin();
        }
        if self.written >= REFUSALS {
            return false;
        }
        if let Some(address) = address {
            let of_address = self.by_address.entry(address).or_default();
            if *of_address >= REFUSALS_OF_ADDRESS {
                return false;
            }
            *of_address += 1;
        }
        self.written += 1;
        true
    }
}

fn rfc3339(at: SystemTime) -> String {
    humantime::format_rfc3339_millis(at).to_string()
}

fn lock<Value>(mutex: &Mutex<Value>) -> MutexGuard<'_, Value> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use serde_json::Value;

    use super::*;

    fn audit() -> (tempfile::TempDir, PathBuf, Audit) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit");
        let audit = Audit::open(Some(&path)).unwrap();
        (folder, path, audit)
    }

    fn refusal(address: &str) -> Line {
        let address = Some(SocketAddr::new(address.parse().unwrap(), 1));
        Line { event: "refused", reason: Some("no_proof"), address, ..Line::default() }
    }

    fn lines(path: &Path) -> Vec<Value> {
        let text = std::fs::read_to_string(path).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap_or(Value::Null)).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn refusals_are_written_up_to_a_number_and_then_summed_up() {
        let (_folder, path, audit) = audit();
        let now = SystemTime::now();
        for _ in 0..1000 {
            audit.refused(refusal("10.0.0.1"), now).unwrap();
        }
        audit.refused(refusal("10.0.0.2"), now).unwrap();
        assert_eq!(lines(&path).len() as u32, REFUSALS_OF_ADDRESS + 1, "another address is still written");
        for host in 3..200 {
            audit.refused(refusal(&format!("10.0.0.{host}")), now).unwrap();
        }
        assert_eq!(lines(&path).len() as u32, REFUSALS);
        audit.sum_up(now).unwrap();
        assert_eq!(lines(&path).len() as u32, REFUSALS, "its minute is not over");

        tokio::time::advance(MINUTE).await;
        audit.sum_up(now).unwrap();
        audit.sum_up(now).unwrap();
        let written = lines(&path);
        assert_eq!(written.len() as u32, REFUSALS + 1);
        let sum = written.last().unwrap();
        assert_eq!(sum["event"], "refusals_left_out");
        assert_eq!(sum["left_out"]["no_proof"], 1000 + 1 + 197 - u64::from(REFUSALS));
        audit.refused(refusal("10.0.0.1"), now).unwrap();
        assert_eq!(lines(&path).len() as u32, REFUSALS + 2, "the count began afresh");
    }

    #[test]
    fn half_a_line_is_not_glued_to_the_next() {
        let (_folder, path, audit) = audit();
        let now = SystemTime::now();
        audit.write(Line { event: "issued", ..Line::default() }, now).unwrap();
        drop(audit);
        // What a full disk, or a power failure, leaves.
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, [&whole[..], &whole[..20]].concat()).unwrap();
        let audit = Audit::open(Some(&path)).unwrap();
        audit.write(Line { event: "issued", ..Line::default() }, now).unwrap();
        audit.write(Line { event: "issued", ..Line::default() }, now).unwrap();
        let written = lines(&path);
        assert_eq!(written.len(), 4);
        assert!(written[1].is_null() && written[2]["event"] == "issued" && written[3]["event"] == "issued");
    }

    #[test]
    fn a_rotated_file_is_left_and_a_wide_one_is_not_taken() {
        let (folder, path, audit) = audit();
        let (now, moved) = (SystemTime::now(), folder.path().join("audit.1"));
        audit.write(Line::default(), now).unwrap();
        std::fs::rename(&path, &moved).unwrap();
        assert!(audit.reopen().unwrap());
        audit.write(Line::default(), now).unwrap();
        assert_eq!((lines(&moved).len(), lines(&path).len()), (1, 1));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(audit.reopen().is_err());
        audit.write(Line::default(), now).unwrap();
        assert_eq!(lines(&path).len(), 2, "the old one is written to as before");
    }

    #[test]
    fn standard_output_is_not_opened_again() {
        assert!(!Audit::open(None).unwrap().reopen().unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn a_line_that_nobody_takes_is_seen_without_waiting_for_it() {
        let (_folder, _path, audit) = audit();
        *lock(&audit.writing) = Some(Instant::now());
        assert!(!audit.is_failing());
        tokio::time::advance(STALLED).await;
        let _held_by_the_write = lock(&audit.out);
        assert!(audit.has_stalled() && audit.is_failing());
    }

    #[test]
    fn what_could_not_be_written_is_tried_again_and_said() {
        let audit = Audit::open(Some(Path::new("/dev/full"))).err();
        assert!(
            audit.is_some_and(|error| error.to_string().contains("mode")),
            "a device that others may write to"
        );
        let (_folder, path, audit) = self::audit();
        let now = SystemTime::now();
        lock(&audit.out).file = OpenOptions::new().write(true).open("/dev/full").unwrap();
        assert!(audit.write(Line::default(), now).is_err());
        assert!(audit.is_failing() && audit.check(now).is_err());
        assert!(audit.refused(refusal("10.0.0.1"), now).is_err());
        audit.reopen().unwrap();
        audit.failing.store(true, Ordering::Relaxed);
        audit.check(now).unwrap();
        assert!(!audit.is_failing());
        assert_eq!(lines(&path)[0]["event"], "resumed");
        assert_eq!(lock(&audit.refusals).left_out["no_proof"], 1, "it is summed up later");
    }
}
