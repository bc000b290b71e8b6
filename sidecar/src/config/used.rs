//! Settings as used: every value checked, no option left open. What each may be, and what it is if nobody says, is
//! in `reader.rs`.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use serde::Serialize;

use super::{
    consul::{Consul, Probe},
    kubelet_probe::KubeletProbe,
};
use crate::model::{ExpiredPeers, KeyExchange, MutualTls, Protocol, ServiceName};

/// All settings of a sidecar.
#[derive(Debug, Clone, Serialize)]
pub struct Config {
    /// Whose sidecar this is.
    pub own: OwnService,
    /// The app, as others may reach it.
    pub app: App,
    /// Where our identity comes from; none: this sidecar has no identity and speaks plaintext only.
    pub authority: Option<Authority>,
    /// What happens to destinations that are no service.
    pub mode: Mode,
    /// Are services called that nobody's identity is known of?
    pub outbound_mutual_tls: MutualTls,
    /// What becomes of opaque connections whose peer's certificate has ended.
    pub expired_peers: ExpiredPeers,
    /// Explicit upstreams on loopback addresses.
    pub upstreams: Vec<Upstream>,
    /// Longest wait for TCP and TLS where no policy says otherwise.
    #[serde(serialize_with = "as_text")]
    pub connect_timeout: Duration,
    /// Where services and policies come from.
    pub stores: Stores,
    /// Ports and sockets of the sidecar.
    pub ports: Ports,
    /// Bounds.
    pub limits: Limits,
    /// Times of a drain.
    pub drain: DrainTimes,
    /// `off`, `failures` or `all`.
    pub access_log: AccessLogMode,
    /// Is it passed on that a trace which begins here is not recorded?
    pub propagate_unsampled: bool,
    /// Where access log lines go; none: standard output, of `exec` standard error.
    pub access_log_file: Option<PathBuf>,
    /// Filter of the sidecar's own log.
    pub log: String,
    /// Own log as JSON lines.
    pub log_json: bool,
}

/// Whose sidecar this is.
#[derive(Debug, Clone, Serialize)]
pub struct OwnService {
    /// The service.
    pub service: ServiceName,
    /// One instance of it; unique among the running ones.
    pub instance: String,
    /// Failure zone.
    pub zone: Option<String>,
    /// The address that peers dial; none: find out.
    pub advertise: Option<IpAddr>,
}

/// The app, as others may reach it.
#[derive(Debug, Clone, Serialize)]
pub struct App {
    /// Ports that the workload registers: these alone are also delivered to the app's loopback.
    pub ports: Vec<u16>,
    /// What it speaks; none: detect.
    pub protocol: Option<Protocol>,
    /// Is plaintext taken?
    pub mutual_tls: MutualTls,
    /// The same for single ports.
    pub mutual_tls_ports: BTreeMap<u16, MutualTls>,
    /// Its version, for others to see.
    pub version: Option<String>,
    /// Words that are registered with it.
    pub tags: Vec<String>,
    /// Its share of the traffic; none: what the registry has for those that say nothing.
    pub weight: Option<u16>,
    /// How it is asked whether it lives.
    pub probe: Probe,
    /// What is asked of it in the kubelet's place.
    pub kubelet_probes: Vec<KubeletProbe>,
}

/// Where our identity comes from.
#[derive(Debug, Clone, Serialize)]
pub struct Authority {
    /// Host and port of the certificate authority.
    pub address: String,
    /// How it must prove itself before a token is sent.
    pub pin: Pin,
    /// The join token; none: a kept certificate must do.
    pub token_file: Option<PathBuf>,
    /// Where the current certificate outlives a restart.
    pub state_dir: Option<PathBuf>,
    /// Lifetime to ask for; none: the authority's default.
    pub lifetime: Option<Duration>,
    /// How keys are agreed on, with the authority and between sidecars.
    pub key_exchange: KeyExchange,
}

/// What the authority's root is recognised by.
#[derive(Debug, Clone, Serialize)]
pub enum Pin {
    /// A PEM file with the root.
    File(PathBuf),
    /// The SHA-256 of the root's DER.
    Sha256([u8; 32]),
}

/// What happens to destinations that are no service of the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// They are passed through untouched.
    AllowAny,
    /// They are refused.
    RegistryOnly,
}

/// A loopback address that stands for one service.
#[derive(Debug, Clone, Serialize, PartialEq, Eq)]
pub struct Upstream {
    /// Where the app connects to.
    pub listen: SocketAddr,
    /// Whom it means.
    pub service: ServiceName,
}

/// Where services and policies come from.
#[derive(Debug, Clone, Serialize)]
pub struct Stores {
    /// Directory of service files.
    pub services: Option<PathBuf>,
    /// Make our own workload known, there and in Consul?
    pub publish: bool,
    /// Directory of policy files.
    pub policies: Option<PathBuf>,
    /// Resolvers for names that are not ours; empty: those of `/etc/resolv.conf`.
    pub dns: Vec<SocketAddr>,
    /// Domains whose names resolvers may lead to this host; an empty one stands for all.
    pub dns_rebinding_allowed: Vec<String>,
    /// Where virtual addresses outlive a restart.
    pub state_dir: Option<PathBuf>,
    /// The registry; none: files alone.
    pub consul: Option<Consul>,
}

/// Ports and sockets of the sidecar.
#[derive(Debug, Clone, Serialize)]
pub struct Ports {
    /// The app's connections, loopback only.
    pub outbound: u16,
    /// Peers' connections.
    pub inbound: u16,
    /// DNS of the app, loopback only.
    pub dns: u16,
    /// Probes and metrics.
    pub admin: SocketAddr,
    /// Everything else of the admin interface.
    pub admin_socket: PathBuf,
}

/// Bounds that hold against strangers.
#[derive(Debug, Clone, Serialize)]
pub struct Limits {
    /// Threads that carry traffic.
    pub workers: usize,
    /// Connections per direction, as many as the limit of open files allows.
    pub connections: usize,
    /// Requests at a time per direction.
    pub requests: usize,
    /// Bytes of a request's head.
    pub header_bytes: usize,
    /// Header fields of a request.
    pub header_fields: usize,
    /// Time for the head of a request, from its first byte.
    #[serde(serialize_with = "as_text")]
    pub header_timeout: Duration,
    /// Time without a request after which a connection is closed.
    #[serde(serialize_with = "as_text")]
    pub idle_timeout: Duration,
    /// Requests at a time on one HTTP/2 connection.
    pub streams: u32,
    /// Bytes of unread uploads in all HTTP/2 connections of clients without an identity.
    pub buffer_memory: u64,
}

/// Times of a drain.
#[derive(Debug, Clone, Serialize)]
pub struct DrainTimes {
    /// Inbound goes on this long after the signal, until peers have heard.
    #[serde(serialize_with = "as_text")]
    pub settle: Duration,
    /// Longest wait for requests in flight.
    #[serde(serialize_with = "as_text")]
    pub timeout: Duration,
}

/// Which requests and opaque connections the access log tells of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum AccessLogMode {
    /// None.
    Off,
    /// What the mesh could not carry.
    Failures,
    /// All.
    All,
}

pub(super) fn as_text<S: serde::Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&humantime::format_duration(*duration))
}

impl Config {
    /// The sidecar's own ports: never a destination.
    pub fn own_ports(&self) -> Vec<u16> {
        vec![self.ports.outbound, self.ports.inbound, self.ports.dns, self.ports.admin.port()]
    }
}
