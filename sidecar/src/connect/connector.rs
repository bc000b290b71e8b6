//! Dials an address and, towards a peer of the mesh, proves both sides before a byte of a request is written.

use std::{future::Future, io, net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use tokio::{
    net::{TcpSocket, TcpStream},
    sync::watch,
};

use super::Security;
use crate::{
    model::{ExpiredPeers, Failed, Failure, Result},
    net::{self, Reclaimer, Stream},
    tls::{self, Alpn, Credentials, VerifiedPeer},
};

/// Makes an unconnected socket, IPv6 where asked: for an app that lives in a network namespace of its own.
pub type SocketMaker =
    Arc<dyn Fn(bool) -> Pin<Box<dyn Future<Output = io::Result<TcpSocket>> + Send>> + Send + Sync>;

/// Where sockets come from.
#[derive(Clone)]
pub enum Dialer {
    /// The sidecar's own network namespace.
    Direct,
    /// The namespace of the app, which hands its sockets out.
    Handed(SocketMaker),
}

impl Dialer {
    /// Dials an address there. The caller sets the time limit. Where no descriptor is left, idle connections that
    /// `reclaimer` knows are closed first.
    ///
    /// # Errors
    /// What `connect` says, or whoever hands the sockets out.
    pub async fn dial(&self, address: SocketAddr, reclaimer: &Reclaimer) -> io::Result<TcpStream> {
        reclaimer.open(|| self.dial_once(address)).await
    }

    async fn dial_once(&self, address: SocketAddr) -> io::Result<TcpStream> {
        match self {
            Dialer::Direct => net::dial(address).await,
            Dialer::Handed(make) => {
                let stream = make(address.is_ipv6()).await?.connect(address).await?;
                net::set_options(&stream)?;
                Ok(stream)
            }
        }
    }
}

/// Dials, and secures with our own identity.
#[derive(Clone)]
pub struct Connector {
    dialer: Dialer,
    credentials: watch::Receiver<Option<Arc<Credentials>>>,
    drain_timeout: Duration,
    expired_peers: ExpiredPeers,
    reclaimer: Reclaimer,
}

/// A connection and, in the mesh, the proven other side.
pub struct Secured {
    /// The bytes.
    pub stream: Stream,
    /// Who is there; none in plaintext.
    pub peer: Option<VerifiedPeer>,
}

impl Connector {
    /// `credentials` are taken anew for each connection. HTTP that is under way when the trust in a peer ends may
    /// go on for `drain_timeout`.
    pub fn new(
        dialer: Dialer,
        credentials: watch::Receiver<Option<Arc<Credentials>>>,
        drain_timeout: Duration,
    ) -> Self {
        Connector {
            dialer,
            credentials,
            drain_timeout,
            expired_peers: ExpiredPeers::default(),
            reclaimer: Reclaimer::default(),
        }
    }

    /// The same with another choice about opaque connections whose peer's certificate has ended.
    pub fn with_expired_peers(self, expired_peers: ExpiredPeers) -> Self {
        Connector { expired_peers, ..self }
    }

    /// The same, and the idle connections that `reclaimer` knows are closed where a dial finds no descriptor.
    pub fn with_reclaimer(self, reclaimer: Reclaimer) -> Self {
        Connector { reclaimer, ..self }
    }

    /// Where pools register how their idle connections are closed.
    pub(super) fn reclaimer(&self) -> &Reclaimer {
        &self.reclaimer
    }

    /// What becomes of opaque connections whose peer's certificate has ended.
    pub fn expired_peers(&self) -> ExpiredPeers {
        self.expired_peers
    }

    /// Our own credentials, to watch.
    pub fn credentials(&self) -> &watch::Receiver<Option<Arc<Credentials>>> {
        &self.credentials
    }

    /// How long HTTP may go on after the trust in its peer ended.
    pub(super) fn drain_timeout(&self) -> Duration {
        self.drain_timeout
    }

    /// Opens a connection within `limit`, TCP and TLS together.
    ///
    /// # Errors
    /// The `connect_*` failures, `plaintext_forbidden`, `no_identity`, and those of the handshake; `overloaded` where no descriptor is left.
    pub async fn connect(
        &self,
        address: SocketAddr,
        security: &Security,
        alpn: Alpn,
        limit: Duration,
    ) -> Result<Secured> {
        match tokio::time::timeout(limit, self.open(address, security, alpn)).await {
            Ok(opened) => opened,
            Err(_) => {
                let detail = format!("{address}: no connection within {}", humantime::format_duration(limit));
                Err(Failed::new(Failure::ConnectTimeout, detail))
            }
        }
    }

    async fn open(&self, address: SocketAddr, security: &Security, alpn: Alpn) -> Result<Secured> {
        let expected = match security {
            Security::Mesh(expected) => expected,
            Security::Plain => {
                let stream = self.dial(address).await?;
                return Ok(Secured { stream: stream.into(), peer: None });
            }
            Security::Forbidden => return Err(plaintext_forbidden(address)),
        };
        let Some(credentials) = self.credentials.borrow().clone() else {
            return Err(Failed::new(
                Failure::NoIdentity,
                format!("{address}: we have no valid certificate yet"),
            ));
        };
        let stream = self.dial(address).await?;
        let (stream, peer) = tls::connect(stream.into(), &credentials, expected, alpn)
            .await
            .map_err(|failed| Failed::new(failed.failure, format!("{address}: {}", failed.detail)))?;
        Ok(Secured { stream, peer: Some(peer) })
    }

    async fn dial(&self, address: SocketAddr) -> Result<TcpStream> {
        let dialled = self.dialer.dial(address, &self.reclaimer).await;
        dialled.map_err(|error| dial_failed(address, &error))
    }
}

fn plaintext_forbidden(address: SocketAddr) -> Failed {
    let detail = format!(
        "{address}: nobody says which identity to expect there, and plaintext is forbidden (by --outbound-mtls, by \
         `outbound_mutual_tls` of its policy, or as an identity in the registry cannot be read: the log names it); is \
         its sidecar registered, or should its policy name `identities`?"
    );
    Failed::new(Failure::PlaintextForbidden, detail)
}

fn dial_failed(address: SocketAddr, error: &io::Error) -> Failed {
    if net::is_out_of_descriptors(error) {
        let detail = format!("{address}: no descriptor is left for a connection (`ulimit -n`): {error}");
        return Failed::new(Failure::Overloaded, detail);
    }
    let failure = match error.kind() {
        io::ErrorKind::ConnectionRefused => Failure::ConnectRefused,
        io::ErrorKind::TimedOut => Failure::ConnectTimeout,
        _ => Failure::ConnectUnreachable,
    };
    Failed::new(failure, format!("{address}: {error}"))
}

#[cfg(test)]
mod tests {
    use nix::libc;

    use super::*;
    use crate::policy::response::failure_speaks_against_endpoint;

    #[tokio::test]
    async fn where_plaintext_is_forbidden_nobody_is_dialled() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, limit) = (listener.local_addr().unwrap(), Duration::from_secs(5));
        let connector = Connector::new(Dialer::Direct, watch::channel(None).1, Duration::ZERO);
        for alpn in [Alpn::Http1, Alpn::Http2, Alpn::Tcp] {
            let refused = connector.connect(address, &Security::Forbidden, alpn, limit).await.err().unwrap();
            assert_eq!(refused.failure, Failure::PlaintextForbidden);
            assert!(!failure_speaks_against_endpoint(refused.failure) && !refused.failure.is_transport());
        }
        let plain = connector.connect(address, &Security::Plain, Alpn::Tcp, limit).await.unwrap();
        let (accepted, client) = listener.accept().await.unwrap();
        drop((plain, accepted));
        assert!(client.ip().is_loopback());
        assert!(
            tokio::time::timeout(Duration::from_millis(50), listener.accept()).await.is_err(),
            "a forbidden connection was made"
        );
    }

    #[test]
    fn a_want_of_descriptors_does_not_speak_against_the_endpoint() {
        let address = SocketAddr::from(([10, 0, 0, 1], 80));
        for (code, speaks) in [(libc::EMFILE, false), (libc::ENFILE, false), (libc::EHOSTUNREACH, true)] {
            let failed = dial_failed(address, &io::Error::from_raw_os_error(code));
            assert_eq!(failure_speaks_against_endpoint(failed.failure), speaks, "{failed:?}");
            assert!(failed.detail.contains("10.0.0.1:80"), "{failed:?}");
        }
    }
}
