//! Workloads of a Kubernetes cluster prove themselves by the token of their service account, which the kubelet puts into
//! their volume for the audience `weft-ca`. The cluster itself says whether a token is good (TokenReview), so that one of a
//! deleted pod, of another audience or of another cluster is none. The trust bundle goes into a ConfigMap.
//!
//! <https://kubernetes.io/docs/reference/kubernetes-api/authentication-resources/token-review-v1/>

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::{Context, Result, anyhow, bail};
use k8s_openapi::api::{
    authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus},
    core::v1::ConfigMap,
};
use kube::{
    Api, Client,
    api::{ObjectMeta, Patch, PatchParams, PostParams},
};
use rustls_pki_types::CertificateDer;
use tokio::{
    sync::{Semaphore, watch},
    time::{sleep, timeout},
};
use weft_proto::spiffe::{SpiffeId, TrustDomain};

use crate::authority::Authority;

/// For whom a token must be.
pub const AUDIENCE: &str = "weft-ca";
/// The ConfigMap with the roots, in the authority's namespace.
pub const ROOT_CONFIG_MAP: &str = "weft-root";
/// The key in it.
pub const ROOT_KEY: &str = "root.pem";

/// What precedes namespace and name in the user of a service account.
const USER_PREFIX: &str = "system:serviceaccount:";
/// In the user's extra fields: the pod that the token is bound to.
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
/// Reviews under way; the API server is asked for no more at a time.
const REVIEWS: usize = 32;
/// For one review, with the wait for its turn.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(5);
/// After a failed write of the bundle.
const PAUSE: Duration = Duration::from_secs(5);
/// The bundle is written again after so long, should somebody have changed it.
const REWRITE: Duration = Duration::from_secs(60);

/// A cluster that vouches for its workloads.
#[derive(Clone)]
pub struct Cluster {
    client: Client,
    trust_domain: TrustDomain,
    turns: Arc<Semaphore>,
}

/// A workload that the cluster vouches for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attested {
    /// Who it is.
    pub id: SpiffeId,
    /// Its pod, where the token is bound to one.
    pub pod: Option<String>,
}

/// Why a token proves nothing.
#[derive(Debug)]
pub enum Unproven {
    /// The cluster says so.
    Refused(String),
    /// The cluster could not be asked.
    Unknown(String),
}

/// Is this the token of a service account, which is a JWT, and no join token?
pub fn is_service_account_token(text: &str) -> bool {
    text.split('.').count() == 3 && text.starts_with("ey")
}

impl Cluster {
    /// The cluster that this program runs in, or that `KUBECONFIG` names.
    ///
    /// # Errors
    /// There is none.
    pub async fn connect(trust_domain: TrustDomain) -> Result<Self> {
        let client = Client::try_default().await.context("no cluster: neither in a pod nor by KUBECONFIG")?;
        Ok(Cluster { client, trust_domain, turns: Arc::new(Semaphore::new(REVIEWS)) })
    }

    /// Asks the cluster who holds a token.
    ///
    /// # Errors
    /// The token is not good, or nobody could say.
    pub async fn review(&self, token: &str) -> Result<Attested, Unproven> {
        let asking = async {
            let _turn = self.turns.acquire().await;
            let review = TokenReview {
                spec: TokenReviewSpec {
                    audiences: Some(vec![AUDIENCE.to_owned()]),
                    token: Some(token.to_owned()),
                },
                ..TokenReview::default()
            };
            Api::<TokenReview>::all(self.client.clone()).create(&PostParams::default(), &review).await
        };
        match timeout(REVIEW_TIMEOUT, asking).await {
            Ok(Ok(review)) => attested(review.status.unwrap_or_default(), &self.trust_domain)
                .map_err(|error| Unproven::Refused(format!("{error:#}"))),
            Ok(Err(error)) => Err(Unproven::Unknown(format!("the cluster cannot review the token: {error}"))),
            Err(_) => Err(Unproven::Unknown(format!(
                "the cluster did not review the token within {} s",
                REVIEW_TIMEOUT.as_secs()
            ))),
        }
    }

    /// Keeps the ConfigMap with the roots as they are, for as long as the program runs.
    pub async fn publish_roots(self, mut authority: watch::Receiver<Arc<Authority>>) {
        let mut failed = false;
        loop {
            let roots = pem(authority.borrow_and_update().roots());
            let rest = match self.write_roots(roots).await {
                Ok(()) => {
                    failed = false;
                    REWRITE
                }
                Err(error) => {
                    if !std::mem::replace(&mut failed, true) {
                        tracing::warn!(
                            "the ConfigMap {ROOT_CONFIG_MAP} cannot be written: {error}; it is tried again"
                        );
                    }
                    PAUSE
                }
            };
            tokio::select! {
                () = sleep(rest) => {}
                changed = authority.changed() => if changed.is_err() { return },
            }
        }
    }

    async fn write_roots(&self, roots: String) -> Result<(), kube::Error> {
        let map = ConfigMap {
            metadata: ObjectMeta { name: Some(ROOT_CONFIG_MAP.to_owned()), ..ObjectMeta::default() },
            data: Some(BTreeMap::from([(ROOT_KEY.to_owned(), roots)])),
            ..ConfigMap::default()
        };
        let api = Api::<ConfigMap>::default_namespaced(self.client.clone());
        let ours = PatchParams::apply("weft-ca").force();
        api.patch(ROOT_CONFIG_MAP, &ours, &Patch::Apply(&map)).await.map(drop)
    }
}

/// What the cluster says of a token.
fn attested(status: TokenReviewStatus, trust_domain: &TrustDomain) -> Result<Attested> {
    if status.authenticated != Some(true) {
        bail!("the token is not good: {}", status.error.unwrap_or_else(|| "the cluster says no more".into()));
    }
    if !status.audiences.is_some_and(|audiences| audiences.iter().any(|audience| audience == AUDIENCE)) {
        bail!("the token is not for the audience {AUDIENCE}");
    }
    let user = status.user.unwrap_or_default();
    let name = user.username.unwrap_or_default();
    let account = name.strip_prefix(USER_PREFIX).and_then(|rest| rest.split_once(':'));
    let (namespace, account) = account.with_context(|| format!("{name:?} is no service account"))?;
    let text = format!("spiffe://{trust_domain}/ns/{namespace}/sa/{account}");
    let id = text.parse().map_err(|error| anyhow!("{text} is no identity: {error}"))?;
    let pod =
        user.extra.and_then(|mut extra| extra.remove(POD_NAME)).and_then(|names| names.into_iter().next());
    Ok(Attested { id, pod })
}

fn pem(roots: &[CertificateDer<'static>]) -> String {
    let one = |root: &CertificateDer<'_>| pem::Pem::new("CERTIFICATE", root.to_vec());
    pem::encode_many(&roots.iter().map(one).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::authentication::v1::UserInfo;

    use super::*;

    fn status(username: &str, audiences: &[&str]) -> TokenReviewStatus {
        TokenReviewStatus {
            authenticated: Some(true),
            audiences: Some(audiences.iter().map(|audience| (*audience).to_owned()).collect()),
            user: Some(UserInfo {
                username: Some(username.to_owned()),
                extra: Some(BTreeMap::from([(POD_NAME.to_owned(), vec!["orders-1".to_owned()])])),
                ..UserInfo::default()
            }),
            error: None,
        }
    }

    #[test]
    fn a_service_account_is_its_namespace_and_name() {
        let domain: TrustDomain = "weft.local".parse().unwrap();
        let good = attested(status("system:serviceaccount:shop:orders", &["weft-ca"]), &domain).unwrap();
        assert_eq!(good.id.to_string(), "spiffe://weft.local/ns/shop/sa/orders");
        assert_eq!(good.pod.as_deref(), Some("orders-1"));
    }

    #[test]
    fn what_the_cluster_does_not_vouch_for_is_refused_with_the_reason() {
        let domain: TrustDomain = "weft.local".parse().unwrap();
        let unknown =
            TokenReviewStatus { error: Some("token has expired".into()), ..TokenReviewStatus::default() };
        for (status, reason) in [
            (unknown, "token has expired"),
            (status("system:serviceaccount:shop:orders", &["other"]), "audience"),
            (status("system:node:node1", &["weft-ca"]), "no service account"),
            (status("system:serviceaccount:shop", &["weft-ca"]), "no service account"),
        ] {
            let error = attested(status, &domain).unwrap_err();
            assert!(error.to_string().contains(reason), "{error:#}");
        }
    }

    #[test]
    fn join_tokens_are_told_from_those_of_service_accounts() {
        assert!(is_service_account_token("eyJhbGciOiJSUzI1NiJ9.e30.c2ln"));
        for text in ["weft-token-0123", "", "a.b", "ey.b", "a.b.c"] {
            assert!(!is_service_account_token(text), "{text}");
        }
    }
}
