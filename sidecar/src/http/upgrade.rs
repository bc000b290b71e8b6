//! Connections that stop being HTTP: `Upgrade` (RFC 9110 7.8) and CONNECT (RFC 9110 9.3.6). After the head of
//! the answer both sides are plain bytes, copied both ways.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

use hyper::{
    HeaderMap, Method, Request, StatusCode, Version,
    header::{CONNECTION, HeaderValue, UPGRADE},
    upgrade::{OnUpgrade, Upgraded},
};
use hyper_util::rt::TokioIo;

use crate::net::{Copied, Stream, copy_both_ways};

/// Does the client ask to leave HTTP on this HTTP/1 connection?
pub fn wants_upgrade<B>(request: &Request<B>) -> bool {
    request.version() == Version::HTTP_11
        && (request.method() == Method::CONNECT || names_upgrade(request.headers()))
}

fn names_upgrade(headers: &HeaderMap) -> bool {
    headers.contains_key(UPGRADE)
        && headers
            .get_all(CONNECTION)
            .iter()
            .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
            .any(|token| token.trim_ascii().eq_ignore_ascii_case(b"upgrade"))
}

/// Did the server agree to leave HTTP?
pub fn left_http(method: &Method, status: StatusCode) -> bool {
    status == StatusCode::SWITCHING_PROTOCOLS || method == Method::CONNECT && status.is_success()
}

/// Puts back the two headers that ask for an upgrade, for this hop.
pub fn ask_for_upgrade(headers: &mut HeaderMap, wanted: Option<HeaderValue>) {
    if let Some(wanted) = wanted {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, wanted);
    }
}

/// The place where a request leaves what its connection becomes after HTTP. One per connection: the task that
/// served it goes on with the bytes, under the same drain, record and trust.
#[derive(Debug, Clone, Default)]
pub struct Upgrade(Arc<Mutex<Option<(OnUpgrade, OnUpgrade)>>>);

impl Upgrade {
    /// Both sides agreed to leave HTTP.
    pub fn agreed(&self, client: OnUpgrade, server: OnUpgrade) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((client, server));
    }

    /// Copies between both sides until both directions have ended; nothing to do where nobody left HTTP. To be
    /// called when the connection has been served.
    pub async fn splice(&self) -> (Copied, io::Result<()>) {
        let agreed = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some((client, server)) = agreed else { return (Copied::default(), Ok(())) };
        match tokio::try_join!(stream_below(client), stream_below(server)) {
            Ok((client, server)) => copy_both_ways(client, server).await,
            Err(error) => (Copied::default(), Err(error)),
        }
    }
}

/// The stream below an upgraded connection, with what hyper had read ahead put back.
async fn stream_below(upgrade: OnUpgrade) -> io::Result<Stream> {
    let upgraded: Upgraded = upgrade.await.map_err(io::Error::other)?;
    let parts = upgraded
        .downcast::<TokioIo<Stream>>()
        .map_err(|_| io::Error::other("an upgraded connection that is not one of ours"))?;
    let mut stream = parts.io.into_inner();
    if !parts.read_buf.is_empty() {
        stream.unread(parts.read_buf);
    }
    Ok(stream)
}
