//! Connections that stop being HTTP: `Upgrade` (RFC 9110 7.8) and CONNECT (RFC 9110 9.3.6). After the head of
//! the answer both sides are plain bytes, copied both ways.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

use hyper::{
    HeaderMap, Method, Request, StatusCode, Version,
    header::{CONNECTION, HeaderValue, UPGRADE},
    http::uri::Authority,
    upgrade::OnUpgrade,
};
use hyper_util::rt::TokioIo;

use super::headers;
use crate::{
    model::{HttpVersion, Result},
    net::Stream,
    tls::VerifiedPeer,
};

/// Does the client ask to leave HTTP on this HTTP/1 connection?
pub fn wants_upgrade<B>(request: &Request<B>) -> bool {
    request.version() == Version::HTTP_11
        && (request.method() == Method::CONNECT || names_upgrade(request.headers()))
}

fn names_upgrade(headers: &HeaderMap) -> bool {
    headers.get(UPGRADE).is_some_and(|wanted| !names_http(wanted.as_bytes()))
        && headers
            .get_all(CONNECTION)
            .iter()
            .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
            .any(|token| token.trim_ascii().eq_ignore_ascii_case(b"upgrade"))
}

/// `h2c` does not leave HTTP: as an upgrade it would carry requests past everybody who reads them. It is not
/// offered to the server, as RFC 9110 7.8 allows; HTTP/2 with prior knowledge needs no upgrade.
fn names_http(wanted: &[u8]) -> bool {
    let mut names = wanted.split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
    names.any(|name| name.eq_ignore_ascii_case(b"h2c") || name.to_ascii_lowercase().starts_with(b"http"))
}

/// Did the server agree to leave HTTP?
pub fn left_http(method: &Method, status: StatusCode) -> bool {
    status == StatusCode::SWITCHING_PROTOCOLS || method == Method::CONNECT && status.is_success()
}

/// Gives a request that asks to leave HTTP the form of the next hop, as [`headers::frame_for`] does for others.
/// `authority` is what [`headers::check`] read. CONNECT keeps its target, and Host says the same.
///
/// # Errors
/// `bad_request` where the target has no form on that hop.
pub fn frame_for_upgrade<B: http_body::Body>(
    request: &mut Request<B>,
    authority: Option<Authority>,
    fallback: impl FnOnce() -> Authority,
) -> Result<()> {
    let wanted = request.headers().get(UPGRADE).cloned();
    headers::remove_per_hop(request.headers_mut());
    if request.method() == Method::CONNECT {
        headers::set_host(request.headers_mut(), authority, fallback)?;
    } else {
        let absolute = headers::absolute_scheme(request);
        headers::frame_for(request, HttpVersion::Http1, authority, absolute, fallback)?;
    }
    if let Some(wanted) = wanted {
        request.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
        request.headers_mut().insert(UPGRADE, wanted);
    }
    Ok(())
}

/// The place where a request leaves what its connection becomes after HTTP. One per connection: the task that
/// served it goes on with the bytes, under the same drain, record and trust.
#[derive(Debug, Clone, Default)]
pub struct Upgrade(Arc<Mutex<Option<Agreed>>>);

#[derive(Debug)]
struct Agreed {
    client: OnUpgrade,
    server: OnUpgrade,
    peer: Option<VerifiedPeer>,
}

/// A connection that has left HTTP: bytes on both sides.
pub struct Upgraded {
    /// Towards whoever asked for it.
    pub client: Stream,
    /// Towards whoever agreed.
    pub server: Stream,
    /// Who agreed; none in plaintext. The bytes may flow as long as the trust in it lasts.
    pub peer: Option<VerifiedPeer>,
}

impl Upgrade {
    /// Both sides agreed to leave HTTP; `peer` is who the server proved to be.
    pub fn agreed(&self, client: OnUpgrade, server: OnUpgrade, peer: Option<VerifiedPeer>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Agreed { client, server, peer });
    }

    /// The streams to copy between; none where nobody left HTTP. To be called when the connection has been
    /// served.
    ///
    /// # Errors
    /// Where one of the two broke in the moment of the change.
    pub async fn upgraded(&self) -> io::Result<Option<Upgraded>> {
        let agreed = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Agreed { client, server, peer }) = agreed else { return Ok(None) };
        let (client, server) = tokio::try_join!(stream_below(client), stream_below(server))?;
        Ok(Some(Upgraded { client, server, peer }))
    }
}

/// The stream below an upgraded connection, with what hyper had read ahead put back.
async fn stream_below(upgrade: OnUpgrade) -> io::Result<Stream> {
    let upgraded = upgrade.await.map_err(io::Error::other)?;
    let parts = upgraded
        .downcast::<TokioIo<Stream>>()
        .map_err(|_| io::Error::other("an upgraded connection that is not one of ours"))?;
    let mut stream = parts.io.into_inner();
    stream.only_carry();
    if !parts.read_buf.is_empty() {
        stream.unread(parts.read_buf);
    }
    Ok(stream)
}
