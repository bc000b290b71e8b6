//! Join tokens: the first proof of a workload that has no certificate yet.
//!
//! A token is 256 random bits, bound to one identity, with an end, for one use or many. The directory keeps
//! only its SHA-256, as the name of a file, so that the command line and a running authority share them and a
//! stolen directory yields no token. Using up a single-use token is one rename: of two callers one wins.

use std::{
    fmt,
    io::ErrorKind,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, bail};
use aws_lc_rs::{
    digest::{SHA256, digest},
    rand,
};
use serde::{Deserialize, Serialize};
use weft_proto::spiffe::SpiffeId;

use crate::{directory::Directory, request::hex};

/// The tokens of one authority.
#[derive(Debug, Clone)]
pub struct Tokens(Directory);

/// What is kept of a token, beside its hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Token {
    /// Who may be had with it.
    pub identity: SpiffeId,
    /// May it be used more than once?
    pub reusable: bool,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// From when on it is worth nothing, in seconds since 1970.
    pub expires: u64,
}

/// Where a token stands in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It can be used.
    Open,
    /// It was for one use and has been used.
    Used,
    /// Its time is over.
    Expired,
}

/// Why a token is not taken. The caller never learns which; the audit does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Invalid {
    /// No such token was made, or it was revoked.
    Unknown,
    /// Its one use is over.
    Used,
    /// Its time is over.
    Expired,
}

/// Every token begins with this, so that scanners for leaked secrets can find one.
const PREFIX: &str = "weft-token-";
const OPEN: &str = ".json";
const USED: &str = ".used";
const FOLDER: &str = "tokens";
/// Used and expired tokens stay listed this long.
const KEPT: Duration = Duration::from_secs(7 * 24 * 3600);
/// More tokens than this at a time are refused.
const MAX_TOKENS: usize = 100_000;

impl Tokens {
    /// The tokens inside an authority's directory.
    ///
    /// # Errors
    /// What [`Directory::inside`] says.
    pub fn open(directory: &Directory) -> Result<Self> {
        Ok(Tokens(directory.inside(FOLDER)?))
    }

    /// Makes a token; the text is shown once and not kept.
    ///
    /// # Errors
    /// No randomness, too many tokens, or it cannot be written.
    pub fn create(
        &self,
        identity: SpiffeId,
        reusable: bool,
        valid: Duration,
        now: SystemTime,
    ) -> Result<String> {
        if self.0.names()?.len() >= MAX_TOKENS {
            bail!("there are {MAX_TOKENS} tokens already; revoke some");
        }
        let mut secret = [0; 32];
        rand::fill(&mut secret).map_err(|_| anyhow::anyhow!("the system gives no random bytes"))?;
        let text = format!("{PREFIX}{}", hex(&secret));
        let created = seconds(now);
        let token = Token { identity, reusable, created, expires: created.saturating_add(valid.as_secs()) };
        self.0.write(&format!("{}{OPEN}", hash(&text)), &serde_json::to_vec(&token)?)?;
        Ok(text)
    }

    /// Looks a token up, without using it.
    ///
    /// # Errors
    /// The file of the token cannot be read; the inner error where it is not valid.
    pub fn check(&self, text: &str, now: SystemTime) -> Result<std::result::Result<Token, Invalid>> {
        let hash = hash(text);
        let Some(bytes) = self.0.read(&format!("{hash}{OPEN}"))? else {
            let used = self.0.read(&format!("{hash}{USED}"))?.is_some();
            return Ok(Err(if used { Invalid::Used } else { Invalid::Unknown }));
        };
        let token = parse(&bytes, &hash)?;
        Ok(if token.expires <= seconds(now) { Err(Invalid::Expired) } else { Ok(token) })
    }

    /// Uses a token that [`Tokens::check`] has found good. A single-use token is gone then, whatever happens
    /// after, a power failure included; of several callers at the same time one gets it.
    ///
    /// # Errors
    /// The file cannot be renamed; the inner error where somebody was first.
    pub fn consume(&self, text: &str, token: &Token) -> Result<std::result::Result<(), Invalid>> {
        if token.reusable {
            return Ok(Ok(()));
        }
        let hash = hash(text);
        match self.0.rename(&format!("{hash}{OPEN}"), &format!("{hash}{USED}")) {
            Ok(()) => Ok(Ok(())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Err(Invalid::Used)),
            Err(error) => Err(error).with_context(|| format!("using up token {}", short(&hash))),
        }
    }

    /// All tokens, by the beginning of their hash.
    ///
    /// # Errors
    /// A file of a token cannot be read.
    pub fn list(&self, now: SystemTime) -> Result<Vec<(String, State, Token)>> {
        let mut listed = Vec::new();
        for name in self.0.names()? {
            let Some((hash, used)) = split(&name) else { continue };
            let Some(bytes) = self.0.read(&name)? else { continue };
            let token = parse(&bytes, hash)?;
            let state = if used {
                State::Used
            } else if token.expires <= seconds(now) {
                State::Expired
            } else {
                State::Open
            };
            listed.push((short(hash).to_owned(), state, token));
        }
        Ok(listed)
    }

    /// Takes tokens back, given the beginning of a hash as [`Tokens::list`] shows it.
    ///
    /// # Errors
    /// No token or more than one begins so.
    pub fn revoke(&self, beginning: &str) -> Result<()> {
        let names: Vec<String> = self
            .0
            .names()?
            .into_iter()
            .filter(|name| split(name).is_some_and(|(hash, _)| hash.starts_with(beginning)))
            .collect();
        match &names[..] {
            [name] if !beginning.is_empty() => self.0.remove(name).map(drop),
            [] => bail!("no token begins with {beginning:?}; `weft-ca token list` shows them"),
            _ => bail!("{} tokens begin with {beginning:?}; give more of it", names.len()),
        }
    }

    /// Forgets tokens that ended a week ago. A file that cannot be read or removed keeps no other from being forgotten.
    ///
    /// # Errors
    /// The first of those files, and how many there are.
    pub fn prune(&self, now: SystemTime) -> Result<()> {
        let (mut first, mut failed) = (None, 0);
        for name in self.0.names()? {
            let forgotten = self
                .is_over(&name, now)
                .and_then(|over| if over { self.0.remove_unsynced(&name).map(drop) } else { Ok(()) });
            if let Err(error) = forgotten {
                failed += 1;
                first.get_or_insert(error);
            }
        }
        // Once for all: one that came back would be forgotten again.
        self.0.sync()?;
        first.map_or(Ok(()), |error| {
            Err(error.context(format!("files of tokens that were skipped: {failed}")))
        })
    }

    /// Did the token of this file end a week ago?
    fn is_over(&self, name: &str, now: SystemTime) -> Result<bool> {
        let Some((hash, _)) = split(name) else { return Ok(false) };
        let Some(bytes) = self.0.read(name)? else { return Ok(false) };
        Ok(parse(&bytes, hash)?.expires.saturating_add(KEPT.as_secs()) < seconds(now))
    }
}

/// The name under which a token appears in the audit and in lists: the beginning of its hash.
pub fn name_of(text: &str) -> String {
    short(&hash(text)).to_owned()
}

fn hash(text: &str) -> String {
    hex(digest(&SHA256, text.as_bytes()).as_ref())
}

fn short(hash: &str) -> &str {
    hash.get(..16).unwrap_or(hash)
}

fn split(name: &str) -> Option<(&str, bool)> {
    let open = name.strip_suffix(OPEN).map(|hash| (hash, false));
    open.or_else(|| name.strip_suffix(USED).map(|hash| (hash, true)))
}

/// Reads the file of the token with that hash.
///
/// # Errors
/// It is damaged.
pub fn parse(bytes: &[u8], hash: &str) -> Result<Token> {
    serde_json::from_slice(bytes)
        .with_context(|| format!("the file of token {} is damaged; revoke it and make another", short(hash)))
}

fn seconds(at: SystemTime) -> u64 {
    at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Invalid::Unknown => "unknown or revoked",
            Invalid::Used => "already used",
            Invalid::Expired => "expired",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens() -> (tempfile::TempDir, Tokens) {
        let outer = tempfile::tempdir().unwrap();
        let directory = Directory::create(&outer.path().join("d")).unwrap();
        let tokens = Tokens::open(&directory).unwrap();
        (outer, tokens)
    }

    fn web() -> SpiffeId {
        "spiffe://weft.local/ns/shop/sa/web".parse().unwrap()
    }

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_single_use_token_is_good_once() {
        let (_outer, tokens) = tokens();
        let now = SystemTime::now();
        let text = tokens.create(web(), false, HOUR, now).unwrap();
        let token = tokens.check(&text, now).unwrap().unwrap();
        assert_eq!(token.identity, web());
        assert_eq!(tokens.check(&text, now).unwrap().unwrap(), token, "looking does not use it");
        assert_eq!(tokens.consume(&text, &token).unwrap(), Ok(()));
        assert_eq!(tokens.consume(&text, &token).unwrap(), Err(Invalid::Used));
        assert_eq!(tokens.check(&text, now).unwrap(), Err(Invalid::Used));
        assert_eq!(tokens.list(now).unwrap()[0].1, State::Used);
    }

    #[test]
    fn the_disk_knows_that_a_token_is_used_or_revoked_before_anybody_else_does() {
        use nix::sys::inotify::{AddWatchFlags as Flags, InitFlags, Inotify};

        let (outer, tokens) = tokens();
        let now = SystemTime::now();
        let (used, revoked) = [(); 2].map(|()| tokens.create(web(), false, HOUR, now).unwrap()).into();
        let seen = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
        let flags = Flags::IN_OPEN | Flags::IN_ONLYDIR | Flags::IN_MOVED_TO | Flags::IN_DELETE;
        seen.add_watch(&outer.path().join("d/tokens"), flags).unwrap();
        let token = tokens.check(&used, now).unwrap().unwrap();
        let changes = [
            (
                Flags::IN_MOVED_TO,
                Box::new(|| tokens.consume(&used, &token).unwrap().unwrap()) as Box<dyn Fn()>,
            ),
            (Flags::IN_DELETE, Box::new(|| tokens.revoke(&name_of(&revoked)).unwrap())),
        ];
        for (change, run) in changes {
            run();
            let events = seen.read_events().unwrap();
            let changed = events.iter().position(|event| event.mask.contains(change)).expect("the change");
            // A directory is opened after the change only to be synced.
            let synced = events[changed..]
                .iter()
                .any(|event| event.mask.contains(Flags::IN_OPEN | Flags::IN_ISDIR) && event.name.is_none());
            assert!(synced, "{change:?}: {events:?}");
        }
    }

    #[test]
    fn many_at_once_use_a_single_use_token_once() {
        let (_outer, tokens) = tokens();
        let now = SystemTime::now();
        let text = tokens.create(web(), false, HOUR, now).unwrap();
        let token = tokens.check(&text, now).unwrap().unwrap();
        let won = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..8).map(|_| scope.spawn(|| tokens.consume(&text, &token).unwrap().is_ok())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).filter(|won| *won).count()
        });
        assert_eq!(won, 1);
    }

    #[test]
    fn a_token_ends_and_is_forgotten_later() {
        let (_outer, tokens) = tokens();
        let now = SystemTime::now();
        let text = tokens.create(web(), true, HOUR, now).unwrap();
        assert!(tokens.check(&text, now + HOUR - Duration::from_secs(2)).unwrap().is_ok());
        assert_eq!(tokens.check(&text, now + HOUR).unwrap(), Err(Invalid::Expired));
        tokens.prune(now + HOUR + KEPT / 2).unwrap();
        assert_eq!(tokens.list(now + HOUR).unwrap()[0].1, State::Expired);
        tokens.prune(now + HOUR + KEPT * 2).unwrap();
        assert!(tokens.list(now).unwrap().is_empty());
    }

    #[test]
    fn a_damaged_file_keeps_no_other_token_from_being_forgotten() {
        let (_outer, tokens) = tokens();
        let now = SystemTime::now();
        for name in ["0", "f"] {
            tokens.0.write(&format!("{}{OPEN}", name.repeat(64)), b"not JSON").unwrap();
        }
        let old = tokens.create(web(), true, HOUR, now).unwrap();
        let error = format!("{:#}", tokens.prune(now + HOUR + KEPT * 2).unwrap_err());
        assert!(error.contains("skipped: 2") && error.contains("0000000000000000 is damaged"), "{error}");
        assert_eq!(tokens.check(&old, now).unwrap(), Err(Invalid::Unknown));
    }

    #[test]
    fn only_the_hash_is_kept_and_a_token_can_be_taken_back() {
        let (outer, tokens) = tokens();
        let now = SystemTime::now();
        let text = tokens.create(web(), true, HOUR, now).unwrap();
        for entry in std::fs::read_dir(outer.path().join("d/tokens")).unwrap() {
            let path = entry.unwrap().path();
            let kept = format!("{}{}", path.display(), std::fs::read_to_string(&path).unwrap());
            assert!(!kept.contains(&text[PREFIX.len()..]), "{kept}");
        }
        assert!(tokens.revoke("").is_err() && tokens.revoke("zz").is_err());
        tokens.revoke(&name_of(&text)).unwrap();
        assert_eq!(tokens.check(&text, now).unwrap(), Err(Invalid::Unknown));
        for strange in ["", "../../root", "weft-token-", "\0"] {
            assert_eq!(tokens.check(strange, now).unwrap(), Err(Invalid::Unknown), "{strange:?}");
        }
    }
}
