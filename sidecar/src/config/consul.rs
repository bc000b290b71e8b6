//! Settings of the registry, and of the probe whose result is registered there. `CONSUL_HTTP_*` and the other
//! variables of Consul's own programs count where nothing else is said. A token never stands among the settings,
//! only the place where it is read from.

use std::{path::PathBuf, time::Duration};

use serde::Serialize;

use super::{
    reader::{Reader, port},
    used::as_text,
};

/// How Consul is reached, and how long it believes us.
#[derive(Debug, Clone, Serialize)]
pub struct Consul {
    /// Agents, tried in turn; at least one.
    pub addresses: Vec<ConsulAddress>,
    /// Where the ACL token is.
    pub token: ConsulToken,
    /// For addresses with TLS.
    pub tls: ConsulTls,
    /// A workload that gave no sign of life for so long is out.
    #[serde(serialize_with = "as_text")]
    pub ttl: Duration,
    /// Consul forgets a workload that was out for so long.
    #[serde(serialize_with = "as_text")]
    pub deregister_after: Duration,
}

/// One agent's HTTP interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ConsulAddress {
    /// `http://` or `https://`.
    Tcp {
        /// `https://`?
        tls: bool,
        /// A name, or an address without brackets.
        host: String,
        /// The port.
        port: u16,
    },
    /// `unix://`: the path of a socket on this host, without TLS.
    Unix(PathBuf),
}

/// Where the ACL token is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ConsulToken {
    /// There is none: the anonymous token.
    None,
    /// In `CONSUL_HTTP_TOKEN`.
    Variable,
    /// In this file.
    File(PathBuf),
}

/// How Consul proves itself, and we to Consul.
#[derive(Debug, Clone, Serialize)]
pub struct ConsulTls {
    /// PEM file with roots; none: those of the system.
    pub ca_file: Option<PathBuf>,
    /// Our certificate and its key, in PEM files.
    pub client: Option<(PathBuf, PathBuf)>,
    /// The name that the certificate must have; none: the host of the address.
    pub server_name: Option<String>,
    /// False believes whoever answers.
    pub verify: bool,
}

/// How the app is asked whether it lives.
#[derive(Debug, Clone, Serialize)]
pub struct Probe {
    /// What is done.
    pub kind: ProbeKind,
    /// Time between two probes of an app that is well.
    #[serde(serialize_with = "as_text")]
    pub interval: Duration,
    /// Answers in a row after which it is well.
    pub rise: u32,
    /// Failures in a row after which it is not.
    pub fall: u32,
}

/// What a probe does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ProbeKind {
    /// Nothing: the app is well while the sidecar runs.
    None,
    /// It connects.
    Tcp,
    /// It asks for this path, and wants a status below 400.
    Http(String),
}

/// Where Consul's HTTP interface listens if nobody says.
const HTTP_PORT: u16 = 8500;
const HTTPS_PORT: u16 = 8501;
/// Consul's own minimum for forgetting a service.
const LEAST_DEREGISTER_AFTER: Duration = Duration::from_secs(60);
const LEAST_TTL: Duration = Duration::from_secs(3);
const LEAST_INTERVAL: Duration = Duration::from_millis(100);

impl ConsulAddress {
    /// Is it asked over TLS?
    pub fn has_tls(&self) -> bool {
        matches!(self, ConsulAddress::Tcp { tls: true, .. })
    }
}

impl Reader<'_> {
    pub(super) fn consul(&mut self) -> Option<Consul> {
        let has_tls = self.truth("consul-tls", false);
        let expected = "HOST:PORT, http://HOST:PORT, https://HOST:PORT or unix:///PATH";
        let addresses = self.many("consul", expected, |text| address(text, has_tls));
        let token = match self.file("consul-token-file") {
            Some(file) => ConsulToken::File(file),
            None if self.written.has_variable("CONSUL_HTTP_TOKEN") => ConsulToken::Variable,
            None => ConsulToken::None,
        };
        let certificate = self.file("consul-certificate");
        let key = self.file("consul-key");
        if certificate.is_some() != key.is_some() {
            self.mistakes.push(
                "--consul-certificate: stands without --consul-key, or that without it; expected both"
                    .to_owned(),
            );
        }
        let tls = ConsulTls {
            ca_file: self.file("consul-ca-file"),
            client: certificate.zip(key),
            server_name: self.text("consul-server-name"),
            verify: self.truth("consul-verify", true),
        };
        let ttl = self.at_least("consul-ttl", Duration::from_secs(15), LEAST_TTL);
        let deregister_after =
            self.at_least("consul-deregister-after", LEAST_DEREGISTER_AFTER, LEAST_DEREGISTER_AFTER);
        (!addresses.is_empty()).then_some(Consul { addresses, token, tls, ttl, deregister_after })
    }

    pub(super) fn probe(&mut self) -> Probe {
        let kind = self.parsed_with("probe", "tcp, http:/PATH or none", |text| match text {
            "none" => Ok(ProbeKind::None),
            "tcp" => Ok(ProbeKind::Tcp),
            _ => match text.strip_prefix("http:") {
                Some(path) if path.starts_with('/') && path.parse::<hyper::Uri>().is_ok() => {
                    Ok(ProbeKind::Http(path.to_owned()))
                }
                _ => Err("unknown"),
            },
        });
        Probe {
            kind: kind.unwrap_or(ProbeKind::Tcp),
            interval: self.at_least("probe-interval", Duration::from_secs(2), LEAST_INTERVAL),
            rise: self.number("probe-rise", 2, 1..=100),
            fall: self.number("probe-fall", 3, 1..=100),
        }
    }

    /// Consul's own variables say `1` and `0` too.
    fn truth(&mut self, name: &str, default: bool) -> bool {
        let read = |text: &str| match text {
            "true" | "1" => Ok(true),
            "false" | "0" => Ok(false),
            _ => Err("neither"),
        };
        self.parsed_with(name, "true or false", read).unwrap_or(default)
    }

    fn at_least(&mut self, name: &str, default: Duration, least: Duration) -> Duration {
        let expected = format!("a time of at least {}, such as 2s or 1m", humantime::format_duration(least));
        self.parsed_with(name, &expected, |text| {
            humantime::parse_duration(text).ok().filter(|time| *time >= least).ok_or("out of range")
        })
        .unwrap_or(default)
    }
}

fn address(text: &str, has_tls: bool) -> Option<ConsulAddress> {
    let (tls, rest) = match text.split_once("://") {
        Some(("http", rest)) => (false, rest),
        Some(("https", rest)) => (true, rest),
        Some(("unix", path)) => {
            let is_path = path.starts_with('/') && !path.contains('\0');
            return is_path.then(|| ConsulAddress::Unix(path.into()));
        }
        Some(_) => return None,
        None => (has_tls, text),
    };
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let default = if tls { HTTPS_PORT } else { HTTP_PORT };
    let (host, number) = match rest.rsplit_once(':') {
        Some((host, number)) if !host.contains(':') || host.ends_with(']') => (host, port(number)?),
        _ => (rest, default),
    };
    let host = host.strip_prefix('[').and_then(|inner| inner.strip_suffix(']')).unwrap_or(host);
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b".-_:".contains(&byte);
    let is_host = !host.is_empty() && host.len() <= 253 && host.bytes().all(allowed);
    is_host.then(|| ConsulAddress::Tcp { tls, host: host.to_owned(), port: number })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_what_consul_takes() {
        for (text, expected) in [
            ("127.0.0.1:8500", Some((true, "127.0.0.1", 8500))),
            ("consul", Some((true, "consul", 8501))),
            ("http://consul:80/", Some((false, "consul", 80))),
            ("http://consul", Some((false, "consul", 8500))),
            ("https://[fd00::1]:8501", Some((true, "fd00::1", 8501))),
            ("[::1]:8500", Some((true, "::1", 8500))),
            ("unix://run/consul.sock", None),
            ("http://", None),
            ("consul:0", None),
            ("consul:http", None),
            ("http://consul:8500/path", None),
        ] {
            let tcp =
                |(tls, host, port): (_, &str, _)| ConsulAddress::Tcp { tls, host: host.to_owned(), port };
            assert_eq!(address(text, true), expected.map(tcp), "{text}");
        }
        let socket = ConsulAddress::Unix("/run/consul.sock".into());
        assert_eq!(address("unix:///run/consul.sock", true), Some(socket));
    }
}
