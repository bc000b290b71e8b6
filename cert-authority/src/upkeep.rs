//! What must be done again and again: the issuing certificate and our own renewed in time, `roots.pem` read
//! again, old tokens forgotten, the audit taken up again where it could not be written.
//!
//! Each round looks at the clock, which may have jumped in either direction since the last one.
//!
//! A directory that is refused while we run changes nothing: the last good state stays, an error is logged once
//! and counted each round.
//!
//! The audit may block for as long as nobody reads it, and tokens may be many: both are kept on threads that may block,
//! one for each, and the rounds go on meanwhile.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Result, anyhow};
use rcgen::{KeyPair, PublicKeyData};
use rustls::{RootCertStore, ServerConfig, crypto::CryptoProvider, server::WebPkiClientVerifier};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::{
    sync::{Notify, watch},
    task::spawn_blocking,
    time::timeout,
};

use crate::{
    audit::Audit,
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
    begins: SystemTime,
    due: SystemTime,
}

impl Tls {
    /// Half of its life is over, or it has not begun: the clock was ahead when it was made.
    fn is_due(&self, now: SystemTime) -> bool {
        self.due <= now || now < self.begins
    }
}

/// The upkeep, and where it publishes.
pub struct Upkeep {
    /// Where everything is kept.
    pub directory: Directory,
    /// The join tokens.
    pub tokens: Tokens,
    /// Where every decision is written.
    pub audit: Arc<Audit>,
    /// The numbers.
    pub metrics: Arc<Metrics>,
    /// An operator wants everything read again now.
    pub reread: Arc<Notify>,
    /// Who signs.
    pub authority_sender: watch::Sender<Arc<Authority>>,
    /// How we serve.
    pub tls_sender: watch::Sender<Arc<Tls>>,
}

impl Upkeep {
    /// Runs until the program ends.
    pub async fn run(self) {
        let (mut failing, mut reopen, mut stalled) = (false, false, false);
        let (mut keeping, mut pruning) = (spawn_blocking(|| ()), spawn_blocking(|| ()));
        for round in 1_u32.. {
            if timeout(UPKEEP, self.reread.notified()).await.is_ok() {
                tracing::info!("SIGHUP: {ROOTS_FILE} is read again");
                (failing, reopen) = (false, true);
            }
            stalled = self.tell_of_stall(stalled);
            if keeping.is_finished() {
                let (audit, metrics, reopen) =
                    (self.audit.clone(), self.metrics.clone(), std::mem::take(&mut reopen));
                keeping = spawn_blocking(move || keep_audit(&audit, &metrics, reopen));
            }
            if let Err(error) = self.round(SystemTime::now()) {
                self.metrics.upkeep_failures.get_or_create(&[("subject", "state")]).inc();
                if !failing {
                    tracing::error!("the directory is refused, the last good state stays: {error:#}");
                }
                failing = true;
            } else {
                failing = false;
            }
            if round % PRUNE_EVERY == 0 && pruning.is_finished() {
                let (tokens, metrics) = (self.tokens.clone(), self.metrics.clone());
                pruning = spawn_blocking(move || prune(&tokens, &metrics));
            }
        }
    }

    /// Says when the audit begins or ceases to wait for whoever reads it, and counts each round of waiting.
    fn tell_of_stall(&self, before: bool) -> bool {
        let stalled = self.audit.has_stalled();
        match (before, stalled) {
            (false, true) => tracing::error!(
                "the audit is not taken: whoever reads it (a pipe?) has stalled; nothing is given until he reads on"
            ),
            (true, false) => tracing::info!("the audit is taken again"),
            _ => {}
        }
        if stalled {
            self.metrics.upkeep_failures.get_or_create(&[("subject", "audit")]).inc();
        }
        stalled
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
        } else if self.tls_sender.borrow().is_due(now) {
            self.tls_sender.send_replace(Arc::new(make_tls(&current, now)?));
        }
        Ok(())
    }
}

/// What fails here has been logged by the audit when it began to fail.
fn keep_audit(audit: &Audit, metrics: &Metrics, reopen: bool) {
    if reopen {
        match audit.reopen() {
            Ok(true) => tracing::info!("the audit file was opened again"),
            Ok(false) => tracing::info!("the audit goes to standard output, which is not opened again"),
            Err(error) => tracing::error!("the audit file was not opened again: {error:#}"),
        }
    }
    let now = SystemTime::now();
    if audit.check(now).and_then(|()| audit.sum_up(now)).is_err() {
        metrics.upkeep_failures.get_or_create(&[("subject", "audit")]).inc();
    }
}

fn prune(tokens: &Tokens, metrics: &Metrics) {
    if let Err(error) = tokens.prune(SystemTime::now()) {
        metrics.upkeep_failures.get_or_create(&[("subject", "tokens")]).inc();
        tracing::warn!("some old tokens could not be removed: {error:#}");
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
    let issued = authority.sign(&request, &authority.own_id()?, &[], OWN_LIFETIME, now)?;
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
    Ok(Tls { config: Arc::new(config), begins: issued.leaf.not_before, due: now + life / 2 })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 3600);

    struct Home {
        _outer: tempfile::TempDir,
        upkeep: Upkeep,
        now: SystemTime,
    }

    fn home() -> Home {
        let outer = tempfile::tempdir().unwrap();
        let (directory, now) = (Directory::create(&outer.path().join("d")).unwrap(), SystemTime::now());
        let authority = Authority::init(&directory, "weft.local".parse().unwrap(), now).unwrap();
        let tls = make_tls(&authority, now).unwrap();
        let upkeep = Upkeep {
            tokens: Tokens::open(&directory).unwrap(),
            directory,
            audit: Arc::new(Audit::open(Some(&outer.path().join("audit"))).unwrap()),
            metrics: Arc::default(),
            reread: Arc::default(),
            authority_sender: watch::channel(Arc::new(authority)).0,
            tls_sender: watch::channel(Arc::new(tls)).0,
        };
        Home { _outer: outer, upkeep, now }
    }

    impl Home {
        fn is_good(&self, now: SystemTime) -> bool {
            let tls = self.upkeep.tls_sender.borrow().clone();
            self.upkeep.authority_sender.borrow().check_time(now).is_ok()
                && tls.begins <= now
                && now < tls.due
        }
    }

    #[test]
    fn a_clock_that_jumps_ahead_and_back_costs_nothing_but_a_round() {
        let home = home();
        for now in
            [home.now, home.now + 50 * DAY, home.now, home.now - Duration::from_secs(20), home.now + DAY]
        {
            home.upkeep.round(now).unwrap();
            assert!(home.is_good(now), "{now:?}");
        }
    }

    #[test]
    fn a_clock_outside_the_life_of_the_root_changes_nothing() {
        let home = home();
        let before = home.upkeep.authority_sender.borrow().clone();
        for wrong in [home.now + 4000 * DAY, home.now - DAY] {
            assert!(home.upkeep.round(wrong).is_err(), "{wrong:?}");
        }
        home.upkeep.round(home.now).unwrap();
        assert!(home.is_good(home.now));
        assert!(Arc::ptr_eq(&before, &home.upkeep.authority_sender.borrow()));
    }
}
