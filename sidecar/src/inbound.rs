//! The story of a connection and a request that reaches the app: whose it is, whether it may pass, delivery to
//! the app on this host. Read from `connection` downward.
//!
//! Traffic goes where it was meant to go, and only if that is this workload: one of its own addresses, no port
//! of ours; to the app's loopback only for the ports that the workload registers.

mod app_address;
mod arrival;
mod delivery;
mod request;

pub use app_address::AppAddress;
pub use arrival::{Arrival, Caller};
pub use delivery::{Delivery, Meaning};

use std::{
    io,
    net::{IpAddr, SocketAddr},
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use hyper::Request;
use tokio::{
    net::TcpStream,
    sync::{Notify, Semaphore, watch},
    time::timeout,
};

use crate::{
    connect::{self, Connector, Key, Lease, Pool, Security, trust_in_bytes_ended},
    detect::{self, FirstToSpeak, Heard, Hello, ReadAhead},
    drain::Draining,
    http::{self, Activity, Body, BufferBudget, HttpLimits, Stop, Upgrade},
    model::{ExpiredPeers, Failed, Failure, HttpVersion, MutualTls, Protocol, Result},
    net::{self, BrokenSide, Stream},
    policy::authorization::{Permit, authorize},
    serve::{IdleConnections, SilentLimit},
    telemetry::{self, Direction, ServiceMetrics, Telemetry},
    tls::{self, Alpn, Credentials},
};

/// A silent client may wait for the server to speak first; after this long the app is asked.
const SILENCE: Duration = Duration::from_millis(20);
/// A strict port waits this long for the TLS of a client.
const STRICT_SILENCE: Duration = Duration::from_secs(10);
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// A client whose first words take longer is counted among the silent ones.
const AT_ONCE: Duration = Duration::from_millis(40);
/// The same for a handshake, which takes the network's time and that of our processor.
const HANDSHAKE_AT_ONCE: Duration = Duration::from_secs(1);

/// What a worker needs for the traffic that reaches the app.
pub struct Inbound {
    /// Where traffic may go.
    pub delivery: Delivery,
    /// Connections to the app.
    pub pool: Arc<Pool>,
    /// The same without keeping them.
    pub connector: Connector,
    /// Our own identity; none: plaintext only.
    pub credentials: watch::Receiver<Option<Arc<Credentials>>>,
    /// Bounds on what clients send.
    pub limits: HttpLimits,
    /// Requests at a time.
    pub requests: Arc<Semaphore>,
    /// Connections on which nobody has spoken yet.
    pub silent: Arc<SilentLimit>,
    /// What HTTP/2 connections without an identity may hold of unread uploads.
    pub buffers: Arc<BufferBudget>,
    /// HTTP connections, of which idle ones make room for others.
    pub idle: Arc<IdleConnections>,
    /// Metrics, log and spans.
    pub telemetry: Arc<Telemetry>,
    /// Resolved metrics of requests to the app.
    pub metrics: Arc<ServiceMetrics>,
}

impl Inbound {
    /// A connection from outside, from its first byte to its end.
    pub async fn connection(self: Arc<Self>, tcp: TcpStream, client: SocketAddr, draining: Draining) {
        let mut record = self.telemetry.connection(Direction::Inbound, client);
        let mut abort = draining.clone();
        let cut = record.cut().clone();
        let ended = tokio::select! {
            ended = self.accepted(tcp, client, draining, &mut record) => ended,
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

    async fn accepted(
        self: &Arc<Self>,
        tcp: TcpStream,
        client: SocketAddr,
        draining: Draining,
        record: &mut telemetry::Connection,
    ) -> Result<()> {
        let meant = self.delivery.meant(&tcp)?;
        let app = self.delivery.address_of_app(meant)?;
        record.endpoint(app.now());
        record.service(&self.metrics);
        let (caller, upgrade, cut) = (Caller::Plaintext, Upgrade::default(), record.cut().clone());
        let arrival = Arrival { caller, client, meant, app, upgrade, cut };
        let mut stream = Stream::from(tcp);
        let ahead = {
            let speaking = pin!(async {
                let ahead = detect::read_ahead(&mut stream, SILENCE).await?;
                if ahead.is_silence() && self.delivery.mutual_tls(meant.port()) == MutualTls::Strict {
                    return detect::read_ahead(&mut stream, STRICT_SILENCE).await;
                }
                Ok(ahead)
            });
            let ahead = self.silent.wait_beyond(AT_ONCE, client.ip(), speaking).await?;
            ahead.map_err(|error| client_broke(&error))?
        };
        self.heard(stream, ahead, arrival, draining, record).await
    }

    /// What the client began with decides: TLS of the mesh, or plaintext where that is taken.
    async fn heard(
        self: &Arc<Self>,
        stream: Stream,
        ahead: ReadAhead,
        arrival: Arrival,
        draining: Draining,
        record: &mut telemetry::Connection,
    ) -> Result<()> {
        if names_the_mesh(&ahead) {
            return self.secured(stream, arrival, draining, record).await;
        }
        if ahead.heard == Heard::Silence && detect::may_be_tls(&ahead.bytes) {
            // It may be a peer's: no other protocol is taken for it.
            return Err(Failed::new(Failure::ClientTimeout, "the ClientHello of TLS did not come whole"));
        }
        let strict = self.delivery.mutual_tls(arrival.meant.port()) == MutualTls::Strict;
        if strict && ahead.heard == Heard::End && ahead.bytes.is_empty() {
            // A probe of the port, which asks for nothing.
            return Ok(());
        }
        self.delivery.check_plaintext(arrival.meant, &ahead)?;
        let protocol = match (self.delivery.protocol(), ahead.heard) {
            (None, _) if ahead.is_silence() => {
                return Box::pin(self.silent(stream, arrival, draining, record)).await;
            }
            (None, Heard::Protocol(protocol)) => protocol,
            (declared, _) => declared.unwrap_or(Protocol::Opaque),
        };
        if let Some(version) = protocol.http().filter(|_| ahead.is_silence()) {
            return Box::pin(self.unbegun(stream, version, arrival, draining, record)).await;
        }
        self.carry(stream, protocol, arrival, draining, record).await
    }

    /// Mutual TLS of the mesh ends here.
    async fn secured(
        self: &Arc<Self>,
        stream: Stream,
        mut arrival: Arrival,
        draining: Draining,
        record: &mut telemetry::Connection,
    ) -> Result<()> {
        let Some(credentials) = self.credentials.borrow().clone() else {
            return Err(Failed::new(Failure::NoIdentity, "a peer came and we have no valid certificate"));
        };
        let accepted = {
            let accepting = pin!(timeout(HANDSHAKE_TIMEOUT, tls::accept(stream, &credentials)));
            self.silent.wait_beyond(HANDSHAKE_AT_ONCE, arrival.client.ip(), accepting).await?
        };
        let (stream, peer, alpn) = match accepted {
            Ok(accepted) => accepted?,
            Err(_) => return Err(Failed::new(Failure::ClientTimeout, "the TLS handshake took too long")),
        };
        record.peer(Some(peer.id()));
        arrival.caller = Caller::Peer(peer);
        let protocol = match alpn {
            Alpn::Http2 => Protocol::Http2,
            Alpn::Http1 => Protocol::Http1,
            Alpn::Tcp | Alpn::ConfirmedTcp => Protocol::Opaque,
        };
        self.carry(stream, protocol, arrival, draining, record).await
    }

    /// A client that says nothing: the app is connected, and whoever speaks first decides.
    async fn silent(
        self: &Arc<Self>,
        mut stream: Stream,
        arrival: Arrival,
        draining: Draining,
        record: &mut telemetry::Connection,
    ) -> Result<()> {
        let permit = self.permit(&arrival).inspect_err(|_| net::reset(&stream))?;
        let listening = async {
            let mut app = self.connect_app(&arrival, &permit).await?;
            let first = tokio::select! {
                first = detect::first_to_speak(&mut stream, &mut app) => first,
                over = self.welcome_over(&arrival, ExpiredPeers::Close) => return Err(over),
            };
            Ok::<_, Failed>((first.map_err(|error| client_broke(&error))?, app))
        };
        let heard = self.silent.wait(arrival.client.ip(), listening).await.and_then(|heard| heard);
        let (first, app) = heard.inspect_err(|_| net::reset(&stream))?;
        match first {
            FirstToSpeak::Client(ahead) => {
                drop(app);
                Box::pin(self.heard(stream, ahead, arrival, draining, record)).await
            }
            FirstToSpeak::Server => {
                record.endpoint(arrival.app.now());
                record.opened(security(&arrival.caller, Protocol::Opaque), Protocol::Opaque);
                self.copy(stream, app, &arrival, permit, record).await
            }
        }
    }

    /// HTTP by declaration, before its first request.
    async fn unbegun(
        self: &Arc<Self>,
        mut stream: Stream,
        version: HttpVersion,
        arrival: Arrival,
        draining: Draining,
        record: &mut telemetry::Connection,
    ) -> Result<()> {
        let limit = match version {
            HttpVersion::Http1 => self.limits.idle_timeout,
            HttpVersion::Http2 => self.limits.header_timeout,
        };
        let mut stop = draining.clone();
        let speaking = async {
            tokio::select! {
                spoken = timeout(limit, detect::client_speaks(&mut stream)) => Some(spoken),
                () = stop.started() => None,
            }
        };
        match self.silent.wait(arrival.client.ip(), speaking).await? {
            Some(Ok(Ok(ahead))) => Box::pin(self.heard(stream, ahead, arrival, draining, record)).await,
            Some(Ok(Err(error))) => Err(client_broke(&error)),
            Some(Err(_)) if version == HttpVersion::Http2 => {
                Err(Failed::new(Failure::ClientTimeout, "the preface of HTTP/2 did not come"))
            }
            // HTTP/1 may be idle before its first request as behind it.
            Some(Err(_)) | None => Ok(()),
        }
    }

    /// HTTP or bytes, as long as the caller is welcome. HTTP may finish what is under way then.
    async fn carry(
        self: &Arc<Self>,
        stream: Stream,
        protocol: Protocol,
        arrival: Arrival,
        draining: Draining,
        record: &mut telemetry::Connection,
    ) -> Result<()> {
        record.opened(security(&arrival.caller, protocol), protocol);
        match protocol.http() {
            Some(version) => self.serve(stream, version, arrival, draining, record).await,
            None => self.bytes(stream, arrival, record).await,
        }
    }

    /// Bytes, once the app has taken the connection. A sidecar that understands it is told that it has, or that it has
    /// not: then the sidecar may go elsewhere.
    async fn bytes(
        self: &Arc<Self>,
        mut stream: Stream,
        arrival: Arrival,
        record: &mut telemetry::Connection,
    ) -> Result<()> {
        let is_told = connect::is_confirmed(&stream);
        let permit = self.permit(&arrival).inspect_err(|_| net::reset(&stream))?;
        match self.connect_app(&arrival, &permit).await {
            Ok(app) => {
                record.endpoint(arrival.app.now());
                if is_told {
                    connect::confirm(&mut stream).await.map_err(|error| client_broke(&error))?;
                }
                self.copy(stream, app, &arrival, permit, record).await
            }
            Err(failed) => {
                if is_told {
                    connect::refuse(stream).await;
                } else {
                    net::reset(&stream);
                }
                Err(failed)
            }
        }
    }

    async fn serve(
        self: &Arc<Self>,
        stream: Stream,
        version: HttpVersion,
        arrival: Arrival,
        mut draining: Draining,
        record: &mut telemetry::Connection,
    ) -> Result<()> {
        let arrival = Arc::new(arrival);
        let is_begun = begins_within_a_head(&stream, version, &arrival.caller);
        let head_came = Notify::new();
        let answer = |request: Request<Body>| {
            if is_begun {
                head_came.notify_one();
            }
            let (story, arrival) = (self.clone(), arrival.clone());
            async move { story.answer(request, &arrival, version).await }
        };
        let activity = Activity::new();
        let mut registration = self.idle.register(arrival.client.ip(), activity.clone());
        let stop = async {
            tokio::select! {
                () = draining.started() => Stop::Finish(Failed::new(Failure::Draining, "the sidecar stops")),
                over = self.welcome_over(&arrival, ExpiredPeers::Close) => Stop::Finish(over),
                () = registration.closed() => Stop::MakeRoom(made_room()),
            }
        };
        let mut grant = None;
        let limits = match &arrival.caller {
            Caller::Plaintext if version == HttpVersion::Http2 => {
                let limits = self.limits.of_strangers();
                let grant = grant.insert(self.buffers.grant(limits.connection_window()));
                HttpLimits { connection_bytes: grant.window(), ..limits }
            }
            Caller::Plaintext => self.limits.of_strangers(),
            Caller::Peer(_) | Caller::Own(_) => self.limits.of_sidecars(),
        };
        let too_many_wait = self.first_head(is_begun, &head_came, arrival.client.ip());
        tokio::select! {
            biased;
            served = http::serve(stream, version, &limits, stop, &activity, &arrival.cut, answer) => served?,
            failed = too_many_wait => return Err(failed),
        }
        // What it may be upgraded to is neither idle nor HTTP/2.
        drop((registration, grant));
        match arrival.upgrade.upgraded().await.map_err(|error| broke(&error))? {
            Some(upgraded) => {
                let permit = self.permit(&arrival)?;
                self.copy(upgraded.client, upgraded.server, &arrival, permit, record).await
            }
            None => Ok(()),
        }
    }

    /// A client that has begun its first head counts among the silent ones until it is complete. Resolves where those
    /// are too many. Boxed, as most heads come in one piece.
    fn first_head<'a>(
        &'a self,
        is_begun: bool,
        head_came: &'a Notify,
        client: IpAddr,
    ) -> Pin<Box<dyn Future<Output = Failed> + Send + 'a>> {
        if !is_begun {
            return Box::pin(std::future::pending());
        }
        Box::pin(async move {
            match self.silent.wait_beyond(AT_ONCE, client, pin!(head_came.notified())).await {
                Err(failed) => failed,
                Ok(()) => std::future::pending().await,
            }
        })
    }

    /// Bytes both ways, as long as the caller is welcome.
    async fn copy(
        &self,
        client: Stream,
        app: Stream,
        arrival: &Arrival,
        _permit: Permit,
        record: &telemetry::Connection,
    ) -> Result<()> {
        let copying =
            net::copy_both_ways(client, app, |count| record.sent(count), |count| record.received(count));
        tokio::select! {
            ended = copying => ended.map(|_| ()).map_err(|broken| copying_broke(&broken)),
            over = self.welcome_over(arrival, self.connector.expired_peers()) => Err(over),
        }
    }

    /// Resolves when this caller may no longer be here: the trust in a peer has ended, for which the end of its
    /// certificate counts or does not, or plaintext is no longer taken. Boxed, as most of a connection's life it only
    /// waits.
    fn welcome_over<'a>(
        &'a self,
        arrival: &'a Arrival,
        expired: ExpiredPeers,
    ) -> Pin<Box<dyn Future<Output = Failed> + Send + 'a>> {
        Box::pin(async move {
            match &arrival.caller {
                Caller::Peer(peer) => {
                    trust_in_bytes_ended(peer, self.credentials.clone(), expired).await;
                    connect::trust_is_over(peer)
                }
                Caller::Plaintext => {
                    self.delivery.turned_strict(arrival.meant.port()).await;
                    plaintext_is_over(arrival.meant)
                }
                Caller::Own(_) => std::future::pending().await,
            }
        })
    }

    /// A connection of the app to itself, without the network.
    ///
    /// # Errors
    /// As for a connection from outside.
    pub async fn connect_own(&self, arrival: &Arrival) -> Result<Stream> {
        let permit = self.permit(arrival)?;
        self.connect_app(arrival, &permit).await
    }

    /// The same for a request that may stop being HTTP.
    ///
    /// # Errors
    /// As for a request from outside.
    pub async fn lend_own(&self, arrival: &Arrival) -> Result<Lease> {
        let permit = self.permit(arrival)?;
        self.lend_alone(arrival, &permit).await
    }

    /// An HTTP/1 connection to the app that is not kept.
    async fn lend_alone(&self, arrival: &Arrival, _permit: &Permit) -> Result<Lease> {
        let lend = |address| async move {
            connect::one_off(&self.connector, &app_key(address, HttpVersion::Http1), APP_TIMEOUT).await
        };
        arrival.app.reach(lend).await.map_err(as_app)
    }

    fn permit(&self, arrival: &Arrival) -> Result<Permit> {
        authorize(arrival.caller.identity(), self.delivery.mutual_tls(arrival.meant.port()), arrival.client)
    }

    async fn connect_app(&self, arrival: &Arrival, _permit: &Permit) -> Result<Stream> {
        let connect = |address| self.connector.connect(address, &Security::Plain, Alpn::Tcp, APP_TIMEOUT);
        arrival.app.reach(connect).await.map(|secured| secured.stream).map_err(as_app)
    }
}

/// Longest wait for the app to take a connection.
pub(crate) const APP_TIMEOUT: Duration = Duration::from_secs(5);

fn app_key(address: SocketAddr, version: HttpVersion) -> Key {
    Key { address, security: Security::Plain, version }
}

/// The failures of calling the app have names of their own: the caller's side can tell them from its own.
fn as_app(failed: Failed) -> Failed {
    let failure = match failed.failure {
        Failure::ConnectRefused | Failure::ConnectTimeout | Failure::ConnectUnreachable => {
            Failure::AppRefused
        }
        Failure::Reset => Failure::AppReset,
        other => other,
    };
    Failed::new(failure, format!("the app at {}", failed.detail))
}

/// What protects a connection, for its metrics.
fn security(caller: &Caller, protocol: Protocol) -> telemetry::Security {
    match (caller, protocol) {
        (Caller::Plaintext, Protocol::Tls) => telemetry::Security::TlsPassthrough,
        (Caller::Plaintext, _) => telemetry::Security::Plaintext,
        (Caller::Peer(_) | Caller::Own(_), _) => telemetry::Security::MutualTls,
    }
}

fn plaintext_is_over(meant: SocketAddr) -> Failed {
    let detail = format!("{meant} takes mutual TLS of the mesh only, since its policy changed");
    Failed::new(Failure::PlaintextRefused, detail)
}

fn made_room() -> Failed {
    Failed::new(
        Failure::Overloaded,
        "it was idle, and made room for another as the bound of connections was reached",
    )
}

/// Has a stranger sent a part of its first head, and not all of it?
fn begins_within_a_head(stream: &Stream, version: HttpVersion, caller: &Caller) -> bool {
    let ends = |end: &[u8]| stream.peeked().windows(end.len()).any(|bytes| bytes == end);
    version == HttpVersion::Http1
        && matches!(caller, Caller::Plaintext)
        // A line may end in a bare LF (RFC 9112 2.2).
        && !(ends(b"\n\r\n") || ends(b"\n\n"))
}

fn names_the_mesh(ahead: &ReadAhead) -> bool {
    ahead.heard == Heard::Protocol(Protocol::Tls)
        && matches!(
            detect::client_hello(&ahead.bytes),
            Hello::Parsed { alpn, .. } if alpn.iter().any(|name| name.starts_with(b"weft-"))
        )
}

fn broke(error: &io::Error) -> Failed {
    Failed::new(Failure::Reset, error.to_string())
}

/// Which side of the bytes broke them off.
fn copying_broke(broken: &net::Broken) -> Failed {
    match broken.side {
        BrokenSide::First => client_broke(&broken.error),
        BrokenSide::Second => broke(&broken.error),
    }
}

fn client_broke(error: &io::Error) -> Failed {
    Failed::new(Failure::ClientGone, error.to_string())
}
