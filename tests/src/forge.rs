//! Certificates that no honest authority gives: from a root of one's own, or from the mesh's own issuing key with
//! contents that it never signs.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use time::OffsetDateTime;

use crate::Mesh;

/// Signs what it is asked to.
#[derive(Debug)]
pub struct Forger {
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
    folder: PathBuf,
}

/// What a forged certificate says.
#[derive(Debug, Clone)]
pub struct Forged {
    /// Its URI names.
    pub uris: Vec<String>,
    /// Seconds from now to its end; negative where it has ended.
    pub ends_in: i64,
}

impl Forged {
    /// A certificate with one name, valid for an hour.
    pub fn of(uri: &str) -> Forged {
        Forged { uris: vec![uri.to_owned()], ends_in: 3600 }
    }
}

impl Forger {
    /// With the issuing key of the mesh itself, as a thief would have it.
    ///
    /// # Panics
    /// If the authority's files cannot be read.
    pub fn of_mesh(mesh: &Mesh) -> Forger {
        let file = mesh.network.folder().join("ca/issuing.pem");
        let text = fs::read_to_string(&file).expect("the issuing certificate");
        let der = CertificateDer::from_pem_slice(text.as_bytes()).expect("the issuing certificate");
        let (certificate, key) = text.split_at(text.find("-----BEGIN PRIVATE").expect("a key behind it"));
        let key = KeyPair::from_pem(key).expect("the issuing key");
        Forger {
            issuer: Issuer::from_ca_cert_der(&der, key).expect("an issuer"),
            certificate: certificate.to_owned(),
            folder: mesh.network.folder().to_owned(),
        }
    }

    /// With a new root for this trust domain. `folder` takes the files.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn of_stranger(trust_domain: &str, folder: &Path) -> Forger {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.distinguished_name.push(DnType::CommonName, format!("root of {trust_domain}"));
        let uri = format!("spiffe://{trust_domain}");
        params.subject_alt_names = vec![SanType::URI(uri.try_into().expect("a URI"))];
        let certificate = params.self_signed(&key).expect("a root");
        Forger { certificate: certificate.pem(), issuer: Issuer::new(params, key), folder: folder.to_owned() }
    }

    /// The certificate that it signs with, in PEM.
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// A PEM file with a chain and its key.
    ///
    /// # Panics
    /// If it cannot be made or written.
    pub fn leaf(&self, name: &str, forged: &Forged) -> PathBuf {
        let key = KeyPair::generate().expect("a key");
        let now = OffsetDateTime::now_utc();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "forged");
        let names = forged.uris.iter().map(|uri| SanType::URI(uri.as_str().try_into().expect("a URI")));
        params.subject_alt_names = names.collect();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.not_before = now - time::Duration::hours(1);
        params.not_after = now + time::Duration::seconds(forged.ends_in);
        let leaf = params.signed_by(&key, &self.issuer).expect("a leaf");
        let file = self.folder.join(format!("{name}.pem"));
        fs::write(&file, format!("{}{}{}", leaf.pem(), self.certificate, key.serialize_pem()))
            .expect("a file");
        file
    }
}
