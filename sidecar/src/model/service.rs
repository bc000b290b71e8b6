//! Services and their endpoints, as discovery knows them at one moment.

use std::{fmt, net::SocketAddr, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};
use weft_proto::spiffe::SpiffeId;

use super::Protocol;

/// The name of a service in the registry: `orders` in namespace `default`, `orders_shop` in namespace `shop`.
/// Each part is a DNS label (RFC 1123). Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ServiceName(Arc<str>);

/// One service as it is known now. Never changed: a newer one takes its place.
#[derive(Debug, Clone, PartialEq)]
pub struct Service {
    /// Its name.
    pub name: ServiceName,
    /// What its endpoints speak, where somebody declared it.
    pub protocol: Option<Protocol>,
    /// Whom a client expects to meet. Empty: not a mesh service, called in plaintext.
    pub identities: Vec<SpiffeId>,
    /// The registry says whom to expect, but cannot be understood: never called in plaintext all the same.
    pub is_identity_unreadable: bool,
    /// Addresses that mean the service as a whole (a ClusterIP).
    pub addresses: Vec<SocketAddr>,
    /// Where it runs: sorted by address, each once.
    pub endpoints: Vec<Endpoint>,
    /// Does anybody say that it exists?
    pub registered: Registered,
}

/// What is known about the existence of a service that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Registered {
    /// A file or a registry has it, with or without endpoints.
    #[default]
    Yes,
    /// The registry was asked, and has nothing under this name.
    No,
    /// The registry could not be asked yet.
    Unknown,
}

impl Service {
    /// A service of which nothing but the name is known.
    pub fn named(name: ServiceName) -> Self {
        Service {
            name,
            protocol: None,
            identities: Vec::new(),
            is_identity_unreadable: false,
            addresses: Vec::new(),
            endpoints: Vec::new(),
            registered: Registered::Yes,
        }
    }
}

/// One place where a service runs.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct Endpoint {
    /// The endpoint's own address and port: what a sidecar dials, and what the far side redirects.
    pub address: SocketAddr,
    /// Share of the traffic relative to the other endpoints; 1 to 10,000, default 100.
    pub weight: u16,
    /// Failure zone, where known.
    pub zone: Option<Arc<str>>,
    /// Version of the app, where known.
    pub version: Option<Arc<str>>,
    /// Free words of whoever registered it.
    pub tags: Vec<Arc<str>>,
}

/// The weight of an endpoint that states none.
pub const DEFAULT_WEIGHT: u16 = 100;

impl Endpoint {
    /// An endpoint with the default weight, of which nothing else is known.
    pub fn at(address: SocketAddr) -> Self {
        Endpoint { address, weight: DEFAULT_WEIGHT, zone: None, version: None, tags: Vec::new() }
    }
}

impl ServiceName {
    /// The registry's spelling.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ServiceName {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let valid = match text.split_once('_') {
            Some((name, namespace)) => is_dns_label(name) && is_dns_label(namespace),
            None => is_dns_label(text),
        };
        if valid { Ok(ServiceName(text.into())) } else { Err(InvalidName(text.chars().take(150).collect())) }
    }
}

/// RFC 1123 2.1: letters, digits and inner hyphens, at most 63; lowercase only, as Kubernetes has it.
fn is_dns_label(text: &str) -> bool {
    let inner = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-');
    (1..=63).contains(&text.len())
        && text.bytes().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// A text that is not a service name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidName(String);

impl fmt::Display for InvalidName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} is not a service name; expected `name` or `name_namespace`, each of at most 63 of a-z 0-9 -",
            self.0
        )
    }
}

impl std::error::Error for InvalidName {}

impl TryFrom<String> for ServiceName {
    type Error = InvalidName;
    fn try_from(text: String) -> Result<Self, InvalidName> {
        text.parse()
    }
}

impl From<ServiceName> for String {
    fn from(name: ServiceName) -> String {
        name.0.to_string()
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_or_two_dns_labels() {
        for good in ["orders", "orders_shop", "a", "a-1_b-2", &"x".repeat(63)] {
            assert!(good.parse::<ServiceName>().is_ok(), "{good}");
        }
        for bad in ["", "_", "a_", "_b", "a_b_c", "Orders", "a.b", "-a", "a-", "a b", "a/b", &"x".repeat(64)]
        {
            assert!(bad.parse::<ServiceName>().is_err(), "{bad}");
        }
    }
}
