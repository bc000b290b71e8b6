//! The loop that keeps us identified: ask, publish, wait for half of the life, ask again.
//!
//! One task does it all, so there is one order of events: a renewal, a changed bundle and the end of the
//! certificate are three branches of one wait. A failure never takes away what is still valid, and a clock that was
//! wrong for a moment takes away nothing for longer.

use std::{
    fs::File,
    io::Read,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result};
use aws_lc_rs::digest::{SHA256, digest};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use weft_proto::schedule;

use super::{
    Status,
    client::{BundleStream, NotGiven, Proof, obtain},
    kept::{Kept, hex},
    wake::Wake,
};
use crate::{
    config::Authority,
    tls::{Bundle, Credentials},
};

/// What others see: our credentials, none where we have no valid ones.
type Publish = watch::Sender<Option<Arc<Credentials>>>;

/// Keeps valid credentials published until the program ends.
pub async fn run(
    authority: Authority,
    publish: Publish,
    status: watch::Sender<Status>,
    random: fastrand::Rng,
) {
    let (bundles, bundle) = watch::channel(None);
    let watching = watch_bundle(authority.clone(), publish.subscribe(), bundles, random.clone());
    let renewal = Renewal {
        authority,
        publish,
        status,
        random,
        bundle,
        held: None,
        prefer_token: false,
        warned_of_token: false,
    };
    tokio::join!(renewal.run(), watching);
}

struct Renewal {
    authority: Authority,
    publish: Publish,
    status: watch::Sender<Status>,
    random: fastrand::Rng,
    /// The newest bundle of a stream that stands; none while there is no stream.
    bundle: watch::Receiver<Option<Bundle>>,
    /// The last certificate; it may have expired since.
    held: Option<Held>,
    /// There is a token that was not in use when the kept certificate was obtained: it is asked first, once.
    prefer_token: bool,
    warned_of_token: bool,
}

/// A certificate with its key.
struct Held {
    key: Vec<u8>,
    credentials: Arc<Credentials>,
    token_sha256: Option<String>,
}

impl Renewal {
    async fn run(mut self) {
        self.take_up_kept();
        let mut next = match self.valid() {
            Some(held) if !self.prefer_token => self.until_renewal(&held.credentials.clone()),
            _ => Duration::ZERO,
        };
        loop {
            self.status.send_modify(|status| status.next_attempt = Some(SystemTime::now() + next));
            self.wait(next).await;
            self.status.send_modify(|status| status.next_attempt = None);
            next = match self.renew().await {
                Ok(credentials) => {
                    self.status.send_modify(|status| {
                        (status.failures, status.last_error) = (0, None);
                        status.obtained += 1;
                    });
                    self.until_renewal(&credentials)
                }
                Err(detail) => self.note_failure(detail),
            };
            self.follow_clock();
        }
    }

    /// Waits; on the way a changed bundle is published, and a certificate that ends is withdrawn.
    async fn wait(&mut self, pause: Duration) {
        let wake = Wake::after(pause, Instant::now(), SystemTime::now());
        while let Some(nap) = wake.sleep(Instant::now(), SystemTime::now()) {
            let end = self.valid().map(|held| held.credentials.remaining(SystemTime::now()));
            tokio::select! {
                () = sleep(end.map_or(nap, |end| end.min(nap))) => self.follow_clock(),
                Ok(()) = self.bundle.changed() => {
                    if self.take_bundle() == Vouched::NoLonger {
                        return;
                    }
                }
            }
        }
    }

    /// Asks the authority, by the certificate where we have one, and by the token where that is not enough.
    async fn renew(&mut self) -> Result<Arc<Credentials>, String> {
        let held = self.valid().map(|held| held.credentials.clone());
        let limit = schedule::attempt(held.as_ref().map(|held| held.remaining(SystemTime::now())));
        let by_certificate = match &held {
            Some(held) if !self.prefer_token => Some(held.clone()),
            _ => None,
        };
        let mut reasons = Vec::new();
        if let Some(shown) = by_certificate {
            let asked = obtain(&self.authority, Proof::Certificate(&shown), Some(&shown));
            match timeout(limit, asked).await.unwrap_or_else(|_| Err(too_slow(&self.authority, limit))) {
                Ok(given) => return Ok(self.take(given.key, given.credentials, "certificate")),
                Err(not_given) if !not_given.proof_refused || self.authority.token_file.is_none() => {
                    return Err(not_given.detail);
                }
                Err(not_given) => reasons.push(not_given.detail),
            }
        }
        let token = match self.read_token() {
            Ok(token) => token,
            Err(error) => {
                self.prefer_token = false;
                reasons.push(format!("{error:#}"));
                return Err(reasons.join("; "));
            }
        };
        let asked = obtain(&self.authority, Proof::Token(&token), held.as_deref());
        match timeout(limit, asked).await.unwrap_or_else(|_| Err(too_slow(&self.authority, limit))) {
            Ok(given) => {
                self.prefer_token = false;
                Ok(self.take(given.key, given.credentials, "token"))
            }
            Err(not_given) => {
                // A new token that is refused must not cost us the certificate in hand.
                self.prefer_token &= !not_given.proof_refused;
                reasons.push(not_given.detail);
                Err(reasons.join("; "))
            }
        }
    }

    fn take(&mut self, key: Vec<u8>, credentials: Credentials, proof: &str) -> Arc<Credentials> {
        let credentials = self.with_newest_bundle(credentials);
        tracing::info!(
            id = %credentials.id(),
            serial = credentials.serial(),
            not_after = %humantime::format_rfc3339_seconds(credentials.not_after()),
            proof,
            "a certificate was obtained"
        );
        let token_sha256 = match proof {
            "token" => self.token_hash(),
            _ => self.held.as_ref().and_then(|held| held.token_sha256.clone()),
        };
        self.hold(Held { key, credentials: Arc::new(credentials), token_sha256 })
    }

    /// The stream is ahead of the answer where the roots changed in between.
    fn with_newest_bundle(&self, credentials: Credentials) -> Credentials {
        let newest = self.bundle.borrow().clone();
        match newest {
            Some(bundle) if bundle != *credentials.bundle() => match credentials.with_bundle(bundle) {
                Ok(changed) if changed.vouched_for(SystemTime::now()) => changed,
                _ => credentials,
            },
            _ => credentials,
        }
    }

    fn hold(&mut self, held: Held) -> Arc<Credentials> {
        let credentials = held.credentials.clone();
        self.publish.send_replace(Some(credentials.clone()));
        self.held = Some(held);
        self.keep();
        credentials
    }

    /// Publishes our certificate with the roots of the newest bundle.
    fn take_bundle(&mut self) -> Vouched {
        let Some(bundle) = self.bundle.borrow_and_update().clone() else { return Vouched::Still };
        let Some(held) = self.valid() else { return Vouched::Still };
        if bundle == *held.credentials.bundle() {
            return Vouched::Still;
        }
        let changed = match held.credentials.with_bundle(bundle) {
            Ok(changed) => changed,
            Err(failed) => {
                tracing::error!("a trust bundle is refused: {}", failed.detail);
                return Vouched::Still;
            }
        };
        tracing::info!(roots = changed.bundle().roots().len(), "the trust bundle changed");
        let vouched = changed.vouched_for(SystemTime::now());
        let (key, token_sha256) = (held.key.clone(), held.token_sha256.clone());
        self.hold(Held { key, credentials: Arc::new(changed), token_sha256 });
        if vouched { Vouched::Still } else { Vouched::NoLonger }
    }

    /// The certificate in hand, as long as it has not expired.
    fn valid(&self) -> Option<&Held> {
        self.held.as_ref().filter(|held| !held.credentials.remaining(SystemTime::now()).is_zero())
    }

    /// Withdraws what has expired, and publishes it again where the clock was set back since: it was ahead.
    fn follow_clock(&mut self) {
        let Some(held) = &self.held else { return };
        let valid = self.valid().map(|held| held.credentials.clone());
        match (&valid, self.publish.borrow().is_some()) {
            (None, true) => {
                tracing::error!(id = %held.credentials.id(), "our certificate has expired; we have no identity now");
            }
            (Some(_), false) => {
                tracing::warn!(id = %held.credentials.id(), "the clock was set back; our certificate is valid again");
            }
            _ => return,
        }
        self.publish.send_replace(valid);
    }

    fn note_failure(&mut self, detail: String) -> Duration {
        let failures = self.status.borrow().failures.saturating_add(1);
        let remaining = self.valid().map(|held| held.credentials.remaining(SystemTime::now()));
        let pause = schedule::pause(failures, remaining, &mut self.random);
        tracing::warn!(
            failures,
            again_in = %humantime::format_duration(Duration::from_millis(pause.as_millis() as u64)),
            "no certificate was obtained: {detail}"
        );
        self.status.send_modify(|status| {
            status.failures = failures;
            status.failed += 1;
            status.last_error = Some(detail);
        });
        pause
    }

    fn until_renewal(&mut self, credentials: &Credentials) -> Duration {
        schedule::until_renewal(credentials.remaining(SystemTime::now()), &mut self.random)
    }

    /// What a former run has left is used at once; a token that is new since is asked first.
    fn take_up_kept(&mut self) {
        let Some(folder) = &self.authority.state_dir else { return };
        match Kept::load(folder, self.authority.key_exchange) {
            Ok(None) => {}
            Ok(Some(kept)) => {
                let token = self.token_hash();
                self.prefer_token = token.is_some() && token != kept.token_sha256;
                tracing::info!(id = %kept.credentials.id(), "a kept certificate is used");
                let credentials = kept.credentials;
                self.publish.send_replace(Some(credentials.clone()));
                self.held = Some(Held { key: kept.key, credentials, token_sha256: kept.token_sha256 });
            }
            Err(error) => tracing::warn!("no kept certificate is used: {error:#}"),
        }
    }

    fn keep(&self) {
        let (Some(folder), Some(held)) = (&self.authority.state_dir, &self.held) else { return };
        let kept = Kept {
            key: held.key.clone(),
            credentials: held.credentials.clone(),
            token_sha256: held.token_sha256.clone(),
        };
        if let Err(error) = kept.save(folder) {
            tracing::error!("the certificate cannot be kept for a restart: {error:#}");
        }
    }

    fn token_hash(&self) -> Option<String> {
        let text = read_token(self.authority.token_file.as_deref()?).ok()?.0;
        Some(hex(digest(&SHA256, text.as_bytes()).as_ref()))
    }

    /// Read anew each time, so that an operator may put another one there.
    fn read_token(&mut self) -> Result<String> {
        let path = self.authority.token_file.as_deref().context(
            "there is no certificate to renew and no join token (--token-file; `weft-ca token create` makes one)",
        )?;
        let (text, mode) = read_token(path)?;
        if mode & 0o077 != 0 && !self.warned_of_token && !is_projected(path) {
            self.warned_of_token = true;
            tracing::warn!(
                "token file {} has mode {:04o}: others may read it",
                path.display(),
                mode & 0o7777
            );
        }
        Ok(text)
    }
}

/// Do the roots that we believe still vouch for ourselves?
#[derive(PartialEq, Eq)]
enum Vouched {
    Still,
    NoLonger,
}

/// A file of a projected volume is a link into a directory `..DATE` beside it. Its mode is Kubernetes' choice, and who
/// mounts the volume decides who reads it.
fn is_projected(path: &Path) -> bool {
    let real = path.canonicalize().unwrap_or_default();
    let folder = real.parent().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    folder.is_some_and(|name| name.starts_with("..2"))
}

/// No token of ours is longer.
const MAX_TOKEN_BYTES: u64 = 4096;

fn read_token(path: &Path) -> Result<(String, u32)> {
    let file = File::open(path).with_context(|| format!("token file {}", path.display()))?;
    let mode = file.metadata().with_context(|| format!("token file {}", path.display()))?.mode();
    let mut text = String::new();
    file.take(MAX_TOKEN_BYTES)
        .read_to_string(&mut text)
        .with_context(|| format!("token file {}", path.display()))?;
    let text = text.trim().to_owned();
    anyhow::ensure!(!text.is_empty(), "token file {} is empty", path.display());
    Ok((text, mode))
}

fn too_slow(authority: &Authority, limit: Duration) -> NotGiven {
    NotGiven {
        proof_refused: false,
        detail: format!("the authority {} did not answer within {} ms", authority.address, limit.as_millis()),
    }
}

/// Keeps a stream of the trust bundle open while we have credentials, and publishes what comes.
async fn watch_bundle(
    authority: Authority,
    mut credentials: watch::Receiver<Option<Arc<Credentials>>>,
    bundles: watch::Sender<Option<Bundle>>,
    mut random: fastrand::Rng,
) {
    let mut failures = 0;
    loop {
        let Ok(current) = credentials.wait_for(Option::is_some).await.map(|held| held.clone()) else {
            return;
        };
        let Some(current) = current else { continue };
        let limit = schedule::attempt(None);
        let opened = timeout(limit, BundleStream::open(&authority, &current)).await;
        match opened.unwrap_or_else(|_| Err(too_slow(&authority, limit))) {
            Ok(mut stream) => {
                let ended = loop {
                    match stream.next().await {
                        Ok(Some(bundle)) => {
                            failures = 0;
                            bundles.send_replace(Some(bundle));
                        }
                        Ok(None) => break "the authority ended it".to_owned(),
                        Err(error) => break error.detail,
                    }
                };
                tracing::debug!("the trust bundle is not watched for a moment: {ended}");
            }
            Err(error) => tracing::debug!("the trust bundle cannot be watched: {}", error.detail),
        }
        bundles.send_replace(None);
        failures += 1;
        sleep(schedule::pause(failures, Some(current.remaining(SystemTime::now())), &mut random)).await;
    }
}
