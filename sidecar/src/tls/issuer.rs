//! The issuing certificate that we share with our peers. Nearly every peer's chain is its leaf and the certificate
//! that signed ours too, and checking a signature is the dearest part of a handshake: that the shared certificate
//! leads to a root is found once, with our own chain, and each handshake checks the leaf below it.
//!
//! It says no more than the whole path would (RFC 5280 6.1): it counts for one bundle, within its own validity, for
//! the very same bytes. Where anything differs, [`super::verify`] checks the whole path.

use std::time::SystemTime;

use rustls_pki_types::{CertificateDer, TrustAnchor, UnixTime};
use webpki::{Cert, EndEntityCert};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use super::verify::{Role, find_path, unix_time};

/// A certificate that signs leaves, found to lead to a root of one bundle in both roles.
pub(super) struct Issuer {
    certificate: CertificateDer<'static>,
    anchor: TrustAnchor<'static>,
    not_before: u64,
    not_after: u64,
}

impl Issuer {
    /// Of our own chain, leaf first, checked against these roots. None where the path is another one than leaf,
    /// issuing certificate, root; or where a root constrains names, which concerns each leaf anew.
    pub(super) fn of(chain: &[CertificateDer<'static>], roots: &[TrustAnchor<'_>]) -> Option<Self> {
        let [leaf, certificate] = chain else { return None };
        let leaf = EndEntityCert::try_from(leaf).ok()?;
        for role in [Role::Client, Role::Server] {
            let path = find_path(&leaf, roots, &chain[1..], role, unix_time(SystemTime::now())).ok()?;
            let leads_over_it = path.intermediate_certificates().map(Cert::der).eq([certificate.clone()]);
            if !leads_over_it || path.anchor().name_constraints.is_some() {
                return None;
            }
        }
        let (not_before, not_after) = validity(certificate)?;
        let anchor = webpki::anchor_from_trusted_cert(certificate).ok()?.to_owned();
        Some(Issuer { certificate: certificate.clone(), anchor, not_before, not_after })
    }

    /// Is it this certificate?
    pub(super) fn is(&self, certificate: &CertificateDer<'_>) -> bool {
        self.certificate == *certificate
    }

    /// The last second in which it is valid, since 1970.
    pub(super) fn not_after(&self) -> u64 {
        self.not_after
    }

    /// Is this leaf, shown with these other certificates, signed by it and good for the role at this time?
    pub(super) fn signed(
        &self,
        leaf: &EndEntityCert<'_>,
        others: &[CertificateDer<'_>],
        role: Role,
        now: UnixTime,
    ) -> bool {
        matches!(others, [only] if self.is(only))
            && (self.not_before..=self.not_after).contains(&now.as_secs())
            && find_path(leaf, std::slice::from_ref(&self.anchor), &[], role, now).is_ok()
    }
}

/// First and last second in which a certificate is valid, since 1970; none where it cannot be read.
pub(super) fn validity(certificate: &CertificateDer<'_>) -> Option<(u64, u64)> {
    let (_, read) = X509Certificate::from_der(certificate).ok()?;
    let seconds = |at: x509_parser::time::ASN1Time| u64::try_from(at.timestamp()).unwrap_or(0);
    Some((seconds(read.validity().not_before), seconds(read.validity().not_after)))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rcgen::{
        BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose,
        GeneralSubtree, IsCa, KeyPair, KeyUsagePurpose, NameConstraints, SanType,
    };
    use rustls_pki_types::PrivateKeyDer;
    use time::OffsetDateTime;

    use super::*;
    use crate::tls::{
        Bundle, Credentials,
        tests::{ORDERS, WEB},
        verify::{VerifiedPeer, verify_chain},
    };

    type Signer = CertifiedIssuer<'static, KeyPair>;

    const HOUR: Duration = Duration::from_secs(3600);

    fn signer(name: &str, by: Option<&Signer>, change: impl FnOnce(&mut CertificateParams)) -> Signer {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.distinguished_name.push(DnType::CommonName, name);
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        match by {
            Some(by) => Signer::signed_by(params, key, by),
            None => Signer::self_signed(params, key),
        }
        .unwrap()
    }

    fn leaf(id: &str, by: &Signer, usage: &[ExtendedKeyUsagePurpose]) -> (CertificateDer<'static>, KeyPair) {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = usage.to_vec();
        (params.not_before, params.not_after) =
            (OffsetDateTime::now_utc() - HOUR, OffsetDateTime::now_utc() + HOUR);
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, by).unwrap().der().clone(), key)
    }

    const BOTH: [ExtendedKeyUsagePurpose; 2] =
        [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];

    fn bundle(root: &Signer) -> Bundle {
        Bundle::new("weft.local".parse().unwrap(), vec![root.der().clone()]).unwrap()
    }

    fn chain(leaf: &CertificateDer<'static>, issuer: &Signer) -> Vec<CertificateDer<'static>> {
        vec![leaf.clone(), issuer.der().clone()]
    }

    #[test]
    fn a_leaf_is_taken_below_the_shared_issuer_exactly_where_the_whole_path_takes_it() {
        let root = signer("root", None, |_| {});
        let soon = OffsetDateTime::now_utc() + HOUR / 2;
        let issuer = signer("issuer", Some(&root), |params| params.not_after = soon);
        // The same name and another key.
        let forger = signer("issuer", None, |_| {});
        let other = signer("other issuer", Some(&root), |_| {});
        let (own, key) = leaf(WEB, &issuer, &BOTH);
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let credentials = Credentials::new(chain(&own, &issuer), key, bundle(&root)).unwrap();
        let (known, plain) = (credentials.bundle(), bundle(&root));
        assert!(known.issuer().is_some() && plain.issuer().is_none());

        let now = SystemTime::now();
        let good = chain(&leaf(ORDERS, &issuer, &BOTH).0, &issuer);
        let forged = leaf(ORDERS, &forger, &BOTH).0;
        let only_client = leaf(ORDERS, &issuer, &[ExtendedKeyUsagePurpose::ClientAuth]).0;
        let cases = [
            (good.clone(), now, true),
            (good.clone(), now + HOUR * 3 / 4, false),
            (good.clone(), now + HOUR * 2, false),
            (good.clone(), now - HOUR * 2, false),
            (good[..1].to_vec(), now, false),
            (chain(&forged, &issuer), now, false),
            (chain(&forged, &forger), now, false),
            (chain(&only_client, &issuer), now, false),
            (chain(&leaf(ORDERS, &other, &BOTH).0, &other), now, true),
            (chain(&leaf(ORDERS, &other, &BOTH).0, &issuer), now, false),
        ];
        for (number, (chain, at, taken)) in cases.iter().enumerate() {
            for bundle in [known, &plain] {
                let found = verify_chain(chain, bundle, Role::Server, unix_time(*at));
                assert_eq!(found.is_ok(), *taken, "case {number}: {found:?}");
            }
        }
    }

    #[test]
    fn a_peer_is_trusted_as_long_as_all_of_its_chain_and_its_root_are() {
        let (root, next) = (signer("root", None, |_| {}), signer("next root", None, |_| {}));
        let soon = OffsetDateTime::now_utc() + HOUR / 2;
        let issuer = signer("issuer", Some(&root), |params| params.not_after = soon);
        let chain = chain(&leaf(ORDERS, &issuer, &BOTH).0, &issuer);
        let now = SystemTime::now();
        for bundle in [bundle(&root), bundle(&root).with_issuer_of(&chain)] {
            let read = verify_chain(&chain, &bundle, Role::Server, unix_time(now)).unwrap();
            let peer = VerifiedPeer::proven(read, &chain, Role::Server, bundle.clone());
            assert!(peer.still_trusted(&bundle, now));
            assert!(!peer.still_trusted(&bundle, now + HOUR * 3 / 4), "its issuer has expired");
            let both = vec![root.der().clone(), next.der().clone()];
            let both = Bundle::new("weft.local".parse().unwrap(), both).unwrap();
            assert!(peer.still_trusted(&both, now));
            let next = Bundle::new("weft.local".parse().unwrap(), vec![next.der().clone()]).unwrap();
            assert!(!peer.still_trusted(&next, now), "its root was removed");
            assert!(!peer.still_trusted(&next.with_issuer_of(&chain), now), "its root was removed");
        }
    }

    #[test]
    fn only_a_plain_path_is_shortened() {
        let root = signer("root", None, |_| {});
        let issuer = signer("issuer", Some(&root), |_| {});
        let (own, _) = leaf(WEB, &issuer, &BOTH);
        let (direct, _) = leaf(WEB, &root, &BOTH);
        assert!(bundle(&root).with_issuer_of(&chain(&own, &issuer)).issuer().is_some());
        assert!(bundle(&root).with_issuer_of(&chain(&own, &issuer)[..1]).issuer().is_none());
        assert!(bundle(&issuer).with_issuer_of(&chain(&own, &issuer)[..1]).issuer().is_none());
        // What is shown beside it is on no path, and nobody has checked it.
        let stranger = signer("stranger", None, |_| {});
        assert!(bundle(&root).with_issuer_of(&chain(&direct, &stranger)).issuer().is_none());
        assert!(bundle(&stranger).with_issuer_of(&chain(&own, &issuer)).issuer().is_none());
        let one_role = leaf(WEB, &issuer, &[ExtendedKeyUsagePurpose::ClientAuth]).0;
        assert!(bundle(&root).with_issuer_of(&chain(&one_role, &issuer)).issuer().is_none());

        let constrained = signer("constrained root", None, |params| {
            params.name_constraints = Some(NameConstraints {
                permitted_subtrees: Vec::new(),
                excluded_subtrees: vec![GeneralSubtree::DnsName("example.org".to_owned())],
            });
        });
        let issuer = signer("issuer", Some(&constrained), |_| {});
        let chain = chain(&leaf(WEB, &issuer, &BOTH).0, &issuer);
        let bundle = bundle(&constrained);
        assert!(verify_chain(&chain, &bundle, Role::Client, unix_time(SystemTime::now())).is_ok());
        assert!(bundle.with_issuer_of(&chain).issuer().is_none());
    }
}
