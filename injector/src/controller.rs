//! The controller: keeps Consul's catalog as the cluster is. It watches Services, EndpointSlices and Pods, makes of them what
//! the catalog should hold ([`crate::mirror`]), and writes what differs. Only the replica that leads writes. What the catalog
//! holds is read when a replica begins to lead, after a failure, and once a minute: what died meanwhile is removed, and what
//! somebody else changed is written again. Without a cluster's answer nothing is removed: what was known goes on.

use std::{fmt::Debug, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use futures_util::{Stream, StreamExt, stream};
use k8s_openapi::api::{
    core::v1::{Pod, PodSpec, PodStatus, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client, Resource,
    core::ObjectMeta,
    runtime::{
        WatchStreamExt,
        reflector::{self, Store},
        watcher,
    },
};
use serde::de::DeserializeOwned;
use tokio::{
    sync::Notify,
    task::JoinHandle,
    time::{Instant, sleep, sleep_until},
};

use crate::{
    catalog::ConsulCatalog,
    leader::{Leader, Term},
    metrics::Metrics,
    mirror::{Catalog, Naming, Operation, difference, mirror},
    names,
    settings::Settings,
};

/// A running controller.
pub struct Controller {
    leader: Arc<Leader>,
    tasks: Vec<JoinHandle<()>>,
}

/// What happens within so long after a write is written together.
const COALESCE: Duration = Duration::from_millis(100);
/// The catalog is read again after so long,
const RESYNC: Duration = Duration::from_secs(60);
/// and where nothing happens its nodes are, with one request, so that a Consul that lost its state is soon noticed.
const CHECK: Duration = Duration::from_secs(5);
/// After a failure, and twice as long after each further one.
const FIRST_BACKOFF: Duration = Duration::from_millis(500);
const LONGEST_BACKOFF: Duration = Duration::from_secs(30);
/// Writes at a time.
const PARALLEL: usize = 8;

impl Controller {
    /// Starts watching and, where this replica leads, writing. Replicas differ by `identity`.
    ///
    /// # Errors
    /// The settings name no agent that can be used.
    pub fn start(
        client: Client,
        settings: &Settings,
        identity: &str,
        metrics: Arc<Metrics>,
    ) -> Result<Controller> {
        let catalog = ConsulCatalog::of(settings)?;
        let leader = Leader::new(client.clone(), &settings.namespace, names::CONTROLLER_LEASE, identity);
        let naming = Naming {
            trust_domain: settings.trust_domain.clone(),
            cluster: settings.controller.cluster.clone(),
        };
        let (objects, mut tasks) = watch(&client);
        let term = leader.term();
        let writing = Writing { objects, naming, catalog, metrics };
        tasks.push(tokio::spawn(writing.run(term)));
        let candidate = Arc::clone(&leader);
        tasks.push(tokio::spawn(async move { candidate.campaign().await }));
        Ok(Controller { leader, tasks })
    }

    /// Stops writing, and lets another replica begin at once.
    pub async fn stop(self) {
        for task in &self.tasks {
            task.abort();
        }
        for task in self.tasks {
            // Cancelled, or ended by a panic that is in the log.
            let _ended = task.await;
        }
        self.leader.release().await;
    }
}

/// The objects of the cluster, kept up to date by watches.
struct Objects {
    services: Store<Service>,
    slices: Store<EndpointSlice>,
    pods: Store<Pod>,
    changed: Arc<Notify>,
}

fn watch(client: &Client) -> (Objects, Vec<JoinHandle<()>>) {
    let changed = Arc::new(Notify::new());
    let (services, services_writer) = reflector::store();
    let (slices, slices_writer) = reflector::store();
    let (pods, pods_writer) = reflector::store();
    let tasks = vec![
        follow("Services", events(client).modify(keep_of_service).reflect(services_writer), &changed),
        follow("EndpointSlices", events(client).modify(keep_of_slice).reflect(slices_writer), &changed),
        follow("Pods", events(client).modify(keep_of_pod).reflect(pods_writer), &changed),
    ];
    (Objects { services, slices, pods, changed }, tasks)
}

/// A watch of all objects of a kind.
fn events<K>(client: &Client) -> impl Stream<Item = watcher::Result<watcher::Event<K>>> + Send + use<K>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    watcher(Api::<K>::all(client.clone()), watcher::Config::default()).default_backoff()
}

fn follow<K: 'static>(
    kind: &'static str,
    events: impl Stream<Item = watcher::Result<watcher::Event<K>>> + Send + 'static,
    changed: &Arc<Notify>,
) -> JoinHandle<()> {
    let changed = Arc::clone(changed);
    tokio::spawn(events.for_each(move |event| {
        match event {
            Ok(_) => changed.notify_one(),
            Err(error) => tracing::warn!(%error, "{kind} cannot be watched; what is known of them goes on"),
        }
        std::future::ready(())
    }))
}

impl Objects {
    /// Waits until all kinds were listed once.
    async fn are_known(&self) {
        let listed = tokio::join!(
            self.services.wait_until_ready(),
            self.slices.wait_until_ready(),
            self.pods.wait_until_ready()
        );
        if !matches!(listed, (Ok(()), Ok(()), Ok(()))) {
            // A watch ends only with the program.
            std::future::pending::<()>().await;
        }
    }

    fn mirror(&self, naming: &Naming) -> Catalog {
        mirror(&self.services.state(), &self.slices.state(), &self.pods.state(), naming)
    }
}

/// All that the writing replica needs.
struct Writing {
    objects: Objects,
    naming: Naming,
    catalog: ConsulCatalog,
    metrics: Arc<Metrics>,
}

impl Writing {
    async fn run(self, mut term: Term) {
        self.objects.are_known().await;
        loop {
            term.begins().await;
            self.metrics.leads(true);
            tracing::info!("this replica leads: it writes into the registry");
            let mut end = term.clone();
            tokio::select! {
                () = self.lead(&term) => {}
                () = end.ends() => {}
            }
            self.metrics.leads(false);
            tracing::info!("this replica does not lead any more");
        }
    }

    /// Writes whenever something has changed, until the term is over.
    async fn lead(&self, term: &Term) {
        let (mut known, mut resync) = (None, Instant::now());
        let mut failure: Option<Duration> = None;
        while term.holds() {
            if Instant::now() >= resync {
                known = None;
            }
            let reads = known.is_none();
            match self.sync(&mut known, term).await {
                Ok(()) => {
                    if failure.take().is_some() {
                        tracing::info!("the registry is as the cluster is again");
                    }
                    if reads {
                        resync = Instant::now() + RESYNC;
                    }
                    sleep(COALESCE).await;
                }
                Err(error) => {
                    if failure.is_none() {
                        tracing::warn!("the registry is not as the cluster is: {error:#}; it is tried again");
                    }
                    let backoff = failure.map_or(FIRST_BACKOFF, |last| (last * 2).min(LONGEST_BACKOFF));
                    (failure, resync) = (Some(backoff), Instant::now() + backoff);
                    known = None;
                    sleep(FIRST_BACKOFF).await;
                }
            }
            tokio::select! {
                () = self.objects.changed.notified() => {}
                () = sleep_until(resync) => {}
                () = sleep(CHECK), if known.is_some() => {
                    let nodes = self.catalog.nodes().await;
                    known = known.filter(|known| nodes.is_ok_and(|nodes| nodes.iter().eq(known.keys())));
                }
            }
        }
    }

    /// Makes the catalog as the cluster is. `known` is what the catalog holds; none where it must be read.
    async fn sync(&self, known: &mut Option<Catalog>, term: &Term) -> Result<()> {
        let actual = match known {
            Some(actual) => actual,
            None => known.insert(self.catalog.read().await.context("the catalog cannot be read")?),
        };
        let desired = self.objects.mirror(&self.naming);
        let operations = difference(&desired, actual);
        let (registrations, removals): (Vec<_>, Vec<_>) =
            operations.into_iter().partition(|operation| matches!(operation, Operation::Register { .. }));
        // What goes must go also where something cannot be registered.
        let registered = self.write(registrations, term).await;
        self.write(removals, term).await.and(registered)?;
        self.metrics.synced(desired.values().map(|node| node.instances.len()).sum());
        *actual = desired;
        Ok(())
    }

    /// Writes them all; the first failure is returned when all were tried.
    async fn write(&self, operations: Vec<Operation>, term: &Term) -> Result<()> {
        let writes = stream::iter(operations).map(|operation| async move {
            anyhow::ensure!(term.holds(), "this replica does not lead any more");
            let outcome = self.catalog.write(&operation).await;
            self.metrics.wrote(operation.kind(), outcome.is_ok());
            tracing::debug!(?operation, is_done = outcome.is_ok(), "written");
            outcome
        });
        let outcomes: Vec<Result<()>> = writes.buffer_unordered(PARALLEL).collect().await;
        outcomes.into_iter().collect()
    }
}

// Watches keep only what the mirror reads: a cluster has many pods, and most of a pod is of no interest here.

fn keep_of_slice(slice: &mut EndpointSlice) {
    slice.metadata.managed_fields = None;
}

fn keep_of_service(service: &mut Service) {
    service.metadata.managed_fields = None;
    service.metadata.annotations = None;
    service.status = None;
}

fn keep_of_pod(pod: &mut Pod) {
    let ours = [names::ANNOTATION_STATUS, names::ANNOTATION_PROTOCOL];
    let metadata = std::mem::take(&mut pod.metadata);
    pod.metadata = ObjectMeta {
        name: metadata.name,
        namespace: metadata.namespace,
        uid: metadata.uid,
        resource_version: metadata.resource_version,
        annotations: metadata.annotations.map(|mut all| {
            all.retain(|key, _| ours.contains(&key.as_str()));
            all
        }),
        labels: metadata.labels.map(|mut all| {
            all.retain(|key, _| key == names::LABEL_VERSION);
            all
        }),
        ..ObjectMeta::default()
    };
    pod.spec = pod.spec.take().map(|spec| PodSpec {
        node_name: spec.node_name,
        service_account_name: spec.service_account_name,
        ..PodSpec::default()
    });
    pod.status =
        pod.status.take().map(|status| PodStatus { host_ip: status.host_ip, ..PodStatus::default() });
}
