//! SPIFFE ids of the form `spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>`.
//!
//! Grammar: [SPIFFE-ID](https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE-ID.md) section 2, narrowed
//! to the one path shape of this mesh. An id that parses is canonical: comparing text compares identities.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};

/// A workload's identity. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SpiffeId {
    text: Arc<str>,
    trust_domain_end: usize,
}

/// The name of a trust domain: lowercase letters, digits, `.`, `-`, `_`; at most 255 bytes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TrustDomain(Arc<str>);

/// Why a text is not an id of this mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidId {
    text: String,
    reason: &'static str,
}

/// The id under which the certificate authority of a trust domain serves: namespace `weft`, service account
/// `weft-ca`. No workload ever gets it.
pub fn authority_id(trust_domain: &TrustDomain) -> Result<SpiffeId, InvalidId> {
    SpiffeId::new(trust_domain, AUTHORITY_NAMESPACE, AUTHORITY_ACCOUNT)
}

const AUTHORITY_NAMESPACE: &str = "weft";
const AUTHORITY_ACCOUNT: &str = "weft-ca";

const SCHEME: &str = "spiffe://";
/// SPIFFE-ID 2.3: implementations must accept, and may refuse longer than, 2048 bytes.
const MAX_ID_BYTES: usize = 2048;
const MAX_TRUST_DOMAIN_BYTES: usize = 255;

impl SpiffeId {
    /// Builds the id of a service account; fails where a part is not valid.
    pub fn new(
        trust_domain: &TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, InvalidId> {
        format!("{SCHEME}{trust_domain}/ns/{namespace}/sa/{service_account}").parse()
    }

    /// The whole URI.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The name of the trust domain, without the scheme.
    pub fn trust_domain(&self) -> &str {
        &self.text[SCHEME.len()..self.trust_domain_end]
    }

    /// The part after `/ns/`.
    pub fn namespace(&self) -> &str {
        self.path_segment(2)
    }

    /// The part after `/sa/`.
    pub fn service_account(&self) -> &str {
        self.path_segment(4)
    }

    /// Is this the certificate authority of its trust domain ([`authority_id`])?
    pub fn is_authority(&self) -> bool {
        self.namespace() == AUTHORITY_NAMESPACE && self.service_account() == AUTHORITY_ACCOUNT
    }

    fn path_segment(&self, index: usize) -> &str {
        self.text[self.trust_domain_end..].split('/').nth(index).unwrap_or_default()
    }
}

impl FromStr for SpiffeId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let refuse = |reason| Err(InvalidId { text: text.chars().take(200).collect(), reason });
        if text.len() > MAX_ID_BYTES {
            return refuse("longer than 2048 bytes");
        }
        let Some(rest) = text.strip_prefix(SCHEME) else { return refuse("does not begin with spiffe://") };
        let Some((domain, path)) = rest.split_once('/') else { return refuse("has no path") };
        if let Err(reason) = check_trust_domain(domain) {
            return refuse(reason);
        }
        let segments: Vec<&str> = path.split('/').collect();
        let ["ns", namespace, "sa", account] = segments[..] else {
            return refuse("path is not /ns/<namespace>/sa/<service-account>");
        };
        if !is_segment(namespace) || !is_segment(account) {
            return refuse("a path segment is empty, a dot, or has a character other than a-z A-Z 0-9 . - _");
        }
        Ok(SpiffeId { text: text.into(), trust_domain_end: SCHEME.len() + domain.len() })
    }
}

impl TrustDomain {
    /// The name itself.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TrustDomain {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        match check_trust_domain(text) {
            Ok(()) => Ok(TrustDomain(text.into())),
            Err(reason) => Err(InvalidId { text: text.chars().take(200).collect(), reason }),
        }
    }
}

fn check_trust_domain(name: &str) -> Result<(), &'static str> {
    if name.is_empty() || name.len() > MAX_TRUST_DOMAIN_BYTES {
        return Err("trust domain is empty or longer than 255 bytes");
    }
    let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_');
    if !name.bytes().all(allowed) {
        return Err("trust domain has a character other than a-z 0-9 . - _");
    }
    Ok(())
}

fn is_segment(segment: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    !segment.is_empty() && segment != "." && segment != ".." && segment.bytes().all(allowed)
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for InvalidId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not an identity of this mesh: {}", self.text, self.reason)
    }
}

impl std::error::Error for InvalidId {}

impl TryFrom<String> for SpiffeId {
    type Error = InvalidId;
    fn try_from(text: String) -> Result<Self, InvalidId> {
        text.parse()
    }
}

impl From<SpiffeId> for String {
    fn from(id: SpiffeId) -> String {
        id.text.to_string()
    }
}

impl TryFrom<String> for TrustDomain {
    type Error = InvalidId;
    fn try_from(text: String) -> Result<Self, InvalidId> {
        text.parse()
    }
}

impl From<TrustDomain> for String {
    fn from(name: TrustDomain) -> String {
        name.0.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_an_id_apart() {
        let id: SpiffeId = "spiffe://weft.local/ns/shop/sa/orders".parse().unwrap();
        assert_eq!(
            (id.trust_domain(), id.namespace(), id.service_account()),
            ("weft.local", "shop", "orders")
        );
        assert_eq!(SpiffeId::new(&"weft.local".parse().unwrap(), "shop", "orders").unwrap(), id);
    }

    #[test]
    fn refuses_what_two_readers_could_read_differently() {
        for text in [
            "",
            "spiffe://",
            "spiffe://weft.local",
            "spiffe://weft.local/",
            "https://weft.local/ns/a/sa/b",
            "SPIFFE://weft.local/ns/a/sa/b",
            "spiffe://Weft.local/ns/a/sa/b",
            "spiffe://weft.local:80/ns/a/sa/b",
            "spiffe://user@weft.local/ns/a/sa/b",
            "spiffe://weft.local/ns/a/sa/b/",
            "spiffe://weft.local/ns/a/sa/",
            "spiffe://weft.local/ns/../sa/b",
            "spiffe://weft.local/ns/a/sa/b?x=1",
            "spiffe://weft.local/ns/a/sa/b#x",
            "spiffe://weft.local/ns/a/sa/%62",
            "spiffe://weft.local/ns/a/sa/b\0",
            "spiffe://weft.local//ns/a/sa/b",
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text:?} was taken for an id");
        }
        assert!(format!("spiffe://d/ns/a/sa/{}", "b".repeat(2048)).parse::<SpiffeId>().is_err());
    }
}
