//! The injector of Weft. This list is the architecture: the modules from the top layer to the bottom. A module uses
//! only modules below it (`tests/tests/house.rs` checks that). The command line in `main.rs` stands above all.

/// The HTTPS server that answers admission reviews.
pub mod webhook;
/// Our own serving certificate: renewed in time, and the CA bundle in step with it.
pub mod identity;
/// The CA bundle of the webhook configuration.
pub mod ca_bundle;
/// The client of the certificate authority.
pub mod authority;
/// The serving certificate in use.
pub mod certificate;
/// Pods of the mesh, registered in Consul: watches the cluster, and writes what differs.
pub mod controller;
/// Which of several replicas writes.
pub mod leader;
/// Consul's catalog over its HTTP API.
pub mod catalog;
/// What Consul's catalog should hold, and how it differs from what it holds.
pub mod mirror;
/// The numbers for Prometheus.
pub mod metrics;
/// The authority's root, in every namespace of the mesh.
pub mod roots;
/// `inject -f` and `uninject -f`: the same decision, on files.
pub mod offline;
/// Edits of YAML that keep every byte they do not touch.
pub mod yaml;
/// What changes in a pod, as JSON Patch; and how it is taken back.
pub mod patch;
/// Inject, leave alone or refuse, and why.
pub mod decide;
/// The containers and volumes that are added to a pod.
pub mod containers;
/// Probes and hooks of the kubelet, sent to the sidecar instead of the app.
pub mod probes;
/// Annotations of a pod: the table of them, and what each may be.
pub mod annotations;
/// The injector's settings, as written in its file.
pub mod settings;
/// Labels, annotations, and names of what is added.
pub mod names;
