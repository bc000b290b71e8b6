//! The root and the issuing certificate: made once, kept in the directory, used to sign workloads.
//!
//! The root signs only issuing certificates; the issuing certificate signs workloads and is renewed from the
//! root at half of its life, or as soon as it cannot be used: it is missing, damaged, or of another time than the
//! clock's. The root itself is never made anew. What was signed is read back and checked like a stranger's before it
//! is handed out, and never outlives its issuer.
//! Documents: X509-SVID sections 2 to 5, RFC 5280 section 4.

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow, bail};
use aws_lc_rs::{
    digest::{SHA256, digest},
    rand,
};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls_pki_types::{CertificateDer, UnixTime, pem::PemObject};
use time::OffsetDateTime;
use webpki::{EndEntityCert, KeyUsage};
use weft_proto::{
    certificate::Leaf,
    spiffe::{SpiffeId, TrustDomain},
};
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer};

use crate::{
    directory::Directory,
    request::{Request, hex},
};

/// Everything that signs. Never changed: a renewed one takes its place.
pub struct Authority {
    trust_domain: TrustDomain,
    root: Signer,
    issuing: Signer,
    roots: Vec<CertificateDer<'static>>,
}

/// What a command tells of an authority. Nothing is signed, mended or written for it.
pub struct Known {
    /// The trust domain.
    pub trust_domain: TrustDomain,
    /// As [`Authority::root_sha256`].
    pub root_sha256: String,
    /// How many roots are handed out.
    pub roots: usize,
    /// When the root ends.
    pub root_not_after: SystemTime,
    /// When the issuing certificate ends; `None` where it is missing or damaged, until `weft-ca serve` signs another.
    pub issuing_not_after: Option<SystemTime>,
}

/// A certificate that may sign, with its key.
struct Signer {
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
    not_before: SystemTime,
    not_after: SystemTime,
}

/// A workload's certificate, checked.
#[derive(Debug, Clone)]
pub struct Issued {
    /// Leaf first, then the issuing certificate.
    pub chain: Vec<CertificateDer<'static>>,
    /// What the leaf says.
    pub leaf: Leaf,
}

/// The root's certificate and key.
const ROOT_FILE: &str = "root.pem";
/// The issuing certificate and its key.
const ISSUING_FILE: &str = "issuing.pem";
/// The roots that are handed out as the trust bundle.
pub const ROOTS_FILE: &str = "roots.pem";

const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
const ISSUING_LIFETIME: Duration = Duration::from_secs(90 * 24 * 3600);
/// Certificates begin a little earlier, for clocks that are a little behind.
const BACKDATED: Duration = Duration::from_secs(30);
/// More roots than a rotation needs.
const MAX_ROOTS: usize = 16;

impl Authority {
    /// Makes a new authority in an empty directory.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn init(directory: &Directory, trust_domain: TrustDomain, now: SystemTime) -> Result<Self> {
        let key = KeyPair::generate()?;
        let params = signer_params(&trust_domain, "root", 1, now - BACKDATED, now + ROOT_LIFETIME)?;
        let certificate = params.self_signed(&key)?;
        let root_pem = format!("{}{}", certificate.pem(), key.serialize_pem());
        let roots_pem = certificate.pem();
        let root = Signer::parse(root_pem.as_bytes())?;
        let (issuing, issuing_pem) = root.sign_issuing(&trust_domain, now)?;
        // The root comes last: without it the directory is seen to be incomplete.
        directory.write(ROOTS_FILE, roots_pem.as_bytes())?;
        directory.write(ISSUING_FILE, issuing_pem.as_bytes())?;
        directory.write(ROOT_FILE, root_pem.as_bytes())?;
        let roots = vec![root.certificate.clone()];
        Ok(Authority { trust_domain, root, issuing, roots })
    }

    /// Takes up an authority where it was left, to serve. An issuing certificate that cannot be used is replaced by a new one.
    ///
    /// # Errors
    /// A file is wider than 0600; root or `roots.pem` are missing, damaged, or do not fit each other; the root is not
    /// valid now; a new issuing certificate cannot be written.
    pub fn load(directory: &Directory, now: SystemTime) -> Result<Self> {
        // Before anything is signed: the wrong root in a directory must not replace what fits the right one.
        let (trust_domain, root, roots) = read_root(directory, now)?;
        let kept = directory.read(ISSUING_FILE)?.context("it is missing");
        let issuing = match kept.and_then(|bytes| Signer::parse(&bytes)) {
            Ok(issuing) => issuing,
            Err(reason) => {
                warn_of_issuing(directory, &reason);
                root.replace_issuing(directory, &trust_domain, now)?
            }
        };
        let mut authority = Authority { trust_domain, root, issuing, roots };
        if let Err(reason) = authority.check_issuing(now) {
            warn_of_issuing(directory, &reason);
            authority.issuing = authority.root.replace_issuing(directory, &authority.trust_domain, now)?;
            authority.check_issuing(now)?;
        }
        Ok(authority)
    }

    /// The same authority with a new issuing certificate, written to the directory.
    ///
    /// # Errors
    /// The root is not valid now, or it cannot be written.
    pub fn renew_issuing(&self, directory: &Directory, now: SystemTime) -> Result<Self> {
        self.root.check_time(now).with_context(|| format!("{}", directory.path(ROOT_FILE).display()))?;
        self.root.replace_issuing(directory, &self.trust_domain, now)?;
        Self::load(directory, now)
    }

    /// Is it time for a new issuing certificate? When more than half of its life is over, and also when it has not
    /// begun: the clock was ahead when it was signed, and until then it is good for nothing.
    pub fn issuing_is_due(&self, now: SystemTime) -> bool {
        if now < self.issuing.not_before {
            return true;
        }
        let life = self.issuing.not_after.duration_since(self.issuing.not_before).unwrap_or_default();
        let renewable = self.issuing.not_after < self.root.not_after;
        renewable && now + life / 2 >= self.issuing.not_after
    }

    /// Can anything be signed now?
    ///
    /// # Errors
    /// Which of the two signing certificates is not valid now, and why.
    pub fn check_time(&self, now: SystemTime) -> Result<()> {
        self.root.check_time(now).context("the root")?;
        self.issuing.check_time(now).context("the issuing certificate")
    }

    /// Does `roots.pem` differ from what we hand out?
    ///
    /// # Errors
    /// It cannot be read, or is refused.
    pub fn roots_changed(&self, directory: &Directory) -> Result<bool> {
        let bytes = directory.read(ROOTS_FILE)?.ok_or_else(|| missing(directory, ROOTS_FILE))?;
        let roots = parse_roots(&bytes, &self.root)
            .with_context(|| format!("{}", directory.path(ROOTS_FILE).display()))?;
        Ok(roots != self.roots)
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The roots that workloads shall believe: our own, and what an operator added to `roots.pem`.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// Our own root.
    pub fn root(&self) -> &CertificateDer<'static> {
        &self.root.certificate
    }

    /// The SHA-256 of our root's DER, in hexadecimal: what a client pins.
    pub fn root_sha256(&self) -> String {
        self.root.sha256()
    }

    /// When the root ends.
    pub fn root_not_after(&self) -> SystemTime {
        self.root.not_after
    }

    /// What a command tells of it.
    pub fn known(&self) -> Known {
        Known {
            trust_domain: self.trust_domain.clone(),
            root_sha256: self.root_sha256(),
            roots: self.roots.len(),
            root_not_after: self.root.not_after,
            issuing_not_after: Some(self.issuing.not_after),
        }
    }

    /// When the issuing certificate ends.
    pub fn issuing_not_after(&self) -> SystemTime {
        self.issuing.not_after
    }

    /// The authority's own id, under which it serves. It is never given to anybody else.
    pub fn own_id(&self) -> Result<SpiffeId> {
        weft_proto::spiffe::authority_id(&self.trust_domain).map_err(|error| anyhow!("{error}"))
    }

    /// Signs a workload's key, for an identity that was proven. The certificate ends after this lifetime, or
    /// with the issuing certificate where that is sooner. With DNS names it serves only: it says so to every verifier,
    /// by its extended key usage.
    ///
    /// # Errors
    /// The identity is of another trust domain, the issuer has expired, or what was signed fails the check.
    pub fn sign(
        &self,
        request: &Request,
        id: &SpiffeId,
        dns_names: &[String],
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Issued> {
        if id.trust_domain() != self.trust_domain.as_str() {
            bail!("{id} is not of the trust domain {}", self.trust_domain);
        }
        let not_before = (now - BACKDATED).max(self.issuing.not_before);
        let not_after = (now + lifetime).min(self.issuing.not_after);
        self.check_time(now)?;
        let mut params = CertificateParams::default();
        // No subject: the identity is the URI name alone, which rcgen then marks as critical.
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into()?)];
        for name in dns_names {
            params.subject_alt_names.push(SanType::DnsName(name.as_str().try_into()?));
        }
        // RFC 5280 lets a leaf leave basicConstraints out; py-spiffe takes only one that says it is no authority.
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        if dns_names.is_empty() {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth);
        }
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial()?);
        params.not_before = OffsetDateTime::from(not_before);
        params.not_after = OffsetDateTime::from(not_after);
        let key = SubjectPublicKeyInfo::from_der(&request.public_key)?;
        let certificate = params.signed_by(&key, &self.issuing.issuer)?;
        let chain = vec![certificate.der().clone(), self.issuing.certificate.clone()];
        let leaf = self.check(&chain, request, id, dns_names, now)?;
        if leaf.not_after > not_after || leaf.not_before + Duration::from_secs(1) < not_before {
            bail!("the certificate that was signed lives longer than it should");
        }
        Ok(Issued { chain, leaf })
    }

    /// What a peer will check, checked by us first.
    fn check(
        &self,
        chain: &[CertificateDer<'static>],
        request: &Request,
        id: &SpiffeId,
        dns_names: &[String],
        now: SystemTime,
    ) -> Result<Leaf> {
        let (end_entity, intermediates) = chain.split_first().context("an empty chain")?;
        let (leaf, names) =
            Leaf::parse_serving(end_entity).map_err(|error| anyhow!("the signed certificate: {error}"))?;
        if leaf.id != *id || names != dns_names || leaf.public_key != request.public_key {
            bail!("the certificate that was signed is not the one that was asked for");
        }
        let anchors = [webpki::anchor_from_trusted_cert(&self.root.certificate)?];
        let certificate = EndEntityCert::try_from(end_entity)?;
        let at = UnixTime::since_unix_epoch(now.duration_since(SystemTime::UNIX_EPOCH)?);
        let client = dns_names.is_empty().then(KeyUsage::client_auth);
        for usage in client.into_iter().chain([KeyUsage::server_auth()]) {
            certificate.verify_for_usage(
                webpki::ALL_VERIFICATION_ALGS,
                &anchors,
                intermediates,
                at,
                usage,
                None,
                None,
            )?;
        }
        Ok(leaf)
    }

    /// Signs a throw-away key: proves that issuing certificate, root and keys fit together.
    fn check_issuing(&self, now: SystemTime) -> Result<()> {
        let key = KeyPair::generate()?;
        let request = Request { public_key: key.subject_public_key_info() };
        self.sign(&request, &self.own_id()?, &[], Duration::from_secs(60), now).map(drop)
    }
}

impl Known {
    /// Reads it from the directory.
    ///
    /// # Errors
    /// As [`Authority::load`] for root and `roots.pem`; a file is wider than 0600.
    pub fn read(directory: &Directory, now: SystemTime) -> Result<Self> {
        let (trust_domain, root, roots) = read_root(directory, now)?;
        let issuing = directory.read(ISSUING_FILE)?.and_then(|bytes| Signer::parse(&bytes).ok());
        Ok(Known {
            trust_domain,
            root_sha256: root.sha256(),
            roots: roots.len(),
            root_not_after: root.not_after,
            issuing_not_after: issuing.map(|issuing| issuing.not_after),
        })
    }
}

impl Signer {
    /// The SHA-256 of its DER, in hexadecimal.
    fn sha256(&self) -> String {
        hex(digest(&SHA256, &self.certificate).as_ref())
    }

    /// Reads a certificate and its key, which must belong together.
    fn parse(pem: &[u8]) -> Result<Self> {
        let certificate = CertificateDer::from_pem_slice(pem)
            .map_err(|error| anyhow!("no certificate in PEM can be read: {error}"))?;
        let text = std::str::from_utf8(pem).context("it is not text")?;
        let key_at = text.find("-----BEGIN PRIVATE KEY-----").context("it has no private key")?;
        let key = KeyPair::from_pem(&text[key_at..]).context("its private key cannot be read")?;
        let parsed = read(&certificate)?;
        if parsed.public_key().raw != key.subject_public_key_info() {
            bail!("its certificate and its private key do not belong together");
        }
        let (not_before, not_after) = (
            time_of(parsed.validity().not_before.timestamp()),
            time_of(parsed.validity().not_after.timestamp()),
        );
        let issuer = Issuer::from_ca_cert_der(&certificate, key)?;
        Ok(Signer { issuer, not_before, not_after, certificate })
    }

    /// Is it valid now?
    fn check_time(&self, now: SystemTime) -> Result<()> {
        let time = humantime::format_rfc3339_seconds;
        if now < self.not_before {
            bail!(
                "it is valid from {} on, and the clock of this machine says {}",
                time(self.not_before),
                time(now)
            );
        }
        if self.not_after <= now {
            bail!("it expired at {}, and the clock of this machine says {}", time(self.not_after), time(now));
        }
        Ok(())
    }

    /// Signs a new issuing certificate and writes it to the directory.
    fn replace_issuing(
        &self,
        directory: &Directory,
        trust_domain: &TrustDomain,
        now: SystemTime,
    ) -> Result<Signer> {
        let (issuing, pem) = self.sign_issuing(trust_domain, now)?;
        directory.write(ISSUING_FILE, pem.as_bytes())?;
        Ok(issuing)
    }

    fn sign_issuing(&self, trust_domain: &TrustDomain, now: SystemTime) -> Result<(Signer, String)> {
        let key = KeyPair::generate()?;
        let not_before = (now - BACKDATED).max(self.not_before);
        let not_after = (now + ISSUING_LIFETIME).min(self.not_after);
        let params = signer_params(trust_domain, "issuing", 0, not_before, not_after)?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let pem = format!("{}{}", certificate.pem(), key.serialize_pem());
        Ok((Signer::parse(pem.as_bytes())?, pem))
    }
}

/// The trust domain, the root and `roots.pem`: what is never made anew, and must be good for anything else.
fn read_root(
    directory: &Directory,
    now: SystemTime,
) -> Result<(TrustDomain, Signer, Vec<CertificateDer<'static>>)> {
    let read = |name: &str| {
        let bytes = directory.read(name)?.ok_or_else(|| missing(directory, name))?;
        Ok::<_, anyhow::Error>((bytes, directory.path(name)))
    };
    let (bytes, path) = read(ROOT_FILE)?;
    let root = Signer::parse(&bytes).with_context(|| format!("{}", path.display()))?;
    let trust_domain = trust_domain_of(&root.certificate).with_context(|| format!("{}", path.display()))?;
    root.check_time(now).with_context(|| {
        format!(
            "{}: the root is not valid now. Set the clock, or, where it is right, make a new root in a new \
             directory (`weft-ca init`) and give its pin to every workload",
            path.display()
        )
    })?;
    let (bytes, path) = read(ROOTS_FILE)?;
    let roots = parse_roots(&bytes, &root).with_context(|| format!("{}", path.display()))?;
    Ok((trust_domain, root, roots))
}

/// A certificate that may sign. Its URI name is the trust domain (X509-SVID 4.1); its subject is like no other's.
fn signer_params(
    trust_domain: &TrustDomain,
    role: &str,
    path_length: u8,
    not_before: SystemTime,
    not_after: SystemTime,
) -> Result<CertificateParams> {
    let serial = serial()?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, trust_domain.as_str());
    let name = format!("Weft {role} {}", hex(&serial.to_bytes()[..4]));
    params.distinguished_name.push(DnType::CommonName, name);
    params.subject_alt_names = vec![SanType::URI(format!("spiffe://{trust_domain}").try_into()?)];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_length));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(serial);
    params.not_before = OffsetDateTime::from(not_before);
    params.not_after = OffsetDateTime::from(not_after);
    Ok(params)
}

/// 126 random bits, positive and without a leading zero byte (RFC 5280 section 4.1.2.2).
fn serial() -> Result<SerialNumber> {
    let mut bytes = [0; 16];
    rand::fill(&mut bytes).map_err(|_| anyhow!("the system gives no random bytes"))?;
    bytes[0] = (bytes[0] & 0x7f) | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

/// The roots of `roots.pem`; ours must be among them, or nobody would believe what we sign.
fn parse_roots(pem: &[u8], own: &Signer) -> Result<Vec<CertificateDer<'static>>> {
    let roots: Vec<CertificateDer<'static>> =
        CertificateDer::pem_slice_iter(pem).collect::<std::result::Result<_, _>>().context("damaged PEM")?;
    if roots.len() > MAX_ROOTS {
        bail!("it has {} roots; at most {MAX_ROOTS} are handed out", roots.len());
    }
    if !roots.contains(&own.certificate) {
        bail!("it lacks the root of {ROOT_FILE}, so nobody would believe what is signed here; add it again");
    }
    for root in &roots {
        webpki::anchor_from_trusted_cert(root).context("one of its certificates is no usable root")?;
    }
    Ok(roots)
}

fn trust_domain_of(root: &CertificateDer<'_>) -> Result<TrustDomain> {
    let parsed = read(root)?;
    let names = parsed.subject_alternative_name()?.context("it has no URI name")?;
    let [GeneralName::URI(uri)] = names.value.general_names[..] else {
        bail!("it does not have exactly one URI name");
    };
    let domain = uri.strip_prefix("spiffe://").context("its name is not a trust domain")?;
    domain.parse().map_err(|error| anyhow!("{error}"))
}

fn read<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>> {
    let (_, parsed) =
        X509Certificate::from_der(certificate).map_err(|error| anyhow!("a damaged certificate: {error}"))?;
    Ok(parsed)
}

fn time_of(seconds: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

fn warn_of_issuing(directory: &Directory, reason: &anyhow::Error) {
    tracing::warn!(
        "{} cannot be used ({reason:#}); a new issuing certificate is signed from {ROOT_FILE}",
        directory.path(ISSUING_FILE).display()
    );
}

fn missing(directory: &Directory, name: &str) -> anyhow::Error {
    anyhow!(
        "{} is missing. It is never made anew by itself: restore it from a backup. For a first start run \
         `weft-ca init --dir DIR --trust-domain NAME` on an empty directory",
        directory.path(name).display()
    )
}

#[cfg(test)]
mod tests;
