//! Probes of the app on behalf of the kubelet: in strict mode its own plaintext would be refused, so the injector
//! points them here. A probe is named by a fixed identifier and does what it was configured to do: no part of a
//! request becomes part of an address.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use http_body_util::Empty;
use hyper::{Request, StatusCode, client::conn::http1, header::HOST, http::request};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};

/// One probe of the app.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// The last segment of its path, `/probe/{id}`.
    pub id: String,
    /// The app.
    pub address: SocketAddr,
    /// What is done.
    pub action: ProbeAction,
    /// For the whole of it.
    pub timeout: Duration,
}

/// What a probe does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeAction {
    /// Connect, and close again.
    Tcp,
    /// GET this path; the app's status is passed on.
    Http {
        /// Path and query.
        path: String,
        /// Further headers; `Host` replaces the address.
        headers: Vec<(String, String)>,
    },
}

impl Probe {
    /// The status for the kubelet, and the reason where it is not the app's own.
    pub(super) async fn run(&self) -> (StatusCode, String) {
        match timeout(self.timeout, self.ask()).await {
            Ok(Ok(status)) => (status, format!("{}: {status}\n", self.id)),
            Ok(Err(error)) => {
                (StatusCode::SERVICE_UNAVAILABLE, format!("{}: {}: {error:#}\n", self.id, self.address))
            }
            Err(_) => {
                let reason = format!("{}: {}: nothing within {:?}\n", self.id, self.address, self.timeout);
                (StatusCode::GATEWAY_TIMEOUT, reason)
            }
        }
    }

    async fn ask(&self) -> anyhow::Result<StatusCode> {
        let stream = TcpStream::connect(self.address).await?;
        let ProbeAction::Http { path, headers } = &self.action else { return Ok(StatusCode::OK) };
        let request = self.request(path, headers)?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let answer = async move { sender.send_request(request).await.map(|answer| answer.status()) };
        // The connection is driven until the head of the answer is there; its body does not matter.
        tokio::select! {
            status = answer => Ok(status?),
            Err(error) = connection => Err(error.into()),
        }
    }

    fn request(&self, path: &str, headers: &[(String, String)]) -> anyhow::Result<Request<Empty<Bytes>>> {
        let mut builder: request::Builder = Request::get(path).header("user-agent", "kube-probe/weft");
        for (name, value) in headers {
            builder = builder.header(name, value);
        }
        if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
            builder = builder.header(HOST, self.address.to_string());
        }
        Ok(builder.body(Empty::new())?)
    }
}
