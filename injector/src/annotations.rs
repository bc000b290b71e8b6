//! Annotations of a pod: one table says which there are, what each may be, and which flag, variable or resource it
//! becomes. A wrong one refuses the pod, so all of them are named at once, each with what was expected.

use std::{collections::BTreeMap, net::IpAddr};

use crate::names::{ANNOTATION_PREFIX, ANNOTATION_STATUS, LABEL_INJECT};

/// One annotation.
struct Annotation {
    /// Without the prefix.
    name: &'static str,
    value: Value,
    target: Target,
}

/// What an annotation may be.
enum Value {
    /// One of these words.
    Choice(&'static [&'static str]),
    /// `80,8000-8999`
    PortRanges,
    /// `80,8080`
    Ports,
    /// `8080=strict,9090=permissive`
    PortModes,
    /// `10.0.0.0/8,fd00::/8`
    Networks,
    /// `127.0.0.1:9000=orders,…`
    Upstreams,
    /// `30s`
    Duration,
    /// 0 to 1
    Ratio,
    /// `100m`, `64Mi`
    Quantity,
    /// A name of a service, as in DNS, perhaps with `_NAMESPACE`.
    ServiceName,
    /// What cannot be checked here.
    Text,
}

/// What an annotation becomes.
enum Target {
    /// A flag of the sidecar.
    Sidecar(&'static str),
    /// A flag of the sidecar, once for each part between commas.
    SidecarEach(&'static str),
    /// A flag of `redirect apply`.
    Redirect(&'static str),
    /// A variable of the sidecar.
    Variable(&'static str),
    /// A request or limit: `requests/cpu`.
    Resource(&'static str),
    /// Ports of the app that the mesh reaches, in place of those that its containers name.
    Ports,
    /// Name of the service.
    Service,
}

const fn annotation(name: &'static str, value: Value, target: Target) -> Annotation {
    Annotation { name, value, target }
}

const MODES: Value = Value::Choice(&["permissive", "strict"]);

const ANNOTATIONS: &[Annotation] = &[
    annotation("service", Value::ServiceName, Target::Service),
    annotation("ports", Value::Ports, Target::Ports),
    annotation(
        "protocol",
        Value::Choice(&["http1", "http2", "grpc", "tls", "tcp"]),
        Target::Sidecar("protocol"),
    ),
    annotation("include-inbound-ports", Value::PortRanges, Target::Redirect("include-inbound-ports")),
    annotation("exclude-inbound-ports", Value::PortRanges, Target::Redirect("exclude-inbound-ports")),
    annotation("include-outbound-ports", Value::PortRanges, Target::Redirect("include-outbound-ports")),
    annotation("exclude-outbound-ports", Value::PortRanges, Target::Redirect("exclude-outbound-ports")),
    annotation("include-outbound-networks", Value::Networks, Target::Redirect("include-outbound-networks")),
    annotation("exclude-outbound-networks", Value::Networks, Target::Redirect("exclude-outbound-networks")),
    annotation("redirect-dns", Value::Choice(&["true", "false"]), Target::Redirect("dns")),
    annotation("redirect-backend", Value::Choice(&["auto", "nft", "legacy"]), Target::Redirect("backend")),
    annotation("mode", Value::Choice(&["allow-any", "registry-only"]), Target::Sidecar("mode")),
    annotation("mtls", MODES, Target::Sidecar("mtls")),
    annotation("mtls-ports", Value::PortModes, Target::SidecarEach("mtls-port")),
    annotation("outbound-mtls", MODES, Target::Sidecar("outbound-mtls")),
    annotation("upstreams", Value::Upstreams, Target::SidecarEach("upstream")),
    annotation("connect-timeout", Value::Duration, Target::Sidecar("connect-timeout")),
    annotation("idle-timeout", Value::Duration, Target::Sidecar("idle-timeout")),
    annotation("certificate-lifetime", Value::Duration, Target::Sidecar("certificate-lifetime")),
    annotation("settle-time", Value::Duration, Target::Sidecar("settle-time")),
    annotation("drain-timeout", Value::Duration, Target::Sidecar("drain-timeout")),
    annotation("log", Value::Text, Target::Sidecar("log")),
    annotation("log-format", Value::Choice(&["text", "json"]), Target::Sidecar("log-format")),
    annotation("access-log", Value::Choice(&["off", "failures", "all"]), Target::Sidecar("access-log")),
    annotation("trace-ratio", Value::Ratio, Target::Variable("OTEL_TRACES_SAMPLER_ARG")),
    annotation("cpu-request", Value::Quantity, Target::Resource("requests/cpu")),
    annotation("cpu-limit", Value::Quantity, Target::Resource("limits/cpu")),
    annotation("memory-request", Value::Quantity, Target::Resource("requests/memory")),
    annotation("memory-limit", Value::Quantity, Target::Resource("limits/memory")),
];

/// What a pod's annotations ask for, checked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodSettings {
    /// The name of its service.
    pub service: Option<String>,
    /// Ports of the app that the mesh reaches.
    pub ports: Option<Vec<u16>>,
    /// Flags of the sidecar and their values; a flag may stand several times.
    pub sidecar: Vec<(&'static str, String)>,
    /// Flags of the redirect.
    pub redirect: Vec<(&'static str, String)>,
    /// Variables of the sidecar.
    pub environment: BTreeMap<&'static str, String>,
    /// `requests/cpu` and its value.
    pub resources: BTreeMap<&'static str, String>,
}

impl PodSettings {
    /// Reads the annotations that begin with `weft.dev/`.
    ///
    /// # Errors
    /// One message for each annotation that is unknown or wrong.
    pub fn read(annotations: &BTreeMap<String, String>) -> Result<Self, Vec<String>> {
        let mut settings = PodSettings::default();
        let mut wrong = Vec::new();
        for (key, text) in annotations {
            let Some(name) = key.strip_prefix(ANNOTATION_PREFIX) else { continue };
            if key == ANNOTATION_STATUS {
                continue;
            }
            let Some(known) = ANNOTATIONS.iter().find(|annotation| annotation.name == name) else {
                wrong.push(unknown(key));
                continue;
            };
            let text = text.trim();
            match known.value.check(text) {
                Ok(()) => settings.set(&known.target, text),
                Err(expected) => wrong.push(format!("annotation {key} is {text:?}; expected {expected}")),
            }
        }
        if wrong.is_empty() { Ok(settings) } else { Err(wrong) }
    }

    fn set(&mut self, target: &Target, text: &str) {
        match target {
            Target::Sidecar(flag) => self.sidecar.push((flag, text.to_owned())),
            Target::SidecarEach(flag) => {
                self.sidecar.extend(parts(text).map(|part| (*flag, part.to_owned())))
            }
            Target::Redirect(flag) => self.redirect.push((flag, parts(text).collect::<Vec<_>>().join(","))),
            Target::Variable(name) => _ = self.environment.insert(name, text.to_owned()),
            Target::Resource(path) => _ = self.resources.insert(path, text.to_owned()),
            Target::Ports => self.ports = Some(parts(text).filter_map(|part| part.parse().ok()).collect()),
            Target::Service => self.service = Some(text.to_owned()),
        }
    }
}

impl Value {
    /// The error says what was expected.
    fn check(&self, text: &str) -> Result<(), String> {
        let (good, expected) = match self {
            Value::Choice(words) => (words.contains(&text), format!("one of: {}", words.join(", "))),
            Value::PortRanges => (all(text, is_port_range), "ports and ranges such as 80,8000-8999".into()),
            Value::Ports => (text.is_empty() || all(text, is_port), "ports such as 80,8080".into()),
            Value::PortModes => (
                all(text, |part| {
                    part.split_once('=')
                        .is_some_and(|(port, mode)| is_port(port) && MODES.check(mode).is_ok())
                }),
                "ports with `permissive` or `strict`, such as 8080=strict".into(),
            ),
            Value::Networks => (all(text, is_network), "networks such as 10.0.0.0/8,fd00::/8".into()),
            Value::Upstreams => (
                all(text, is_upstream),
                "loopback addresses with a service, such as 127.0.0.1:9000=orders_shop".into(),
            ),
            Value::Duration => {
                (humantime::parse_duration(text).is_ok(), "a time such as 30s or 500ms".into())
            }
            Value::Ratio => (
                text.parse::<f64>().is_ok_and(|ratio| (0.0..=1.0).contains(&ratio)),
                "a number from 0 to 1".into(),
            ),
            Value::Quantity => (is_quantity(text), "a quantity such as 100m or 64Mi".into()),
            Value::ServiceName => (
                is_service_name(text),
                "a name of lower-case letters, digits and dashes, such as orders or orders_shop".into(),
            ),
            Value::Text => (!text.is_empty(), "some text".into()),
        };
        if good { Ok(()) } else { Err(expected) }
    }
}

fn unknown(key: &str) -> String {
    if key == LABEL_INJECT {
        return format!("{LABEL_INJECT} is an annotation here; it must be a label");
    }
    let known: Vec<&str> = ANNOTATIONS.iter().map(|annotation| annotation.name).collect();
    format!("annotation {key} is not known; known are {ANNOTATION_PREFIX}… with {}", known.join(", "))
}

fn parts(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|part| !part.is_empty())
}

fn all(text: &str, good: impl Fn(&str) -> bool) -> bool {
    parts(text).next().is_some() && text.split(',').all(|part| good(part.trim()))
}

fn is_port(text: &str) -> bool {
    text.parse::<u16>().is_ok_and(|port| port > 0) && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn is_port_range(text: &str) -> bool {
    match text.split_once('-') {
        None => is_port(text),
        Some((low, high)) => {
            is_port(low) && is_port(high) && low.parse::<u16>().ok() <= high.parse::<u16>().ok()
        }
    }
}

fn is_network(text: &str) -> bool {
    let (address, length) = text.split_once('/').unwrap_or((text, "0"));
    let Ok(address) = address.parse::<IpAddr>() else { return false };
    let longest = if address.is_ipv4() { 32 } else { 128 };
    length.parse::<u8>().is_ok_and(|length| length <= longest)
}

fn is_upstream(text: &str) -> bool {
    let Some((address, service)) = text.split_once('=') else { return false };
    address
        .parse::<std::net::SocketAddr>()
        .is_ok_and(|address| address.ip().is_loopback() && address.port() > 0)
        && is_service_name(service)
}

/// Digits with an optional point, then a suffix of Kubernetes' quantities.
fn is_quantity(text: &str) -> bool {
    let number = text.trim_end_matches(|character: char| character.is_ascii_alphabetic());
    const SUFFIXES: [&str; 14] = ["", "m", "k", "M", "G", "T", "P", "Ki", "Mi", "Gi", "Ti", "Pi", "E", "Ei"];
    SUFFIXES.contains(&&text[number.len()..])
        && number.starts_with(|character: char| character.is_ascii_digit())
        && number.parse::<f64>().is_ok()
}

fn is_service_name(text: &str) -> bool {
    let label = |text: &str| {
        (1..=63).contains(&text.len())
            && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
            && !text.starts_with('-')
            && !text.ends_with('-')
    };
    match text.split_once('_') {
        None => label(text),
        Some((name, namespace)) => label(name) && label(namespace),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(annotations: &[(&str, &str)]) -> Result<PodSettings, Vec<String>> {
        let map = annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        PodSettings::read(&map)
    }

    #[test]
    fn annotations_become_flags_variables_and_resources() {
        let settings = read(&[
            ("weft.dev/service", "orders"),
            ("weft.dev/ports", "8080, 9090"),
            ("weft.dev/exclude-outbound-ports", "3306, 6379-6380"),
            ("weft.dev/mtls-ports", "8080=strict,9090=permissive"),
            ("weft.dev/trace-ratio", "0.5"),
            ("weft.dev/memory-limit", "256Mi"),
            ("prometheus.io/scrape", "true"),
        ])
        .unwrap();
        assert_eq!(settings.service.as_deref(), Some("orders"));
        assert_eq!(settings.ports, Some(vec![8080, 9090]));
        assert_eq!(settings.redirect, [("exclude-outbound-ports", "3306,6379-6380".to_owned())]);
        assert_eq!(
            settings.sidecar,
            [("mtls-port", "8080=strict".to_owned()), ("mtls-port", "9090=permissive".to_owned())]
        );
        assert_eq!(settings.environment["OTEL_TRACES_SAMPLER_ARG"], "0.5");
        assert_eq!(settings.resources["limits/memory"], "256Mi");
    }

    #[test]
    fn every_wrong_annotation_is_named_with_what_was_expected() {
        let wrong = [
            ("weft.dev/ports", "80,http", "ports such as"),
            ("weft.dev/exclude-inbound-ports", "90-80", "ranges"),
            ("weft.dev/exclude-outbound-networks", "10.0.0.0/33", "networks"),
            ("weft.dev/mtls", "on", "permissive, strict"),
            ("weft.dev/mtls-ports", "8080", "8080=strict"),
            ("weft.dev/upstreams", "10.0.0.1:80=orders", "loopback"),
            ("weft.dev/drain-timeout", "30", "a time"),
            ("weft.dev/trace-ratio", "1.5", "0 to 1"),
            ("weft.dev/cpu-limit", "1 core", "quantity"),
            ("weft.dev/service", "Orders", "lower-case"),
            ("weft.dev/prots", "80", "not known"),
            ("weft.dev/inject", "enabled", "must be a label"),
        ];
        for (key, value, expected) in wrong {
            let messages = read(&[(key, value)]).unwrap_err();
            assert!(
                messages.len() == 1 && messages[0].contains(key) && messages[0].contains(expected),
                "{key}: {messages:?}"
            );
        }
        let all: Vec<(&str, &str)> = wrong.iter().map(|(key, value, _)| (*key, *value)).collect();
        // `mtls` and `ports` stand once each
        assert_eq!(read(&all).unwrap_err().len(), wrong.len());
    }

    #[test]
    fn quantities_are_those_of_kubernetes() {
        for good in ["1", "100m", "0.5", "64Mi", "1G", "2Gi"] {
            assert!(is_quantity(good), "{good}");
        }
        for bad in ["", "m", "-1", "1 Gi", "64mb", "1e"] {
            assert!(!is_quantity(bad), "{bad}");
        }
    }
}
