//! Everything that may go wrong with a connection or a request, in one list.
//!
//! A `Failure` answers four questions: which status does the caller see, whose side failed, may the call be
//! tried again, and which label stands for it. The label is the same in the answer's `x-weft-failure` header,
//! the access log, the metric and the span. `docs/failures.md` has the list with cause and cure.

use std::fmt;

/// Why the mesh could not carry a connection or a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Failure {
    /// The request can be read in two ways, or not at all.
    BadRequest,
    /// More header bytes or fields than allowed.
    HeadersTooLarge,
    /// The client did not finish the head of its request in time.
    ClientTimeout,
    /// The client went away before the answer was complete.
    ClientGone,
    /// The destination is one of the sidecar's own ports.
    Loop,
    /// The destination is no service of the mesh, and the mode is `registry-only`.
    UnknownDestination,
    /// A virtual address that stands for no service now.
    UnknownVirtualAddress,
    /// The service is known and has no endpoint.
    NoEndpoint,
    /// The registry was asked and has no service of this name.
    NotRegistered,
    /// The registry could not be asked, and nothing is known of the service.
    RegistryUnavailable,
    /// The TCP connection was refused.
    ConnectRefused,
    /// The TCP connection or its TLS handshake took too long.
    ConnectTimeout,
    /// The address cannot be reached.
    ConnectUnreachable,
    /// The TLS handshake failed.
    Handshake,
    /// The peer proved an identity, but not the expected one.
    WrongIdentity,
    /// The peer's certificate is not one of this mesh, or no longer.
    UntrustedPeer,
    /// Plaintext or a foreign TLS where only mutual TLS of the mesh is taken.
    PlaintextRefused,
    /// The service has no identities, and this sidecar, or its policy, does not call it in plaintext.
    PlaintextForbidden,
    /// We have no valid certificate of our own.
    NoIdentity,
    /// The connection broke before the answer began.
    Reset,
    /// The answer broke off in the middle.
    BodyCut,
    /// The peer broke the rules of HTTP.
    BadResponse,
    /// More header bytes or fields in an answer than allowed.
    ResponseHeadersTooLarge,
    /// The attempt took too long.
    AttemptTimeout,
    /// The request as a whole took too long.
    RequestTimeout,
    /// A limit on concurrent requests or connections is reached.
    Overloaded,
    /// The sidecar is stopping.
    Draining,
    /// The destination is not an address or port of this workload that may be reached from outside.
    NotOurs,
    /// The app on this host refuses connections.
    AppRefused,
    /// The app on this host closed the connection before its answer began.
    AppReset,
    /// A bug: a task of ours ended with a panic.
    Internal,
}

/// Whose side failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// Whoever called us.
    Client,
    /// The mesh itself: configuration, registry, identity, limits.
    Mesh,
    /// Whomever we called.
    Upstream,
}

impl Failure {
    /// Every failure, for tables and tests.
    pub const ALL: &'static [Failure] = &[
        Failure::BadRequest,
        Failure::HeadersTooLarge,
        Failure::ClientTimeout,
        Failure::ClientGone,
        Failure::Loop,
        Failure::UnknownDestination,
        Failure::UnknownVirtualAddress,
        Failure::NoEndpoint,
        Failure::NotRegistered,
        Failure::RegistryUnavailable,
        Failure::ConnectRefused,
        Failure::ConnectTimeout,
        Failure::ConnectUnreachable,
        Failure::Handshake,
        Failure::WrongIdentity,
        Failure::UntrustedPeer,
        Failure::PlaintextRefused,
        Failure::PlaintextForbidden,
        Failure::NoIdentity,
        Failure::Reset,
        Failure::BodyCut,
        Failure::BadResponse,
        Failure::ResponseHeadersTooLarge,
        Failure::AttemptTimeout,
        Failure::RequestTimeout,
        Failure::Overloaded,
        Failure::Draining,
        Failure::NotOurs,
        Failure::AppRefused,
        Failure::AppReset,
        Failure::Internal,
    ];

    /// The word that stands for it everywhere: snake_case, never changed once published.
    pub const fn label(self) -> &'static str {
        self.facts().0
    }

    /// The failure that a label stands for.
    pub fn from_label(label: &str) -> Option<Failure> {
        Failure::ALL.iter().copied().find(|failure| failure.label() == label)
    }

    /// The HTTP status that the caller sees, where the answer had not begun.
    pub const fn status(self) -> u16 {
        self.facts().1
    }

    /// Whose side failed.
    pub const fn side(self) -> Side {
        self.facts().2
    }

    /// Did the failure happen before anything could have been processed? Then any method may be tried again.
    pub const fn nothing_processed(self) -> bool {
        matches!(
            self,
            Failure::ConnectRefused
                | Failure::ConnectTimeout
                | Failure::ConnectUnreachable
                | Failure::Handshake
                | Failure::WrongIdentity
                | Failure::UntrustedPeer
                | Failure::AppRefused
        )
    }

    /// Did the transport fail? Then a safe method may be tried again.
    pub const fn is_transport(self) -> bool {
        self.nothing_processed()
            || matches!(self, Failure::Reset | Failure::AttemptTimeout | Failure::AppReset)
    }

    const fn facts(self) -> (&'static str, u16, Side) {
        use Side::{Client, Mesh, Upstream};
        match self {
            Failure::BadRequest => ("bad_request", 400, Client),
            Failure::HeadersTooLarge => ("headers_too_large", 431, Client),
            Failure::ClientTimeout => ("client_timeout", 408, Client),
            Failure::ClientGone => ("client_gone", 499, Client),
            Failure::Loop => ("loop", 508, Client),
            Failure::UnknownDestination => ("unknown_destination", 502, Mesh),
            Failure::UnknownVirtualAddress => ("unknown_virtual_address", 502, Mesh),
            Failure::NoEndpoint => ("no_endpoint", 503, Mesh),
            Failure::NotRegistered => ("not_registered", 503, Mesh),
            Failure::RegistryUnavailable => ("registry_unavailable", 503, Mesh),
            Failure::ConnectRefused => ("connect_refused", 503, Upstream),
            Failure::ConnectTimeout => ("connect_timeout", 504, Upstream),
            Failure::ConnectUnreachable => ("connect_unreachable", 503, Upstream),
            Failure::Handshake => ("handshake", 503, Upstream),
            Failure::WrongIdentity => ("wrong_identity", 503, Upstream),
            Failure::UntrustedPeer => ("untrusted_peer", 503, Upstream),
            Failure::PlaintextRefused => ("plaintext_refused", 403, Client),
            Failure::PlaintextForbidden => ("plaintext_forbidden", 503, Mesh),
            Failure::NoIdentity => ("no_identity", 503, Mesh),
            Failure::Reset => ("reset", 502, Upstream),
            Failure::BodyCut => ("body_cut", 502, Upstream),
            Failure::BadResponse => ("bad_response", 502, Upstream),
            Failure::ResponseHeadersTooLarge => ("response_headers_too_large", 502, Upstream),
            Failure::AttemptTimeout => ("attempt_timeout", 504, Upstream),
            Failure::RequestTimeout => ("request_timeout", 504, Upstream),
            Failure::Overloaded => ("overloaded", 503, Mesh),
            Failure::Draining => ("draining", 503, Mesh),
            Failure::NotOurs => ("not_ours", 403, Client),
            Failure::AppRefused => ("app_refused", 503, Upstream),
            Failure::AppReset => ("app_reset", 502, Upstream),
            Failure::Internal => ("internal", 500, Mesh),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

/// A failure with the words for the log: the thing, the place, the way out.
#[derive(Debug, Clone)]
pub struct Failed {
    /// What kind of failure.
    pub failure: Failure,
    /// What happened, for a person. Never sent to a peer.
    pub detail: String,
}

/// The result of a step on the way of a connection or a request.
pub type Result<T> = std::result::Result<T, Failed>;

impl Failed {
    /// A failure with its words.
    pub fn new(failure: Failure, detail: impl Into<String>) -> Self {
        Failed { failure, detail: detail.into() }
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.failure, self.detail)
    }
}

impl std::error::Error for Failed {}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_failure_has_a_label_of_its_own_and_an_error_status() {
        let labels: HashSet<_> = Failure::ALL.iter().map(|failure| failure.label()).collect();
        assert_eq!(labels.len(), Failure::ALL.len());
        assert!(Failure::ALL.iter().all(|failure| (400..600).contains(&failure.status())));
    }
}
