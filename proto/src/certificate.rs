//! What a workload's certificate says of itself: exactly one SPIFFE id, its life, its key.
//!
//! The rules are those of [X509-SVID](https://github.com/spiffe/spiffe/blob/main/standards/X509-SVID.md)
//! sections 2 to 4 for a leaf. This file reads; it verifies no signature and no chain: a [`Leaf`] is a claim
//! until somebody has checked it against a trust bundle.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use x509_parser::{
    certificate::X509Certificate,
    extensions::{GeneralName, ParsedExtension},
    prelude::FromDer,
    time::ASN1Time,
};

use crate::spiffe::SpiffeId;

/// A leaf certificate, read and found to be well-formed; not yet believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaf {
    /// The one URI name.
    pub id: SpiffeId,
    /// Not valid before.
    pub not_before: SystemTime,
    /// Not valid after.
    pub not_after: SystemTime,
    /// The serial number in lowercase hexadecimal, bytes parted by colons.
    pub serial: String,
    /// The SubjectPublicKeyInfo in DER.
    pub public_key: Vec<u8>,
}

/// Why a certificate is not a workload's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidLeaf(String);

impl Leaf {
    /// Reads the leaf certificate of a peer.
    ///
    /// # Errors
    /// Not DER, no or more than one URI name, a name that is no id of this mesh, a certificate that may sign
    /// others, one that may not make signatures. X509-SVID would allow DNS names: here they are the mark of a server that
    /// is called from outside of the mesh, whose key opens nothing within.
    pub fn parse(der: &[u8]) -> Result<Self, InvalidLeaf> {
        let (leaf, dns_names) = Self::parse_serving(der)?;
        match dns_names.first() {
            None => Ok(leaf),
            Some(name) => Err(InvalidLeaf(format!(
                "it has a DNS name ({}), so it is for a server outside of the mesh and not for a peer",
                name.chars().take(100).flat_map(char::escape_default).collect::<String>()
            ))),
        }
    }

    /// Reads a leaf certificate that may have DNS names, which come with it: that of a server which is called from outside of
    /// the mesh. No peer is judged by this.
    ///
    /// # Errors
    /// As [`Leaf::parse`], but for the DNS names.
    pub fn parse_serving(der: &[u8]) -> Result<(Self, Vec<String>), InvalidLeaf> {
        let certificate = read(der)?;
        let names = names(&certificate)?;
        let id = only_id(&names.uris)?;
        check_usage(&certificate)?;
        let dns_names = names.dns.iter().map(|&name| name.to_owned()).collect();
        let leaf = Leaf {
            id,
            not_before: time(certificate.validity().not_before),
            not_after: time(certificate.validity().not_after),
            serial: certificate.raw_serial_as_string(),
            public_key: certificate.public_key().raw.to_vec(),
        };
        Ok((leaf, dns_names))
    }
}

/// Whom a certificate claims to be, for a log line about a refusal: its URI names as they stand there, cut to
/// a sane length, or the words that it has none.
pub fn claimed(der: &[u8]) -> String {
    let Ok(certificate) = read(der) else { return "no readable certificate".to_owned() };
    match names(&certificate) {
        Ok(names) if names.uris.is_empty() => "a certificate without an identity".to_owned(),
        Ok(names) => {
            let shown: Vec<String> = names
                .uris
                .iter()
                .take(3)
                .map(|name| name.chars().take(200).flat_map(char::escape_default).collect())
                .collect();
            shown.join(" and ")
        }
        Err(_) => "a certificate without a readable identity".to_owned(),
    }
}

fn read(der: &[u8]) -> Result<X509Certificate<'_>, InvalidLeaf> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok(_) => Err(InvalidLeaf("it has bytes after its end".to_owned())),
        Err(error) => Err(InvalidLeaf(format!("it is not a certificate in DER: {error}"))),
    }
}

/// The names of a certificate that count here.
#[derive(Default)]
struct Names<'a> {
    uris: Vec<&'a str>,
    dns: Vec<&'a str>,
}

fn only_id(uris: &[&str]) -> Result<SpiffeId, InvalidLeaf> {
    match *uris {
        [] => Err(InvalidLeaf("it has no URI name, so no identity".to_owned())),
        [name] => name.parse().map_err(|error| InvalidLeaf(format!("its name {error}"))),
        _ => Err(InvalidLeaf(format!("it has {} URI names instead of one", uris.len()))),
    }
}

fn names<'a>(certificate: &'a X509Certificate<'_>) -> Result<Names<'a>, InvalidLeaf> {
    let mut names = Names::default();
    let mut seen = false;
    for extension in certificate.extensions() {
        match extension.parsed_extension() {
            ParsedExtension::SubjectAlternativeName(_) if seen => {
                return Err(InvalidLeaf("it has two lists of names".to_owned()));
            }
            ParsedExtension::SubjectAlternativeName(list) => {
                seen = true;
                for name in &list.general_names {
                    match name {
                        GeneralName::URI(uri) => names.uris.push(*uri),
                        GeneralName::DNSName(name) => names.dns.push(*name),
                        GeneralName::Invalid(..) => {
                            return Err(InvalidLeaf("one of its names is malformed".to_owned()));
                        }
                        _ => {}
                    }
                }
            }
            ParsedExtension::ParseError { .. } => {
                return Err(InvalidLeaf(format!("its extension {} is malformed", extension.oid)));
            }
            _ => {}
        }
    }
    Ok(names)
}

/// X509-SVID 4.1 to 4.3: a leaf is no CA, signs no certificates or lists, and makes digital signatures.
fn check_usage(certificate: &X509Certificate<'_>) -> Result<(), InvalidLeaf> {
    if certificate.is_ca() {
        return Err(InvalidLeaf("it belongs to a certificate authority, not to a workload".to_owned()));
    }
    let usage = certificate
        .key_usage()
        .map_err(|error| InvalidLeaf(format!("its key usage is malformed: {error}")))?;
    let Some(usage) = usage else {
        return Err(InvalidLeaf("it does not state its key usage".to_owned()));
    };
    if !usage.value.digital_signature() || usage.value.key_cert_sign() || usage.value.crl_sign() {
        return Err(InvalidLeaf("its key usage is not that of a workload (digitalSignature)".to_owned()));
    }
    Ok(())
}

/// Certificates know whole seconds only; years before 1970 count as 1970.
fn time(at: ASN1Time) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(at.timestamp()).unwrap_or(0))
}

impl fmt::Display for InvalidLeaf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for InvalidLeaf {}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, IsCa, KeyPair, KeyUsagePurpose, SanType};

    use super::*;

    fn certificate(uris: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.subject_alt_names = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        change(&mut params);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    const WEB: &str = "spiffe://weft.local/ns/shop/sa/web";

    #[test]
    fn reads_a_workload() {
        let leaf = Leaf::parse(&certificate(&[WEB], |_| {})).unwrap();
        assert_eq!(leaf.id.as_str(), WEB);
        assert!(leaf.not_before < leaf.not_after && !leaf.serial.is_empty());
    }

    #[test]
    fn dns_names_are_read_beside_the_one_identity_and_are_not_for_peers() {
        let server = certificate(&[WEB], |params| {
            params.subject_alt_names.push(SanType::DnsName("web.shop.svc".try_into().unwrap()));
        });
        let (leaf, dns_names) = Leaf::parse_serving(&server).unwrap();
        assert_eq!((leaf.id.as_str(), &dns_names[..]), (WEB, &["web.shop.svc".to_owned()][..]));
        let refused = Leaf::parse(&server).unwrap_err().to_string();
        assert!(refused.contains("a DNS name (web.shop.svc)"), "{refused}");
    }

    #[test]
    fn refuses_what_is_not_exactly_one_workload() {
        let ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let cases = [
            (certificate(&[], |_| {}), "no URI name"),
            (certificate(&[WEB, "spiffe://weft.local/ns/shop/sa/pay"], |_| {}), "2 URI names"),
            (certificate(&[WEB, WEB], |_| {}), "2 URI names"),
            (certificate(&["https://weft.local/"], |_| {}), "not an identity"),
            (certificate(&[WEB], |params| params.is_ca = ca), "certificate authority"),
            (certificate(&[WEB], |params| params.key_usages = vec![]), "key usage"),
            (certificate(&[WEB], |params| params.key_usages.push(KeyUsagePurpose::KeyCertSign)), "key usage"),
            ([certificate(&[WEB], |_| {}), vec![0]].concat(), "after its end"),
            (b"hello".to_vec(), "not a certificate"),
        ];
        for (der, reason) in cases {
            let error = Leaf::parse(&der).unwrap_err().to_string();
            assert!(error.contains(reason), "{error:?} does not say {reason:?}");
        }
    }

    #[test]
    fn no_prefix_and_no_flipped_byte_panics() {
        let good = certificate(&[WEB], |_| {});
        for end in 0..good.len() {
            assert!(Leaf::parse(&good[..end]).is_err());
            let mut flipped = good.clone();
            flipped[end] ^= 0x41;
            let _ = Leaf::parse(&flipped);
            let _ = claimed(&flipped);
        }
    }

    #[test]
    fn a_claim_is_safe_to_log() {
        assert_eq!(claimed(&certificate(&[WEB], |_| {})), WEB);
        assert_eq!(claimed(&certificate(&["x\n\u{1b}[31m"], |_| {})), "x\\n\\u{1b}[31m");
        assert_eq!(claimed(&certificate(&[], |_| {})), "a certificate without an identity");
        assert_eq!(claimed(b"x"), "no readable certificate");
    }
}
