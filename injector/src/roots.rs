//! The root that sidecars pin: the authority keeps it in a ConfigMap of its own namespace; here it is copied into every
//! namespace of the mesh, as a pod mounts only what is in its own. Every replica does it: the same write twice changes nothing.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::{
    Api, Client, ResourceExt,
    api::{ObjectMeta, Patch, PatchParams},
    runtime::reflector::Store,
};
use tokio::{sync::Notify, time::sleep};

use crate::names;

/// What copies of the root need.
pub struct Roots {
    /// The cluster.
    pub client: Client,
    /// Where the authority keeps the original.
    pub own_namespace: String,
    /// All namespaces, kept up to date by a watch.
    pub namespaces: Store<Namespace>,
}

/// The original is read again after so long: roots change once in years, and copies may be deleted.
const REREAD: Duration = Duration::from_secs(30);
/// After a failure.
const PAUSE: Duration = Duration::from_secs(2);
const MANAGER: &str = "weft-injector";

impl Roots {
    /// Copies whenever a namespace has changed, and now and then. Never ends.
    pub async fn distribute(self, changed: Arc<Notify>) {
        let mut failed = false;
        loop {
            let rest = match self.copy_to_all().await {
                Ok(()) => {
                    failed = false;
                    REREAD
                }
                Err(error) => {
                    if !std::mem::replace(&mut failed, true) {
                        tracing::warn!(%error, "ConfigMap {} cannot be copied; it is tried again", names::ROOT_CONFIG_MAP);
                    }
                    PAUSE
                }
            };
            tokio::select! {
                () = sleep(rest) => {}
                () = changed.notified() => {}
            }
        }
    }

    async fn copy_to_all(&self) -> Result<(), kube::Error> {
        let Some(data) = self.original().await? else { return Ok(()) };
        let mut outcome = Ok(());
        for namespace in self.namespaces.state() {
            let name = namespace.name_any();
            if name == self.own_namespace || !is_of_the_mesh(&namespace) {
                continue;
            }
            // One namespace that is going must not keep the root from the others.
            if let Err(error) = self.copy(&name, &data).await {
                outcome = Err(error);
            }
        }
        outcome
    }

    async fn original(&self) -> Result<Option<BTreeMap<String, String>>, kube::Error> {
        let api = Api::<ConfigMap>::namespaced(self.client.clone(), &self.own_namespace);
        Ok(api.get_opt(names::ROOT_CONFIG_MAP).await?.and_then(|map| map.data))
    }

    async fn copy(&self, namespace: &str, data: &BTreeMap<String, String>) -> Result<(), kube::Error> {
        let labels = BTreeMap::from([("app.kubernetes.io/managed-by".to_owned(), MANAGER.to_owned())]);
        let map = ConfigMap {
            metadata: ObjectMeta {
                name: Some(names::ROOT_CONFIG_MAP.to_owned()),
                labels: Some(labels),
                ..ObjectMeta::default()
            },
            data: Some(data.clone()),
            ..ConfigMap::default()
        };
        let api = Api::<ConfigMap>::namespaced(self.client.clone(), namespace);
        api.patch(names::ROOT_CONFIG_MAP, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&map))
            .await
            .map(drop)
    }
}

/// Is it labelled, and not going? Pods that ask for injection themselves, in a namespace that does not, find no root there and wait for one.
fn is_of_the_mesh(namespace: &Namespace) -> bool {
    let labelled =
        matches!(namespace.labels().get(names::LABEL_INJECT).map(String::as_str), Some("enabled" | "true"));
    labelled && namespace.metadata.deletion_timestamp.is_none()
}
