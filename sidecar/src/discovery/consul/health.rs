//! The answer to `/v1/health/service/NAME`, read into words of the model. Pure, and believes nothing: an answer
//! of another shape is refused as a whole; an instance whose values cannot be used (port 0, a name for an
//! address, an unknown protocol) is left out with a mistake that names it. What is long or unknown is skipped.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    str::FromStr,
    sync::Arc,
};

use serde::{Deserialize, de::DeserializeOwned};
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
    port: i64,
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

/// Reads the answer.
pub(super) fn read(name: &ServiceName, body: &[u8]) -> Result<Reading, Error> {
    let entries: Vec<Entry> = match serde_json::from_slice(body) {
        Ok(entries) => entries,
        Err(_) => return Err(explain::<Vec<Entry>>(&format!("service `{name}`"), body)),
    };
    if entries.len() > MAX_INSTANCES {
        let text =
            format!("service `{name}` has {} instances; at most {MAX_INSTANCES} are read", entries.len());
        return Err(Error::new(Kind::BadAnswer, text));
    }
    let mut reading = Reading::default();
    let mut words = Words::default();
    for entry in entries {
        let key = (words.shared(&entry.node.node), Arc::from(short(&entry.service.id)));
        match instance(name, key.clone(), &entry, &mut words) {
            Ok(instance) => reading.instances.push(instance),
            Err(why) => {
                if reading.mistakes.len() < MAX_MISTAKES {
                    reading.mistakes.push(format!(
                        "service `{name}`, instance `{}` on node `{}`: {why}",
                        key.1.escape_debug(),
                        key.0.escape_debug()
                    ));
                }
                reading.unreadable.insert(key);
            }
        }
    }
    Ok(reading)
}

/// Why an answer cannot be read: the field, what was expected, and how it begins.
pub(super) fn explain<T: DeserializeOwned>(of: &str, body: &[u8]) -> Error {
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
    let port = u16::try_from(service.port).ok().filter(|port| *port != 0);
    let port =
        port.ok_or_else(|| format!("`Service.Port` is {}; expected a port from 1 to 65535", service.port))?;
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
            ("/Service/Port", json!(0), "`Service.Port` is 0; expected a port from 1 to 65535"),
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

    #[test]
    fn an_answer_of_another_shape_is_refused_with_its_field() {
        let good = json!([entry("a", "10.1.0.2", 80)]).to_string();
        let mut wrong = json!([entry("a", "10.1.0.2", 80), entry("b", "10.1.0.2", 80)]);
        wrong[1]["Service"]["Port"] = "80".into();
        let mut without = json!([entry("a", "10.1.0.2", 80)]);
        without[0]["Service"].as_object_mut().unwrap().remove("Port");
        let (long, key) = ("x".repeat(1_000_000), format!("a\u{7f}{}", "x".repeat(1_000_000)));
        let mut long_text = json!([entry("a", "10.1.0.2", 80)]);
        long_text[0]["Service"]["Port"] = long.into();
        let long_key = json!([{key: [1]}]).to_string();
        for (body, expected) in [
            (wrong.to_string(), "`[1].Service.Port`: invalid type: string \"80\""),
            (without.to_string(), "missing field `Port`"),
            (long_text.to_string(), "`[0].Service.Port`: invalid type: string \"xxx"),
            (long_key[..long_key.len() - 4].to_owned(), "`[0].a\\u{7f}xxx"),
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
        assert!(read(&"orders".parse().unwrap(), deep.as_bytes()).is_err());
    }
}
