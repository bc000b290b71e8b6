//! Who we are: our certificate chain, its key, and whom we believe; made ready for handshakes once.
//!
//! Credentials never change. A renewed certificate or a new bundle makes new ones, which `identity` publishes;
//! connections that stand keep the ones they began with.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::{
    CipherSuite, ClientConfig, NamedGroup, ServerConfig,
    client::Resumption,
    crypto::{CryptoProvider, SupportedKxGroup},
    server::NoServerSessionStorage,
    sign::{CertifiedKey, SingleCertAndKey},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use weft_proto::{certificate::Leaf, names, spiffe::SpiffeId};

use super::{
    bundle::Bundle,
    judge::{ExpectClient, ExpectServer, Expected},
    verify::{Role, unix_time, verify_chain},
};
use crate::model::{Failed, Failure, KeyExchange, Result};

/// Our own identity, ready for handshakes.
pub struct Credentials {
    leaf: Leaf,
    key: Arc<CertifiedKey>,
    bundle: Bundle,
    pub(super) provider: Arc<CryptoProvider>,
    pub(super) server: Arc<ServerConfig>,
    /// What every dial begins with; its verifier expects nobody, and the dial puts its own in place.
    pub(super) client: ClientConfig,
}

impl Credentials {
    /// Makes credentials of a chain (leaf first, without the root), its key, and the bundle.
    ///
    /// # Errors
    /// [`Failure::NoIdentity`] where the leaf is not exactly one workload, is expired, does not belong to the
    /// key, or its chain does not lead to a root of the bundle.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        bundle: Bundle,
    ) -> Result<Self> {
        let leaf = verify_chain(&chain, &bundle, Role::Client, unix_time(SystemTime::now()))
            .and_then(|_| verify_chain(&chain, &bundle, Role::Server, unix_time(SystemTime::now())))
            .map_err(|reason| unusable(&reason))?;
        let provider = provider();
        let key = CertifiedKey::from_der(chain, key, &provider)
            .map_err(|error| unusable(&format!("it does not belong to the key: {error}")))?;
        Self::assemble(leaf, Arc::new(key), bundle, provider)
    }

    /// The same certificate and key with other roots to believe. It does not fail where these roots no longer
    /// vouch for ourselves: peers must be judged by the newest bundle in any case.
    ///
    /// # Errors
    /// [`Failure::NoIdentity`] where the bundle belongs to another trust domain.
    pub fn with_bundle(&self, bundle: Bundle) -> Result<Self> {
        if bundle.trust_domain() != self.bundle.trust_domain() {
            return Err(unusable(&format!(
                "the new trust bundle belongs to {}, not to {}",
                bundle.trust_domain(),
                self.bundle.trust_domain()
            )));
        }
        Self::assemble(self.leaf.clone(), self.key.clone(), bundle, self.provider.clone())
    }

    /// The same identity with keys agreed on in this way.
    ///
    /// # Errors
    /// [`Failure::NoIdentity`] where rustls refuses the configuration.
    pub fn with_key_exchange(self, key_exchange: KeyExchange) -> Result<Self> {
        Self::assemble(self.leaf, self.key, self.bundle, provider_for(key_exchange))
    }

    /// Our id.
    pub fn id(&self) -> &SpiffeId {
        &self.leaf.id
    }

    /// Our certificate is not valid before this time.
    pub fn not_before(&self) -> SystemTime {
        self.leaf.not_before
    }

    /// Our certificate is not valid after this time.
    pub fn not_after(&self) -> SystemTime {
        self.leaf.not_after
    }

    /// How much longer our certificate is valid; zero where it has expired.
    pub fn remaining(&self, now: SystemTime) -> Duration {
        self.leaf.not_after.duration_since(now).unwrap_or_default()
    }

    /// The serial number of our certificate, in hexadecimal.
    pub fn serial(&self) -> &str {
        &self.leaf.serial
    }

    /// Whom we believe.
    pub fn bundle(&self) -> &Bundle {
        &self.bundle
    }

    /// Our chain, leaf first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.key.cert
    }

    /// Do the roots of our own bundle still vouch for us?
    pub fn vouched_for(&self, now: SystemTime) -> bool {
        verify_chain(&self.key.cert, &self.bundle, Role::Client, unix_time(now)).is_ok()
    }

    /// Refuses to begin a handshake with an expired certificate.
    pub(super) fn check_own_life(&self) -> Result<()> {
        if self.remaining(SystemTime::now()).is_zero() {
            return Err(unusable(&format!(
                "it expired at {}; is the certificate authority reachable?",
                humantime::format_rfc3339_seconds(self.not_after())
            )));
        }
        Ok(())
    }

    /// The certificate with its key, for a handshake that is not between sidecars.
    pub(super) fn certified_key(&self) -> Arc<CertifiedKey> {
        self.key.clone()
    }

    fn assemble(
        leaf: Leaf,
        key: Arc<CertifiedKey>,
        bundle: Bundle,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self> {
        let bundle = bundle.with_issuer_of(&key.cert);
        let server = server_config(&key, &bundle, &provider)?;
        let nobody = ExpectServer::new(Vec::new(), Expected::Ids(Vec::new()), provider.clone());
        let client = client_config(Arc::new(nobody), Some(key.clone()), provider.clone())?;
        Ok(Credentials { leaf, key, bundle, provider, server: Arc::new(server), client })
    }
}

/// Resumption is off on both sides: every connection proves both identities by certificate, so that a removed
/// root or an expired certificate never lives on in a ticket. Idle connections hold no ticket either.
fn server_config(
    key: &Arc<CertifiedKey>,
    bundle: &Bundle,
    provider: &Arc<CryptoProvider>,
) -> Result<ServerConfig> {
    let verifier = ExpectClient::new(bundle.clone(), provider.clone());
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| unusable(&error.to_string()))?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(key.clone())));
    config.alpn_protocols =
        [names::ALPN_HTTP2, names::ALPN_HTTP1, names::ALPN_TCP_CONFIRMED, names::ALPN_TCP]
            .map(<[u8]>::to_vec)
            .to_vec();
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// A client's configuration: TLS 1.3, no name sent, no resumption, the key where there is one.
pub(super) fn client_config(
    verifier: Arc<dyn rustls::client::danger::ServerCertVerifier>,
    key: Option<Arc<CertifiedKey>>,
    provider: Arc<CryptoProvider>,
) -> Result<ClientConfig> {
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| unusable(&error.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match key {
        Some(key) => builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(key))),
        None => builder.with_no_client_auth(),
    };
    config.enable_sni = false;
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// The one crypto library, passed on explicitly: no process-wide default. AES-128 comes first (RFC 8446 9.1: the suite
/// that everyone has): with SHA-256, which processors compute themselves, a handshake is cheaper than with AES-256 and
/// SHA-384.
pub(super) fn provider_for(key_exchange: KeyExchange) -> Arc<CryptoProvider> {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    // The client's order decides.
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    let is_hybrid = |group: &&'static dyn SupportedKxGroup| group.name() == NamedGroup::X25519MLKEM768;
    match key_exchange {
        // A share for X25519 is sent along: a peer that lacks the hybrid costs no further round trip.
        KeyExchange::PostQuantum => provider.kx_groups.sort_by_key(|group| !is_hybrid(group)),
        KeyExchange::Classic => provider.kx_groups.retain(|group| !is_hybrid(group)),
    }
    Arc::new(provider)
}

/// The same where nobody has said how keys are to be agreed on.
pub(super) fn provider() -> Arc<CryptoProvider> {
    provider_for(KeyExchange::default())
}

fn unusable(reason: &str) -> Failed {
    Failed::new(Failure::NoIdentity, format!("our own certificate is unusable: {reason}"))
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({}, until {})", self.id(), humantime::format_rfc3339_seconds(self.not_after()))
    }
}
