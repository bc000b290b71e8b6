//! What must be done again and again: the issuing certificate and our own renewed in time, `roots.pem` read
//! again, old tokens forgotten.
//!
//! A directory that is refused while we run changes nothing: the last good state stays, an error is logged once
//! and counted each round.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Result, anyhow};
use rcgen::{KeyPair, PublicKeyData};
use rustls::{RootCertStore, ServerConfig, crypto::CryptoProvider, server::WebPkiClientVerifier};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::{sync::watch, time::sleep};

use crate::{
    authority::{Authority, ROOTS_FILE},
    directory::Directory,
    metrics::Metrics,
    request::Request,
    token::Tokens,
};

/// Between two rounds.
const UPKEEP: Duration = Duration::from_secs(2);
/// Rounds between two looks for tokens to forget: an hour.
const PRUNE_EVERY: u32 = 1800;
/// How long our own TLS certificate lives.
const OWN_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// Our TLS, and when it must be made anew.
pub struct Tls {
    /// For the next handshake.
    pub config: Arc<ServerConfig>,
    due: SystemTime,
}

/// The upkeep, and where it publishes.
pub struct Upkeep {
    /// Where everything is kept.
    pub directory: Directory,
    /// The join tokens.
    pub tokens: Tokens,
    /// The numbers.
    pub metrics: Arc<Metrics>,
    /// Who signs.
    pub authority_sender: watch::Sender<Arc<Authority>>,
    /// How we serve.
    pub tls_sender: watch::Sender<Arc<Tls>>,
}

impl Upkeep {
    /// Runs until the program ends.
    pub async fn run(self) {
        let mut failing = false;
        for round in 1_u32.. {
            sleep(UPKEEP).await;
            if let Err(error) = self.round(SystemTime::now()) {
                self.metrics.upkeep_failures.get_or_create(&[("subject", "state")]).inc();
                if !failing {
                    tracing::error!("the directory is refused, the last good state stays: {error:#}");
                }
                failing = true;
            } else {
                failing = false;
            }
            if round % PRUNE_EVERY == 0
                && let Err(error) = self.tokens.prune(SystemTime::now())
            {
                self.metrics.upkeep_failures.get_or_create(&[("subject", "tokens")]).inc();
                tracing::warn!("old tokens could not be removed: {error:#}");
            }
        }
    }

    /// Renews what is due, and takes up changed roots.
    fn round(&self, now: SystemTime) -> Result<()> {
        let current = self.authority_sender.borrow().clone();
        let next = if current.issuing_is_due(now) {
            let renewed = current.renew_issuing(&self.directory, now)?;
            tracing::info!("the issuing certificate was renewed");
            Some(renewed)
        } else if current.roots_changed(&self.directory)? {
            let loaded = Authority::load(&self.directory, now)?;
            tracing::info!(roots = loaded.roots().len(), "{ROOTS_FILE} changed");
            Some(loaded)
        } else {
            None
        };
        if let Some(authority) = next {
            let authority = Arc::new(authority);
            self.tls_sender.send_replace(Arc::new(make_tls(&authority, now)?));
            self.metrics.set_ends(authority.root_not_after(), authority.issuing_not_after());
            self.authority_sender.send_replace(authority);
        } else if self.tls_sender.borrow().due <= now {
            self.tls_sender.send_replace(Arc::new(make_tls(&current, now)?));
        }
        Ok(())
    }
}

/// Signs a certificate for ourselves; the chain shows the root too, so that a client that knows only its
/// SHA-256 can find it.
///
/// # Errors
/// The authority cannot sign.
pub fn make_tls(authority: &Authority, now: SystemTime) -> Result<Tls> {
    let key = KeyPair::generate()?;
    let request = Request { public_key: key.subject_public_key_info() };
    let issued = authority.sign(&request, &authority.own_id()?, OWN_LIFETIME, now)?;
    let mut chain = issued.chain;
    chain.push(authority.root().clone());
    let provider: Arc<CryptoProvider> = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    for root in authority.roots() {
        roots.add(root.clone())?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .allow_unauthenticated()
        .build()
        .map_err(|error| anyhow!("{error}"))?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    // No resumption: a renewal proves its certificate on its own connection.
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    let life = issued.leaf.not_after.duration_since(now).unwrap_or_default();
    Ok(Tls { config: Arc::new(config), due: now + life / 2 })
}
