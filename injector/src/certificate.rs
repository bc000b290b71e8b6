//! The serving certificate in use: set by whoever renews it, shown by the HTTPS server in every new handshake. It comes from
//! the authority ([`crate::identity`]) or from two files of an operator's own, which are read again when they change.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result};
use arc_swap::ArcSwapOption;
use rustls::ServerConfig;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio::time::sleep;

const RELOAD: Duration = Duration::from_secs(5);

/// The certificate that new connections are shown; none at first where it comes from the authority.
#[derive(Default)]
pub struct Serving(ArcSwapOption<Held>);

struct Held {
    config: Arc<ServerConfig>,
    /// None where it is the operator's own.
    not_after: Option<SystemTime>,
}

impl Serving {
    /// Takes the place of the certificate before.
    ///
    /// # Errors
    /// Chain and key do not fit.
    pub fn set(
        &self,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        not_after: Option<SystemTime>,
    ) -> Result<()> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        self.0.store(Some(Arc::new(Held { config: Arc::new(config), not_after })));
        Ok(())
    }

    /// For the next handshake.
    pub fn config(&self) -> Option<Arc<ServerConfig>> {
        self.0.load().as_ref().map(|held| Arc::clone(&held.config))
    }

    /// How long the certificate is still valid; none where there is none that is. One of the operator's own counts as
    /// valid for ever: he renews it.
    pub fn remaining(&self, now: SystemTime) -> Option<Duration> {
        let held = self.0.load();
        let Some(not_after) = held.as_ref()?.not_after else { return Some(Duration::MAX) };
        not_after.duration_since(now).ok().filter(|left| !left.is_zero())
    }
}

/// A serving certificate in two PEM files.
#[derive(Debug, Clone)]
pub struct Files {
    /// The chain, the leaf first.
    pub chain: PathBuf,
    /// The leaf's key.
    pub key: PathBuf,
}

impl Files {
    /// Reads both.
    ///
    /// # Errors
    /// One is missing or damaged, or they do not fit.
    pub fn read(&self, serving: &Serving) -> Result<()> {
        let chain = CertificateDer::pem_file_iter(&self.chain)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .with_context(|| format!("{}: not a certificate in PEM", self.chain.display()))?;
        let key = PrivateKeyDer::from_pem_file(&self.key)
            .with_context(|| format!("{}: not a key in PEM", self.key.display()))?;
        serving
            .set(chain, key, None)
            .with_context(|| format!("{}: does not fit its key", self.chain.display()))
    }

    /// Reads them again whenever they change. A bad one is named in the log, and the last good one goes on. Never ends.
    pub async fn follow(self, serving: Arc<Serving>) {
        let mut seen = self.changed();
        loop {
            sleep(RELOAD).await;
            let now = self.changed();
            if now == seen {
                continue;
            }
            match self.read(&serving) {
                Ok(()) => {
                    seen = now;
                    tracing::info!(file = %self.chain.display(), "the serving certificate was read again");
                }
                Err(error) => tracing::warn!("{error:#}; the last good certificate goes on"),
            }
        }
    }

    fn changed(&self) -> Option<(SystemTime, SystemTime)> {
        let time = |file| std::fs::metadata(file).and_then(|data| data.modified()).ok();
        Some((time(&self.chain)?, time(&self.key)?))
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    #[test]
    fn a_certificate_counts_until_its_end() {
        let serving = Serving::default();
        let now = SystemTime::now();
        assert!(serving.config().is_none() && serving.remaining(now).is_none());
        let key = KeyPair::generate().unwrap();
        let leaf = CertificateParams::default().self_signed(&key).unwrap();
        let private = || PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let minute = Duration::from_secs(60);
        serving.set(vec![leaf.der().clone()], private(), Some(now + minute)).unwrap();
        assert_eq!((serving.remaining(now), serving.remaining(now + minute)), (Some(minute), None));
        assert!(serving.config().is_some(), "an expired one is shown until there is another");
        serving.set(vec![leaf.der().clone()], private(), None).unwrap();
        assert!(serving.remaining(now + minute).is_some());
        let other = PrivateKeyDer::try_from(KeyPair::generate().unwrap().serialize_der()).unwrap();
        assert!(serving.set(vec![leaf.der().clone()], other, None).is_err());
    }
}
