//! One entry of the answer to `/v1/health/service/NAME`: an instance as the model has it, or why it cannot be used. Pure,
//! and believes nothing. What is long or unknown is skipped.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    str::FromStr,
    sync::Arc,
};

use serde::Deserialize;
use serde_json::value::RawValue;
use weft_proto::{names, spiffe::SpiffeId};

use super::super::error::printable;
use crate::{
    discovery::is_virtual,
    model::{Endpoint, Protocol, ServiceName},
};

const MAX_IDENTITIES: usize = 20;
const MAX_TAGS: usize = 100;
/// Of an id, a tag, a zone or a version.
const MAX_WORD: usize = 255;
const MAX_WEIGHT: i64 = 10_000;

/// What tells an instance from all others: its node and its id there.
pub type InstanceKey = (Arc<str>, Arc<str>);

/// One registered instance.
#[derive(Debug, Clone, PartialEq)]
pub struct Instance {
    pub key: InstanceKey,
    pub endpoint: Endpoint,
    pub identities: Vec<SpiffeId>,
    pub protocol: Option<Protocol>,
    /// None of its checks is critical, and it wants traffic.
    pub is_well: bool,
    /// It would be well if Consul's servers reached the agent of its node.
    pub is_cut_off: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    node: Node,
    service: Registration,
    #[serde(default)]
    checks: Option<Vec<Check>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Node {
    node: String,
    address: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Registration {
    #[serde(rename = "ID")]
    id: String,
    #[serde(default)]
    address: String,
    /// Consul leaves out 0 since 1.11.
    #[serde(default)]
    port: i64,
    /// Since Consul 1.10: a Unix socket on the node, instead of a port.
    #[serde(default)]
    socket_path: String,
    #[serde(default)]
    tags: Option<Vec<String>>,
    #[serde(default)]
    meta: Option<HashMap<String, String>>,
    #[serde(default)]
    weights: Option<Weights>,
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "PascalCase")]
struct Weights {
    passing: i64,
    warning: i64,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Check {
    #[serde(rename = "CheckID", default)]
    id: String,
    status: String,
}

/// The check of every node: do the other members of the cluster reach its agent?
const MEMBERSHIP: &str = "serfHealth";

/// One entry; or which instance it is of, as far as it says, and why it cannot be used.
pub(super) fn read_entry(
    name: &ServiceName,
    text: &str,
    words: &mut Words,
) -> Result<Instance, (Option<InstanceKey>, String)> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    match serde_path_to_error::deserialize::<_, Entry>(&mut deserializer) {
        Ok(entry) => {
            let key = (words.shared(&entry.node.node), Arc::from(short(&entry.service.id)));
            instance(name, key.clone(), &entry, words).map_err(|why| (Some(key), why))
        }
        Err(error) => {
            let key = word_at(text, "Node", "Node").zip(word_at(text, "Service", "ID"));
            let key = key.map(|(node, id)| (words.shared(&node), Arc::from(short(&id))));
            let (path, inner) = (printable(&error.path().to_string()), printable(&error.inner().to_string()));
            Err((key, if path == "." { inner } else { format!("`{path}`: {inner}") }))
        }
    }
}

/// What an entry that cannot be read says of the service's identities: an instance that is left out must not take them
/// along, or the service is called in plaintext. None are stated only where that is certain; what is no entry at all
/// states nothing.
pub(super) fn stated_identities(text: &str) -> Result<Vec<SpiffeId>, String> {
    type Members<'a> = HashMap<String, &'a RawValue>;
    let members = |text| serde_json::from_str::<Members<'_>>(text);
    let unreadable = |_| format!("nor can its `{}` be read", names::META_IDENTITY);
    let Ok(entry) = members(text) else { return Ok(Vec::new()) };
    let Some(Ok(service)) = entry.get("Service").map(|service| members(service.get())) else {
        return Ok(Vec::new());
    };
    let Some(meta) = service.get("Meta") else { return Ok(Vec::new()) };
    let meta: Option<Members<'_>> = serde_json::from_str(meta.get()).map_err(unreadable)?;
    let Some(stated) = meta.and_then(|mut meta| meta.remove(names::META_IDENTITY)) else {
        return Ok(Vec::new());
    };
    let stated: Option<String> = serde_json::from_str(stated.get()).map_err(unreadable)?;
    identities(&stated.unwrap_or_default())
}

/// The text at `outer.inner` of an entry whose other members may be anything.
fn word_at(text: &str, outer: &str, inner: &str) -> Option<String> {
    let mut members: HashMap<String, &RawValue> = serde_json::from_str(text).ok()?;
    members = serde_json::from_str(members.remove(outer)?.get()).ok()?;
    serde_json::from_str(members.remove(inner)?.get()).ok()
}

fn instance(
    name: &ServiceName,
    key: InstanceKey,
    entry: &Entry,
    words: &mut Words,
) -> Result<Instance, String> {
    let service = &entry.service;
    let (field, text) = match service.address.as_str() {
        "" => ("Node.Address", entry.node.address.as_str()),
        own => ("Service.Address", own),
    };
    let ip: IpAddr = value(field, text, "an IP address")?;
    let ip = ip.to_canonical();
    if ip.is_unspecified() || ip.is_multicast() || is_virtual(ip) {
        return Err(format!("`{field}` is {ip}; expected an address to dial"));
    }
    let port = port(service)?;
    let checks = || entry.checks.iter().flatten();
    let own = worst(checks().filter(|check| check.id != MEMBERSHIP))?;
    let of_node = worst(checks().filter(|check| check.id == MEMBERSHIP))?;
    let weights = service.weights.unwrap_or(Weights { passing: 1, warning: 1 });
    let warns = own == Health::Warning || of_node == Health::Warning;
    let weight = if warns { weights.warning } else { weights.passing };
    if weight < 0 {
        return Err(format!("`Service.Weights` has {weight}; expected 0 or more"));
    }
    let meta = |key: &str| {
        let found = service.meta.as_ref().and_then(|meta| meta.get(key));
        found.map(String::as_str).filter(|text| !text.is_empty())
    };
    let mut word = |key: &'static str| meta(key).map(|text| word(key, text, words)).transpose();
    let (zone, version) = (word(names::META_ZONE)?, word(names::META_VERSION)?);
    check_namespace(name, meta(names::META_NAMESPACE))?;
    let tags = service.tags.as_deref().unwrap_or_default();
    let tags = tags.iter().filter(|tag| tag.len() <= MAX_WORD).take(MAX_TAGS);
    let endpoint = Endpoint {
        // Weights are relative; a heavier one than we know counts as the heaviest.
        weight: u16::try_from(weight.clamp(1, MAX_WEIGHT)).unwrap_or(1),
        zone,
        version,
        tags: tags.map(|tag| words.shared(tag)).collect(),
        ..Endpoint::at(SocketAddr::new(ip, port))
    };
    Ok(Instance {
        key,
        endpoint,
        identities: identities(meta(names::META_IDENTITY).unwrap_or_default())?,
        protocol: meta(names::META_PROTOCOL).map(protocol).transpose()?,
        is_well: own.max(of_node) != Health::Critical && weight > 0,
        is_cut_off: own != Health::Critical && of_node == Health::Critical && weight > 0,
    })
}

fn port(service: &Registration) -> Result<u16, String> {
    let port = u16::try_from(service.port).ok().filter(|port| *port != 0);
    port.ok_or_else(|| match (service.port, service.socket_path.as_str()) {
        (0, "") => "`Service.Port` is 0 or missing; expected a port from 1 to 65535".to_owned(),
        (0, socket) => format!(
            "`Service.Port` is missing and `Service.SocketPath` is {:?}; a socket is reached on its own host \
             alone, expected a port from 1 to 65535",
            short(socket)
        ),
        (port, _) => format!("`Service.Port` is {port}; expected a port from 1 to 65535"),
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Health {
    Passing,
    Warning,
    Critical,
}

/// The worst of these checks.
fn worst<'a>(checks: impl Iterator<Item = &'a Check>) -> Result<Health, String> {
    let mut worst = Health::Passing;
    for check in checks {
        worst = worst.max(match check.status.as_str() {
            "passing" => Health::Passing,
            "warning" => Health::Warning,
            "critical" | "maintenance" => Health::Critical,
            other => {
                return Err(format!(
                    "`Checks.Status` is {:?}; expected passing, warning, critical",
                    short(other)
                ));
            }
        });
    }
    Ok(worst)
}

fn identities(text: &str) -> Result<Vec<SpiffeId>, String> {
    let parts: Vec<&str> = text.split(',').map(str::trim).filter(|part| !part.is_empty()).collect();
    if parts.len() > MAX_IDENTITIES {
        return Err(format!("`{}` has {} ids; at most {MAX_IDENTITIES}", names::META_IDENTITY, parts.len()));
    }
    let expected = "SPIFFE ids such as spiffe://weft.local/ns/shop/sa/orders, separated by commas";
    if parts.is_empty() && !text.is_empty() {
        return Err(format!("`{}` is {:?}; expected {expected}", names::META_IDENTITY, short(text)));
    }
    parts.into_iter().map(|part| value(names::META_IDENTITY, part, expected)).collect()
}

fn protocol(text: &str) -> Result<Protocol, String> {
    Ok(match text {
        "http1" => Protocol::Http1,
        "http2" | "grpc" => Protocol::Http2,
        "tls" => Protocol::Tls,
        "tcp" => Protocol::Opaque,
        other => {
            let expected = "http1, http2, grpc, tls or tcp";
            return Err(format!("`{}` is {:?}; expected {expected}", names::META_PROTOCOL, short(other)));
        }
    })
}

/// The namespace is part of the service's name: `orders` is in `default`, `orders_shop` in `shop`.
fn check_namespace(name: &ServiceName, stated: Option<&str>) -> Result<(), String> {
    let own = name.as_str().split_once('_').map_or("default", |(_, namespace)| namespace);
    match stated {
        Some(other) if other != own => {
            let key = names::META_NAMESPACE;
            Err(format!("`{key}` is {:?}, but the service's name says {own:?}", short(other)))
        }
        _ => Ok(()),
    }
}

fn word(key: &str, text: &str, words: &mut Words) -> Result<Arc<str>, String> {
    if text.len() > MAX_WORD || text.chars().any(char::is_control) {
        return Err(format!("`{key}` is {:?}; expected at most {MAX_WORD} printable bytes", short(text)));
    }
    Ok(words.shared(text))
}

fn value<T: FromStr>(field: &str, text: &str, expected: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("`{field}` is {:?}; expected {expected}", short(text)))
}

/// The beginning of a foreign text.
fn short(text: &str) -> &str {
    let end =
        text.char_indices().map(|(at, one)| at + one.len_utf8()).take_while(|end| *end <= MAX_WORD).last();
    &text[..end.unwrap_or(0)]
}

/// Words that many instances share, each kept once.
#[derive(Default)]
pub(super) struct Words(HashSet<Arc<str>>);

impl Words {
    pub(super) fn shared(&mut self, text: &str) -> Arc<str> {
        let text = short(text);
        match self.0.get(text) {
            Some(known) => known.clone(),
            None => {
                let new: Arc<str> = text.into();
                self.0.insert(new.clone());
                new
            }
        }
    }
}
