//! The verifiers that rustls asks about a peer in the middle of a handshake.
//!
//! They hold what is expected and leave every check to `verify`. The words of a refusal travel through rustls
//! as a [`Failed`] inside its error, so that the log can name whom it was about. TLS 1.2 is never spoken.

use std::sync::Arc;

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, verify_tls13_signature},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use weft_proto::{certificate::claimed, spiffe::SpiffeId};

use super::{
    authority::Anchor,
    bundle::Bundle,
    verify::{Role, verify_chain},
};
use crate::model::{Failed, Failure, Result};

/// Judges a server: a chain to one of the anchors, and one of the expected identities.
#[derive(Debug)]
pub(super) struct ExpectServer {
    anchors: Vec<Anchor>,
    expected: Expected,
    provider: Arc<CryptoProvider>,
}

/// Whom a dial expects.
#[derive(Debug)]
pub(super) enum Expected {
    /// One of these.
    Ids(Vec<SpiffeId>),
    /// The certificate authority of whichever trust domain the anchors vouch for.
    Authority,
}

impl ExpectServer {
    pub(super) fn new(anchors: Vec<Anchor>, expected: Expected, provider: Arc<CryptoProvider>) -> Self {
        ExpectServer { anchors, expected, provider }
    }
}

impl ServerCertVerifier for ExpectServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        let chain = chain_of(end_entity, intermediates);
        self.check(&chain, now).map_err(refusal)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl ExpectServer {
    fn check(&self, chain: &[CertificateDer<'_>], now: UnixTime) -> Result<()> {
        let mut reason = "we have no root to check it against".to_owned();
        for anchor in &self.anchors {
            let verified =
                anchor.bundle(chain).and_then(|bundle| verify_chain(chain, &bundle, Role::Server, now));
            match verified {
                Ok(leaf) => return self.expected.check(&leaf.id),
                Err(why) => reason = why,
            }
        }
        Err(untrusted(chain, &reason))
    }
}

impl Expected {
    /// Is this, now proven, identity one that we look for?
    fn check(&self, id: &SpiffeId) -> Result<()> {
        let wanted = match self {
            Expected::Ids(ids) if ids.contains(id) => return Ok(()),
            Expected::Authority if id.is_authority() => return Ok(()),
            Expected::Ids(ids) => {
                ids.iter().take(SHOWN).map(SpiffeId::as_str).collect::<Vec<_>>().join(" or ")
            }
            Expected::Authority => "the certificate authority, weft-ca".to_owned(),
        };
        Err(Failed::new(Failure::WrongIdentity, format!("it is {id}; expected {wanted}")))
    }
}

/// Expected identities that a log line names.
const SHOWN: usize = 5;

/// Judges a client: it must have a certificate, and its chain must lead to our bundle.
#[derive(Debug)]
pub(super) struct ExpectClient {
    bundle: Bundle,
    provider: Arc<CryptoProvider>,
}

impl ExpectClient {
    pub(super) fn new(bundle: Bundle, provider: Arc<CryptoProvider>) -> Self {
        ExpectClient { bundle, provider }
    }
}

impl ClientCertVerifier for ExpectClient {
    fn client_auth_mandatory(&self) -> bool {
        true
    }

    /// No hints: a client of the mesh has one certificate, and strangers learn nothing.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> std::result::Result<ClientCertVerified, rustls::Error> {
        let chain = chain_of(end_entity, intermediates);
        match verify_chain(&chain, &self.bundle, Role::Client, now) {
            Ok(_) => Ok(ClientCertVerified::assertion()),
            Err(reason) => Err(refusal(untrusted(&chain, &reason))),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn chain_of<'a>(
    end_entity: &'a CertificateDer<'a>,
    intermediates: &'a [CertificateDer<'a>],
) -> Vec<CertificateDer<'a>> {
    std::iter::once(end_entity)
        .chain(intermediates)
        .map(|certificate| CertificateDer::from(certificate.as_ref()))
        .collect()
}

fn untrusted(chain: &[CertificateDer<'_>], reason: &str) -> Failed {
    let claim = chain.first().map_or_else(|| "no one".to_owned(), |leaf| claimed(leaf));
    Failed::new(Failure::UntrustedPeer, format!("it claims to be {claim}: {reason}"))
}

fn refusal(failed: Failed) -> rustls::Error {
    rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(failed))))
}

fn only_tls13() -> rustls::Error {
    rustls::Error::General("only TLS 1.3 is spoken here".to_owned())
}
