//! Our own serving certificate: asked of the authority, renewed from half of its life, and the CA bundle of the webhook kept
//! in step. A failure never takes away what is still valid.
//!
//! The order matters where the authority's root changes: the API server learns the new root before a certificate of it is
//! shown, and the old root stays in the bundle until other replicas have followed. One task does it all.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, anyhow};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, Client};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use tokio::time::{sleep, timeout};
use weft_proto::schedule;

use crate::{
    authority::{Given, Wanted, issue},
    ca_bundle::{self, Others},
    certificate::Serving,
    metrics::Metrics,
    names,
};

/// How the injector gets its certificate.
pub struct Identity {
    /// The cluster.
    pub client: Client,
    /// `HOST:PORT` of the authority.
    pub authority: String,
    /// How the authority is recognised.
    pub pin: Pin,
    /// The token of our service account, for the audience of the authority; read at every use.
    pub token_file: PathBuf,
    /// The names of our Service.
    pub dns_names: Vec<String>,
    /// None: as long as the authority gives it.
    pub lifetime: Option<Duration>,
    /// The MutatingWebhookConfiguration whose CA bundle follows.
    pub configuration: String,
    /// Where the certificate goes.
    pub serving: Arc<Serving>,
    /// The numbers.
    pub metrics: Arc<Metrics>,
}

/// Where the authority's root stands.
pub enum Pin {
    /// In this PEM file.
    File(PathBuf),
    /// In the ConfigMap of the authority's namespace, this one.
    ConfigMap(String),
}

/// The root and the bundle are looked at again after so long.
const LOOK: Duration = Duration::from_secs(10);
/// For one look at the root or the bundle: an API server that hangs must not keep us from a renewal for longer.
const ANSWER: Duration = Duration::from_secs(10);
/// API servers learn of a changed bundle by a watch.
const LEARN: Duration = Duration::from_secs(2);
/// Other replicas have followed a change of the root after so long; then the old one goes from the bundle.
const FOLLOWED: Duration = Duration::from_secs(600);

/// What the last certificate came with.
struct Held {
    pinned: Vec<CertificateDer<'static>>,
    roots: Vec<CertificateDer<'static>>,
    /// Since when these roots.
    since: SystemTime,
}

impl Identity {
    /// Keeps a valid certificate, and the CA bundle that fits it, for as long as the program runs.
    pub async fn run(self) {
        let mut random = fastrand::Rng::new();
        let mut held: Option<Held> = None;
        let (mut next, mut failures, mut bundle_failed) = (SystemTime::now(), 0, false);
        loop {
            let pinned = within(self.pinned()).await;
            let changed = matches!((&pinned, &held), (Ok(pinned), Some(held)) if *pinned != held.pinned)
                && failures == 0;
            if changed || next <= SystemTime::now() {
                match self.renew(pinned, &mut held).await {
                    Ok(not_after) => {
                        let life = not_after.duration_since(SystemTime::now()).unwrap_or_default();
                        next = SystemTime::now() + schedule::until_renewal(life, &mut random);
                        failures = 0;
                    }
                    Err(error) => {
                        failures += 1;
                        let left = self.serving.remaining(SystemTime::now());
                        let pause = schedule::pause(failures, left, &mut random);
                        next = SystemTime::now() + pause;
                        self.metrics.certificate_failures.inc();
                        let again_in = pause.as_millis();
                        tracing::warn!(failures, again_in, "no serving certificate was obtained: {error:#}");
                    }
                }
            }
            if let Some(held) = &held {
                bundle_failed = self.keep_bundle(held, bundle_failed).await;
            }
            let until_next = next.duration_since(SystemTime::now()).unwrap_or_default();
            sleep(until_next.min(LOOK)).await;
        }
    }

    /// Asks for a certificate and shows it from now on. Gives its end.
    async fn renew(
        &self,
        pinned: Result<Vec<CertificateDer<'static>>>,
        held: &mut Option<Held>,
    ) -> Result<SystemTime> {
        let pinned = pinned?;
        let token = std::fs::read_to_string(&self.token_file)
            .with_context(|| format!("{}: cannot be read", self.token_file.display()))?;
        let wanted = Wanted { token: token.trim(), dns_names: &self.dns_names, lifetime: self.lifetime };
        let limit = schedule::attempt(self.serving.remaining(SystemTime::now()));
        let Given { chain, key, roots, not_after, serial } =
            timeout(limit, issue(&self.authority, &pinned, &wanted))
                .await
                .map_err(|_| anyhow!("the authority {} did not answer within {limit:?}", self.authority))??;
        let known = held.as_ref().filter(|held| held.roots == roots).map(|held| held.since);
        if known.is_none() {
            self.introduce(&roots).await?;
        }
        self.serving.set(chain, key, Some(not_after))?;
        self.metrics.obtained(not_after);
        let until = humantime::format_rfc3339_seconds(not_after);
        tracing::info!(serial, not_after = %until, "a serving certificate was obtained");
        *held = Some(Held { pinned, roots, since: known.unwrap_or_else(SystemTime::now) });
        Ok(not_after)
    }

    /// Has the API server believe new roots, before a certificate of them is shown. Without a certificate that still serves
    /// nothing is lost by showing it first.
    async fn introduce(&self, roots: &[CertificateDer<'static>]) -> Result<()> {
        let written = within(ca_bundle::write(&self.client, &self.configuration, roots, Others::Keep)).await;
        match (written, self.serving.remaining(SystemTime::now())) {
            (Ok(true), Some(_)) => sleep(LEARN).await,
            (Err(error), Some(_)) => return Err(error.context("the CA bundle cannot be written first")),
            // The bundle is written below, again and again.
            (_, None) | (Ok(false), _) => {}
        }
        Ok(())
    }

    /// Says whether it failed.
    async fn keep_bundle(&self, held: &Held, failed_before: bool) -> bool {
        let age = held.since.elapsed().unwrap_or_default();
        let others = if age < FOLLOWED { Others::Keep } else { Others::Remove };
        match within(ca_bundle::write(&self.client, &self.configuration, &held.roots, others)).await {
            Ok(false) => false,
            Ok(true) => {
                tracing::info!(configuration = self.configuration, "the CA bundle was written");
                false
            }
            Err(error) => {
                self.metrics.ca_bundle_failures.inc();
                if !failed_before {
                    tracing::warn!("the CA bundle cannot be written: {error:#}; it is tried again");
                }
                true
            }
        }
    }

    /// The root of the authority, as it is now.
    async fn pinned(&self) -> Result<Vec<CertificateDer<'static>>> {
        let (text, place) = match &self.pin {
            Pin::File(path) => {
                let text =
                    std::fs::read(path).with_context(|| format!("{}: cannot be read", path.display()))?;
                (text, path.display().to_string())
            }
            Pin::ConfigMap(namespace) => {
                let place = format!("ConfigMap {} of namespace {namespace}", names::ROOT_CONFIG_MAP);
                let api = Api::<ConfigMap>::namespaced(self.client.clone(), namespace);
                let map = api.get(names::ROOT_CONFIG_MAP).await.with_context(|| place.clone())?;
                let text = map.data.and_then(|mut data| data.remove(names::ROOT_KEY));
                (text.unwrap_or_default().into_bytes(), place)
            }
        };
        let roots: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&text)
            .collect::<Result<_, _>>()
            .map_err(|error| anyhow!("{place}: not certificates in PEM: {error}"))?;
        if roots.is_empty() {
            return Err(anyhow!("{place}: no certificate in PEM"));
        }
        Ok(roots)
    }
}

async fn within<Answer>(asking: impl Future<Output = Result<Answer>>) -> Result<Answer> {
    timeout(ANSWER, asking)
        .await
        .unwrap_or_else(|_| Err(anyhow!("the API server did not answer within {ANSWER:?}")))
}
