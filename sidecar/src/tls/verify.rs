//! The check of a peer's certificate chain, and the value that proves it was made.
//!
//! Chain and validity are checked by webpki; the identity by X509-SVID section 5.2: one URI name, of our own
//! Chain and validity are checked by webpki; the identity by X509-SVID section 5.2: one URI name, of our own
//! trust domain. Stricter than that: a certificate with a DNS name is for a server that is called from outside of the
//! mesh, and is no peer, whatever identity stands beside it.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls_pki_types::{CertificateDer, TrustAnchor, UnixTime};
use webpki::{EndEntityCert, KeyUsage, VerifiedPath};
use weft_proto::{certificate::Leaf, spiffe::SpiffeId};

use super::{bundle::Bundle, issuer::validity};

/// A peer whose certificate chain led to a root of ours, during the handshake of one connection. Only this
/// room makes one. Cheap to clone.
#[derive(Debug, Clone)]
pub struct VerifiedPeer(Arc<Proof>);

#[derive(Debug)]
struct Proof {
    leaf: Leaf,
    chain: Vec<CertificateDer<'static>>,
    role: Role,
    /// The roots that it was checked against.
    bundle: Bundle,
    /// The last second in which all of the chain is valid, since 1970; none where that cannot be read.
    valid_until: Option<u64>,
}

/// The peer's part in the handshake, which its certificate must allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Client,
    Server,
}

/// Leaf, issuing certificate, and room for a longer chain of an operator's own.
const MAX_CHAIN: usize = 5;

impl VerifiedPeer {
    /// For a chain that [`verify_chain`] has accepted with this bundle in this very handshake.
    pub(super) fn proven(leaf: Leaf, chain: &[CertificateDer<'_>], role: Role, bundle: Bundle) -> Self {
        let chain: Vec<_> = chain.iter().map(|certificate| certificate.clone().into_owned()).collect();
        let end_of_other = |certificate: &CertificateDer<'_>| match bundle.issuer() {
            Some(issuer) if issuer.is(certificate) => Some(issuer.not_after()),
            _ => validity(certificate).map(|(_, end)| end),
        };
        let leaf_ends = Some(unix_time(leaf.not_after).as_secs());
        let valid_until = chain.iter().skip(1).map(end_of_other).chain([leaf_ends]).min().flatten();
        VerifiedPeer(Arc::new(Proof { leaf, chain, role, bundle, valid_until }))
    }

    /// Who it is.
    pub fn id(&self) -> &SpiffeId {
        &self.0.leaf.id
    }

    /// When its certificate ends.
    pub fn not_after(&self) -> SystemTime {
        self.0.leaf.not_after
    }

    /// The serial number of its certificate, in hexadecimal.
    pub fn serial(&self) -> &str {
        &self.0.leaf.serial
    }

    /// Does this bundle vouch for it, the end of its certificate aside? That is whether it would have been accepted in the
    /// last moment in which it was valid.
    pub fn vouched_for(&self, bundle: &Bundle, now: SystemTime) -> bool {
        let now = unix_time(now).as_secs();
        let at = self.0.valid_until.map_or(now, |end| now.min(end));
        let at = UnixTime::since_unix_epoch(Duration::from_secs(at));
        self.0.bundle == *bundle || verify_chain(&self.0.chain, bundle, self.0.role, at).is_ok()
    }

    /// Would its certificate be accepted now, by this bundle? A connection for which this turns false is
    /// drained and closed. With the roots of the handshake nothing can have changed but the time,
    /// which goes forward.
    pub fn still_trusted(&self, bundle: &Bundle, now: SystemTime) -> bool {
        let in_time = self.0.valid_until.is_some_and(|end| unix_time(now).as_secs() <= end);
        (in_time && self.0.bundle == *bundle)
            || verify_chain(&self.0.chain, bundle, self.0.role, unix_time(now)).is_ok()
    }
}

/// Checks a chain as presented, leaf first: an identity of the bundle's trust domain, a path to one of its
/// roots, and validity at this time. The error is a reason to log, naming no one.
pub(super) fn verify_chain(
    chain: &[CertificateDer<'_>],
    bundle: &Bundle,
    role: Role,
    now: UnixTime,
) -> Result<Leaf, String> {
    let Some((end_entity, intermediates)) = chain.split_first() else {
        return Err("it showed no certificate".to_owned());
    };
    if chain.len() > MAX_CHAIN {
        return Err(format!("its chain has {} certificates; at most {MAX_CHAIN} are taken", chain.len()));
    }
    let leaf = Leaf::parse(end_entity).map_err(|error| format!("its certificate is refused: {error}"))?;
    if leaf.id.trust_domain() != bundle.trust_domain().as_str() {
        return Err(format!(
            "it belongs to another trust domain, {}, not {}",
            leaf.id.trust_domain(),
            bundle.trust_domain()
        ));
    }
    let end_entity = EndEntityCert::try_from(end_entity).map_err(|error| reason(&error))?;
    if !bundle.issuer().is_some_and(|issuer| issuer.signed(&end_entity, intermediates, role, now)) {
        find_path(&end_entity, bundle.anchors(), intermediates, role, now).map_err(|error| reason(&error))?;
    }
    Ok(leaf)
}

/// A path from a leaf over these other certificates to one of the anchors, for this role at this time.
pub(super) fn find_path<'a>(
    leaf: &'a EndEntityCert<'a>,
    anchors: &'a [TrustAnchor<'_>],
    others: &'a [CertificateDer<'a>],
    role: Role,
    now: UnixTime,
) -> Result<VerifiedPath<'a>, webpki::Error> {
    let usage = match role {
        Role::Client => KeyUsage::client_auth(),
        Role::Server => KeyUsage::server_auth(),
    };
    leaf.verify_for_usage(webpki::ALL_VERIFICATION_ALGS, anchors, others, now, usage, None, None)
}

fn reason(error: &webpki::Error) -> String {
    match error {
        webpki::Error::CertExpired { not_after, .. } => {
            format!("its certificate expired at {}", timestamp(*not_after))
        }
        webpki::Error::CertNotValidYet { not_before, .. } => {
            format!("its certificate is not valid before {}; are both clocks right?", timestamp(*not_before))
        }
        webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey => {
            "no root of our trust bundle signed its certificate (unknown root)".to_owned()
        }
        other => format!("its certificate chain is refused: {other}"),
    }
}

fn timestamp(at: UnixTime) -> String {
    humantime::format_rfc3339_seconds(SystemTime::UNIX_EPOCH + Duration::from_secs(at.as_secs())).to_string()
}

pub(super) fn unix_time(at: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
}
