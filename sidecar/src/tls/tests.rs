//! Handshakes over real sockets: who is taken, who is refused, in both directions, and what the log would say.
//! [`TestAuthority`] makes certificates for the tests of the rooms above too.

use std::{
    io::ErrorKind,
    sync::Arc,
    time::{Duration, SystemTime},
};

use aws_lc_rs::digest::{SHA256, digest};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::{
    ClientConfig, ServerConfig,
    sign::{CertifiedKey, SingleCertAndKey},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use time::OffsetDateTime;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use weft_proto::spiffe::SpiffeId;

use super::*;
use crate::{
    model::{Failed, Failure, KeyExchange, Result},
    net::Stream,
};

/// A root that signs leaves directly.
pub(crate) struct TestAuthority {
    trust_domain: &'static str,
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
}

/// How a leaf of the tests differs from a good one.
pub(crate) struct TestLeaf {
    pub(crate) uris: Vec<String>,
    pub(crate) dns_names: Vec<&'static str>,
    pub(crate) not_before: OffsetDateTime,
    pub(crate) not_after: OffsetDateTime,
    pub(crate) usages: Vec<ExtendedKeyUsagePurpose>,
}

impl TestLeaf {
    pub(crate) fn of(id: &str) -> Self {
        let now = OffsetDateTime::now_utc();
        TestLeaf {
            uris: vec![id.to_owned()],
            dns_names: Vec::new(),
            not_before: now - Duration::from_secs(60),
            not_after: now + Duration::from_secs(3600),
            usages: vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
        }
    }
}

impl TestAuthority {
    pub(crate) fn new(trust_domain: &'static str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.distinguished_name.push(DnType::CommonName, "test root");
        let root = params.self_signed(&key).unwrap().der().clone();
        TestAuthority { trust_domain, issuer: Issuer::new(params, key), root }
    }

    pub(crate) fn bundle(&self) -> Bundle {
        Bundle::new(self.trust_domain.parse().unwrap(), vec![self.root.clone()]).unwrap()
    }

    pub(crate) fn leaf(&self, leaf: TestLeaf) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "test leaf");
        let uris = leaf.uris.iter().map(|uri| SanType::URI(uri.as_str().try_into().unwrap()));
        let dns_names = leaf.dns_names.iter().map(|&name| SanType::DnsName(name.try_into().unwrap()));
        params.subject_alt_names = uris.chain(dns_names).collect();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = leaf.usages;
        (params.not_before, params.not_after) = (leaf.not_before, leaf.not_after);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (vec![certificate.der().clone()], PrivateKeyDer::try_from(key.serialize_der()).unwrap())
    }

    /// Good credentials for this id, which belongs to the authority's trust domain.
    pub(crate) fn credentials(&self, id: &str) -> Credentials {
        let (chain, key) = self.leaf(TestLeaf::of(id));
        Credentials::new(chain, key, self.bundle()).unwrap()
    }
}

pub(crate) const WEB: &str = "spiffe://weft.local/ns/shop/sa/web";
pub(crate) const ORDERS: &str = "spiffe://weft.local/ns/shop/sa/orders";

fn id(text: &str) -> SpiffeId {
    text.parse().unwrap()
}

/// Two ends of a real TCP connection on loopback.
async fn sockets() -> (Stream, Stream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (server, _) = listener.accept().await.unwrap();
    (client.into(), server.into())
}

type Accepted = Result<(Stream, VerifiedPeer, Alpn)>;
type Connected = Result<(Stream, VerifiedPeer)>;

async fn handshake(
    client: &Credentials,
    server: &Credentials,
    expected: &[&str],
    alpn: Alpn,
) -> (Connected, Accepted) {
    let (near, far) = sockets().await;
    let expected: Vec<SpiffeId> = expected.iter().map(|text| id(text)).collect();
    tokio::join!(connect(near, client, &expected, alpn), accept(far, server))
}

fn refused<T>(result: Result<T>, failure: Failure, words: &[&str]) -> Failed {
    let Err(failed) = result else { panic!("taken; expected {failure}") };
    assert_eq!(failed.failure, failure, "{failed}");
    for word in words {
        assert!(failed.detail.contains(word), "{:?} does not say {word:?}", failed.detail);
    }
    failed
}

#[tokio::test]
async fn both_sides_learn_who_the_other_is_and_bytes_flow() {
    let authority = TestAuthority::new("weft.local");
    let (web, orders) = (authority.credentials(WEB), authority.credentials(ORDERS));
    for alpn in [Alpn::Http2, Alpn::Http1, Alpn::Tcp] {
        let (near, far) = handshake(&web, &orders, &[WEB, ORDERS], alpn).await;
        let ((mut near, server), (mut far, client, carried)) = (near.unwrap(), far.unwrap());
        assert_eq!((server.id(), client.id(), carried), (&id(ORDERS), &id(WEB), alpn));
        assert_eq!((server.not_after(), server.serial()), (orders.not_after(), orders.serial()));
        near.write_all(b"ping").await.unwrap();
        near.flush().await.unwrap();
        let mut buffer = [0; 4];
        far.read_exact(&mut buffer).await.unwrap();
        assert_eq!(&buffer, b"ping");
    }
}

#[test]
fn the_cheapest_suite_and_the_hybrid_key_exchange_come_first_and_the_others_stay() {
    use rustls::{CipherSuite::TLS13_AES_128_GCM_SHA256, NamedGroup, crypto::aws_lc_rs::default_provider};
    let (ours, default) = (credentials::provider(), default_provider());
    assert_eq!(ours.cipher_suites[0].suite(), TLS13_AES_128_GCM_SHA256);
    assert_eq!(ours.cipher_suites.len(), default.cipher_suites.len());
    assert_eq!(ours.kx_groups[0].name(), NamedGroup::X25519MLKEM768);
    assert_eq!(ours.kx_groups.len(), default.kx_groups.len());
}

#[tokio::test]
async fn keys_are_agreed_on_by_the_hybrid_unless_a_side_has_curves_alone() {
    use KeyExchange::{Classic, PostQuantum};
    use rustls::NamedGroup::{X25519, X25519MLKEM768};
    let authority = TestAuthority::new("weft.local");
    for (of_client, of_server, group) in [
        (PostQuantum, PostQuantum, X25519MLKEM768),
        (Classic, PostQuantum, X25519),
        (PostQuantum, Classic, X25519),
        (Classic, Classic, X25519),
    ] {
        let web = authority.credentials(WEB).with_key_exchange(of_client).unwrap();
        let orders = authority.credentials(ORDERS).with_key_exchange(of_server).unwrap();
        // New roots change nothing about it.
        let orders = orders.with_bundle(authority.bundle()).unwrap();
        let (near, far) = handshake(&web, &orders, &[ORDERS], Alpn::Http2).await;
        let seen = (near.unwrap().0.key_exchange(), far.unwrap().0.key_exchange());
        assert_eq!(seen, (Some(group), Some(group)), "{of_client:?} {of_server:?}");
    }
}

#[tokio::test]
async fn a_sidecar_that_knows_no_first_byte_is_spoken_to_without_one() {
    let authority = TestAuthority::new("weft.local");
    let (web, orders) = (authority.credentials(WEB), authority.credentials(ORDERS));
    let (near, far) = handshake(&web, &orders, &[ORDERS], Alpn::ConfirmedTcp).await;
    let (near, far) = (near.unwrap(), far.unwrap());
    assert_eq!((near.0.alpn(), far.2), (Some(&b"weft-tcp2"[..]), Alpn::ConfirmedTcp));
    // An older client.
    let (near, far) = handshake(&web, &orders, &[ORDERS], Alpn::Tcp).await;
    assert_eq!((near.unwrap().0.alpn(), far.unwrap().2), (Some(&b"weft-tcp"[..]), Alpn::Tcp));
    // An older server.
    let older = Stranger { chain: Some(authority.leaf(TestLeaf::of(ORDERS))), alpn: vec![b"weft-tcp"] };
    let (near, far) = sockets().await;
    let mut config = ServerConfig::builder_with_provider(credentials::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(older.resolver().unwrap());
    config.alpn_protocols = vec![b"weft-tcp".to_vec()];
    let expected = [id(ORDERS)];
    let (near, far) = tokio::join!(
        connect(near, &web, &expected, Alpn::ConfirmedTcp),
        TlsAcceptor::from(Arc::new(config)).accept(far)
    );
    far.unwrap();
    assert_eq!(near.unwrap().0.alpn(), Some(&b"weft-tcp"[..]));
}

#[tokio::test]
async fn a_client_sends_nothing_to_an_unexpected_identity() {
    let authority = TestAuthority::new("weft.local");
    let (web, orders) = (authority.credentials(WEB), authority.credentials(ORDERS));
    let (near, far) = handshake(&web, &orders, &[WEB], Alpn::Tcp).await;
    refused(near, Failure::WrongIdentity, &[ORDERS, &format!("expected {WEB}"), "refused by", WEB]);
    refused(far, Failure::Handshake, &["client", "alert"]);
}

#[tokio::test]
async fn no_expected_identity_means_nobody() {
    let authority = TestAuthority::new("weft.local");
    let web = authority.credentials(WEB);
    let (near, mut far) = sockets().await;
    refused(connect(near, &web, &[], Alpn::Tcp).await, Failure::WrongIdentity, &["no identity is expected"]);
    assert_eq!(far.read(&mut [0; 16]).await.unwrap(), 0, "not even a hello is sent");
}

/// A peer that does as it likes: no checks, any certificate, any protocol.
struct Stranger {
    chain: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
    alpn: Vec<&'static [u8]>,
}

#[derive(Debug)]
struct TakeAnyone;

impl rustls::client::danger::ServerCertVerifier for TakeAnyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &rustls_pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls_pki_types::UnixTime,
    ) -> std::result::Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> std::result::Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> std::result::Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        credentials::provider().signature_verification_algorithms.supported_schemes()
    }
}

impl Stranger {
    fn resolver(&self) -> Option<Arc<SingleCertAndKey>> {
        let (chain, key) = self.chain.as_ref()?;
        let key = CertifiedKey::from_der(chain.clone(), key.clone_key(), &credentials::provider()).unwrap();
        Some(Arc::new(SingleCertAndKey::from(key)))
    }

    /// Connects to our `accept`; gives what it says, and the stranger's first read.
    async fn call(&self, server: &Credentials) -> (Accepted, std::io::Result<usize>) {
        let builder = ClientConfig::builder_with_provider(credentials::provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(TakeAnyone));
        let mut config = match self.resolver() {
            Some(resolver) => builder.with_client_cert_resolver(resolver),
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = self.alpn.iter().map(|name| name.to_vec()).collect();
        let (near, far) = sockets().await;
        let calling = async {
            let name = "stranger.example".try_into().unwrap();
            let mut tls = TlsConnector::from(Arc::new(config)).connect(name, near).await?;
            tls.read(&mut [0; 16]).await
        };
        let (read, accepted) = tokio::join!(calling, async {
            // Dropped at once, so that the stranger sees an end where it was taken.
            accept(far, server).await
        });
        (accepted, read)
    }

    /// Stands where `connect` dials; gives what our side says, and the bytes of ours that it got to read.
    async fn answer(&self, client: &Credentials, expected: &str) -> (Connected, Vec<u8>) {
        let mut config = ServerConfig::builder_with_provider(credentials::provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(self.resolver().unwrap());
        config.alpn_protocols = self.alpn.iter().map(|name| name.to_vec()).collect();
        let (near, far) = sockets().await;
        let answering = async {
            let mut got = Vec::new();
            if let Ok(mut tls) = TlsAcceptor::from(Arc::new(config)).accept(far).await {
                let _ = tls.read_to_end(&mut got).await;
            }
            got
        };
        let expected = [id(expected)];
        let dialling = async {
            let (mut stream, peer) = connect(near, client, &expected, Alpn::Tcp).await?;
            stream.write_all(b"secret").await.unwrap();
            stream.shutdown().await.unwrap();
            Ok((stream, peer))
        };
        tokio::join!(dialling, answering)
    }
}

/// Every certificate that must be refused, with the failure and the words of the log line.
fn bad_certificates(authority: &TestAuthority) -> Vec<(Stranger, Vec<&'static str>)> {
    let now = OffsetDateTime::now_utc();
    let with = |change: &dyn Fn(&mut TestLeaf)| {
        let mut leaf = TestLeaf::of(ORDERS);
        change(&mut leaf);
        authority.leaf(leaf)
    };
    let expired = with(&|leaf| {
        leaf.not_before = now - Duration::from_secs(7200);
        leaf.not_after = now - Duration::from_secs(5);
    });
    let future = with(&|leaf| leaf.not_before = now + Duration::from_secs(1800));
    let two = with(&|leaf| leaf.uris.push(WEB.to_owned()));
    let none = with(&|leaf| leaf.uris.clear());
    let server = with(&|leaf| leaf.dns_names.push("orders.shop.svc"));
    let other = with(&|leaf| leaf.uris = vec!["spiffe://evil.example/ns/shop/sa/orders".to_owned()]);
    let shape = with(&|leaf| leaf.uris = vec!["spiffe://weft.local/orders".to_owned()]);
    let code = with(&|leaf| leaf.usages = vec![ExtendedKeyUsagePurpose::CodeSigning]);
    let foreign_root = TestAuthority::new("weft.local").leaf(TestLeaf::of(ORDERS));
    let long = {
        let (mut chain, key) = with(&|_| {});
        chain.extend(std::iter::repeat_n(authority.root.clone(), 5));
        (chain, key)
    };
    let cases = [
        (expired, vec![ORDERS, "expired at"]),
        (future, vec![ORDERS, "not valid before"]),
        (two, vec![ORDERS, WEB, "2 URI names"]),
        (server, vec![ORDERS, "a DNS name (orders.shop.svc)", "not for a peer"]),
        (none, vec!["without an identity", "no URI name"]),
        (other, vec!["spiffe://evil.example/ns/shop/sa/orders", "another trust domain"]),
        (shape, vec!["spiffe://weft.local/orders", "not an identity of this mesh"]),
        (code, vec![ORDERS, "chain is refused"]),
        (foreign_root, vec![ORDERS, "unknown root"]),
        (long, vec![ORDERS, "at most 5"]),
    ];
    cases
        .into_iter()
        .map(|(chain, words)| (Stranger { chain: Some(chain), alpn: vec![b"weft-tcp"] }, words))
        .collect()
}

#[tokio::test]
async fn a_server_refuses_every_bad_client_and_the_client_can_tell() {
    let authority = TestAuthority::new("weft.local");
    let orders = authority.credentials(ORDERS);
    for (stranger, mut words) in bad_certificates(&authority) {
        let (accepted, read) = stranger.call(&orders).await;
        words.extend(["client 127.0.0.1", "refused by spiffe://weft.local/ns/shop/sa/orders"]);
        refused(accepted, Failure::UntrustedPeer, &words);
        let error = read.unwrap_err();
        assert!(refused_by_peer(&error), "{words:?}: the client read {error:?}");
    }
}

#[tokio::test]
async fn a_client_refuses_every_bad_server_and_sends_it_nothing() {
    let authority = TestAuthority::new("weft.local");
    let web = authority.credentials(WEB);
    for (stranger, mut words) in bad_certificates(&authority) {
        let (connected, got) = stranger.answer(&web, ORDERS).await;
        words.extend(["server 127.0.0.1", "refused by spiffe://weft.local/ns/shop/sa/web"]);
        refused(connected, Failure::UntrustedPeer, &words);
        assert!(got.is_empty(), "{words:?}: the stranger got {got:?}");
    }
    let good = Stranger { chain: Some(authority.leaf(TestLeaf::of(ORDERS))), alpn: vec![b"weft-tcp"] };
    let (connected, got) = good.answer(&web, ORDERS).await;
    connected.unwrap();
    assert_eq!(got, b"secret", "the control: a good server gets it");
}

#[tokio::test]
async fn a_server_refuses_strangers_who_are_no_sidecars() {
    let authority = TestAuthority::new("weft.local");
    let orders = authority.credentials(ORDERS);
    let leaf = || Some(authority.leaf(TestLeaf::of(WEB)));
    let cases = [
        (Stranger { chain: None, alpn: vec![b"weft-tcp"] }, Failure::UntrustedPeer, "no certificate"),
        (Stranger { chain: leaf(), alpn: vec![b"h2"] }, Failure::PlaintextRefused, "foreign ALPN"),
        (Stranger { chain: leaf(), alpn: vec![] }, Failure::PlaintextRefused, "named no mesh protocol"),
    ];
    for (stranger, failure, word) in cases {
        let (accepted, _) = stranger.call(&orders).await;
        refused(accepted, failure, &[word, ORDERS]);
    }
}

#[tokio::test]
async fn a_client_refuses_a_server_of_another_protocol() {
    let authority = TestAuthority::new("weft.local");
    let web = authority.credentials(WEB);
    for (alpn, word) in [(vec![b"http/1.1".as_slice()], "NoApplicationProtocol"), (vec![], "did not agree")] {
        let stranger = Stranger { chain: Some(authority.leaf(TestLeaf::of(ORDERS))), alpn };
        let (connected, got) = stranger.answer(&web, ORDERS).await;
        refused(connected, Failure::Handshake, &[word]);
        assert!(got.is_empty());
    }
}

#[tokio::test]
async fn plaintext_is_refused_both_ways() {
    let authority = TestAuthority::new("weft.local");
    let web = authority.credentials(WEB);
    let (mut near, far) = sockets().await;
    near.write_all(b"GET / HTTP/1.1\r\nHost: orders\r\n\r\n").await.unwrap();
    refused(accept(far, &web).await, Failure::PlaintextRefused, &["plaintext"]);

    let (near, mut far) = sockets().await;
    far.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
    let expected = [id(ORDERS)];
    refused(connect(near, &web, &expected, Alpn::Tcp).await, Failure::Handshake, &["plaintext"]);

    let (near, far) = sockets().await;
    drop(far);
    // An end or a reset, whichever comes first.
    refused(connect(near, &web, &expected, Alpn::Tcp).await, Failure::Handshake, &[WEB]);
}

#[tokio::test]
async fn tls_1_2_is_not_spoken() {
    let authority = TestAuthority::new("weft.local");
    let orders = authority.credentials(ORDERS);
    let config = ClientConfig::builder_with_provider(credentials::provider())
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(TakeAnyone))
        .with_no_client_auth();
    let (near, far) = sockets().await;
    let name = "stranger.example".try_into().unwrap();
    let (_, accepted) =
        tokio::join!(TlsConnector::from(Arc::new(config)).connect(name, near), accept(far, &orders));
    refused(accepted, Failure::PlaintextRefused, &["TLS 1.3"]);
}

#[tokio::test]
async fn trust_taken_back_is_seen_on_a_standing_connection() {
    let (authority, other) = (TestAuthority::new("weft.local"), TestAuthority::new("weft.local"));
    let (web, orders) = (authority.credentials(WEB), authority.credentials(ORDERS));
    let (near, far) = handshake(&web, &orders, &[ORDERS], Alpn::Tcp).await;
    let ((_, server), (_, client, _)) = (near.unwrap(), far.unwrap());
    let now = SystemTime::now();
    let of_peer = server.clone();
    for peer in [server, client] {
        assert!(peer.still_trusted(&authority.bundle(), now));
        assert!(!peer.still_trusted(&other.bundle(), now), "the root is gone");
        assert!(!peer.still_trusted(&authority.bundle(), now + Duration::from_secs(4000)), "expired");
    }
    let much_later = now + Duration::from_secs(40_000);
    assert!(of_peer.vouched_for(&authority.bundle(), much_later), "its end does not count");
    assert!(
        of_peer.vouched_for(&authority.bundle(), now) && !of_peer.vouched_for(&other.bundle(), much_later)
    );
    let changed = web.with_bundle(other.bundle()).unwrap();
    assert!(web.vouched_for(now) && !changed.vouched_for(now));
    let elsewhere = TestAuthority::new("elsewhere.example").bundle();
    refused(web.with_bundle(elsewhere), Failure::NoIdentity, &["elsewhere.example"]);
}

#[tokio::test]
async fn our_own_certificate_is_not_used_once_it_expired() {
    let authority = TestAuthority::new("weft.local");
    let mut leaf = TestLeaf::of(WEB);
    // Certificates know whole seconds: valid until the end of the next one at most.
    leaf.not_after = OffsetDateTime::now_utc() + Duration::from_secs(1);
    let (chain, key) = authority.leaf(leaf);
    let web = Credentials::new(chain, key, authority.bundle()).unwrap();
    tokio::time::sleep(web.remaining(SystemTime::now()) + Duration::from_millis(10)).await;
    let (near, far) = sockets().await;
    refused(connect(near, &web, &[id(ORDERS)], Alpn::Tcp).await, Failure::NoIdentity, &["expired at"]);
    refused(accept(far, &web).await, Failure::NoIdentity, &["expired at"]);
}

#[test]
fn credentials_must_fit_together() {
    let authority = TestAuthority::new("weft.local");
    let (chain, _) = authority.leaf(TestLeaf::of(WEB));
    let (_, other_key) = authority.leaf(TestLeaf::of(WEB));
    refused(Credentials::new(chain, other_key, authority.bundle()), Failure::NoIdentity, &["key"]);
    let (chain, key) = TestAuthority::new("weft.local").leaf(TestLeaf::of(WEB));
    refused(Credentials::new(chain, key, authority.bundle()), Failure::NoIdentity, &["unknown root"]);
    let (_, key) = authority.leaf(TestLeaf::of(WEB));
    refused(Credentials::new(vec![], key, authority.bundle()), Failure::NoIdentity, &["no certificate"]);
}

#[test]
fn a_bundle_holds_a_few_real_roots() {
    let domain = || "weft.local".parse().unwrap();
    let root = TestAuthority::new("weft.local").root;
    refused(Bundle::new(domain(), vec![]), Failure::NoIdentity, &["has 0 roots"]);
    refused(Bundle::new(domain(), vec![root.clone(); 17]), Failure::NoIdentity, &["has 17 roots"]);
    refused(
        Bundle::new(domain(), vec![root, CertificateDer::from(vec![1])]),
        Failure::NoIdentity,
        &["number 2"],
    );
}

/// A server as the authority is: ALPN `h2`, takes anyone, shows its root too.
async fn authority_handshake(
    authority: &TestAuthority,
    served_as: &str,
    anchors: Vec<Anchor>,
) -> (Result<()>, Vec<u8>) {
    let (mut chain, key) = authority.leaf(TestLeaf::of(served_as));
    chain.push(authority.root.clone());
    let key = CertifiedKey::from_der(chain, key, &credentials::provider()).unwrap();
    let mut config = ServerConfig::builder_with_provider(credentials::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
    config.alpn_protocols = vec![b"h2".to_vec()];
    let (near, far) = sockets().await;
    let serving = async {
        let mut got = Vec::new();
        if let Ok(mut tls) = TlsAcceptor::from(Arc::new(config)).accept(far).await {
            let _ = tls.read_to_end(&mut got).await;
        }
        got
    };
    let dialling = async {
        let (mut stream, trust_domain) =
            connect_authority(near, anchors, None, KeyExchange::default()).await?;
        assert_eq!(trust_domain.as_str(), authority.trust_domain);
        stream.write_all(b"token").await.unwrap();
        stream.shutdown().await.unwrap();
        Ok(())
    };
    tokio::join!(dialling, serving)
}

#[tokio::test]
async fn the_authority_proves_itself_before_a_token_is_sent() {
    const AUTHORITY: &str = "spiffe://weft.local/ns/weft/sa/weft-ca";
    let (authority, other) = (TestAuthority::new("weft.local"), TestAuthority::new("weft.local"));
    let hash =
        |of: &TestAuthority| Anchor::Sha256(digest(&SHA256, &of.root).as_ref().try_into().expect("32 bytes"));
    let good = [
        vec![hash(&authority)],
        vec![Anchor::Bundle(authority.bundle())],
        vec![Anchor::Roots(vec![authority.root.clone()])],
        vec![Anchor::Bundle(other.bundle()), hash(&authority)],
    ];
    for anchors in good {
        let (proven, got) = authority_handshake(&authority, AUTHORITY, anchors).await;
        proven.unwrap();
        assert_eq!(got, b"token");
    }
    let bad = [
        (AUTHORITY, vec![hash(&other)], Failure::UntrustedPeer, "SHA-256"),
        (AUTHORITY, vec![Anchor::Bundle(other.bundle())], Failure::UntrustedPeer, "unknown root"),
        (AUTHORITY, vec![Anchor::Roots(vec![other.root.clone()])], Failure::UntrustedPeer, "unknown root"),
        (AUTHORITY, vec![], Failure::UntrustedPeer, "no root"),
        (WEB, vec![hash(&authority)], Failure::WrongIdentity, WEB),
        (
            "spiffe://evil.example/ns/weft/sa/weft-ca",
            vec![Anchor::Bundle(authority.bundle())],
            Failure::UntrustedPeer,
            "another trust domain",
        ),
    ];
    for (served_as, anchors, failure, word) in bad {
        let (proven, got) = authority_handshake(&authority, served_as, anchors).await;
        refused(proven, failure, &[word]);
        assert!(got.is_empty(), "the token was sent to {served_as}");
    }
}

#[tokio::test]
async fn first_bytes_are_waited_for_and_put_back() {
    let (mut near, mut far) = sockets().await;
    far.write_all(b"settings").await.unwrap();
    first_bytes(&mut near).await.unwrap();
    let mut buffer = [0; 8];
    near.read_exact(&mut buffer).await.unwrap();
    assert_eq!(&buffer, b"settings");
    drop(far);
    assert_eq!(first_bytes(&mut near).await.unwrap_err().kind(), ErrorKind::UnexpectedEof);
}

#[tokio::test]
async fn an_ordinary_error_is_not_taken_for_a_refusal() {
    assert!(!refused_by_peer(&ErrorKind::ConnectionReset.into()));
    let alert = rustls::Error::AlertReceived(rustls::AlertDescription::CloseNotify);
    assert!(!refused_by_peer(&std::io::Error::new(ErrorKind::InvalidData, alert)));
}
