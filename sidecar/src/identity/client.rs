//! The client of the certificate authority: one call for a certificate, one stream for the trust bundle.
//!
//! Each call has a connection of its own, whose far side has proven itself before a byte of ours is sent:
//! renewal and the stream show the certificate, the first request a token. The caller sets time limits.

use std::{path::Path, time::Duration};

use anyhow::anyhow;
use hyper::{Request, Response, Uri, body::Incoming, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rcgen::{CertificateParams, KeyPair};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tonic::{Code, Status, Streaming, body::Body};
use tower::{service_fn, util::BoxService};
use weft_proto::{
    ca::{self, IssueRequest, WatchBundleRequest, certificate_authority_client::CertificateAuthorityClient},
    spiffe::TrustDomain,
};

use crate::{
    config::{Authority, Pin},
    net,
    tls::{Anchor, Bundle, Credentials, connect_authority, first_bytes, refused_by_peer},
};

/// How an identity is proven to the authority.
pub(super) enum Proof<'a> {
    /// By the certificate that we have.
    Certificate(&'a Credentials),
    /// By a join token.
    Token(&'a str),
}

/// A certificate that was given, ready for use.
pub(super) struct Given {
    /// PKCS#8.
    pub(super) key: Vec<u8>,
    /// With the bundle that came along.
    pub(super) credentials: Credentials,
}

/// Why there is no certificate.
#[derive(Debug)]
pub(super) struct NotGiven {
    /// The authority has proven itself and does not accept our proof: another proof may help.
    pub(super) proof_refused: bool,
    /// For the log.
    pub(super) detail: String,
}

type Client = CertificateAuthorityClient<BoxService<Request<Body>, Response<Incoming>, hyper::Error>>;

/// A chain and a few roots.
const MAX_MESSAGE: usize = 256 * 1024;
/// A silent connection is probed after this long.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// Longest wait for a proof that somebody is waiting for at a terminal.
const PROOF_TIMEOUT: Duration = Duration::from_secs(5);
/// For the answer to a probe.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Makes a key and has it certified. `current` is what we have, also where the proof is a token.
pub(super) async fn obtain(
    authority: &Authority,
    proof: Proof<'_>,
    current: Option<&Credentials>,
) -> Result<Given, NotGiven> {
    let (shown, join_token) = match proof {
        Proof::Certificate(credentials) => (Some(credentials), String::new()),
        Proof::Token(token) => (None, token.to_owned()),
    };
    let key = KeyPair::generate().map_err(other)?;
    let csr = CertificateParams::default().serialize_request(&key).map_err(other)?;
    let lifetime = authority.lifetime.map_or(0, |lifetime| lifetime.as_secs());
    let request = IssueRequest {
        csr: csr.der().to_vec(),
        join_token,
        lifetime_seconds: u32::try_from(lifetime).unwrap_or(u32::MAX),
        dns_names: Vec::new(),
    };
    let (mut client, trust_domain) = connect(authority, current, shown).await?;
    let answer = client.issue(request).await.map_err(|status| not_given(authority, &status))?.into_inner();
    let bundle = read_bundle(answer.bundle.unwrap_or_default(), &trust_domain)?;
    let chain = answer.chain.into_iter().map(CertificateDer::from).collect();
    let key = key.serialize_der();
    let private = PrivateKeyDer::try_from(key.clone()).map_err(other)?;
    // Checks the chain against the bundle, and that it was our key that was signed.
    let credentials = Credentials::new(chain, private, bundle)
        .and_then(|credentials| credentials.with_key_exchange(authority.key_exchange))
        .map_err(other)?;
    if let Some(shown) = shown
        && shown.id() != credentials.id()
    {
        return Err(other(format!("we are {} and were given {}", shown.id(), credentials.id())));
    }
    Ok(Given { key, credentials })
}

/// The trust bundle now, and again when it changes.
pub(super) struct BundleStream {
    stream: Streaming<ca::Bundle>,
    trust_domain: TrustDomain,
    /// The connection lives as long as its client.
    _client: Client,
}

impl BundleStream {
    /// Asks for the stream.
    pub(super) async fn open(authority: &Authority, current: &Credentials) -> Result<Self, NotGiven> {
        let (mut client, trust_domain) = match connect(authority, Some(current), Some(current)).await {
            // A new authority does not know our root; the bundle is no secret, and strangers get it too.
            Err(refused) if refused.proof_refused => connect(authority, Some(current), None).await?,
            connected => connected?,
        };
        let answer = client.watch_bundle(WatchBundleRequest {}).await;
        let stream = answer.map_err(|status| not_given(authority, &status))?.into_inner();
        Ok(BundleStream { stream, trust_domain, _client: client })
    }

    /// Waits for the next bundle; none where the stream has ended.
    pub(super) async fn next(&mut self) -> Result<Option<Bundle>, NotGiven> {
        match self.stream.message().await {
            Ok(None) => Ok(None),
            Ok(Some(bundle)) => read_bundle(bundle, &self.trust_domain).map(Some),
            Err(status) => Err(other(format!("the stream of the trust bundle broke: {}", status.message()))),
        }
    }
}

/// Dials the authority and has it prove itself, without showing anything of ours.
///
/// # Errors
/// Why it is not reached or not believed.
pub async fn prove(authority: &Authority) -> anyhow::Result<TrustDomain> {
    let proven = tokio::time::timeout(PROOF_TIMEOUT, connect(authority, None, None)).await;
    let proven = proven.map_err(|_| anyhow::anyhow!("the authority {} is silent", authority.address))?;
    proven.map(|(_, trust_domain)| trust_domain).map_err(|refusal| anyhow::anyhow!(refusal.detail))
}

/// Dials the addresses of the authority in turn; the first that proves itself is taken.
async fn connect(
    authority: &Authority,
    current: Option<&Credentials>,
    shown: Option<&Credentials>,
) -> Result<(Client, TrustDomain), NotGiven> {
    let name = &authority.address;
    let mut anchors: Vec<Anchor> =
        current.map(|credentials| Anchor::Bundle(credentials.bundle().clone())).into_iter().collect();
    anchors.push(pinned(&authority.pin).map_err(|error| other(format!("{error:#}")))?);
    let addresses = tokio::net::lookup_host(name)
        .await
        .map_err(|error| other(format!("the address of the authority, {name}, is not known: {error}")))?;
    let mut last = format!("the authority's name {name} has no address");
    for address in addresses {
        let stream = match net::dial(address).await {
            Ok(stream) => net::Stream::from(stream),
            Err(error) => {
                last = format!("the authority {name} ({address}) cannot be reached: {error}");
                continue;
            }
        };
        match connect_authority(stream, anchors.clone(), shown, authority.key_exchange).await {
            Ok((mut stream, trust_domain)) => match first_bytes(&mut stream).await {
                Ok(()) => return Ok((speak(stream).await?, trust_domain)),
                Err(error) if refused_by_peer(&error) => {
                    let detail = format!("the authority {name} refuses our certificate: {error}");
                    return Err(NotGiven { proof_refused: true, detail });
                }
                Err(error) => last = format!("the authority {name} ended the connection: {error}"),
            },
            Err(failed) => last = format!("the authority {name} has not proven itself: {}", failed.detail),
        }
    }
    Err(other(last))
}

/// gRPC over this one connection.
async fn speak(stream: net::Stream) -> Result<Client, NotGiven> {
    let (sender, connection) = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(other)?;
    // It ends when the client is dropped.
    tokio::spawn(connection);
    let send = service_fn(move |request| {
        let mut sender = sender.clone();
        async move { sender.send_request(request).await }
    });
    let client = Client::with_origin(BoxService::new(send), Uri::from_static("http://weft-ca"));
    Ok(client.max_decoding_message_size(MAX_MESSAGE))
}

fn pinned(pin: &Pin) -> anyhow::Result<Anchor> {
    match pin {
        Pin::Sha256(hash) => Ok(Anchor::Sha256(*hash)),
        Pin::File(path) => read_roots(path).map(Anchor::Roots),
    }
}

fn read_roots(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let refuse = |why: String| anyhow!("the root of the authority, {}: {why}", path.display());
    let roots: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| refuse(error.to_string()))?;
    if roots.is_empty() { Err(refuse("no certificate in PEM".to_owned())) } else { Ok(roots) }
}

fn read_bundle(bundle: ca::Bundle, trust_domain: &TrustDomain) -> Result<Bundle, NotGiven> {
    if bundle.trust_domain != trust_domain.as_str() {
        let named: String = bundle.trust_domain.chars().take(255).collect();
        return Err(other(format!("the authority of {trust_domain} sent a trust bundle of {named:?}")));
    }
    let roots = bundle.roots.into_iter().map(CertificateDer::from).collect();
    Bundle::new(trust_domain.clone(), roots).map_err(other)
}

fn not_given(authority: &Authority, status: &Status) -> NotGiven {
    NotGiven {
        proof_refused: matches!(status.code(), Code::Unauthenticated | Code::PermissionDenied),
        detail: format!(
            "the authority {} answers {:?}: {}",
            authority.address,
            status.code(),
            status.message().chars().take(300).collect::<String>()
        ),
    }
}

fn other(error: impl ToString) -> NotGiven {
    NotGiven { proof_refused: false, detail: error.to_string() }
}
