//! The answer to `/v1/health/service/NAME`, read into words of the model. Pure, and believes nothing: an answer
//! that is no list is refused as a whole; an entry of another shape, or an instance whose values cannot be used (no
//! port, a name for an address, an unknown protocol) is left out with a mistake that names it, and costs no other
//! one. What is long or unknown is skipped.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
    sync::Arc,
};

use serde::{
    Deserialize, Deserializer,
    de::{Error as _, SeqAccess, Visitor},
};
use serde_json::value::RawValue;
use weft_proto::{names, spiffe::SpiffeId};

use super::error::{Error, Kind, printable, said};
use crate::{
    discovery::is_virtual,
    model::{Endpoint, Protocol, ServiceName},
};

/// Instances of one service.
pub(super) const MAX_INSTANCES: usize = 20_000;
/// Mistakes that are kept of one answer.
const MAX_MISTAKES: usize = 20;
const MAX_IDENTITIES: usize = 20;
const MAX_TAGS: usize = 100;
/// Of an id, a tag, a zone or a version.
const MAX_WORD: usize = 255;
const MAX_WEIGHT: i64 = 10_000;

/// What tells an instance from all others: its node and its id there.
pub(super) type InstanceKey = (Arc<str>, Arc<str>);

/// One registered instance.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Instance {
    pub(super) key: InstanceKey,
    pub(super) endpoint: Endpoint,
    pub(super) identities: Vec<SpiffeId>,
    pub(super) protocol: Option<Protocol>,
    /// None of its checks is critical, and it wants traffic.
    pub(super) is_well: bool,
    /// It would be well if Consul's servers reached the agent of its node.
    pub(super) is_cut_off: bool,
}

/// What one answer holds.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Reading {
    pub(super) instances: Vec<Instance>,
    /// Instances that are there and cannot be read.
    pub(super) unreadable: HashSet<InstanceKey>,
    /// The identities that they state.
    pub(super) identities: Vec<SpiffeId>,
    /// One of them states identities that cannot be read either.
    pub(super) is_identity_unreadable: bool,
    /// For the log; bounded.
    pub(super) mistakes: Vec<String>,
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

/// The entries of an answer as they came. Bounded, so that an answer of nothing but commas takes no memory.
struct Entries<'a>(Vec<&'a RawValue>);

impl<'de> Deserialize<'de> for Entries<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(EntriesVisitor)
    }
}

struct EntriesVisitor;

impl<'de> Visitor<'de> for EntriesVisitor {
    type Value = Entries<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a sequence of instances")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Entries<'de>, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = list.next_element()? {
            if entries.len() == MAX_INSTANCES {
                return Err(A::Error::custom(format!("more than {MAX_INSTANCES} instances; none is read")));
            }
            entries.push(entry);
        }
        Ok(Entries(entries))
    }
}

/// Reads the answer.
pub(super) fn read(name: &ServiceName, body: &[u8]) -> Result<Reading, Error> {
    let entries: Entries<'_> = match serde_json::from_slice(body) {
        Ok(entries) => entries,
        Err(_) => return Err(explain::<Entries<'_>>(&format!("service `{name}`"), body)),
    };
    let mut reading = Reading::default();
    let mut words = Words::default();
    for (at, entry) in entries.0.into_iter().enumerate() {
        match read_entry(name, entry.get(), &mut words) {
            Ok(instance) => reading.instances.push(instance),
            Err((key, mut why)) => {
                match stated_identities(entry.get()) {
                    Ok(identities) => reading.identities.extend(identities),
                    Err(of_identities) => {
                        reading.is_identity_unreadable = true;
                        if of_identities != why {
                            why = format!("{why}; {of_identities}");
                        }
                    }
                }
                if reading.mistakes.len() < MAX_MISTAKES {
                    let place = match &key {
                        Some((node, id)) => {
                            format!("instance `{}` on node `{}`", id.escape_debug(), node.escape_debug())
                        }
                        None => format!("entry {} of the answer", at + 1),
                    };
                    reading.mistakes.push(format!("service `{name}`, {place}: {why}"));
                }
                reading.unreadable.insert(key.unwrap_or_else(|| (words.shared(""), words.shared(""))));
            }
        }
    }
    Ok(reading)
}

/// One entry; or which instance it is of, as far as it says, and why it cannot be used.
fn read_entry(
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
fn stated_identities(text: &str) -> Result<Vec<SpiffeId>, String> {
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

/// Why an answer cannot be read: the field, what was expected, and how it begins.
pub(super) fn explain<'a, T: Deserialize<'a>>(of: &str, body: &'a [u8]) -> Error {
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let why = match serde_path_to_error::deserialize::<_, T>(&mut deserializer) {
        Ok(_) => "something follows the answer".to_owned(),
        Err(error) => {
            let (path, inner) = (printable(&error.path().to_string()), error.inner());
            let place = if path == "." { String::new() } else { format!("`{path}`: ") };
            match inner.is_eof() {
                true => format!("{place}the answer ends too early, after {} bytes", body.len()),
                false => format!("{place}{}", printable(&inner.to_string())),
            }
        }
    };
    let begins: Vec<u8> = body.iter().copied().take(40).collect();
    Error::new(
        Kind::BadAnswer,
        format!("{of}: the answer cannot be read: {why} (it begins {})", said(&begins)),
    )
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
struct Words(HashSet<Arc<str>>);

impl Words {
    fn shared(&mut self, text: &str) -> Arc<str> {
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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    pub(super) fn entry(id: &str, address: &str, port: i64) -> Value {
        json!({
            "Node": {"ID": "0f65", "Node": "n1", "Address": "10.0.0.9", "Meta": {}},
            "Service": {
                "ID": id, "Service": "orders", "Tags": null, "Address": address, "Port": port, "Meta": null,
                "Weights": {"Passing": 1, "Warning": 1}, "Proxy": {"MeshGateway": {}},
            },
            "Checks": [{"CheckID": "serfHealth", "Status": "passing", "Output": "alive"}],
        })
    }

    fn read_it(entries: &Value) -> Result<Reading, Error> {
        read(&"orders".parse().unwrap(), entries.to_string().as_bytes())
    }

    #[test]
    fn an_instance_becomes_an_endpoint() {
        let mut full = entry("a", "10.1.0.2", 8080);
        full["Service"]["Tags"] = json!(["v2", "canary"]);
        full["Service"]["Weights"] = json!({"Passing": 50, "Warning": 7});
        full["Service"]["Meta"] = json!({
            "weft-identity": "spiffe://d/ns/default/sa/orders, spiffe://d/ns/default/sa/old",
            "weft-protocol": "grpc", "weft-zone": "eu-1a", "weft-version": "1.2", "weft-namespace": "default",
            "other": "x",
        });
        let mut warned = entry("b", "", 1);
        warned["Service"]["Weights"] = json!({"Passing": 50, "Warning": 7});
        warned["Checks"][0]["Status"] = "warning".into();
        let mut down = entry("c", "::ffff:10.1.0.3", 1);
        down["Checks"][0]["Status"] = "critical".into();
        let mut resting = entry("d", "fd00::2", 1);
        resting["Service"]["Weights"] = json!({"Passing": 0, "Warning": 0});
        let reading = read_it(&json!([full, warned, down, resting])).unwrap();
        assert_eq!(reading.mistakes, [""; 0]);
        let [full, warned, down, resting] = &reading.instances[..] else { panic!("{reading:?}") };
        assert_eq!(full.endpoint.address, "10.1.0.2:8080".parse().unwrap());
        assert_eq!((full.endpoint.weight, full.endpoint.zone.as_deref()), (50, Some("eu-1a")));
        assert_eq!(full.endpoint.version.as_deref(), Some("1.2"));
        assert_eq!(full.endpoint.tags.iter().map(AsRef::as_ref).collect::<Vec<_>>(), ["v2", "canary"]);
        assert_eq!((full.identities.len(), full.protocol), (2, Some(Protocol::Http2)));
        assert_eq!(warned.endpoint.address, "10.0.0.9:1".parse().unwrap());
        assert_eq!((warned.endpoint.weight, warned.is_well), (7, true));
        assert_eq!((down.endpoint.address.to_string().as_str(), down.is_well), ("10.1.0.3:1", false));
        assert!(!resting.is_well && !resting.is_cut_off);
        assert!(Arc::ptr_eq(&full.key.0, &warned.key.0), "words are shared");
        assert_eq!(read_it(&json!([])).unwrap(), Reading::default());
    }

    #[test]
    fn a_lost_node_is_told_from_an_app_that_is_down() {
        let own = json!({"CheckID": "service:a", "ServiceID": "a", "Status": "passing"});
        for (of_node, of_app, expected) in [
            ("passing", "passing", (true, false, 50)),
            ("passing", "warning", (true, false, 7)),
            ("critical", "passing", (false, true, 50)),
            ("critical", "warning", (false, true, 7)),
            ("passing", "critical", (false, false, 50)),
            ("critical", "critical", (false, false, 50)),
        ] {
            let mut one = entry("a", "10.1.0.2", 80);
            one["Service"]["Weights"] = json!({"Passing": 50, "Warning": 7});
            one["Checks"] = json!([one["Checks"][0], own]);
            one["Checks"][0]["Status"] = of_node.into();
            one["Checks"][1]["Status"] = of_app.into();
            let found = read_it(&json!([one])).unwrap().instances.remove(0);
            let read = (found.is_well, found.is_cut_off, found.endpoint.weight);
            assert_eq!(read, expected, "{of_node} {of_app}");
        }
    }

    #[test]
    fn an_instance_that_cannot_be_used_is_named_with_its_field() {
        let cases = [
            ("/Service/Port", json!(0), "`Service.Port` is 0 or missing; expected a port from 1 to 65535"),
            ("/Service/Port", json!(65536), "`Service.Port` is 65536"),
            ("/Service/Address", json!("web.local"), "`Service.Address` is \"web.local\"; expected an IP"),
            ("/Service/Address", json!("240.0.0.1"), "expected an address to dial"),
            ("/Node/Address", json!(""), "`Node.Address` is \"\""),
            (
                "/Service/Meta",
                json!({"weft-protocol": "http"}),
                "`weft-protocol` is \"http\"; expected http1,",
            ),
            ("/Service/Meta", json!({"weft-identity": "orders"}), "`weft-identity` is \"orders\""),
            ("/Service/Meta", json!({"weft-zone": "x".repeat(600)}), "`weft-zone` is "),
            ("/Service/Meta", json!({"weft-namespace": "shop"}), "but the service's name says \"default\""),
            ("/Service/Weights", json!({"Passing": -1, "Warning": 1}), "`Service.Weights` has -1"),
            ("/Checks/0/Status", json!("odd"), "`Checks.Status` is \"odd\""),
        ];
        for (place, value, expected) in cases {
            let address = if place == "/Node/Address" { "" } else { "10.1.0.2" };
            let mut bad = entry("bad", address, 80);
            *bad.pointer_mut(place).unwrap() = value;
            let reading = read_it(&json!([entry("good", "10.1.0.3", 80), bad])).unwrap();
            let [mistake] = &reading.mistakes[..] else { panic!("{place}: {reading:?}") };
            assert!(mistake.starts_with("service `orders`, instance `bad` on node `n1`: "), "{mistake}");
            assert!(mistake.contains(expected), "{mistake}");
            assert_eq!((reading.instances.len(), reading.unreadable.len()), (1, 1), "{place}");
        }
    }

    /// What a newer Consul leaves out, and what a program in between may make of the rest.
    #[test]
    fn an_entry_that_cannot_be_read_costs_that_entry_alone() {
        let without = |place: &str, key: &str| {
            let mut bad = entry("bad", "10.1.0.2", 80);
            bad.pointer_mut(place).unwrap().as_object_mut().unwrap().remove(key);
            bad
        };
        let with = |place: &str, value: Value| {
            let mut bad = entry("bad", "10.1.0.2", 80);
            *bad.pointer_mut(place).unwrap() = value;
            bad
        };
        let mut socket = without("/Service", "Port");
        socket["Service"]["SocketPath"] = "/run/orders.sock".into();
        let named = "instance `bad` on node `n1`: ";
        for (bad, place, expected) in [
            (without("/Service", "Port"), named, "`Service.Port` is 0 or missing; expected a port"),
            (socket, named, "`Service.SocketPath` is \"/run/orders.sock\""),
            (with("/Service/Port", json!("80")), named, "`Service.Port`: invalid type: string \"80\""),
            (with("/Service/Port", json!("x".repeat(1_000_000))), named, "`Service.Port`: invalid type: "),
            (with("/Service/Port", json!(1e300)), named, "`Service.Port`: "),
            (with("/Service/Tags", json!({"a": 1})), named, "`Service.Tags`: invalid type: map"),
            (with("/Service/Meta", json!({"a": 7})), named, "`Service.Meta.a`: invalid type: integer"),
            (with("/Checks", json!("none")), named, "`Checks`: invalid type: string"),
            (with("/Node/Address", json!(null)), named, "`Node.Address`: invalid type: null"),
            (without("/Service", "ID"), "entry 2 of the answer: ", "`Service`: missing field `ID`"),
            (with("/Service", json!(null)), "entry 2 of the answer: ", "`Service`: invalid type: null"),
            (without("", "Node"), "entry 2 of the answer: ", "missing field `Node`"),
            (json!(7), "entry 2 of the answer: ", "invalid type: integer `7`"),
            (json!([]), "entry 2 of the answer: ", "invalid"),
        ] {
            let all = json!([entry("good", "10.1.0.3", 80), bad, entry("other", "10.1.0.4", 80)]);
            let reading = read_it(&all).unwrap();
            let [mistake] = &reading.mistakes[..] else { panic!("{reading:?}") };
            assert!(mistake.starts_with(&format!("service `orders`, {place}")), "{mistake}");
            assert!(mistake.contains(expected) && mistake.len() < 600, "{mistake}");
            assert_eq!((reading.instances.len(), reading.unreadable.len()), (2, 1), "{mistake}");
        }
    }

    #[test]
    fn identities_of_what_cannot_be_read_are_not_lost() {
        let identity = "spiffe://d/ns/default/sa/orders";
        let with = |place: &str, value: Value, meta: Value| {
            let mut bad = entry("bad", "10.1.0.2", 80);
            bad["Service"]["Meta"] = meta;
            *bad.pointer_mut(place).unwrap() = value;
            bad
        };
        let stated = || json!({"weft-identity": identity, "weft-zone": "z"});
        for (bad, identities, is_identity_unreadable) in [
            (with("/Service/Port", json!(0), stated()), 1, false),
            (with("/Service/Port", json!("80"), stated()), 1, false),
            (with("/Service/Tags", json!({"a": 1}), stated()), 1, false),
            (with("/Node", json!(null), stated()), 1, false),
            (with("/Checks", json!("none"), stated()), 1, false),
            (with("/Service/Meta/weft-zone", json!(7), stated()), 1, false),
            // Malformed, in an entry that can be read otherwise, and in those that cannot.
            (with("/Service/Meta/weft-identity", json!("orders"), stated()), 0, true),
            (with("/Service/Meta/weft-identity", json!(" ,"), stated()), 0, true),
            (with("/Service/Meta/weft-identity", json!([identity]), stated()), 0, true),
            (with("/Service/Port", json!(0), json!({"weft-identity": "orders"})), 0, true),
            (with("/Service/Tags", json!(7), json!({"weft-identity": "orders"})), 0, true),
            (with("/Service/Meta", json!("none"), json!({})), 0, true),
            // It has none, for certain.
            (with("/Service", json!("none"), json!({})), 0, false),
            (json!(7), 0, false),
            (with("/Service/Port", json!(0), json!(null)), 0, false),
            (with("/Service/Tags", json!(7), json!({"weft-identity": ""})), 0, false),
        ] {
            let reading = read_it(&json!([entry("good", "10.1.0.3", 80), bad])).unwrap();
            assert_eq!((reading.instances.len(), reading.unreadable.len()), (1, 1), "{bad}");
            let found = (reading.identities.len(), reading.is_identity_unreadable);
            assert_eq!(found, (identities, is_identity_unreadable), "{bad}");
            let told = reading.mistakes[0].contains("weft-identity");
            assert!(!is_identity_unreadable || told, "{:?}", reading.mistakes);
        }
    }

    #[test]
    fn an_answer_without_an_end_of_entries_is_refused() {
        let commas = format!("[{}0]", "0,".repeat(MAX_INSTANCES));
        let error = read(&"orders".parse().unwrap(), commas.as_bytes()).unwrap_err();
        assert!(error.text.contains("more than 20000 instances; none is read"), "{error}");
    }

    #[test]
    fn an_answer_of_another_shape_is_refused_with_its_field() {
        let good = json!([entry("a", "10.1.0.2", 80)]).to_string();
        let long_key = format!("[{{\"a\u{7f}{}\": [1", "x".repeat(1_000_000));
        for (body, expected) in [
            (long_key, "ends too early"),
            (good[..good.len() / 2].to_owned(), "the answer ends too early, after "),
            (String::new(), "ends too early, after 0 bytes"),
            ("<html><body>Welcome".to_owned(), "it begins <html><body>Welcome"),
            ("{\"error\": 1}".to_owned(), "expected a sequence"),
            (format!("{good}[]"), "something follows"),
            ("null".to_owned(), "expected a sequence"),
        ] {
            let error = read(&"orders".parse().unwrap(), body.as_bytes()).unwrap_err();
            assert_eq!(error.kind, Kind::BadAnswer);
            assert!(error.text.starts_with("service `orders`: ") && error.text.contains(expected), "{error}");
            assert!(error.text.len() < 600, "{error}");
        }
    }

    #[test]
    fn hostile_bytes_do_no_harm() {
        let good = json!([entry("a", "10.1.0.2", 80)]).to_string().into_bytes();
        let mut random = fastrand::Rng::with_seed(3);
        for _ in 0..20_000 {
            let mut bytes = good.clone();
            for _ in 0..random.usize(1..5) {
                let at = random.usize(..bytes.len());
                bytes[at] = random.u8(..);
            }
            bytes.truncate(random.usize(..=good.len()));
            let _ = read(&"orders".parse().unwrap(), &bytes);
        }
        let deep = format!("{}1{}", "[".repeat(10_000), "]".repeat(10_000));
        let reading = read(&"orders".parse().unwrap(), deep.as_bytes()).unwrap();
        assert_eq!((reading.instances.len(), reading.mistakes.len()), (0, 1));
    }
}
