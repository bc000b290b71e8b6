//! The certificate that outlives a restart: one file of mode 0600 in the state directory, replaced whole.
//!
//! It holds the key, the chain, the roots, and the hash of the token that was in use, so that a new token can
//! be told from the one that is used up. A file that others may read is not used.

use std::{
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result, bail};
use nix::{fcntl::OFlag, unistd::geteuid};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use weft_proto::certificate::Leaf;

use crate::model::KeyExchange;
use crate::tls::{Bundle, Credentials};

/// What is kept, as written: DER in hexadecimal.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    token_sha256: Option<String>,
    key: String,
    chain: Vec<String>,
    roots: Vec<String>,
}

/// A certificate with everything that a renewal and a restart need.
pub(super) struct Kept {
    /// PKCS#8.
    pub(super) key: Vec<u8>,
    /// Ready for handshakes.
    pub(super) credentials: Arc<Credentials>,
    /// Hash of the token file when this was obtained.
    pub(super) token_sha256: Option<String>,
}

const FILE: &str = "identity.json";
/// A key, a chain and some roots.
const MAX_BYTES: u64 = 256 * 1024;

impl Kept {
    /// Reads what a former run has left; none where there is nothing.
    ///
    /// # Errors
    /// The file is not ours, wider than 0600, damaged, or its certificate is not valid any more.
    pub(super) fn load(folder: &Path, key_exchange: KeyExchange) -> Result<Option<Self>> {
        let path = folder.join(FILE);
        let Some(bytes) = read_private(&path)? else { return Ok(None) };
        let written: Written = serde_json::from_slice(&bytes)
            .with_context(|| format!("{} is damaged; remove it, and a token is used", path.display()))?;
        let key = unhex(&written.key)?;
        let chain = certificates(&written.chain)?;
        let leaf = chain.first().context("an empty chain")?;
        let leaf = Leaf::parse(leaf).map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))?;
        let trust_domain =
            leaf.id.trust_domain().parse().map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))?;
        let bundle = Bundle::new(trust_domain, certificates(&written.roots)?)?;
        let private = PrivateKeyDer::try_from(key.clone()).map_err(|error| anyhow::anyhow!("{error}"))?;
        let credentials = Credentials::new(chain, private, bundle)
            .and_then(|credentials| credentials.with_key_exchange(key_exchange))
            .with_context(|| format!("{} is not used", path.display()))?;
        Ok(Some(Kept { key, credentials: Arc::new(credentials), token_sha256: written.token_sha256 }))
    }

    /// Writes it for the next run.
    ///
    /// # Errors
    /// What the file system says.
    pub(super) fn save(&self, folder: &Path) -> Result<()> {
        let hexed = |all: &[CertificateDer<'_>]| all.iter().map(|one| hex(one)).collect();
        let written = Written {
            token_sha256: self.token_sha256.clone(),
            key: hex(&self.key),
            chain: hexed(self.credentials.chain()),
            roots: hexed(self.credentials.bundle().roots()),
        };
        let path = folder.join(FILE);
        write_private(&path, &serde_json::to_vec(&written)?)
            .with_context(|| format!("writing {}", path.display()))
    }
}

fn certificates(texts: &[String]) -> Result<Vec<CertificateDer<'static>>> {
    texts.iter().map(|text| Ok(CertificateDer::from(unhex(text)?))).collect()
}

fn read_private(path: &Path) -> Result<Option<Vec<u8>>> {
    let flags = (OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits();
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
    };
    let data = file.metadata()?;
    if !data.is_file() || data.uid() != geteuid().as_raw() || data.mode() & 0o077 != 0 {
        bail!(
            "{} holds a private key and is not used: it must be a file of user {} with mode 0600, not of user {} \
             with mode {:04o}; remove it, and a token is used",
            path.display(),
            geteuid(),
            data.uid(),
            data.mode() & 0o7777
        );
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes).with_context(|| format!("reading {}", path.display()))?;
    Ok(Some(bytes))
}

fn write_private(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let aside = aside(path);
    let _ = fs::remove_file(&aside);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&aside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&aside, path)?;
    path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

fn aside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}", std::process::id()));
    name.into()
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Result<Vec<u8>> {
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) {
        bail!("an odd number of hexadecimal digits");
    }
    let digit = |byte: u8| char::from(byte).to_digit(16).context("not a hexadecimal digit");
    digits.chunks_exact(2).map(|pair| Ok(u8::try_from(digit(pair[0])? * 16 + digit(pair[1])?)?)).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::model::KeyExchange;
    use crate::tls::tests::{TestAuthority, TestLeaf, WEB};

    fn kept() -> Kept {
        let authority = TestAuthority::new("weft.local");
        let (chain, key) = authority.leaf(TestLeaf::of(WEB));
        let bytes = key.secret_der().to_vec();
        let credentials = Credentials::new(chain, key, authority.bundle()).unwrap();
        Kept { key: bytes, credentials: Arc::new(credentials), token_sha256: Some("ab".to_owned()) }
    }

    #[test]
    fn what_was_kept_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Kept::load(folder.path(), KeyExchange::default()).unwrap().is_none());
        let before = kept();
        before.save(folder.path()).unwrap();
        let after = Kept::load(folder.path(), KeyExchange::default()).unwrap().unwrap();
        assert_eq!(after.credentials.chain(), before.credentials.chain());
        assert_eq!(after.credentials.bundle(), before.credentials.bundle());
        assert_eq!((&after.key, &after.token_sha256), (&before.key, &before.token_sha256));
        assert_eq!(fs::metadata(folder.path().join(FILE)).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing was left aside");
    }

    #[test]
    fn a_file_that_others_may_read_or_that_is_damaged_is_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        kept().save(folder.path()).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let error = Kept::load(folder.path(), KeyExchange::default()).err().unwrap().to_string();
        assert!(error.contains("mode 0644") && error.contains("remove it"), "{error}");
        for text in ["", "{}", r#"{"key":"zz","chain":[],"roots":[]}"#, r#"{"key":"","chain":[],"roots":[]}"#]
        {
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            assert!(Kept::load(folder.path(), KeyExchange::default()).is_err(), "{text:?} was used");
        }
    }

    #[test]
    fn hexadecimal_goes_both_ways() {
        assert_eq!(unhex(&hex(&[0, 1, 254, 255])).unwrap(), [0, 1, 254, 255]);
        assert!(unhex("0").is_err() && unhex("0g").is_err() && unhex("é").is_err());
    }
}
