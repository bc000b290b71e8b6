//! The story of a connection and a request that the app makes: whom it means, what it speaks, and the attempts
//! that carry it there. Read from `connection` downward; a request goes on in `outbound/request.rs`.
//!
//! The destination decides which service is meant, never a header: an app that can be talked into a foreign URL
//! must not borrow our identity.

mod request;
mod tunnel;
mod upstream;

use tunnel::{Tunnel, Waiting};
pub use upstream::{Known, Upstream, Upstreams};

use std::{collections::HashMap, io, net::SocketAddr, sync::Arc, time::Duration};

use hyper::Request;
use tokio::{
    net::TcpStream,
    sync::{Semaphore, watch},
};

use crate::{
    config::Mode,
    connect::{self, Connector, Pool},
    detect::{self, Heard},
    discovery::{Destination, Directory, Registry, VirtualAddresses},
    drain::Draining,
    http::{self, Activity, Body, HttpLimits, Stop, Upgrade, Upgraded},
    inbound::Inbound,
    model::{Endpoint, Failed, Failure, HttpVersion, Protocol, Result, ServiceName},
    net::{self, Stream},
    telemetry::{self, Cut, Direction, Telemetry},
    tls::VerifiedPeer,
};

/// A silent client may wait for the server to speak first; after this long the server is asked.
const SILENCE: Duration = Duration::from_millis(20);

/// What a worker needs for the traffic of the app.
pub struct Outbound {
    /// All known services.
    pub directory: watch::Receiver<Arc<Directory>>,
    /// Where those are asked for that are not known yet.
    pub registry: Arc<Registry>,
    /// Which address our DNS gave to which name.
    pub virtual_addresses: Arc<VirtualAddresses>,
    /// Loopback addresses that stand for one service each.
    pub explicit: HashMap<SocketAddr, ServiceName>,
    /// The services that this app calls.
    pub upstreams: Arc<Upstreams>,
    /// Connections to endpoints.
    pub pool: Arc<Pool>,
    /// The same without keeping them.
    pub connector: Connector,
    /// For calls of the app to itself.
    pub inbound: Arc<Inbound>,
    /// What happens to destinations that are no service.
    pub mode: Mode,
    /// The sidecar's own ports: never a destination.
    pub own_ports: Vec<u16>,
    /// Bounds on what the app sends.
    pub limits: HttpLimits,
    /// Requests at a time.
    pub requests: Arc<Semaphore>,
    /// Metrics, log and spans.
    pub telemetry: Arc<Telemetry>,
}

/// Whom a connection means.
#[derive(Clone)]
pub enum Target {
    /// Any endpoint of a service.
    Service(Arc<Upstream>),
    /// One endpoint of a service and no other.
    Endpoint(Arc<Upstream>, Endpoint),
    /// No service: an address, passed through untouched.
    Outside(SocketAddr),
}

impl Outbound {
    /// A redirected connection of the app, from its first byte to its end.
    pub async fn connection(self: Arc<Self>, tcp: TcpStream, client: SocketAddr, draining: Draining) {
        let target = self.meant(&tcp).await;
        self.run(tcp, client, target, draining).await;
    }

    async fn run(
        self: Arc<Self>,
        tcp: TcpStream,
        client: SocketAddr,
        target: Result<Target>,
        draining: Draining,
    ) {
        let mut record = self.telemetry.connection(Direction::Outbound, client);
        let mut abort = draining.clone();
        let cut = record.cut().clone();
        let carried = async {
            match target {
                Ok(target) => self.carry(tcp.into(), target, draining, &mut record).await,
                Err(failed) => self.refuse(tcp.into(), failed, draining).await,
            }
        };
        let ended = tokio::select! {
            ended = carried => ended,
            // Said before the connection is dropped, for the records of its requests.
            too_long = async {
                abort.aborted().await;
                cut.because(Failed::new(Failure::Draining, "the drain took too long"))
            } => Err(too_long),
        };
        if let Err(failed) = ended {
            record.fail(failed);
        }
    }

    /// Whom the address that the app dialled means.
    async fn meant(&self, tcp: &TcpStream) -> Result<Target> {
        let local = tcp.local_addr().map_err(|error| client_broke(&error))?;
        let meant = net::original_destination(tcp, local.is_ipv6()).unwrap_or(local);
        if let Some(name) = self.explicit.get(&meant) {
            return Box::pin(self.named(name)).await.map(Target::Service);
        }
        if self.own_ports.contains(&meant.port()) && meant.ip().to_canonical().is_loopback() || meant == local
        {
            return Err(Failed::new(Failure::Loop, format!("{meant} is a port of the sidecar itself")));
        }
        let found = self.directory.borrow().lookup(meant, &self.virtual_addresses);
        match found {
            Destination::Service(service) => Ok(Target::Service(self.upstreams.get(service).await)),
            Destination::Endpoint(service, endpoint) => {
                Ok(Target::Endpoint(self.upstreams.get(service).await, endpoint))
            }
            Destination::Unasked(name) if self.registry.is_there() => {
                Box::pin(self.named(&name)).await.map(Target::Service)
            }
            Destination::Unasked(_) | Destination::UnknownVirtual(_) => {
                let detail = format!("{} stands for no service now; ask DNS again", meant.ip());
                Err(Failed::new(Failure::UnknownVirtualAddress, detail))
            }
            Destination::Unknown => Box::pin(self.unknown(meant)).await,
        }
    }

    /// An address of which discovery says nothing now. It may be an endpoint of a service that nobody watches any more:
    /// then it is asked for again, or the call would leave the mesh.
    async fn unknown(&self, meant: SocketAddr) -> Result<Target> {
        if let Some(name) = self.upstreams.service_with(meant) {
            let upstream = self.named(&name).await?;
            let canonical = SocketAddr::new(meant.ip().to_canonical(), meant.port());
            let endpoint = upstream.known().endpoint(canonical).cloned();
            if let Some(endpoint) = endpoint {
                return Ok(Target::Endpoint(upstream, endpoint));
            }
        }
        match self.mode {
            Mode::AllowAny => Ok(Target::Outside(meant)),
            Mode::RegistryOnly => {
                let detail = format!("{meant} is no service of the mesh, and the mode is registry-only");
                Err(Failed::new(Failure::UnknownDestination, detail))
            }
        }
    }

    /// The service of this name: as it is known, or as the registry has it, which is asked if need be.
    async fn named(&self, name: &ServiceName) -> Result<Arc<Upstream>> {
        let known = self.directory.borrow().service(name).cloned();
        if let Some(service) = known {
            return Ok(self.upstreams.get(service).await);
        }
        if !self.registry.is_there() {
            let detail = format!("`{name}` is in no service file, and no registry is set");
            return Err(Failed::new(Failure::NoEndpoint, detail));
        }
        match self.registry.ask(name).await {
            Some(service) => Ok(self.upstreams.get_as(service).await),
            // What was known when it was called before is better than nothing.
            None => self.upstreams.called_before(name).ok_or_else(|| {
                let detail = format!("the registry says nothing about `{name}` in time");
                Failed::new(Failure::RegistryUnavailable, detail)
            }),
        }
    }

    async fn carry(
        self: &Arc<Self>,
        stream: Stream,
        target: Target,
        draining: Draining,
        record: &mut telemetry::Connection,
    ) -> Result<()> {
        let declared = match &target {
            Target::Outside(address) => {
                record.endpoint(*address);
                return self.pass_through(stream, *address, record).await;
            }
            Target::Service(upstream) | Target::Endpoint(upstream, _) => {
                record.service(&upstream.metrics);
                upstream.known().protocol()
            }
        };
        match declared {
            Some(protocol) => self.spoken(stream, protocol, target, draining, record).await,
            None => self.detected(stream, target, draining, record).await,
        }
    }

    async fn detected(
        self: &Arc<Self>,
        mut stream: Stream,
        target: Target,
        draining: Draining,
        record: &mut telemetry::Connection,
    ) -> Result<()> {
        let ahead = detect::read_ahead(&mut stream, SILENCE).await.map_err(|error| client_broke(&error))?;
        if ahead.heard == Heard::Silence && ahead.bytes.is_empty() {
            return Box::pin(self.silent(stream, target, draining, record)).await;
        }
        self.heard(stream, ahead.heard, target, draining, record).await
    }

    async fn heard(
        self: &Arc<Self>,
        stream: Stream,
        heard: Heard,
        target: Target,
        draining: Draining,
        record: &mut telemetry::Connection,
    ) -> Result<()> {
        let protocol = self.detected_protocol(heard);
        self.spoken(stream, protocol, target, draining, record).await
    }

    /// A client that says nothing: the server is connected, and whoever speaks first decides.
    async fn silent(
        self: &Arc<Self>,
        mut stream: Stream,
        target: Target,
        draining: Draining,
        record: &mut telemetry::Connection,
    ) -> Result<()> {
        // A client that opens connections before it needs them may speak before the server does. If that is HTTP,
        // the server was dialled for nothing.
        let mut waiting = Waiting::silent(&mut stream);
        let opened = Box::pin(self.open_tunnel(&target, &mut waiting, record)).await;
        let heard = waiting.heard;
        // A client that no server was found for is told by a reset.
        let Some(tunnel) = opened.inspect_err(|_| net::reset(&stream))? else {
            return self.heard(stream, heard.unwrap_or(Heard::Silence), target, draining, record).await;
        };
        let protocol = heard.map_or(Protocol::Opaque, |heard| self.detected_protocol(heard));
        record.opened(security(&target), protocol);
        self.copy(tunnel, stream, record).await
    }

    /// What to take the client's bytes for.
    fn detected_protocol(&self, heard: Heard) -> Protocol {
        match heard {
            Heard::Protocol(protocol) => {
                self.telemetry.metrics().detected(protocol);
                protocol
            }
            // A client that shuts down its side at once may still want to hear the server.
            Heard::Silence | Heard::End => Protocol::Opaque,
        }
    }

    async fn spoken(
        self: &Arc<Self>,
        mut stream: Stream,
        protocol: Protocol,
        target: Target,
        draining: Draining,
        record: &mut telemetry::Connection,
    ) -> Result<()> {
        record.opened(security(&target), protocol);
        match protocol.http() {
            Some(version) => self.serve(stream, version, target, draining, record).await,
            None => {
                let mut waiting = Waiting::known(&mut stream);
                let opened = Box::pin(self.open_tunnel(&target, &mut waiting, record)).await;
                match opened.inspect_err(|_| net::reset(&stream))? {
                    Some(tunnel) => self.copy(tunnel, stream, record).await,
                    None => Err(Failed::new(Failure::Internal, "bytes were taken for HTTP")),
                }
            }
        }
    }

    async fn serve(
        self: &Arc<Self>,
        stream: Stream,
        version: HttpVersion,
        target: Target,
        mut draining: Draining,
        record: &mut telemetry::Connection,
    ) -> Result<()> {
        let (upgrade, cut, client) = (Upgrade::default(), record.cut().clone(), record.peer_address());
        let answer = |request: Request<Body>| {
            let (story, target, upgrade) = (self.clone(), target.clone(), upgrade.clone());
            let cut = cut.clone();
            async move { Ok(story.answer(request, &target, client, version, &upgrade, &cut).await) }
        };
        let (stop, activity) = (stopping(&mut draining), Activity::new());
        http::serve(stream, version, &self.limits, stop, &activity, &cut, answer).await?;
        let upgraded = upgrade.upgraded().await;
        match upgraded.map_err(|error| Failed::new(Failure::Reset, error.to_string()))? {
            Some(Upgraded { client, server, peer }) => {
                record.peer(peer.as_ref().map(VerifiedPeer::id));
                self.copy(Tunnel::of(server, peer), client, record).await
            }
            None => Ok(()),
        }
    }

    /// Tells an HTTP client why its connection leads nowhere; resets any other.
    async fn refuse(&self, mut stream: Stream, failed: Failed, mut draining: Draining) -> Result<()> {
        let ahead = detect::read_ahead(&mut stream, SILENCE).await.map_err(|error| client_broke(&error))?;
        let version = match ahead.heard {
            // A virtual address that stands for nothing is reset whatever is spoken: the app must ask again.
            Heard::Protocol(protocol) if failed.failure != Failure::UnknownVirtualAddress => protocol.http(),
            _ => None,
        };
        if let Some(version) = version {
            let failure = failed.failure;
            let answer = |request: Request<Body>| {
                let is_grpc = http::headers::is_grpc(request.headers());
                async move { Ok(http::answer(failure, is_grpc)) }
            };
            let (stop, activity, cut) = (stopping(&mut draining), Activity::new(), Cut::default());
            http::serve(stream, version, &self.limits, stop, &activity, &cut, answer).await?;
        } else {
            net::reset(&stream);
        }
        Err(failed)
    }
}

/// Resolves when the sidecar stops.
async fn stopping(draining: &mut Draining) -> Stop {
    draining.started().await;
    Stop::Finish(Failed::new(Failure::Draining, "the sidecar stops"))
}

/// What protects the connection to the target, for its metrics.
fn security(target: &Target) -> telemetry::Security {
    match target {
        Target::Service(upstream) | Target::Endpoint(upstream, _) => match upstream.known().security {
            connect::Security::Mesh(_) => telemetry::Security::MutualTls,
            connect::Security::Forbidden => telemetry::Security::Forbidden,
            connect::Security::Plain => telemetry::Security::Plaintext,
        },
        Target::Outside(_) => telemetry::Security::Plaintext,
    }
}

fn client_broke(error: &io::Error) -> Failed {
    Failed::new(Failure::ClientGone, error.to_string())
}

#[cfg(test)]
mod tests;
