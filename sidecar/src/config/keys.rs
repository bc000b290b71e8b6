//! The list of settings: one name for the flag, the variable and the key in the file, and the help that goes
//! with it.

use clap::{Arg, ArgAction};
use weft_proto::names::ENV_PREFIX;

/// One setting.
#[derive(Debug)]
pub struct Key {
    /// `services-dir`: the flag is `--services-dir`, the variable `WEFT_SERVICES_DIR`, the key in the file the
    /// name itself.
    pub name: &'static str,
    /// What stands for the value in `--help`.
    pub value: &'static str,
    /// May it stand more than once? In a variable the values are separated by commas.
    pub many: bool,
    /// For `--help`.
    pub help: &'static str,
    /// The heading in `--help`.
    pub group: &'static str,
    /// A variable of another program's convention that says the same; it counts where nothing else does.
    pub also: Option<&'static str>,
}

impl Key {
    /// The environment variable of this setting.
    pub fn variable(&self) -> String {
        format!("{ENV_PREFIX}{}", self.name.replace('-', "_").to_uppercase())
    }
}

const fn one(group: &'static str, name: &'static str, value: &'static str, help: &'static str) -> Key {
    Key { name, value, many: false, help, group, also: None }
}

const fn many(group: &'static str, name: &'static str, value: &'static str, help: &'static str) -> Key {
    Key { name, value, many: true, help, group, also: None }
}

/// A setting of the registry, with the variable by which Consul's own programs know it.
const fn consul(
    name: &'static str,
    value: &'static str,
    variable: Option<&'static str>,
    help: &'static str,
) -> Key {
    Key { name, value, many: false, help, group: "Consul", also: variable }
}

/// Every setting, in the order of `--help`.
pub const KEYS: &[Key] = &[
    one(
        "Workload",
        "service",
        "NAME",
        "Name of this workload's service: `orders`, or `orders_shop` in namespace shop",
    ),
    one("Workload", "instance", "NAME", "Name of this instance of the service [default: random]"),
    many("Workload", "port", "PORT", "Port of the app that the mesh may reach, on the app's loopback too"),
    one(
        "Workload",
        "protocol",
        "PROTOCOL",
        "What the app speaks: http1, http2, grpc, tls, tcp [default: detect]",
    ),
    one("Workload", "zone", "NAME", "Failure zone of this host"),
    one("Workload", "app-version", "TEXT", "Version of the app, for others to see"),
    many("Workload", "tag", "TEXT", "Tag of this instance in Consul"),
    one("Workload", "advertise", "ADDRESS", "Address that peers dial [default: this host's first address]"),
    one("Identity", "authority", "HOST:PORT", "The certificate authority [default: none, plaintext only]"),
    one("Identity", "authority-root", "FILE", "PEM file with the root that the authority must prove"),
    one("Identity", "authority-sha256", "HEX", "SHA-256 of the root that the authority must prove"),
    one(
        "Identity",
        "token-file",
        "FILE",
        "Join token for the first certificate, or the token of a service account in Kubernetes",
    ),
    one("Identity", "state-dir", "DIR", "Where certificate and virtual addresses outlive a restart"),
    one("Identity", "certificate-lifetime", "TIME", "Lifetime to ask for [default: the authority's]"),
    one(
        "Identity",
        "key-exchange",
        "HOW",
        "Keys of TLS in the mesh: `post-quantum` prefers X25519MLKEM768, `classic` offers curves alone [default: post-quantum]",
    ),
    one(
        "Identity",
        "expired-peers",
        "WHAT",
        "Opaque and upgraded connections whose peer's certificate has ended: `keep` or `close` [default: keep]",
    ),
    one(
        "Traffic",
        "mode",
        "MODE",
        "Unknown destinations: `allow-any` passes them, `registry-only` refuses them",
    ),
    one("Traffic", "mtls", "MODE", "Plaintext to this workload: `permissive` takes it, `strict` refuses it"),
    many("Traffic", "mtls-port", "PORT=MODE", "The same for one port"),
    one(
        "Traffic",
        "outbound-mtls",
        "MODE",
        "Services without identities: `permissive` calls them in plaintext, `strict` refuses to",
    ),
    many("Traffic", "upstream", "ADDRESS:PORT=SERVICE", "Listen on a loopback address for one service"),
    one("Traffic", "connect-timeout", "TIME", "Longest wait for TCP and TLS to an endpoint [default: 1s]"),
    one("Discovery", "services-dir", "DIR", "Directory of service files to watch"),
    one(
        "Discovery",
        "publish",
        "BOOL",
        "Make this workload known to others, in files and Consul [default: true]",
    ),
    one("Discovery", "policies-dir", "DIR", "Directory of policy files to watch"),
    many("Discovery", "dns-upstream", "ADDRESS", "Resolver for other names [default: /etc/resolv.conf]"),
    many(
        "Discovery",
        "dns-rebinding-allow",
        "DOMAIN",
        "Names whose answers may be loopback or virtual addresses; `.` for all [default: none]",
    ),
    Key {
        name: "consul",
        value: "ADDRESS",
        many: true,
        help: "Consul agent: HOST:PORT, a URL or unix://FILE; several are tried in turn [default: CONSUL_HTTP_ADDR, or none]",
        group: "Consul",
        also: Some("CONSUL_HTTP_ADDR"),
    },
    consul(
        "consul-token-file",
        "FILE",
        Some("CONSUL_HTTP_TOKEN_FILE"),
        "ACL token, read again when it changes [default: CONSUL_HTTP_TOKEN, or none]",
    ),
    consul("consul-tls", "BOOL", Some("CONSUL_HTTP_SSL"), "TLS to addresses without http:// or https://"),
    consul("consul-ca-file", "FILE", Some("CONSUL_CACERT"), "Roots of Consul's TLS [default: the system's]"),
    consul("consul-certificate", "FILE", Some("CONSUL_CLIENT_CERT"), "Our certificate towards Consul"),
    consul("consul-key", "FILE", Some("CONSUL_CLIENT_KEY"), "The key of --consul-certificate"),
    consul(
        "consul-server-name",
        "NAME",
        Some("CONSUL_TLS_SERVER_NAME"),
        "The name that Consul's certificate must have [default: the host of its address]",
    ),
    consul(
        "consul-verify",
        "BOOL",
        Some("CONSUL_HTTP_SSL_VERIFY"),
        "Check Consul's certificate; false believes whoever answers [default: true]",
    ),
    consul(
        "consul-ttl",
        "TIME",
        None,
        "Without a sign of life for so long this workload is out [default: 15s]",
    ),
    consul(
        "consul-deregister-after",
        "TIME",
        None,
        "Consul forgets this workload after it was out for so long, at least 1m [default: 1m]",
    ),
    one(
        "Health",
        "weight",
        "NUMBER",
        "Share of the traffic relative to other instances [default: the registry's]",
    ),
    one(
        "Health",
        "probe",
        "PROBE",
        "How the app is asked whether it lives: tcp, http:/PATH, none [default: tcp]",
    ),
    one("Health", "probe-interval", "TIME", "Time between two probes [default: 2s]"),
    one("Health", "probe-rise", "COUNT", "Answers in a row after which the app is well [default: 2]"),
    one("Health", "probe-fall", "COUNT", "Failures in a row after which it is not [default: 3]"),
    one(
        "Health",
        "app-probes",
        "JSON",
        "Probes of Kubernetes that 15020 asks of the app, at /probe/NAME: {\"app/readinessProbe\": {\"httpGet\": …}}",
    ),
    one(
        "Ports",
        "outbound-port",
        "PORT",
        "Where the app's connections arrive, loopback only [default: 15001]",
    ),
    one("Ports", "inbound-port", "PORT", "Where peers' connections arrive [default: 15006]"),
    one("Ports", "dns-port", "PORT", "DNS of the app, loopback only [default: 15053]"),
    one(
        "Ports",
        "admin",
        "ADDRESS:PORT",
        "Probes and metrics [default: 0.0.0.0:15020; of exec: a free port on loopback]",
    ),
    one("Ports", "admin-socket", "FILE", "Unix socket for everything else of the admin interface"),
    one("Limits", "workers", "COUNT", "Threads that carry traffic [default: 1]"),
    one(
        "Limits",
        "max-connections",
        "COUNT",
        "Connections per direction; more are closed at once, or wait where the limit of open files allows fewer \
         [default: 20000]",
    ),
    one("Limits", "max-requests", "COUNT", "Requests at a time per direction; more get 503 [default: 10000]"),
    one("Limits", "header-bytes", "BYTES", "Bytes of a request's head [default: 65536]"),
    one("Limits", "header-fields", "COUNT", "Header fields of a request [default: 100]"),
    one("Limits", "header-timeout", "TIME", "Time for the head of a request [default: 30s]"),
    one("Limits", "idle-timeout", "TIME", "Connections without a request are closed after it [default: 1h]"),
    one(
        "Limits",
        "buffer-memory",
        "BYTES",
        "Bytes of unread uploads in all HTTP/2 connections of clients without an identity [default: 268435456]",
    ),
    one("Limits", "max-streams", "COUNT", "Requests at a time on one HTTP/2 connection [default: 128]"),
    one(
        "Drain",
        "settle-time",
        "TIME",
        "Inbound goes on this long after SIGTERM, until peers know; at most 1d [default: 2s]",
    ),
    one("Drain", "drain-timeout", "TIME", "Longest wait for requests in flight; at most 1d [default: 30s]"),
    one("Output", "access-log", "WHICH", "off, failures, all [default: failures]"),
    one(
        "Output",
        "access-log-file",
        "FILE",
        "Where access log lines go [default: standard output, of exec standard error]",
    ),
    one(
        "Output",
        "propagate-unsampled",
        "BOOL",
        "Begin traces that are not recorded too: apps then record nothing of them [default: false]",
    ),
    one(
        "Output",
        "log",
        "FILTER",
        "The sidecar's own log: error, warn, info, debug or a filter [default: info]",
    ),
    one("Output", "log-format", "FORMAT", "text or json [default: text]"),
];

/// The flags of the settings, for the command line. Values stay text here: [`super::Config`] reads them, so
/// that all mistakes can be told at once.
pub fn arguments() -> Vec<Arg> {
    let file = Arg::new("config").long("config").value_name("FILE").help("YAML file with settings");
    let settings = KEYS.iter().map(|key| {
        Arg::new(key.name)
            .long(key.name)
            .value_name(key.value)
            .help(key.help)
            .help_heading(key.group)
            .action(if key.many { ArgAction::Append } else { ArgAction::Set })
    });
    std::iter::once(file).chain(settings).collect()
}
