//! The handshake with the certificate authority, which must prove itself before a token is sent.
//!
//! It is the one connection whose far side is no sidecar: it speaks gRPC (ALPN `h2`), it takes a client without
//! a certificate, and at first nothing is known of its trust domain but a root, or a root's SHA-256.

use std::{io, sync::Arc};

use aws_lc_rs::digest::{SHA256, digest};
use rustls_pki_types::CertificateDer;
use tokio_rustls::{TlsConnector, TlsStream};
use weft_proto::{certificate::Leaf, spiffe::TrustDomain};

use super::{
    bundle::Bundle,
    credentials::{Credentials, client_config, provider_for},
    handshake::{failed, peer_address, proven_leaf, server_name},
    judge::{ExpectServer, Expected},
    verify::Role,
};
use crate::{
    model::{Failed, Failure, KeyExchange, Result},
    net::Stream,
};

/// What a server may prove itself against.
#[derive(Debug, Clone)]
pub enum Anchor {
    /// Roots that we have, of a known trust domain.
    Bundle(Bundle),
    /// Roots that an operator gave us; the server says which trust domain is theirs.
    Roots(Vec<CertificateDer<'static>>),
    /// The SHA-256 of a root's DER; the server shows that root in its chain.
    Sha256([u8; 32]),
}

impl Anchor {
    /// The roots to check this chain against; the error is a reason to log.
    pub(super) fn bundle(&self, chain: &[CertificateDer<'_>]) -> std::result::Result<Bundle, String> {
        let roots = match self {
            Anchor::Bundle(bundle) => return Ok(bundle.clone()),
            Anchor::Roots(roots) => roots.clone(),
            Anchor::Sha256(hash) => {
                let pinned =
                    |certificate: &&CertificateDer<'_>| digest(&SHA256, certificate).as_ref() == hash;
                let root = chain.iter().find(pinned);
                let root = root.ok_or("no certificate of its chain has the SHA-256 that we pinned")?;
                vec![root.clone().into_owned()]
            }
        };
        let leaf = chain.first().ok_or("it showed no certificate")?;
        let claim = Leaf::parse(leaf).map_err(|error| error.to_string())?;
        let trust_domain: TrustDomain =
            claim.id.trust_domain().parse().map_err(|error| format!("{error}"))?;
        Bundle::new(trust_domain, roots).map_err(|failed| failed.detail)
    }
}

/// ALPN of gRPC.
const HTTP2: &[u8] = b"h2";

/// Secures a connection to the authority. It must lead to one of the anchors and be the authority of its trust
/// domain, which is returned. With credentials we show our own certificate (renewal), without we show none (a
/// token follows).
///
/// # Errors
/// [`Failure::UntrustedPeer`], [`Failure::WrongIdentity`] or [`Failure::Handshake`]; nothing was sent then.
pub async fn connect_authority(
    stream: Stream,
    anchors: Vec<Anchor>,
    credentials: Option<&Credentials>,
    key_exchange: KeyExchange,
) -> Result<(Stream, TrustDomain)> {
    let address = peer_address(&stream);
    let provider = provider_for(key_exchange);
    let verifier = ExpectServer::new(anchors, Expected::Authority, provider.clone());
    let key = credentials.map(Credentials::certified_key);
    let mut config = client_config(Arc::new(verifier), key, provider)?;
    config.alpn_protocols = vec![HTTP2.to_vec()];
    let own = credentials.map_or("a workload without identity", |own| own.id().as_str());
    let explain = |error: io::Error| failed(&error, Role::Server, &address, own);
    let name = server_name(&stream).map_err(explain)?;
    let tls = TlsConnector::from(Arc::new(config)).connect(name, stream).await.map_err(explain)?;
    if tls.get_ref().1.alpn_protocol() != Some(HTTP2) {
        let detail = format!("server {address} did not agree to HTTP/2 (ALPN); is it weft-ca?");
        return Err(Failed::new(Failure::Handshake, detail));
    }
    let leaf = proven_leaf(tls.get_ref().1.peer_certificates().unwrap_or_default(), &address)?;
    let trust_domain = leaf
        .id
        .trust_domain()
        .parse()
        .map_err(|error| Failed::new(Failure::UntrustedPeer, format!("server {address}: {error}")))?;
    Ok((TlsStream::from(tls).into(), trust_domain))
}
