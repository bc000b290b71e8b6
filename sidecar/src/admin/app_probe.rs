//! The kubelet's probes, asked of the app in its place, as the kubelet would: GET with 200 to 399 for an answer, a
//! connection, or gRPC's health protocol. A redirect is followed where it stays with the app. TLS is not verified.
//!
//! An app of the mesh would refuse the kubelet in strict mode, and its listener would be the sidecar's.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{
    Request, Response, StatusCode, Uri,
    body::Incoming,
    client::conn::{http1, http2},
    header::{HOST, HeaderName, HeaderValue, LOCATION, USER_AGENT},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::aws_lc_rs,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::Mutex,
    time::{Instant, timeout},
};
use tokio_rustls::TlsConnector;
use tonic::{body::Body, client::Grpc as GrpcClient};
use tonic_prost::ProstCodec;
use tower::service_fn;

use crate::{
    config::{Grpc, HttpGet, KubeletProbe, ProbeHandler, Scheme},
    connect::Dialer,
    net::Reclaimer,
};

/// Probes by name, and where the app may listen. Of each probe one is under way at a time: who asks meanwhile gets the answer
/// to it too, so that nobody makes the app answer more than the kubelet would.
pub struct AppProbes {
    /// What may be asked.
    probes: Vec<(KubeletProbe, Mutex<Last>)>,
    /// How the app is reached.
    pub dialer: Dialer,
    /// Makes room where no descriptor is left.
    pub reclaimer: Reclaimer,
    /// Addresses for a port, in the order in which they are tried.
    pub addresses: Arc<dyn Fn(u16) -> Vec<SocketAddr> + Send + Sync>,
}

/// The last outcome of a probe, and when its asking began.
type Last = Option<(Instant, Outcome)>;

/// What the app answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Its status, or one that stands for its answer.
    pub status: StatusCode,
    /// The beginning of its body, or what is wrong.
    pub text: String,
}

/// As the kubelet.
const REDIRECTS: usize = 10;
/// So much of an app's answer is passed on; the kubelet shows it in events.
const BODY_BYTES: usize = 10 * 1024;
const USER_AGENT_VALUE: HeaderValue = HeaderValue::from_static("kube-probe/weft");

impl AppProbes {
    /// Probes of an app.
    pub fn new(
        probes: &[KubeletProbe],
        dialer: Dialer,
        reclaimer: Reclaimer,
        addresses: Arc<dyn Fn(u16) -> Vec<SocketAddr> + Send + Sync>,
    ) -> Self {
        let probes = probes.iter().map(|probe| (probe.clone(), Mutex::default())).collect();
        AppProbes { probes, dialer, reclaimer, addresses }
    }

    /// Asks; none where no probe has this name.
    pub async fn ask(&self, name: &str) -> Option<Outcome> {
        let came = Instant::now();
        let (probe, last) = self.probes.iter().find(|(probe, _)| probe.name == name)?;
        let mut last = last.lock().await;
        if let Some((began, outcome)) = &*last
            && *began >= came
        {
            return Some(outcome.clone());
        }
        let began = Instant::now();
        let outcome = self.ask_now(probe).await;
        *last = Some((began, outcome.clone()));
        Some(outcome)
    }

    async fn ask_now(&self, probe: &KubeletProbe) -> Outcome {
        let asking = async {
            match &probe.handler {
                ProbeHandler::HttpGet(get) => self.get(get).await,
                ProbeHandler::TcpSocket(socket) => {
                    self.connect(socket.port).await?;
                    Ok(Outcome { status: StatusCode::OK, text: String::new() })
                }
                ProbeHandler::Grpc(grpc) => self.check_health(grpc).await,
            }
        };
        let outcome = timeout(probe.timeout, asking).await.unwrap_or_else(|_| Err(too_slow(probe.timeout)));
        outcome.unwrap_or_else(|error| Outcome {
            status: StatusCode::SERVICE_UNAVAILABLE,
            text: format!("{error:#}"),
        })
    }

    async fn connect(&self, port: u16) -> Result<TcpStream> {
        let mut last = anyhow!("there is no address");
        for address in (self.addresses)(port) {
            match self.dialer.dial(address, &self.reclaimer).await {
                Ok(stream) => return Ok(stream),
                Err(error) => last = anyhow::Error::new(error).context(address),
            }
        }
        Err(last.context(format!("the app does not take connections on port {port}")))
    }

    async fn get(&self, get: &HttpGet) -> Result<Outcome> {
        let mut target: Uri = target(&get.path)?;
        for _ in 0..REDIRECTS {
            let answer = self.get_once(get, &target).await?;
            let location = answer.headers().get(LOCATION).filter(|_| answer.status().is_redirection());
            let Some(location) = location else { return outcome(answer).await };
            match redirect(&target, &host(get), location)? {
                Redirect::Here(next) => target = next,
                Redirect::Elsewhere => return outcome(answer).await,
            }
        }
        bail!("more than {REDIRECTS} redirects")
    }

    async fn get_once(&self, get: &HttpGet, target: &Uri) -> Result<Response<Incoming>> {
        let request = request(get, target)?;
        let stream = self.connect(get.port).await?;
        match get.scheme {
            Scheme::Http => send(stream, request).await,
            Scheme::Https => {
                let name = ServerName::try_from("localhost")?;
                let stream = TlsConnector::from(unverified()?).connect(name, stream).await;
                send(stream.context("TLS with the app")?, request).await
            }
        }
    }

    /// <https://github.com/grpc/grpc/blob/master/doc/health-checking.md>
    async fn check_health(&self, grpc: &Grpc) -> Result<Outcome> {
        let stream = self.connect(grpc.port).await?;
        let (sender, connection) =
            http2::handshake::<_, _, Body>(TokioExecutor::new(), TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let send = service_fn(move |request| {
            let mut sender = sender.clone();
            async move { sender.send_request(request).await }
        });
        let mut client = GrpcClient::with_origin(send, Uri::from_static("http://app"));
        client.ready().await?;
        let question = HealthCheckRequest { service: grpc.service.clone().unwrap_or_default() };
        let path = Uri::from_static("/grpc.health.v1.Health/Check").into_parts().path_and_query;
        let path = path.context("a path")?;
        let codec = ProstCodec::<HealthCheckRequest, HealthCheckResponse>::default();
        let answer = client.unary(tonic::Request::new(question), path, codec).await;
        let status = answer.map_err(|status| anyhow!("gRPC {:?}: {}", status.code(), status.message()))?;
        match status.into_inner().status {
            SERVING => Ok(Outcome { status: StatusCode::OK, text: "SERVING".into() }),
            other => bail!("its health is {other}, not {SERVING} (SERVING)"),
        }
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct HealthCheckRequest {
    #[prost(string, tag = "1")]
    service: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct HealthCheckResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

const SERVING: i32 = 1;

fn too_slow(limit: Duration) -> anyhow::Error {
    anyhow!("the app did not answer within {limit:?}")
}

fn target(path: &str) -> Result<Uri> {
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    path.parse().with_context(|| format!("the probe's path {path:?}"))
}

/// Where a redirect leads.
enum Redirect {
    /// To another target of the app.
    Here(Uri),
    /// Elsewhere, which the kubelet takes for well.
    Elsewhere,
}

/// Resolves `Location` against the target that was asked (RFC 3986, 5.2), as far as servers use it. `host` is what was sent.
fn redirect(from: &Uri, host: &str, location: &HeaderValue) -> Result<Redirect> {
    let text = location.to_str().context("the redirect's Location")?;
    let path = match text.split_once("://") {
        Some((_, rest)) => {
            let end = rest.find(['/', '?']).unwrap_or(rest.len());
            let (authority, path) = rest.split_at(end);
            if !is_here(authority, host) {
                return Ok(Redirect::Elsewhere);
            }
            if path.starts_with('/') { path.to_owned() } else { format!("/{path}") }
        }
        None if text.starts_with("//") => return Ok(Redirect::Elsewhere),
        None if text.starts_with('/') => text.to_owned(),
        None if text.starts_with('?') => format!("{}{text}", from.path()),
        None => {
            let folder = from.path().rsplit_once('/').map_or("", |(folder, _)| folder);
            format!("{folder}/{text}")
        }
    };
    let path = path.split('#').next().unwrap_or_default();
    path.parse().map(Redirect::Here).with_context(|| format!("the redirect to {text:?}"))
}

/// The Host that was sent, or a name of the loopback, with or without a port.
fn is_here(authority: &str, host: &str) -> bool {
    let name = |text: &str| text.rsplit_once(':').map_or(text, |(name, _)| name).to_ascii_lowercase();
    name(authority) == name(host) || ["localhost", "127.0.0.1", "[::1]"].contains(&name(authority).as_str())
}

/// The Host that is sent: the probe's own, or a name of this host.
fn host(get: &HttpGet) -> String {
    let own = get.http_headers.iter().find(|field| field.name.eq_ignore_ascii_case("host"));
    own.map_or_else(|| format!("localhost:{}", get.port), |field| field.value.clone())
}

fn request(get: &HttpGet, target: &Uri) -> Result<Request<Empty<Bytes>>> {
    let mut request = Request::get(target.clone()).body(Empty::new())?;
    let headers = request.headers_mut();
    headers.insert(HOST, HeaderValue::from_str(&host(get)).context("the probe's Host")?);
    headers.insert(USER_AGENT, USER_AGENT_VALUE);
    for field in &get.http_headers {
        let name = HeaderName::try_from(&field.name).with_context(|| format!("header {:?}", field.name))?;
        let value =
            HeaderValue::from_str(&field.value).with_context(|| format!("the value of header {name}"))?;
        if name == HOST || name == USER_AGENT {
            headers.insert(name, value);
        } else {
            headers.append(name, value);
        }
    }
    Ok(request)
}

async fn send<Io>(stream: Io, request: Request<Empty<Bytes>>) -> Result<Response<Incoming>>
where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // It ends when the answer is read or dropped.
    tokio::spawn(connection);
    sender.send_request(request).await.context("the app gives no answer")
}

async fn outcome(answer: Response<Incoming>) -> Result<Outcome> {
    let status = answer.status();
    let body = Limited::new(answer.into_body(), BODY_BYTES).collect().await;
    let bytes = body.map(|body| body.to_bytes()).unwrap_or_default();
    Ok(Outcome { status, text: String::from_utf8_lossy(&bytes).into_owned() })
}

fn unverified() -> Result<Arc<ClientConfig>> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Unverified(provider)))
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// Takes every certificate: the kubelet does not verify those of probes, and this one is asked on the pod's own addresses.
#[derive(Debug)]
struct Unverified(Arc<rustls::crypto::CryptoProvider>);

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests;
