//! Ports, user id, header and environment names on which the programs agree. Each number stands here once.

/// Where redirected connections of the app arrive. Loopback only.
pub const OUTBOUND_PORT: u16 = 15001;
/// Where redirected connections of peers arrive.
pub const INBOUND_PORT: u16 = 15006;
/// Probes and metrics, on the pod address.
pub const ADMIN_PORT: u16 = 15020;
/// DNS of the app, redirected here. Loopback only.
pub const DNS_PORT: u16 = 15053;
/// Where the certificate authority serves gRPC over TLS.
pub const AUTHORITY_PORT: u16 = 15080;
/// Probes and metrics of the certificate authority.
pub const AUTHORITY_ADMIN_PORT: u16 = 15081;
/// Every port of the sidecar: a connection meant for one of them is refused.
pub const SIDECAR_PORTS: [u16; 4] = [OUTBOUND_PORT, INBOUND_PORT, ADMIN_PORT, DNS_PORT];

/// The user the sidecar runs as in a pod; its traffic is not redirected.
pub const SIDECAR_UID: u32 = 1337;

/// Every variable that configures the sidecar begins with this; none reaches the app.
pub const ENV_PREFIX: &str = "WEFT_";

/// Variables of other programs with which the sidecar proves itself; none reaches the app either.
pub const CREDENTIAL_VARIABLES: [&str; 3] =
    ["CONSUL_HTTP_TOKEN", "CONSUL_HTTP_TOKEN_FILE", "CONSUL_CLIENT_KEY"];

/// Every header of ours begins with this. Believed only from a verified peer.
pub const HEADER_PREFIX: &str = "x-weft-";
/// The label of the failure, on an answer that the mesh made itself.
pub const HEADER_FAILURE: &str = "x-weft-failure";
/// Milliseconds that the caller still waits.
pub const HEADER_DEADLINE: &str = "x-weft-deadline";
/// What the app spoke before the request was carried as HTTP/2: `h1` or `h2`.
pub const HEADER_PROTOCOL: &str = "x-weft-protocol";

/// The scheme of the absolute target with which the app called a proxy over HTTP/1 (`http`).
pub const HEADER_ABSOLUTE: &str = "x-weft-absolute";

/// TLS between sidecars, HTTP/2 inside.
pub const ALPN_HTTP2: &[u8] = b"weft-h2";
/// TLS between sidecars, HTTP/1.1 inside (upgrades and CONNECT).
pub const ALPN_HTTP1: &[u8] = b"weft-h1";
/// TLS between sidecars, the app's own bytes inside.
pub const ALPN_TCP: &[u8] = b"weft-tcp";

/// The same behind one byte of the server, which says whether its app has taken the connection.
pub const ALPN_TCP_CONFIRMED: &[u8] = b"weft-tcp2";

/// In the registry's metadata of an instance: the SPIFFE ids that a client may meet there, separated by commas.
pub const META_IDENTITY: &str = "weft-identity";
/// What the instance speaks: `http1`, `http2`, `grpc`, `tls`, `tcp`.
pub const META_PROTOCOL: &str = "weft-protocol";
/// Its failure zone.
pub const META_ZONE: &str = "weft-zone";
/// The version of the app.
pub const META_VERSION: &str = "weft-version";
/// Its namespace, as it is in the service's name.
pub const META_NAMESPACE: &str = "weft-namespace";
/// The pod that it is, where a controller registered it.
pub const META_POD: &str = "weft-pod";
/// Where policy documents stand in the registry's key-value store; the service's name follows.
pub const POLICIES_PREFIX: &str = "weft/policies/";
