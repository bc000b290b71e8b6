//! The client of the certificate authority: one call for a serving certificate, on a connection of its own, by the token of
//! our service account. Nothing is sent before the authority has proven itself by a root that is pinned.

use std::{
    io,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, anyhow, bail};
use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, KeyPair};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, OtherError, RootCertStore, SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{CryptoProvider, verify_tls13_signature},
    server::ParsedCertificate,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::Endpoint;
use tower::service_fn;
use weft_proto::{
    ca::{IssueRequest, certificate_authority_client::CertificateAuthorityClient},
    certificate::Leaf,
};

/// What is asked for.
pub struct Wanted<'a> {
    /// The token of our service account.
    pub token: &'a str,
    /// The names of our Service.
    pub dns_names: &'a [String],
    /// None: as long as the authority gives it.
    pub lifetime: Option<Duration>,
}

/// A certificate that was given.
pub struct Given {
    /// The leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's key.
    pub key: PrivateKeyDer<'static>,
    /// The trust bundle of the authority.
    pub roots: Vec<CertificateDer<'static>>,
    /// When the leaf ends.
    pub not_after: SystemTime,
    /// Its serial number.
    pub serial: String,
}

/// A chain and a few roots.
const MAX_MESSAGE: usize = 256 * 1024;
/// Characters of an answer that the log shows.
const SHOWN: usize = 300;

/// Makes a key and has it certified by the authority at `HOST:PORT`, which must prove itself by one of the roots. The caller
/// sets the time limit.
///
/// # Errors
/// It is not reached or not believed, or it refuses.
pub async fn issue(address: &str, roots: &[CertificateDer<'static>], wanted: &Wanted<'_>) -> Result<Given> {
    let key = KeyPair::generate()?;
    let csr = CertificateParams::default().serialize_request(&key)?;
    let lifetime = wanted.lifetime.map_or(0, |lifetime| lifetime.as_secs());
    let request = IssueRequest {
        csr: csr.der().to_vec(),
        join_token: wanted.token.to_owned(),
        lifetime_seconds: u32::try_from(lifetime).unwrap_or(u32::MAX),
        dns_names: wanted.dns_names.to_vec(),
    };
    let mut stream = Some(TokioIo::new(connect(address, roots).await?));
    let once = service_fn(move |_| {
        std::future::ready(stream.take().ok_or(io::Error::from(io::ErrorKind::NotConnected)))
    });
    let channel = Endpoint::from_static("http://weft-ca").connect_with_connector(once).await?;
    let mut client = CertificateAuthorityClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
    let answer = client.issue(request).await.map_err(|status| {
        let words: String = status.message().chars().take(SHOWN).collect();
        anyhow!("the authority {address} answers {:?}: {words}", status.code())
    })?;
    let answer = answer.into_inner();
    let chain: Vec<CertificateDer<'static>> = answer.chain.into_iter().map(CertificateDer::from).collect();
    let (leaf, names) = Leaf::parse_serving(chain.first().context("the authority gave an empty chain")?)?;
    if names != wanted.dns_names {
        bail!("the authority gave a certificate for {names:?} instead of {:?}", wanted.dns_names);
    }
    let roots: Vec<CertificateDer<'static>> =
        answer.bundle.unwrap_or_default().roots.into_iter().map(CertificateDer::from).collect();
    if roots.is_empty() {
        bail!("the authority gave no root");
    }
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(|error| anyhow!("{error}"))?;
    Ok(Given { chain, key, roots, not_after: leaf.not_after, serial: leaf.serial })
}

async fn connect(
    address: &str,
    roots: &[CertificateDer<'static>],
) -> Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = ExpectAuthority::new(roots, Arc::clone(&provider))?;
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let stream = TcpStream::connect(address)
        .await
        .with_context(|| format!("the authority {address} cannot be reached"))?;
    let name = ServerName::IpAddress(stream.peer_addr()?.ip().into());
    let connecting = TlsConnector::from(Arc::new(config)).connect(name, stream).await;
    connecting.with_context(|| format!("the authority {address} has not proven itself"))
}

/// Verifies the authority: a chain to one of the pinned roots, and the identity that no workload gets.
#[derive(Debug)]
struct ExpectAuthority {
    roots: RootCertStore,
    provider: Arc<CryptoProvider>,
}

impl ExpectAuthority {
    fn new(roots: &[CertificateDer<'static>], provider: Arc<CryptoProvider>) -> Result<Self> {
        let mut store = RootCertStore::empty();
        for root in roots {
            store.add(root.clone()).context("the root of the authority is not usable")?;
        }
        Ok(ExpectAuthority { roots: store, provider })
    }
}

impl ServerCertVerifier for ExpectAuthority {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let algorithms = self.provider.signature_verification_algorithms.all;
        let parsed = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, algorithms)?;
        match Leaf::parse(end_entity) {
            Ok(leaf) if leaf.id.is_authority() => Ok(ServerCertVerified::assertion()),
            Ok(leaf) => {
                Err(refusal(&format!("it is {}; expected the certificate authority, weft-ca", leaf.id)))
            }
            Err(error) => Err(refusal(&error.to_string())),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(refusal("TLS 1.2 is not spoken with the authority"))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn refusal(words: &str) -> rustls::Error {
    let error: Box<dyn std::error::Error + Send + Sync> = words.into();
    CertificateError::Other(OtherError(Arc::from(error))).into()
}
