//! From settings as written to settings as used: what each may be, and what it is if nobody says. All mistakes are
//! collected, each with its place and what was expected there.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Display,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use weft_proto::names;

use super::{
    kubelet_probe::KubeletProbe,
    used::{
        AccessLogMode, App, Authority, Config, DrainTimes, Limits, Mode, OwnService, Pin, Ports, Stores,
        Upstream,
    },
    written::{Entry, InvalidSettings, Written},
};
use crate::model::{ExpiredPeers, KeyExchange, MutualTls, Protocol, ServiceName, Timeouts};

impl Config {
    /// Checks what was written. `admin` is where probes and metrics stand if nobody says.
    ///
    /// # Errors
    /// All mistakes at once, each with its place and what was expected.
    pub fn check(written: &Written, admin: SocketAddr) -> Result<Config, InvalidSettings> {
        let mut reader = Reader { written, admin, mistakes: written.mistakes().to_vec() };
        let config = reader.config();
        match config {
            Some(config) if reader.mistakes.is_empty() => Ok(config),
            _ => Err(InvalidSettings(reader.mistakes)),
        }
    }
}

/// Reads entries and collects mistakes.
pub(super) struct Reader<'a> {
    pub(super) written: &'a Written,
    admin: SocketAddr,
    pub(super) mistakes: Vec<String>,
}

impl Reader<'_> {
    fn config(&mut self) -> Option<Config> {
        let own = self.own_service();
        let ports = self.ports(own.as_ref().map(|own| own.instance.as_str()));
        let config = Config {
            app: self.app(),
            authority: self.authority(),
            mode: self
                .choice("mode", &[("allow-any", Mode::AllowAny), ("registry-only", Mode::RegistryOnly)]),
            outbound_mutual_tls: self.choice("outbound-mtls", &MUTUAL_TLS),
            expired_peers: self
                .choice("expired-peers", &[("keep", ExpiredPeers::Keep), ("close", ExpiredPeers::Close)]),
            upstreams: self.upstreams(),
            connect_timeout: self.duration("connect-timeout", Timeouts::default().connect),
            stores: Stores {
                services: self.directory("services-dir"),
                publish: self.parsed("publish", "true or false").unwrap_or(true),
                policies: self.directory("policies-dir"),
                dns: self.many("dns-upstream", "an IP address with an optional port", resolver),
                dns_rebinding_allowed: self.many(
                    "dns-rebinding-allow",
                    "a domain such as `example.org`, or `.` for all",
                    domain,
                ),
                state_dir: self.directory_to_be("state-dir"),
                consul: self.consul(),
            },
            limits: self.limits(),
            drain: DrainTimes {
                settle: self.time_of_a_drain("settle-time", Duration::from_secs(2)),
                timeout: self.time_of_a_drain("drain-timeout", Duration::from_secs(30)),
            },
            access_log: self.choice(
                "access-log",
                &[
                    ("failures", AccessLogMode::Failures),
                    ("off", AccessLogMode::Off),
                    ("all", AccessLogMode::All),
                ],
            ),
            propagate_unsampled: self.choice("propagate-unsampled", &[("false", false), ("true", true)]),
            access_log_file: self.text("access-log-file").map(PathBuf::from),
            log: self.text("log").unwrap_or_else(|| "info".to_owned()),
            log_json: self.choice("log-format", &[("text", false), ("json", true)]),
            own: own?,
            ports,
        };
        self.no_port_twice(&config);
        Some(config)
    }

    fn own_service(&mut self) -> Option<OwnService> {
        if self.written.entry("service").is_none() {
            self.mistakes.push("--service: missing; expected the name of this workload's service".to_owned());
        }
        let service = self.parsed::<ServiceName>("service", "`name` or `name_namespace`");
        let instance = self.parsed_with("instance", "at most 100 of a-z 0-9 - .", |text| {
            let fits = !text.is_empty() && text.len() <= 100;
            let plain = text.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.'));
            (fits && plain).then(|| text.to_owned()).ok_or("other characters")
        });
        Some(OwnService {
            service: service?,
            instance: instance.unwrap_or_else(|| format!("{:08x}", fastrand::u32(..))),
            zone: self.text("zone"),
            advertise: self.parsed("advertise", "an IP address"),
        })
    }

    fn app(&mut self) -> App {
        App {
            ports: self.many("port", "a port from 1 to 65535", port),
            protocol: self.parsed_with("protocol", "http1, http2, grpc, tls or tcp", |text| {
                serde_json::from_value::<Protocol>(text.into()).map_err(|_| "unknown")
            }),
            mutual_tls: self.choice("mtls", &MUTUAL_TLS),
            mutual_tls_ports: self
                .many("mtls-port", "PORT=permissive or PORT=strict", |text| {
                    let (number, mode) = text.split_once('=')?;
                    let mode = MUTUAL_TLS.iter().find(|(name, _)| *name == mode)?.1;
                    Some((port(number)?, mode))
                })
                .into_iter()
                .collect(),
            version: self.parsed_with("app-version", EXPECTED_WORD, |text| word(text).ok_or("not that")),
            tags: self.many("tag", EXPECTED_WORD, word),
            weight: self.written.entry("weight").is_some().then(|| self.number("weight", 1, 1..=10_000)),
            probe: self.probe(),
            kubelet_probes: self
                .parsed_with(
                    "app-probes",
                    "a JSON object of probes as Kubernetes writes them",
                    KubeletProbe::parse_all,
                )
                .unwrap_or_default(),
        }
    }

    fn authority(&mut self) -> Option<Authority> {
        let state_dir = self.text("state-dir").map(PathBuf::from);
        let token_file = self.file("token-file");
        let lifetime = self
            .written
            .entry("certificate-lifetime")
            .is_some()
            .then(|| self.duration("certificate-lifetime", Duration::from_secs(24 * 3600)));
        let key_exchange = self.choice(
            "key-exchange",
            &[("post-quantum", KeyExchange::PostQuantum), ("classic", KeyExchange::Classic)],
        );
        let by_file = self.file("authority-root").map(Pin::File);
        let by_hash = self.parsed_with("authority-sha256", "64 hexadecimal digits", |text| {
            hex32(text).map(Pin::Sha256).ok_or("not a SHA-256")
        });
        let address = self.parsed_with("authority", "HOST:PORT", |text| match text.rsplit_once(':') {
            Some((host, number)) if !host.is_empty() && port(number).is_some() => Ok(text.to_owned()),
            _ => Err("no port"),
        })?;
        let pin = by_file.or(by_hash);
        if pin.is_none() {
            let way_out =
                "expected --authority-root FILE or --authority-sha256 HEX, which `weft-ca root` prints";
            self.mistakes.push(format!("--authority: nothing to recognise the authority by; {way_out}"));
        }
        Some(Authority { address, pin: pin?, token_file, state_dir, lifetime, key_exchange })
    }

    fn upstreams(&mut self) -> Vec<Upstream> {
        self.many("upstream", "LOOPBACK-ADDRESS:PORT=SERVICE", |text| {
            let (listen, service) = text.split_once('=')?;
            let listen: SocketAddr = listen.parse().ok()?;
            let service = service.parse().ok()?;
            listen.ip().is_loopback().then_some(Upstream { listen, service })
        })
    }

    fn ports(&mut self, instance: Option<&str>) -> Ports {
        let default_socket = std::env::var_os("XDG_RUNTIME_DIR")
            .map_or_else(std::env::temp_dir, PathBuf::from)
            .join(format!("weft-{}.sock", instance.unwrap_or_default()));
        Ports {
            outbound: self.port("outbound-port", names::OUTBOUND_PORT),
            inbound: self.port("inbound-port", names::INBOUND_PORT),
            dns: self.port("dns-port", names::DNS_PORT),
            admin: self.parsed("admin", "ADDRESS:PORT").unwrap_or(self.admin),
            admin_socket: self.text("admin-socket").map_or(default_socket, PathBuf::from),
        }
    }

    fn limits(&mut self) -> Limits {
        Limits {
            workers: self.number("workers", 1, 1..=64),
            connections: self.number("max-connections", 20_000, 1..=1_000_000),
            requests: self.number("max-requests", 10_000, 1..=1_000_000),
            header_bytes: self.number("header-bytes", 64 * 1024, 1024..=1024 * 1024),
            header_fields: self.number("header-fields", 100, 1..=10_000),
            header_timeout: self.duration("header-timeout", Duration::from_secs(30)),
            idle_timeout: self.duration("idle-timeout", Duration::from_secs(3600)),
            streams: self.number("max-streams", 128, 1..=10_000),
            buffer_memory: self.number("buffer-memory", 256 * 1024 * 1024, 0..=1024 * 1024 * 1024 * 1024),
        }
    }

    /// Two listeners on one port would take each other's connections.
    fn no_port_twice(&mut self, config: &Config) {
        let mut seen: BTreeMap<u16, &str> = BTreeMap::new();
        let own = [
            ("outbound-port", config.ports.outbound),
            ("inbound-port", config.ports.inbound),
            ("dns-port", config.ports.dns),
            ("admin", config.ports.admin.port()),
        ];
        let app = config.app.ports.iter().map(|port| ("port", *port));
        for (name, number) in own.into_iter().chain(app).filter(|(_, number)| *number != 0) {
            if let Some(other) = seen.insert(number, name) {
                self.mistakes
                    .push(format!("--{name}: port {number} is taken by --{other}; expected another"));
            }
        }
        let mut listening = BTreeSet::new();
        for Upstream { listen, .. } in &config.upstreams {
            if let Some(other) = seen.get(&listen.port()) {
                self.mistakes
                    .push(format!("--upstream: {listen} is taken by --{other}; expected another port"));
            }
            if !listening.insert(listen) {
                self.mistakes.push(format!("--upstream: {listen} stands twice; expected one service for it"));
            }
        }
    }

    pub(super) fn text(&mut self, name: &str) -> Option<String> {
        self.parsed::<String>(name, "a text")
    }

    /// A file that must be readable now.
    pub(super) fn file(&mut self, name: &str) -> Option<PathBuf> {
        self.parsed_with(name, "a readable file", |text| {
            std::fs::File::open(text).map(|_| PathBuf::from(text)).map_err(|error| error.to_string())
        })
    }

    fn directory(&mut self, name: &str) -> Option<PathBuf> {
        self.parsed_with(name, "a directory", |text| match std::fs::metadata(text) {
            Ok(found) if found.is_dir() => Ok(PathBuf::from(text)),
            Ok(_) => Err("not a directory".to_owned()),
            Err(error) => Err(error.to_string()),
        })
    }

    /// A directory that is there, or can be made: its parent is there.
    fn directory_to_be(&mut self, name: &str) -> Option<PathBuf> {
        self.parsed_with(name, "a directory, or a new one in a directory that is there", |text| {
            let path = PathBuf::from(text);
            match std::fs::metadata(&path) {
                Ok(found) if found.is_dir() => Ok(path),
                Ok(_) => Err("not a directory".to_owned()),
                Err(_) if path.parent().is_some_and(|parent| parent.is_dir()) => Ok(path),
                Err(error) => Err(error.to_string()),
            }
        })
    }

    fn port(&mut self, name: &str, default: u16) -> u16 {
        self.parsed_with(name, "a port from 1 to 65535", |text| port(text).ok_or("out of range"))
            .unwrap_or(default)
    }

    pub(super) fn duration(&mut self, name: &str, default: Duration) -> Duration {
        self.parsed_with(name, "a time such as 500ms, 2s or 1h", humantime::parse_duration).unwrap_or(default)
    }

    /// A part of a drain, whose end must be a moment of the clock.
    fn time_of_a_drain(&mut self, name: &str, default: Duration) -> Duration {
        self.parsed_with(name, "a time such as 500ms, 2s or 1h, and at most 1d", |text| {
            let time = humantime::parse_duration(text).map_err(|error| error.to_string())?;
            if time <= LONGEST_DRAIN { Ok(time) } else { Err("too long".to_owned()) }
        })
        .unwrap_or(default)
    }

    pub(super) fn number<T>(&mut self, name: &str, default: T, range: std::ops::RangeInclusive<T>) -> T
    where
        T: FromStr + PartialOrd + Display,
    {
        let expected = format!("a whole number from {} to {}", range.start(), range.end());
        self.parsed_with(name, &expected, |text| {
            text.parse().ok().filter(|number| range.contains(number)).ok_or("out of range")
        })
        .unwrap_or(default)
    }

    /// One of some words; the first is the default.
    pub(super) fn choice<T: Copy>(&mut self, name: &str, choices: &[(&str, T)]) -> T {
        let expected = choices.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(" or ");
        let find = |text: &str| {
            choices.iter().find(|(word, _)| *word == text).map(|choice| choice.1).ok_or("unknown")
        };
        self.parsed_with(name, &expected, find).unwrap_or(choices[0].1)
    }

    pub(super) fn parsed<T>(&mut self, name: &str, expected: &str) -> Option<T>
    where
        T: FromStr,
        T::Err: Display,
    {
        self.parsed_with(name, expected, |text| text.parse::<T>())
    }

    pub(super) fn parsed_with<T, E: Display>(
        &mut self,
        name: &str,
        expected: &str,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> Option<T> {
        let Entry { values, place } = self.written.entry(name)?;
        let text = values.last()?;
        match parse(text) {
            Ok(value) => Some(value),
            Err(error) => {
                self.mistakes.push(format!("{place}: `{name}` is {text:?} ({error}); expected {expected}"));
                None
            }
        }
    }

    pub(super) fn many<T>(
        &mut self,
        name: &str,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Vec<T> {
        let Some(Entry { values, place }) = self.written.entry(name) else { return Vec::new() };
        let mut read = Vec::new();
        for text in values {
            match parse(text) {
                Some(value) => read.push(value),
                None => self.mistakes.push(format!("{place}: `{name}` is {text:?}; expected {expected}")),
            }
        }
        read
    }
}

pub(super) fn port(text: &str) -> Option<u16> {
    text.parse().ok().filter(|number| *number != 0)
}

/// Longer than anybody waits for the end of a process.
const LONGEST_DRAIN: Duration = Duration::from_secs(24 * 3600);

const MUTUAL_TLS: [(&str, MutualTls); 2] =
    [("permissive", MutualTls::Permissive), ("strict", MutualTls::Strict)];

/// What a registry takes for a tag or a version.
const EXPECTED_WORD: &str = "1 to 255 bytes without control characters";

fn word(text: &str) -> Option<String> {
    let fits = (1..=255).contains(&text.len()) && !text.chars().any(char::is_control);
    fits.then(|| text.to_owned())
}

/// A resolver's address; port 53 where none is given.
fn resolver(text: &str) -> Option<SocketAddr> {
    text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(|address| SocketAddr::new(address, 53)))
}

/// A domain in small letters, without dots at its ends; `.` is the empty one.
fn domain(text: &str) -> Option<String> {
    let plain = text.trim_matches('.').to_ascii_lowercase();
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    let is_domain =
        plain.split('.').all(|label| (1..=63).contains(&label.len()) && label.bytes().all(allowed));
    (text == "." || plain.len() <= 253 && is_domain).then_some(plain)
}

fn hex32(text: &str) -> Option<[u8; 32]> {
    let text = text.replace(':', "");
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).ok()?;
    }
    Some(bytes)
}
