//! What Consul's catalog should hold of a cluster, and how it differs from what it holds. Pure: objects of Kubernetes in, a
//! catalog out; two catalogs in, operations out.
//!
//! A Service with a selector is a service of Consul, under its first port; each endpoint of its first address family that is
//! an injected pod is an instance, on one node of Consul per node of the cluster. Kubernetes' conditions decide: a ready
//! endpoint is passing, another one critical, and one that is terminating is out, except where it still serves and no
//! endpoint of the Service is ready (as kube-proxy does it). Not mirrored: ExternalName, Services without a selector, further
//! ports, and pods outside of the mesh.
//!
//! EndpointSlices: <https://kubernetes.io/docs/concepts/services-networking/endpoint-slices/>.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use k8s_openapi::api::{
    core::v1::{Pod, Service, ServicePort},
    discovery::v1::{Endpoint, EndpointPort, EndpointSlice},
};
use kube::ResourceExt;
use weft_proto::{
    names as registry,
    spiffe::{SpiffeId, TrustDomain},
};

use crate::names;

/// What the mirror of a cluster is called.
#[derive(Debug, Clone)]
pub struct Naming {
    /// The beginning of every identity.
    pub trust_domain: TrustDomain,
    /// The beginning of the names of nodes.
    pub cluster: String,
}

/// The part of Consul's catalog that is ours, by the name of the node.
pub type Catalog = BTreeMap<String, Node>;

/// A node of the cluster with instances on it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Node {
    /// Its own address. No connection is made to it: each instance has an address.
    pub address: String,
    /// By their id.
    pub instances: BTreeMap<String, Instance>,
}

/// A pod as an endpoint of one service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// `orders`, or `orders_shop` outside of namespace `default`.
    pub service: String,
    /// The pod's.
    pub address: String,
    /// Of the pod.
    pub port: u16,
    /// Identity, protocol, zone, version, namespace and pod.
    pub meta: BTreeMap<String, String>,
    /// The status of its check.
    pub status: Status,
}

/// The status of an instance's check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Status {
    /// Neither of the others, or there is no check; only ever read.
    Unknown,
    /// It gets no calls.
    Critical,
    /// It gets calls.
    Passing,
}

/// One write that brings the catalog nearer to what it should hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// Writes an instance, its check and its node.
    Register {
        /// The node's name.
        node: String,
        /// The node's address.
        address: String,
        /// The instance's.
        id: String,
        /// All of it.
        instance: Instance,
    },
    /// Removes an instance.
    Deregister {
        /// The node's name.
        node: String,
        /// The instance's.
        id: String,
    },
    /// Removes a node and all that is on it.
    DeregisterNode {
        /// Its name.
        node: String,
    },
}

/// The catalog that the objects of a cluster make.
pub fn mirror(
    services: &[Arc<Service>],
    slices: &[Arc<EndpointSlice>],
    pods: &[Arc<Pod>],
    naming: &Naming,
) -> Catalog {
    let pods: HashMap<(&str, &str), &Pod> = pods.iter().map(|pod| (place(&pod.metadata), &**pod)).collect();
    let mut slices_of: HashMap<(&str, &str), Vec<&EndpointSlice>> = HashMap::new();
    for slice in slices {
        let Some(service) = slice.labels().get(names::LABEL_SERVICE_NAME) else { continue };
        let namespace = slice.metadata.namespace.as_deref().unwrap_or_default();
        slices_of.entry((namespace, service)).or_default().push(slice);
    }
    // Where an endpoint stands in two slices, always the same one counts.
    for slices in slices_of.values_mut() {
        slices.sort_by_key(|slice| slice.metadata.name.as_deref());
    }
    let mut catalog = Catalog::new();
    for service in services {
        let slices = slices_of.get(&place(&service.metadata)).map(Vec::as_slice).unwrap_or_default();
        for backend in backends(service, slices, &pods) {
            add(&mut catalog, service, &backend, naming);
        }
    }
    catalog
}

/// An endpoint of a Service that becomes an instance.
struct Backend<'a> {
    endpoint: &'a Endpoint,
    pod: &'a Pod,
    port: u16,
    app_protocol: Option<&'a str>,
    status: Status,
}

/// The endpoints of a Service that are pods of the mesh and shall be registered.
fn backends<'a>(
    service: &Service,
    slices: &[&'a EndpointSlice],
    pods: &HashMap<(&str, &str), &'a Pod>,
) -> Vec<Backend<'a>> {
    let Some((first_port, family)) = mirrored(service) else { return Vec::new() };
    let namespace = service.metadata.namespace.as_deref().unwrap_or_default();
    let mut found = Vec::new();
    for slice in slices.iter().filter(|slice| slice.address_type == family) {
        let Some((port, app_protocol)) = target_port(slice, first_port) else { continue };
        for endpoint in &slice.endpoints {
            let Some(pod) = pod_of(endpoint, namespace, pods).filter(|pod| is_of_the_mesh(pod)) else {
                continue;
            };
            let status = if is_ready(endpoint) { Status::Passing } else { Status::Critical };
            found.push(Backend { endpoint, pod, port, app_protocol, status });
        }
    }
    let one_is_ready =
        found.iter().any(|backend| backend.status == Status::Passing && !is_terminating(backend.endpoint));
    found.retain_mut(|backend| {
        if !is_terminating(backend.endpoint) {
            return true;
        }
        backend.status = Status::Passing;
        !one_is_ready && is_serving(backend.endpoint)
    });
    found
}

/// The port and the address family under which a Service is mirrored; none where it is not.
fn mirrored(service: &Service) -> Option<(&ServicePort, &str)> {
    let spec = service.spec.as_ref()?;
    let has_selector = spec.selector.as_ref().is_some_and(|selector| !selector.is_empty());
    if !has_selector || spec.type_.as_deref() == Some("ExternalName") {
        return None;
    }
    let family = spec.ip_families.as_ref().and_then(|families| families.first());
    Some((spec.ports.as_ref()?.first()?, family.map_or("IPv4", String::as_str)))
}

/// The pods' port behind a Service's, and what it speaks.
fn target_port<'a>(slice: &'a EndpointSlice, wanted: &ServicePort) -> Option<(u16, Option<&'a str>)> {
    let name = wanted.name.as_deref().unwrap_or_default();
    let is_wanted = |port: &&EndpointPort| port.name.as_deref().unwrap_or_default() == name;
    let port = slice.ports.as_ref()?.iter().find(is_wanted)?;
    if port.protocol.as_deref().is_some_and(|protocol| protocol != "TCP") {
        return None;
    }
    let number = u16::try_from(port.port?).ok().filter(|number| *number != 0)?;
    Some((number, port.app_protocol.as_deref()))
}

/// The pod that an endpoint is. None where the watches of both do not agree yet.
fn pod_of<'a>(
    endpoint: &Endpoint,
    namespace: &str,
    pods: &HashMap<(&str, &str), &'a Pod>,
) -> Option<&'a Pod> {
    let target = endpoint.target_ref.as_ref().filter(|target| target.kind.as_deref() == Some("Pod"))?;
    let pod = pods.get(&(namespace, target.name.as_deref()?))?;
    let is_same = target.uid.is_none() || target.uid == pod.metadata.uid;
    is_same.then_some(*pod)
}

fn is_of_the_mesh(pod: &Pod) -> bool {
    pod.annotations().contains_key(names::ANNOTATION_STATUS)
}

/// An unknown condition means yes, as the API says.
fn is_ready(endpoint: &Endpoint) -> bool {
    endpoint.conditions.as_ref().and_then(|conditions| conditions.ready).unwrap_or(true)
}

fn is_serving(endpoint: &Endpoint) -> bool {
    let serving = endpoint.conditions.as_ref().and_then(|conditions| conditions.serving);
    serving.unwrap_or_else(|| is_ready(endpoint))
}

fn is_terminating(endpoint: &Endpoint) -> bool {
    endpoint.conditions.as_ref().and_then(|conditions| conditions.terminating).unwrap_or(false)
}

fn add(catalog: &mut Catalog, service: &Service, backend: &Backend<'_>, naming: &Naming) {
    let (namespace, name) = place(&service.metadata);
    let pod_name = backend.pod.metadata.name.as_deref().unwrap_or_default();
    // Without an identity the instance would be called in plaintext: rather it is not there.
    let Ok(identity) = SpiffeId::new(&naming.trust_domain, namespace, service_account(backend.pod)) else {
        return;
    };
    let (Some(address), Some(host)) = (backend.endpoint.addresses.first(), host(backend)) else { return };
    let service = service_name(namespace, name);
    let meta = [
        (registry::META_IDENTITY, Some(identity.as_str())),
        (registry::META_PROTOCOL, protocol(backend)),
        (registry::META_ZONE, backend.endpoint.zone.as_deref()),
        (registry::META_VERSION, backend.pod.labels().get(names::LABEL_VERSION).map(String::as_str)),
        (registry::META_NAMESPACE, Some(namespace)),
        (registry::META_POD, Some(pod_name)),
    ];
    let instance = Instance {
        address: address.clone(),
        port: backend.port,
        meta: meta
            .into_iter()
            .filter_map(|(key, value)| {
                value.filter(|value| !value.is_empty()).map(|value| (key.to_owned(), value.to_owned()))
            })
            .collect(),
        status: backend.status,
        service,
    };
    // A colon stands in no name of Kubernetes, so no two pods share an id.
    let id = format!("{}:{pod_name}:{}", instance.service, instance.port);
    let node = catalog.entry(format!("{}-{}", naming.cluster, host.0)).or_default();
    // All pods of a node know it by the same address; where they do not, one and always the same counts.
    if node.address.is_empty() || host.1 < node.address.as_str() {
        host.1.clone_into(&mut node.address);
    }
    // While an endpoint moves from one slice to another it may stand in both.
    let known = node.instances.entry(id).or_insert_with(|| instance.clone());
    known.status = known.status.max(instance.status);
}

/// The name and the address of the node that a pod is on.
fn host<'a>(backend: &Backend<'a>) -> Option<(&'a str, &'a str)> {
    let name = backend.endpoint.node_name.as_deref();
    let name = name.or_else(|| backend.pod.spec.as_ref()?.node_name.as_deref())?;
    Some((name, backend.pod.status.as_ref()?.host_ip.as_deref()?))
}

fn service_account(pod: &Pod) -> &str {
    let account = pod.spec.as_ref().and_then(|spec| spec.service_account_name.as_deref());
    account.filter(|account| !account.is_empty()).unwrap_or("default")
}

/// What the Service says of its port, else what the pod says of itself; none is detected.
fn protocol<'a>(backend: &Backend<'a>) -> Option<&'a str> {
    let known = backend.app_protocol.and_then(|name| match name {
        "http" | "kubernetes.io/ws" => Some("http1"),
        "http2" | "kubernetes.io/h2c" => Some("http2"),
        "grpc" => Some("grpc"),
        "https" | "tls" | "kubernetes.io/wss" => Some("tls"),
        "tcp" => Some("tcp"),
        _ => None,
    });
    known.or_else(|| backend.pod.annotations().get(names::ANNOTATION_PROTOCOL).map(|name| name.trim()))
}

/// `orders` in namespace `default`, `orders_shop` in namespace `shop`.
fn service_name(namespace: &str, name: &str) -> String {
    match namespace {
        "default" => name.to_owned(),
        other => format!("{name}_{other}"),
    }
}

fn place(metadata: &kube::core::ObjectMeta) -> (&str, &str) {
    (metadata.namespace.as_deref().unwrap_or_default(), metadata.name.as_deref().unwrap_or_default())
}

/// What makes `actual` into `desired`: first what comes or changes, then what goes, so that a service that moves is never
/// without an instance.
pub fn difference(desired: &Catalog, actual: &Catalog) -> Vec<Operation> {
    let mut operations = Vec::new();
    for (name, node) in desired {
        let known = actual.get(name).filter(|known| known.address == node.address);
        for (id, instance) in &node.instances {
            if known.and_then(|known| known.instances.get(id)) != Some(instance) {
                operations.push(Operation::Register {
                    node: name.clone(),
                    address: node.address.clone(),
                    id: id.clone(),
                    instance: instance.clone(),
                });
            }
        }
    }
    for (name, known) in actual {
        let Some(node) = desired.get(name) else {
            operations.push(Operation::DeregisterNode { node: name.clone() });
            continue;
        };
        let gone = known.instances.keys().filter(|id| !node.instances.contains_key(*id));
        operations.extend(gone.map(|id| Operation::Deregister { node: name.clone(), id: id.clone() }));
    }
    operations
}

impl Operation {
    /// For metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Operation::Register { .. } => "register",
            Operation::Deregister { .. } => "deregister",
            Operation::DeregisterNode { .. } => "deregister_node",
        }
    }
}

#[cfg(test)]
mod tests;
