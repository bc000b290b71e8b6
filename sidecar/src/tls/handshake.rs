//! The two handshakes between sidecars.
//!
//! A client decides about the server's identity before it sends anything but its hello; a server takes a
//! connection only after the client's certificate. In TLS 1.3 (RFC 8446 section 2) a client may be done before
//! the server has judged it: a refusal then arrives as an alert on the client's first read, which
//! [`refused_by_peer`] recognises. No time limits here: the caller sets them.

use std::{io, sync::Arc};

use bytes::Bytes;
use rustls::{AlertDescription, CertificateError, OtherError};
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::AsyncReadExt;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};
use weft_proto::{certificate::Leaf, names, spiffe::SpiffeId};

use super::{
    authority::Anchor,
    bundle::Bundle,
    credentials::Credentials,
    judge::{ExpectServer, Expected},
    verify::{Role, VerifiedPeer},
};
use crate::{
    model::{Failed, Failure, Result},
    net::Stream,
};

/// What is carried inside: the private names that tell the far side that mesh TLS ends there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Alpn {
    /// `weft-h2`: HTTP/2.
    Http2,
    /// `weft-h1`: HTTP/1.1, for upgrades and CONNECT.
    Http1,
    /// `weft-tcp`: the app's own bytes.
    Tcp,
    /// `weft-tcp2`: the same behind one byte of the server, which says whether its app has taken the connection. A client
    /// takes `weft-tcp` too, where the server knows no other.
    ConfirmedTcp,
}

impl Alpn {
    /// The name on the wire (RFC 7301).
    pub fn name(self) -> &'static [u8] {
        match self {
            Alpn::Http2 => names::ALPN_HTTP2,
            Alpn::Http1 => names::ALPN_HTTP1,
            Alpn::Tcp => names::ALPN_TCP,
            Alpn::ConfirmedTcp => names::ALPN_TCP_CONFIRMED,
        }
    }

    /// The name for logs.
    pub fn label(self) -> &'static str {
        match self {
            Alpn::Http2 => "weft-h2",
            Alpn::Http1 => "weft-h1",
            Alpn::Tcp => "weft-tcp",
            Alpn::ConfirmedTcp => "weft-tcp2",
        }
    }

    /// What a client offers that wants this one, the best first.
    fn offered(self) -> &'static [Alpn] {
        match self {
            Alpn::Http2 => &[Alpn::Http2],
            Alpn::Http1 => &[Alpn::Http1],
            Alpn::Tcp => &[Alpn::Tcp],
            Alpn::ConfirmedTcp => &[Alpn::ConfirmedTcp, Alpn::Tcp],
        }
    }

    fn from_name(name: &[u8]) -> Option<Self> {
        let all = [Alpn::Http2, Alpn::Http1, Alpn::Tcp, Alpn::ConfirmedTcp];
        all.into_iter().find(|alpn| alpn.name() == name)
    }
}

/// Takes a connection as the server.
///
/// # Errors
/// [`Failure::UntrustedPeer`] for a client without a valid identity of our trust domain,
/// [`Failure::PlaintextRefused`] for plaintext and for TLS that is not the mesh's,
/// [`Failure::NoIdentity`] where our own certificate has expired, [`Failure::Handshake`] for anything else.
pub async fn accept(stream: Stream, credentials: &Credentials) -> Result<(Stream, VerifiedPeer, Alpn)> {
    credentials.check_own_life()?;
    let address = peer_address(&stream);
    let explain = |error: io::Error| failed(&error, Role::Client, &address, credentials.id());
    let tls = TlsAcceptor::from(credentials.server.clone()).accept(stream).await.map_err(explain)?;
    let session = tls.get_ref().1;
    let Some(alpn) = session.alpn_protocol().and_then(Alpn::from_name) else {
        return Err(Failed::new(
            Failure::PlaintextRefused,
            format!("client {address} of {} named no mesh protocol (ALPN) in its TLS", credentials.id()),
        ));
    };
    let peer = proven(session.peer_certificates(), Role::Client, &address, credentials.bundle())?;
    Ok((TlsStream::from(tls).into(), peer, alpn))
}

/// Secures a dialled connection as the client, to one of the expected identities. Nothing is sent to any
/// other; an empty list refuses everyone.
///
/// # Errors
/// [`Failure::WrongIdentity`] for a peer of our trust domain that is not expected,
/// [`Failure::UntrustedPeer`] for one without a valid identity, [`Failure::NoIdentity`] where our own
/// certificate has expired, [`Failure::Handshake`] for anything else.
pub async fn connect(
    stream: Stream,
    credentials: &Credentials,
    expected: &[SpiffeId],
    alpn: Alpn,
) -> Result<(Stream, VerifiedPeer)> {
    credentials.check_own_life()?;
    let address = peer_address(&stream);
    if expected.is_empty() {
        return Err(Failed::new(
            Failure::WrongIdentity,
            format!("no identity is expected at {address}, so {} dials no one there", credentials.id()),
        ));
    }
    let mut config = credentials.client.clone();
    config.alpn_protocols = alpn.offered().iter().map(|alpn| alpn.name().to_vec()).collect();
    config.dangerous().set_certificate_verifier(Arc::new(ExpectServer::new(
        vec![Anchor::Bundle(credentials.bundle().clone())],
        Expected::Ids(expected.to_vec()),
        credentials.provider.clone(),
    )));
    let explain = |error: io::Error| failed(&error, Role::Server, &address, credentials.id());
    let name = server_name(&stream).map_err(explain)?;
    let tls = TlsConnector::from(Arc::new(config)).connect(name, stream).await.map_err(explain)?;
    let session = tls.get_ref().1;
    if !session.alpn_protocol().is_some_and(|agreed| alpn.offered().iter().any(|alpn| alpn.name() == agreed))
    {
        return Err(Failed::new(
            Failure::Handshake,
            format!("server {address} did not agree to the protocol {} (ALPN)", alpn.label()),
        ));
    }
    let peer = proven(session.peer_certificates(), Role::Server, &address, credentials.bundle())?;
    Ok((TlsStream::from(tls).into(), peer))
}

/// Waits for the first bytes of a server that speaks first, as HTTP/2 does with its SETTINGS (RFC 9113 section
/// 3.4), and puts them back. Until then a client of TLS 1.3 does not know that its certificate was accepted; and
/// who writes before may get a reset instead of the alert that says why.
///
/// # Errors
/// What the read says; ask [`refused_by_peer`].
pub async fn first_bytes(stream: &mut Stream) -> io::Result<()> {
    let mut buffer = [0; FIRST_BYTES];
    let count = stream.read(&mut buffer).await?;
    if count == 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection"));
    }
    stream.unread(Bytes::copy_from_slice(&buffer[..count]));
    Ok(())
}

/// A SETTINGS frame and a WINDOW_UPDATE; more is read later.
const FIRST_BYTES: usize = 128;

/// Does this error of a read or write mean that the far side ended the handshake because it refuses our
/// certificate or protocol? Then nothing was processed. It must be the stream's own error: h2 and hyper pass on
/// only its text.
pub fn refused_by_peer(error: &io::Error) -> bool {
    use AlertDescription as Alert;
    let alert = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    matches!(
        alert,
        Some(rustls::Error::AlertReceived(
            Alert::BadCertificate
                | Alert::UnsupportedCertificate
                | Alert::CertificateRevoked
                | Alert::CertificateExpired
                | Alert::CertificateUnknown
                | Alert::CertificateRequired
                | Alert::UnknownCA
                | Alert::AccessDenied
                | Alert::DecryptError
                | Alert::NoApplicationProtocol
        ))
    )
}

/// The proof, after a handshake whose verifier accepted this chain with this bundle.
fn proven(
    chain: Option<&[CertificateDer<'static>]>,
    role: Role,
    address: &str,
    bundle: &Bundle,
) -> Result<VerifiedPeer> {
    let chain = chain.unwrap_or_default();
    Ok(VerifiedPeer::proven(proven_leaf(chain, address)?, chain, role, bundle.clone()))
}

/// The leaf of a chain that a verifier has accepted.
pub(super) fn proven_leaf(chain: &[CertificateDer<'_>], address: &str) -> Result<Leaf> {
    chain.first().and_then(|leaf| Leaf::parse(leaf).ok()).ok_or_else(|| {
        Failed::new(Failure::UntrustedPeer, format!("peer {address} showed no readable certificate"))
    })
}

pub(super) fn peer_address(stream: &Stream) -> String {
    stream.tcp().peer_addr().map_or_else(|_| "unknown address".to_owned(), |address| address.to_string())
}

/// rustls wants a name for the server; an address is never sent, and our verifier looks at no name.
pub(super) fn server_name(stream: &Stream) -> io::Result<ServerName<'static>> {
    Ok(ServerName::IpAddress(stream.tcp().peer_addr()?.ip().into()))
}

/// Puts a failed handshake into the words of the house.
pub(super) fn failed(error: &io::Error, peer: Role, address: &str, own: impl std::fmt::Display) -> Failed {
    let side = if peer == Role::Client { "client" } else { "server" };
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    let (failure, reason) = match tls {
        Some(rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(inner)))) => {
            match inner.downcast_ref::<Failed>() {
                Some(refused) => (refused.failure, refused.detail.clone()),
                None => (Failure::UntrustedPeer, inner.to_string()),
            }
        }
        Some(rustls::Error::InvalidCertificate(other)) => {
            (Failure::UntrustedPeer, format!("its certificate is refused: {other}"))
        }
        Some(rustls::Error::NoCertificatesPresented) => {
            (Failure::UntrustedPeer, "it showed no certificate, so no identity".to_owned())
        }
        Some(rustls::Error::NoApplicationProtocol) => {
            (Failure::PlaintextRefused, "its TLS is not the mesh's (foreign ALPN)".to_owned())
        }
        Some(rustls::Error::InvalidMessage(_)) if peer == Role::Client => {
            (Failure::PlaintextRefused, "it does not speak TLS (plaintext?)".to_owned())
        }
        Some(rustls::Error::InvalidMessage(_)) => {
            (Failure::Handshake, "it does not speak TLS (plaintext? is a sidecar there?)".to_owned())
        }
        Some(rustls::Error::PeerIncompatible(why)) if peer == Role::Client => {
            (Failure::PlaintextRefused, format!("its TLS is not the mesh's, which is TLS 1.3: {why:?}"))
        }
        Some(rustls::Error::AlertReceived(alert)) => {
            (Failure::Handshake, format!("it refused us with the TLS alert {alert:?}"))
        }
        None if peer == Role::Server && error.kind() == io::ErrorKind::UnexpectedEof => {
            (Failure::Handshake, "it closed the connection on our TLS (is a sidecar there?)".to_owned())
        }
        _ => (Failure::Handshake, format!("the TLS handshake failed: {error}")),
    };
    Failed::new(failure, format!("{side} {address} refused by {own}: {reason}"))
}
