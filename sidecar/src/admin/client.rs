//! The command line's side of the private face.

use std::{path::Path, time::Duration};

use anyhow::{Context, anyhow, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, client::conn::http1, header::HOST};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{net::UnixStream, time::timeout};

/// A sidecar that does not answer for so long is stuck.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Enough for the endpoints of a large mesh.
const ANSWER_BYTES: usize = 64 * 1024 * 1024;

/// Asks the sidecar behind a socket, and returns its answer. An answer that is an error becomes one here, with
/// the sidecar's own words.
pub async fn ask(socket: &Path, method: Method, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
    let place = socket.display();
    let asking = async {
        let stream = UnixStream::connect(socket).await.with_context(|| {
            format!("cannot reach a sidecar at {place}; is it running, and are you its user or root?")
        })?;
        exchange(stream, method, path, body).await.with_context(|| format!("asking the sidecar at {place}"))
    };
    timeout(TIMEOUT, asking)
        .await
        .map_err(|_| anyhow!("the sidecar at {place} did not answer within {TIMEOUT:?}"))?
}

async fn exchange(
    stream: UnixStream,
    method: Method,
    path: &str,
    body: Option<&Value>,
) -> anyhow::Result<Value> {
    let body = Full::new(body.map_or_else(Bytes::new, |body| body.to_string().into()));
    let request = Request::builder().method(method).uri(path).header(HOST, "sidecar").body(body)?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let answer = sender.send_request(request).await?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), ANSWER_BYTES).collect().await;
    let body = body.map_err(|error| anyhow!("its answer: {error}"))?.to_bytes();
    connection.abort();
    let value: Value = serde_json::from_slice(&body).context("its answer is not JSON")?;
    if !status.is_success() {
        bail!("{}", value["error"].as_str().unwrap_or(status.as_str()));
    }
    Ok(value)
}
