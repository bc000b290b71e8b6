//! The ACL token. Read again when its file changes, so that a rotated token needs no restart. It stands in no
//! log, no metric and no view.

use std::{
    fmt, fs,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{Mutex, PoisonError},
    time::SystemTime,
};

use hyper::header::HeaderValue;

use crate::{config::ConsulToken, discovery::files::read_regular};

/// The longest token: Consul's own have 36 bytes.
const MAX_BYTES: u64 = 4096;

/// Where the token comes from, and what was last read there.
pub(super) struct Token {
    source: ConsulToken,
    known: Mutex<Option<(Stamp, HeaderValue)>>,
}

/// A file that has the same stamp has the same content.
type Stamp = (u64, u64, Option<SystemTime>);

impl Token {
    pub(super) fn new(source: ConsulToken) -> Self {
        Token { source, known: Mutex::default() }
    }

    /// The token now; none where there is none.
    ///
    /// # Errors
    /// Why it cannot be read or used.
    pub(super) fn current(&self) -> Result<Option<HeaderValue>, String> {
        match &self.source {
            ConsulToken::None => Ok(None),
            ConsulToken::Variable => {
                let text = std::env::var("CONSUL_HTTP_TOKEN").unwrap_or_default();
                header(&text).map(Some).map_err(|why| format!("the token in CONSUL_HTTP_TOKEN {why}"))
            }
            ConsulToken::File(path) => {
                let refuse = |why: String| format!("the token file {} {why}", path.display());
                self.of_file(path).map(Some).map_err(refuse)
            }
        }
    }

    fn of_file(&self, path: &Path) -> Result<HeaderValue, String> {
        let about = fs::metadata(path).map_err(|error| format!("cannot be read: {error}"))?;
        let stamp = (about.ino(), about.len(), about.modified().ok());
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((then, token)) = known.as_ref()
            && *then == stamp
        {
            return Ok(token.clone());
        }
        let bytes = read_regular(path, MAX_BYTES).map_err(|error| format!("cannot be read: {error}"))?;
        let token = header(&String::from_utf8_lossy(&bytes))?;
        *known = Some((stamp, token.clone()));
        Ok(token)
    }
}

fn header(text: &str) -> Result<HeaderValue, String> {
    let text = text.trim();
    if text.is_empty() {
        return Err("is empty".to_owned());
    }
    let mut value =
        HeaderValue::from_str(text).map_err(|_| "holds characters that no token has".to_owned())?;
    value.set_sensitive(true);
    Ok(value)
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("source", &self.source).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, time::Duration};

    use super::*;

    #[test]
    fn a_file_that_changes_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        fs::write(&path, "one\n").unwrap();
        let token = Token::new(ConsulToken::File(path.clone()));
        assert_eq!(token.current().unwrap().unwrap(), "one");
        assert!(!format!("{:?} {token:?}", token.current()).contains("one"));
        fs::write(&path, "two\n").unwrap();
        File::open(&path).unwrap().set_modified(SystemTime::now() + Duration::from_secs(9)).unwrap();
        assert_eq!(token.current().unwrap().unwrap(), "two");
        for (text, reason) in [(" \n", "is empty"), ("a\u{7}b", "characters"), (&"x".repeat(5000), "longer")]
        {
            fs::write(&path, text).unwrap();
            let refused = token.current().unwrap_err();
            assert!(refused.contains(reason) && refused.contains("token file"), "{refused}");
        }
        fs::remove_file(&path).unwrap();
        assert!(token.current().unwrap_err().contains("cannot be read"));
        assert_eq!(Token::new(ConsulToken::None).current().unwrap(), None);
    }
}
