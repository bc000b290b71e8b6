//! The kubelet's probes and hooks, asked of the app in its place, as the kubelet would: GET with 200 to 399 for an answer, a
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
    time::timeout,
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

/// Probes by name, and where the app may listen.
#[derive(Clone)]
pub struct AppProbes {
    /// What may be asked.
    pub probes: Vec<KubeletProbe>,
    /// How the app is reached.
    pub dialer: Dialer,
    /// Makes room where no descriptor is left.
    pub reclaimer: Reclaimer,
    /// Addresses for a port, in the order in which they are tried.
    pub addresses: Arc<dyn Fn(u16) -> Vec<SocketAddr> + Send + Sync>,
}

/// What the app answered.
#[derive(Debug, PartialEq, Eq)]
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
    /// Asks; none where no probe has this name.
    pub async fn ask(&self, name: &str) -> Option<Outcome> {
        let probe = self.probes.iter().find(|probe| probe.name == name)?;
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
        Some(outcome.unwrap_or_else(|error| Outcome {
            status: StatusCode::SERVICE_UNAVAILABLE,
            text: format!("{error:#}"),
        }))
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
            match answer.headers().get(LOCATION).filter(|_| answer.status().is_redirection()) {
                Some(location) => match target_here(&target, location) {
                    Some(next) => target = next,
                    None => return outcome(answer).await,
                },
                None => return outcome(answer).await,
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

/// Where a redirect leads within the app; none where it leads elsewhere, which counts as well.
fn target_here(from: &Uri, location: &HeaderValue) -> Option<Uri> {
    let location: Uri = location.to_str().ok()?.parse().ok()?;
    if location.authority().is_some() {
        return None;
    }
    match location.path() {
        path if path.starts_with('/') => Some(location),
        relative => {
            let folder = from.path().rsplit_once('/').map_or("", |(folder, _)| folder);
            format!("{folder}/{relative}").parse().ok()
        }
    }
}

fn request(get: &HttpGet, target: &Uri) -> Result<Request<Empty<Bytes>>> {
    let mut request = Request::get(target.clone()).body(Empty::new())?;
    let headers = request.headers_mut();
    headers.insert(HOST, HeaderValue::from_str(&format!("localhost:{}", get.port))?);
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
