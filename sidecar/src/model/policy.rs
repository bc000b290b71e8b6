//! What an operator may turn, per service: values with their defaults, as used. Reading the document that an
//! operator wrote is the business of `config`; deciding by these values that of `policy`.

use std::time::Duration;

use serde::Serialize;
use weft_proto::spiffe::SpiffeId;

use super::Protocol;

/// The traffic policy of one service.
#[derive(Debug, Clone, PartialEq, Serialize, Default)]
pub struct Policy {
    /// What the service speaks; wins over the registry and over detection.
    pub protocol: Option<Protocol>,
    /// Whom a client expects to meet; wins over the registry.
    pub identities: Vec<SpiffeId>,
    /// Whether the service's own sidecars take plaintext.
    pub mutual_tls: Option<MutualTls>,
    /// Whether it is called where nobody says whom to expect there.
    pub outbound_mutual_tls: MutualTls,
    /// How long to wait for what.
    pub timeouts: Timeouts,
    /// When to try again.
    pub retries: Retries,
    /// When to leave an endpoint alone.
    pub breaker: Breaker,
}

/// Does a sidecar take, or make, connections that are not mesh mutual TLS?
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, serde::Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum MutualTls {
    /// Both; inbound, plaintext callers are counted by address.
    #[default]
    Permissive,
    /// Mesh mutual TLS only; inbound, an app's foreign TLS is refused too.
    Strict,
}

/// What becomes of opaque and upgraded connections when the certificate that their peer began with has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum ExpiredPeers {
    /// They go on as long as a root of ours vouches for the peer.
    #[default]
    Keep,
    /// They are closed.
    Close,
}

/// How keys are agreed on in TLS between sidecars and with the authority.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum KeyExchange {
    /// By X25519MLKEM768 with those that have it, else by elliptic curves.
    #[default]
    PostQuantum,
    /// By elliptic curves.
    Classic,
}

/// How long to wait for what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Timeouts {
    /// TCP and TLS together, per attempt.
    pub connect: Duration,
    /// From the first byte of a request to the end of its answer, all attempts; none: no limit of ours.
    pub request: Option<Duration>,
    /// From the start of one attempt to the head of its answer; none: no limit of ours.
    pub attempt: Option<Duration>,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts { connect: Duration::from_secs(1), request: None, attempt: None }
    }
}

/// When to try again.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Retries {
    /// Attempts beyond the first; 0 to 10.
    pub attempts: u8,
    /// Statuses that are worth another attempt. Empty: none.
    pub statuses: Vec<u16>,
    /// Methods beside GET, HEAD and OPTIONS that may be repeated after something was sent.
    pub methods: Vec<String>,
    /// How much of the traffic may be retries.
    pub budget: Budget,
    /// Body bytes kept for another attempt; a longer body is not repeated.
    pub body_bytes: usize,
    /// First pause between attempts; doubles, with jitter.
    pub backoff: Duration,
}

impl Default for Retries {
    fn default() -> Self {
        Retries {
            attempts: 2,
            statuses: Vec::new(),
            methods: Vec::new(),
            budget: Budget::default(),
            body_bytes: 64 * 1024,
            backoff: Duration::from_millis(10),
        }
    }
}

/// How much of the traffic to a service may be retries.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Budget {
    /// Retries per hundred requests.
    pub percent: u8,
    /// Retries per second that are always allowed.
    pub per_second: u16,
}

impl Default for Budget {
    fn default() -> Self {
        Budget { percent: 20, per_second: 1 }
    }
}

/// When to leave an endpoint alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Breaker {
    /// Failures in a row that eject an endpoint; 0 switches the breaker off.
    pub consecutive_failures: u32,
    /// The first ejection; each further one is twice as long, with jitter.
    pub ejection: Duration,
    /// The longest ejection.
    pub ejection_max: Duration,
    /// The share of a service's endpoints that may be out at a time, in percent; one always stays.
    pub max_ejected_percent: u8,
}

impl Default for Breaker {
    fn default() -> Self {
        Breaker {
            consecutive_failures: 5,
            ejection: Duration::from_secs(1),
            ejection_max: Duration::from_secs(60),
            max_ejected_percent: 50,
        }
    }
}
