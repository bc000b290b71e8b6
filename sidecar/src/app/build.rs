//! Opens every socket and makes every part.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use anyhow::{Context, Result, anyhow};
use tokio::{
    net::UnixListener,
    runtime,
    sync::{Semaphore, watch},
};

use super::{
    App, Conditions, Drains, Parts, Place, Places, Senders, Shared, command, descriptors::Descriptors,
    worker::Listeners,
};
use crate::{
    admin::{Leave, Readiness, listen_private},
    config::Config,
    connect::Dialer,
    discovery::{Directory, Registry, VirtualAddresses, consul, policies::Policies},
    http::BufferBudget,
    identity,
    inbound::{AppAddress, Delivery, Meaning},
    model::{Policy, Timeouts},
    net::{self, Reclaimer},
    outbound::Upstreams,
    redirect::{Listeners as InsideListeners, NamespaceSettings},
    serve::{SilentLimit, WhenFull},
    telemetry::{
        AccessLog, AccessLogTarget, LogFormat, LogLevel, Metrics, SpanExport, Telemetry, TraceSettings,
        init_log,
    },
};

/// Every socket of the sidecar, open.
pub(super) struct Sockets {
    pub(super) workers: Vec<Listeners>,
    pub(super) dns_udp: Vec<UdpSocket>,
    pub(super) dns_tcp: Vec<TcpListener>,
    pub(super) admin: TcpListener,
    pub(super) admin_socket: UnixListener,
    pub(super) admin_socket_file: SocketFile,
    pub(super) delivery: Delivery,
}

/// The file of the admin socket, which goes with the sidecar, however it ends.
pub(super) struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn listen_admin(path: &Path) -> Result<(UnixListener, SocketFile)> {
    Ok((listen_private(path)?, SocketFile(path.to_owned())))
}

impl App {
    /// Makes a sidecar of its settings. Nothing runs yet, but every socket is open.
    ///
    /// # Errors
    /// The socket that cannot be opened, or the command that cannot be started, with the way out.
    pub fn build(config: Config, place: Place) -> Result<App> {
        let metrics = Arc::new(Metrics::new());
        let format = if config.log_json { LogFormat::Json } else { LogFormat::Text };
        let (log, log_end) = init_log(&config.log, format, &metrics)?;
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let parts = {
            let _inside = runtime.enter();
            Parts::build(config, place, log, metrics)?
        };
        Ok(App { runtime, parts, log_end })
    }
}

impl Parts {
    fn build(mut config: Config, place: Place, log: LogLevel, metrics: Arc<Metrics>) -> Result<Parts> {
        make_state_dir(&config)?;
        let descriptors = Descriptors::raise().context("cannot read the limit of open files")?;
        let when_full = fit_connections(&mut config, descriptors);
        let output = match place {
            Place::Host => AccessLogTarget::Stdout,
            Place::Namespace(_) => AccessLogTarget::Stderr,
        };
        let (telemetry, span_export) = telemetry(&config, output, metrics)?;
        let advertised = advertised_address(&config)?;
        let (policies_sender, policies) = watch::channel(Arc::new(Policies::default()));
        let (command, app_dialer, mut sockets) = match place {
            Place::Host => (None, Dialer::Direct, host_sockets(&config, &policies, advertised)?),
            Place::Namespace(words) => {
                let settings = NamespaceSettings {
                    command_descriptors: Some(descriptors.before),
                    metrics: telemetry.metrics().clone(),
                    ..command::settings(&config)?
                };
                let (namespace, inside) = command::start(&words, &settings)?;
                // Standard output is the command's. Nothing of ours gets there, and whoever reads it sees its end
                // when the command closes it.
                nix::unistd::dup2_stdout(io::stderr()).context("cannot leave standard output")?;
                let dialer = command::dialer(&namespace);
                (Some(namespace), dialer, namespace_sockets(&config, &policies, advertised, inside)?)
            }
        };
        sockets.delivery.own_ports.push(sockets.admin.local_addr()?.port());
        let (credentials_sender, credentials) = watch::channel(None);
        let (status_sender, identity_status) = watch::channel(identity::Status::default());
        let (directory_sender, directory) = watch::channel(Arc::new(Directory::default()));
        let default_policy = default_policy(&config);
        let (registry_status_sender, registry_status) = watch::channel(consul::Status::default());
        let (registry, consul, asked) = match &config.stores.consul {
            Some(settings) => {
                let client = consul::Client::new(settings, telemetry.metrics().clone())
                    .map_err(|why| anyhow!("Consul cannot be asked: {why}"))?;
                let (registry, asked) = Registry::new(directory.clone());
                (registry, Some(client), Some(asked))
            }
            None => (Registry::none(directory.clone()), None, None),
        };
        let registry = Arc::new(registry);
        let upstreams =
            Upstreams::new(directory.clone(), policies, registry.clone(), default_policy, telemetry.clone());
        let (drains, drainings) = Drains::new();
        let readiness = Readiness::default();
        let shared = Arc::new(Shared {
            conditions: Conditions {
                identity: readiness.condition("identity"),
                discovery: readiness.condition("discovery"),
                policies: readiness.condition("policies"),
                serving: readiness.condition("serving"),
            },
            readiness,
            log,
            virtual_addresses: Arc::new(virtual_addresses(&config)),
            places: places(&config, when_full),
            telemetry,
            credentials,
            identity_status,
            directory,
            registry,
            registry_status,
            consul,
            upstreams,
            advertised,
            app_dialer,
            reclaimer: Reclaimer::default(),
            tasks: Arc::default(),
            registered: watch::Sender::new(false),
            leave: Leave::default(),
            config,
        });
        let senders = Senders {
            credentials: credentials_sender,
            identity_status: status_sender,
            directory: directory_sender,
            policies: policies_sender,
            registry_status: registry_status_sender,
            asked,
        };
        Ok(Parts { shared, sockets, command, senders, span_export, drains, drainings })
    }
}

/// What stands for a service, or a key of its policy, where nobody wrote one.
pub(super) fn default_policy(config: &Config) -> Policy {
    Policy {
        timeouts: Timeouts { connect: config.connect_timeout, ..Timeouts::default() },
        outbound_mutual_tls: config.outbound_mutual_tls,
        ..Policy::default()
    }
}

/// Traces by the `OTEL_*` variables; one that cannot be used is told and left out, as the specification of
/// OpenTelemetry has it.
fn telemetry(
    config: &Config,
    output: AccessLogTarget,
    metrics: Arc<Metrics>,
) -> Result<(Arc<Telemetry>, Option<SpanExport>)> {
    let service = config.own.service.as_str();
    let (mut settings, problems) = TraceSettings::read(|name| std::env::var(name).ok(), service);
    for problem in problems {
        tracing::warn!("{problem}");
    }
    settings.propagators.unsampled = config.propagate_unsampled;
    let target = config.access_log_file.clone().map_or(output, AccessLogTarget::File);
    let access_log =
        AccessLog::open(config.access_log, &target, &metrics).context("cannot open the access log")?;
    Ok(Telemetry::new(&settings, access_log, metrics))
}

/// Bounds connections by the descriptors that there are. Those over a bound that is not the operator's wait for their
/// turn.
fn fit_connections(config: &mut Config, descriptors: Descriptors) -> WhenFull {
    let wanted = config.limits.connections;
    let fit = descriptors.connections(wanted);
    config.limits.connections = fit;
    if fit == wanted {
        return WhenFull::Refuse;
    }
    tracing::warn!(
        "--max-connections {wanted} is clamped to {fit} for each direction, as this process may open {} files; further \
         clients wait. Raise the hard limit (`ulimit -Hn`, LimitNOFILE=), or lower --max-connections",
        descriptors.now
    );
    WhenFull::Wait
}

fn places(config: &Config, when_full: WhenFull) -> Places {
    let limits = &config.limits;
    Places {
        inbound_connections: Arc::new(Semaphore::new(limits.connections)),
        outbound_connections: Arc::new(Semaphore::new(limits.connections)),
        inbound_requests: Arc::new(Semaphore::new(limits.requests)),
        outbound_requests: Arc::new(Semaphore::new(limits.requests)),
        inbound_silent: SilentLimit::new(limits.connections),
        inbound_idle: Arc::default(),
        inbound_buffers: BufferBudget::new(limits.buffer_memory),
        when_full,
    }
}

/// Makes the state directory where it is missing: a volume of Kubernetes is empty, and has one owner for all of it.
fn make_state_dir(config: &Config) -> Result<()> {
    let Some(folder) = &config.stores.state_dir else { return Ok(()) };
    let made = fs::DirBuilder::new().mode(0o700).create(folder);
    match made {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(error).with_context(|| format!("--state-dir {} cannot be made", folder.display()))
        }
        _ => Ok(()),
    }
}

fn virtual_addresses(config: &Config) -> VirtualAddresses {
    match &config.stores.state_dir {
        Some(folder) => VirtualAddresses::open(&folder.join("virtual-addresses.json"), SystemTime::now()),
        None => VirtualAddresses::in_memory(),
    }
}

/// Sockets of a sidecar that shares its network with the app.
fn host_sockets(
    config: &Config,
    policies: &watch::Receiver<Arc<Policies>>,
    advertised: IpAddr,
) -> Result<Sockets> {
    let ports = &config.ports;
    let mut workers = Vec::new();
    for _ in 0..config.limits.workers {
        let mut listeners = Listeners::default();
        for address in both_families(Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST, ports.outbound) {
            listeners.outbound.push(shared(address, "outbound-port")?);
        }
        for address in both_families(Ipv4Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED, ports.inbound) {
            listeners.inbound.push(shared(address, "inbound-port")?);
        }
        for upstream in &config.upstreams {
            listeners.outbound.push(shared(upstream.listen, "upstream")?);
        }
        workers.push(listeners);
    }
    let mut dns_udp = Vec::new();
    let mut dns_tcp = Vec::new();
    for address in both_families(Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST, ports.dns) {
        let udp = UdpSocket::bind(address).with_context(|| taken(address, "dns-port"))?;
        udp.set_nonblocking(true)?;
        dns_udp.push(udp);
        dns_tcp.push(net::listen(address).with_context(|| taken(address, "dns-port"))?);
    }
    let mut addresses = interface_addresses()?;
    addresses.push(advertised);
    let (admin_socket, admin_socket_file) = listen_admin(&ports.admin_socket)?;
    Ok(Sockets {
        workers,
        dns_udp,
        dns_tcp,
        admin: net::listen(ports.admin).with_context(|| taken(ports.admin, "admin"))?,
        admin_socket,
        admin_socket_file,
        delivery: delivery(config, policies, Meaning::Redirected, addresses),
    })
}

/// Sockets of a sidecar whose app has a network of its own: ours stand at the advertised address, the app's
/// were made inside.
fn namespace_sockets(
    config: &Config,
    policies: &watch::Receiver<Arc<Policies>>,
    advertised: IpAddr,
    inside: InsideListeners,
) -> Result<Sockets> {
    let mut workers = Vec::new();
    for _ in 0..config.limits.workers {
        let mut listeners = Listeners::default();
        for port in &config.app.ports {
            listeners.inbound.push(shared(SocketAddr::new(advertised, *port), "port")?);
        }
        workers.push(listeners);
    }
    // Both come worker by worker, the same number for each.
    let upstreams = inside.upstreams.into_iter().map(|(_, listener)| listener);
    for of_all in [inside.outbound, upstreams.collect()] {
        let each = of_all.len() / workers.len();
        for (number, listener) in of_all.into_iter().enumerate() {
            workers[number / each].outbound.push(listener);
        }
    }
    let admin = config.ports.admin;
    let (admin_socket, admin_socket_file) = listen_admin(&config.ports.admin_socket)?;
    Ok(Sockets {
        workers,
        dns_udp: inside.dns_udp,
        dns_tcp: inside.dns_tcp,
        admin: net::listen(admin).with_context(|| taken(admin, "admin"))?,
        admin_socket,
        admin_socket_file,
        delivery: delivery(config, policies, Meaning::Listener, vec![advertised]),
    })
}

fn delivery(
    config: &Config,
    policies: &watch::Receiver<Arc<Policies>>,
    meaning: Meaning,
    addresses: Vec<IpAddr>,
) -> Delivery {
    Delivery {
        meaning,
        registered: AppAddress::registered(&addresses, &config.app.ports),
        addresses,
        own_ports: config.own_ports(),
        protocol: config.app.protocol,
        mutual_tls: config.app.mutual_tls,
        mutual_tls_ports: config.app.mutual_tls_ports.clone(),
        service: config.own.service.clone(),
        policies: policies.clone(),
    }
}

/// Both families, or IPv4 alone where the host has no IPv6.
fn both_families(v4: Ipv4Addr, v6: Ipv6Addr, port: u16) -> Vec<SocketAddr> {
    let has_ipv6 = Path::new("/proc/net/if_inet6").metadata().is_ok()
        && UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).is_ok();
    let mut addresses = vec![SocketAddr::from((v4, port))];
    if has_ipv6 {
        addresses.push(SocketAddr::from((v6, port)));
    }
    addresses
}

fn shared(address: SocketAddr, setting: &str) -> Result<TcpListener> {
    net::listen_shared(address).with_context(|| taken(address, setting))
}

fn taken(address: SocketAddr, setting: &str) -> String {
    format!("cannot listen on {address}; free it, or choose another with --{setting}")
}

/// The address that peers dial: as set, or the first of this host that others can reach.
fn advertised_address(config: &Config) -> Result<IpAddr> {
    if let Some(address) = config.own.advertise {
        return Ok(address);
    }
    let first = interface_addresses()?.into_iter().find(|address| !address.is_loopback());
    Ok(first.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)))
}

/// The addresses of this host that others may dial; link-local ones are left out.
fn interface_addresses() -> Result<Vec<IpAddr>> {
    let mut addresses = Vec::new();
    for interface in nix::ifaddrs::getifaddrs().context("cannot read the addresses of this host")? {
        let Some(address) = interface.address else { continue };
        let ip = match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
            (Some(v4), _) => IpAddr::V4(v4.ip()),
            (_, Some(v6)) if !v6.ip().is_unicast_link_local() => IpAddr::V6(v6.ip()),
            _ => continue,
        };
        if !ip.is_loopback() {
            addresses.push(ip);
        }
    }
    addresses.sort_by_key(|address| address.is_ipv6());
    Ok(addresses)
}
