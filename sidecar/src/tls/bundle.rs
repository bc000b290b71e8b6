//! The trust bundle: the roots of one trust domain, parsed once.
//!
//! A bundle never changes; a newer one takes its place, and connections are checked again against it
//! ([`super::VerifiedPeer::still_trusted`]). Roots of other trust domains have no place in it.

use std::{fmt, sync::Arc};

use rustls_pki_types::{CertificateDer, TrustAnchor};
use weft_proto::spiffe::TrustDomain;

use super::issuer::Issuer;
use crate::model::{Failed, Failure, Result};

/// Whom to believe: the self-signed roots of one trust domain. Cheap to clone.
#[derive(Clone)]
pub struct Bundle {
    trust_domain: TrustDomain,
    roots: Arc<[CertificateDer<'static>]>,
    anchors: Arc<[TrustAnchor<'static>]>,
    issuer: Option<Arc<Issuer>>,
}

/// More roots than a rotation ever needs at a time are a mistake or an attack.
const MAX_ROOTS: usize = 16;

impl Bundle {
    /// Reads the roots.
    ///
    /// # Errors
    /// [`Failure::NoIdentity`] where there is no root, more than 16, or one that is no certificate.
    pub fn new(trust_domain: TrustDomain, roots: Vec<CertificateDer<'static>>) -> Result<Self> {
        let refuse = |why: String| {
            Failed::new(Failure::NoIdentity, format!("the trust bundle of {trust_domain} {why}"))
        };
        if roots.is_empty() || roots.len() > MAX_ROOTS {
            return Err(refuse(format!("has {} roots; expected 1 to {MAX_ROOTS}", roots.len())));
        }
        let mut anchors = Vec::with_capacity(roots.len());
        for (at, root) in roots.iter().enumerate() {
            let anchor = webpki::anchor_from_trusted_cert(root)
                .map_err(|error| refuse(format!("has an unusable root, number {}: {error}", at + 1)))?;
            anchors.push(anchor.to_owned());
        }
        Ok(Bundle { trust_domain, roots: roots.into(), anchors: anchors.into(), issuer: None })
    }

    /// The trust domain whose roots these are.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The roots in DER.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// The same, with the issuing certificate of our own chain, if the chain leads to one of the roots.
    pub(super) fn with_issuer_of(self, chain: &[CertificateDer<'static>]) -> Self {
        let issuer = Issuer::of(chain, &self.anchors).map(Arc::new);
        Bundle { issuer, ..self }
    }

    /// The issuing certificate that was found to lead to one of the roots.
    pub(super) fn issuer(&self) -> Option<&Issuer> {
        self.issuer.as_deref()
    }

    pub(super) fn anchors(&self) -> &[TrustAnchor<'static>] {
        &self.anchors
    }
}

/// Two bundles are equal where their roots are, in the same order.
impl PartialEq for Bundle {
    fn eq(&self, other: &Self) -> bool {
        self.trust_domain == other.trust_domain && self.roots == other.roots
    }
}

impl Eq for Bundle {}

impl fmt::Debug for Bundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bundle({}, {} roots)", self.trust_domain, self.roots.len())
    }
}
