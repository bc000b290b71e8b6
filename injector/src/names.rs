//! Labels, annotations, and names of what is added to a pod. Each stands here once; docs/kubernetes.md lists those that
//! users write.

/// What the controller mirrors into the registry has this, with [`SOURCE`], in the metadata of its node.
pub const META_SOURCE: &str = "external-source";
/// Says that a node of the registry is of a controller of ours.
pub const SOURCE: &str = "weft-kubernetes";
/// In the metadata of such a node: which cluster it is of.
pub const META_CLUSTER: &str = "weft-cluster";
/// A pod's version of its app.
pub const LABEL_VERSION: &str = "app.kubernetes.io/version";
/// On a pod: what its app speaks.
pub const ANNOTATION_PROTOCOL: &str = "weft.dev/protocol";
/// On a slice: the Service that it is of.
pub const LABEL_SERVICE_NAME: &str = "kubernetes.io/service-name";
/// The Lease of the controller that writes.
pub const CONTROLLER_LEASE: &str = "weft-controller";

/// On a namespace or a pod: `enabled` or `disabled`. The pod's counts before the namespace's.
pub const LABEL_INJECT: &str = "weft.dev/inject";
/// Annotations of ours begin with this.
pub const ANNOTATION_PREFIX: &str = "weft.dev/";
/// Written by the injector: what was added, and by which version. JSON, see [`crate::patch::Status`].
pub const ANNOTATION_STATUS: &str = "weft.dev/status";

/// The init container that sets the iptables rules.
pub const REDIRECT_CONTAINER: &str = "weft-redirect";
/// The sidecar: an init container that goes on, or an ordinary container in old clusters.
pub const SIDECAR_CONTAINER: &str = "weft-sidecar";
/// Both.
pub const CONTAINERS: [&str; 2] = [REDIRECT_CONTAINER, SIDECAR_CONTAINER];

/// The projected token of the service account, for the authority.
pub const TOKEN_VOLUME: &str = "weft-token";
/// The root that the authority must prove.
pub const ROOT_VOLUME: &str = "weft-root";
/// Certificate, virtual addresses and the admin socket of the sidecar.
pub const RUN_VOLUME: &str = "weft-run";
/// All.
pub const VOLUMES: [&str; 3] = [TOKEN_VOLUME, ROOT_VOLUME, RUN_VOLUME];

/// The ConfigMap in every namespace of the mesh with the root of the authority.
pub const ROOT_CONFIG_MAP: &str = "weft-root";
/// The key in it.
pub const ROOT_KEY: &str = "root.pem";
/// For whom a service account's token proves its holder.
pub const TOKEN_AUDIENCE: &str = "weft-ca";
/// Nothing is ever injected there.
pub const SYSTEM_NAMESPACES: [&str; 3] = ["kube-system", "kube-public", "kube-node-lease"];
/// The namespace's setting of Pod Security.
pub const POD_SECURITY_ENFORCE: &str = "pod-security.kubernetes.io/enforce";
