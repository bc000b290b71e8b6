//! What a caller wants signed: the public key of a PKCS#10 request (RFC 2986), and nothing else of it.
//!
//! The request's own signature is checked, so that nobody has a key certified that is not in his hands. Names
//! and extensions that stand in the request are not looked at.

use anyhow::{Result, bail};
use aws_lc_rs::{
    digest::{SHA256, digest},
    signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey},
};
use x509_parser::{
    certification_request::X509CertificationRequest,
    oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_SIG_ECDSA_WITH_SHA256},
    prelude::FromDer,
};

/// A P-256 key whose owner has shown that he has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The SubjectPublicKeyInfo in DER.
    pub public_key: Vec<u8>,
}

/// A request with a P-256 key has some 300 bytes.
const MAX_BYTES: usize = 8 * 1024;

impl Request {
    /// Reads a request in DER.
    ///
    /// # Errors
    /// It is not a PKCS#10 request, its key is not on P-256, or its signature is not made with that key.
    pub fn parse(der: &[u8]) -> Result<Self> {
        if der.len() > MAX_BYTES {
            bail!("the certificate request has {} bytes; at most {MAX_BYTES} are read", der.len());
        }
        let Ok(([], request)) = X509CertificationRequest::from_der(der) else {
            bail!("the certificate request is not PKCS#10 in DER (RFC 2986)");
        };
        let info = &request.certification_request_info;
        let algorithm = &info.subject_pki.algorithm;
        let curve = algorithm.parameters.as_ref().and_then(|parameters| parameters.as_oid().ok());
        if algorithm.algorithm != OID_KEY_TYPE_EC_PUBLIC_KEY || curve != Some(OID_EC_P256) {
            bail!("the key of the certificate request is not ECDSA on P-256, the only kind that is signed");
        }
        if request.signature_algorithm.algorithm != OID_SIG_ECDSA_WITH_SHA256 {
            bail!("the certificate request is not signed by ECDSA with SHA-256");
        }
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, info.subject_pki.subject_public_key.data.as_ref())
            .verify(info.raw, request.signature_value.data.as_ref())
            .map_err(|_| anyhow::anyhow!("the certificate request is not signed by its own key"))?;
        Ok(Request { public_key: info.subject_pki.raw.to_vec() })
    }

    /// The SHA-256 of the key, in hexadecimal, for the audit.
    pub fn fingerprint(&self) -> String {
        hex(digest(&SHA256, &self.public_key).as_ref())
    }
}

/// Lowercase hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, PublicKeyData, SanType};

    use super::*;

    fn request(key: &KeyPair) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.subject_alt_names =
            vec![SanType::URI("spiffe://weft.local/ns/a/sa/admin".try_into().unwrap())];
        params.serialize_request(key).unwrap().der().to_vec()
    }

    #[test]
    fn only_the_key_is_taken() {
        let key = KeyPair::generate().unwrap();
        let parsed = Request::parse(&request(&key)).unwrap();
        assert_eq!(parsed, Request { public_key: key.subject_public_key_info() });
        assert_eq!(parsed.fingerprint().len(), 64);
    }

    #[test]
    fn other_keys_foreign_signatures_and_garbage_are_refused() {
        let key = KeyPair::generate().unwrap();
        let good = request(&key);
        let p384 = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        let edwards = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let mut forged = good.clone();
        *forged.last_mut().unwrap() ^= 1;
        let mut renamed = good.clone();
        let at = renamed.windows(5).position(|window| window == b"admin").unwrap();
        renamed[at] = b'A';
        let cases = [
            (request(&p384), "P-256"),
            (request(&edwards), "P-256"),
            (forged, "own key"),
            (renamed, "own key"),
            ([good.clone(), vec![0]].concat(), "PKCS#10"),
            (vec![0x30; 9000], "at most 8192"),
            (vec![], "PKCS#10"),
        ];
        for (der, reason) in cases {
            let error = Request::parse(&der).unwrap_err().to_string();
            assert!(error.contains(reason), "{error:?} does not say {reason:?}");
        }
        for end in 0..good.len() {
            assert!(Request::parse(&good[..end]).is_err());
        }
    }
}
