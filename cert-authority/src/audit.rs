//! The audit: one line of JSON for every certificate given or refused, on standard output or in a file.
//!
//! A certificate that cannot be written down is not given. Secrets never stand here: a token appears by the
//! beginning of its hash, as `weft-ca token list` shows it.

use std::{
    fs::{File, OpenOptions},
    io::{Write, stdout},
    net::SocketAddr,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
    sync::Mutex,
    time::SystemTime,
};

use anyhow::{Context, Result, bail};
use serde::Serialize;

/// Where the lines go.
pub struct Audit(Option<Mutex<File>>);

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
    /// `token`, `certificate` or `none`.
    pub proof: &'static str,
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

impl Audit {
    /// Appends to a file of mode 0600, or writes to standard output.
    ///
    /// # Errors
    /// The file cannot be opened, or others may reach it.
    pub fn open(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path else { return Ok(Audit(None)) };
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)
            .with_context(|| format!("audit file {}", path.display()))?;
        let mode = file.metadata()?.mode() & 0o7777;
        if mode & 0o077 != 0 {
            bail!("audit file {} has mode {mode:04o}; `chmod 0600 {}`", path.display(), path.display());
        }
        Ok(Audit(Some(Mutex::new(file))))
    }

    /// Writes a line.
    ///
    /// # Errors
    /// It could not be written.
    pub fn write(&self, mut line: Line, now: SystemTime) -> Result<()> {
        line.time = humantime::format_rfc3339_millis(now).to_string();
        let mut text = serde_json::to_vec(&line)?;
        text.push(b'\n');
        match &self.0 {
            None => {
                let mut out = stdout().lock();
                out.write_all(&text).and_then(|()| out.flush()).context("audit on standard output")
            }
            Some(file) => {
                let mut file = file.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                file.write_all(&text).context("audit file")
            }
        }
    }
}
