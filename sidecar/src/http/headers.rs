//! Headers between hops: what is checked, what is removed, how a message changes its framing between HTTP/1 and
//! HTTP/2 (RFC 9110 7.6, RFC 9113 8.2 and 8.3).

use hyper::{
    Method, Request, Uri, Version,
    header::{self, Entry, HeaderMap, HeaderName, HeaderValue},
    http::uri::{Authority, Parts, PathAndQuery, Scheme},
};
use weft_proto::names;

use crate::model::{Failed, Failure, HttpVersion, Result};

/// Header fields that belong to one connection (RFC 9110 7.6.1), beside those that `Connection` names.
const PER_HOP: [HeaderName; 5] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// What a request says of the host it is for, read once. A request that two parsers could read differently is
/// refused: more than one Host, a Host that is no authority, user information, or a Host that contradicts
/// `:authority`.
///
/// # Errors
/// [`Failure::BadRequest`].
pub fn authority<B>(request: &Request<B>) -> Result<Option<Authority>> {
    let bad = |what: &str| Err(Failed::new(Failure::BadRequest, what));
    let mut hosts = request.headers().get_all(header::HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return bad("more than one Host header");
    }
    if host.is_none() && request.version() == Version::HTTP_11 {
        return bad("an HTTP/1.1 request without a Host header");
    }
    let host = match host.map(HeaderValue::as_bytes) {
        None | Some(b"") => None,
        Some(bytes) => match Authority::try_from(bytes) {
            Ok(authority) if !bytes.contains(&b'@') => Some(authority),
            _ => return bad("the Host header is not a host with an optional port"),
        },
    };
    match (request.uri().authority(), host) {
        (Some(target), _) if target.as_str().contains('@') => {
            bad("the request target carries user information")
        }
        // RFC 9113 8.3.1.
        (Some(target), Some(host)) if request.version() == Version::HTTP_2 && *target != host => {
            bad("the Host header and :authority differ")
        }
        // RFC 9112 3.2.2: the authority of an absolute target wins over Host.
        (Some(target), _) => Ok(Some(target.clone())),
        (None, host) => Ok(host),
    }
}

/// Removes what belongs to the connection the message came on. `TE: trailers` stays: it is a statement of the
/// client, which gRPC needs.
pub fn remove_per_hop(headers: &mut HeaderMap) {
    if headers.contains_key(header::CONNECTION) {
        remove_named_by_connection(headers);
    }
    for name in &PER_HOP {
        headers.remove(name);
    }
    if let Some(te) = headers.get(header::TE) {
        if te.as_bytes().split(|byte| *byte == b',').any(|part| part.trim_ascii() == b"trailers") {
            headers.insert(header::TE, HeaderValue::from_static("trailers"));
        } else {
            headers.remove(header::TE);
        }
    }
}

fn remove_named_by_connection(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
        .map(<[u8]>::trim_ascii)
        .filter(|token| !token.eq_ignore_ascii_case(b"keep-alive") && !token.eq_ignore_ascii_case(b"close"))
        .filter_map(|token| HeaderName::from_bytes(token).ok())
        .filter(|name| *name != header::TE)
        .collect();
    for name in named {
        headers.remove(name);
    }
}

/// Removes every header that only the mesh may set. An app or a stranger that sets one is not believed.
pub fn remove_ours(headers: &mut HeaderMap) {
    let is_ours = |name: &&HeaderName| name.as_str().starts_with(names::HEADER_PREFIX);
    let ours: Vec<HeaderName> = headers.keys().filter(is_ours).cloned().collect();
    for name in ours {
        headers.remove(name);
    }
}

/// Gives a request the form of the next hop. `authority` is what [`authority`] read; `fallback` stands where
/// the client named none (HTTP/1.0).
///
/// # Errors
/// [`Failure::BadRequest`] where the target has no form on that hop.
pub fn frame_for<B>(
    request: &mut Request<B>,
    version: HttpVersion,
    authority: Option<Authority>,
    fallback: impl FnOnce() -> Authority,
) -> Result<()> {
    if request.method() == Method::CONNECT {
        return Err(Failed::new(Failure::BadRequest, "CONNECT within HTTP/2 is not carried; use HTTP/1"));
    }
    let path = request.uri().path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    let authority = authority.unwrap_or_else(fallback);
    match version {
        HttpVersion::Http2 => {
            *request.uri_mut() = uri(Some(Scheme::HTTP), Some(authority), path)?;
            request.headers_mut().remove(header::HOST);
            *request.version_mut() = Version::HTTP_2;
        }
        HttpVersion::Http1 => {
            if let Entry::Vacant(host) = request.headers_mut().entry(header::HOST) {
                host.insert(host_value(&authority)?);
            }
            *request.uri_mut() = uri(None, None, path)?;
            *request.version_mut() = Version::HTTP_11;
            join_cookies(request.headers_mut());
        }
    }
    Ok(())
}

/// HTTP/2 may split `Cookie` into several fields; HTTP/1 wants one (RFC 9113 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let cookies: Vec<&[u8]> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if cookies.len() > 1
        && let Ok(joined) = HeaderValue::from_bytes(&cookies.join(&b"; "[..]))
    {
        headers.insert(header::COOKIE, joined);
    }
}

fn host_value(authority: &Authority) -> Result<HeaderValue> {
    HeaderValue::from_str(authority.as_str())
        .map_err(|_| Failed::new(Failure::BadRequest, "the authority cannot stand in a Host header"))
}

fn uri(scheme: Option<Scheme>, authority: Option<Authority>, path: PathAndQuery) -> Result<Uri> {
    let mut parts = Parts::default();
    parts.scheme = scheme;
    parts.authority = authority;
    parts.path_and_query = Some(path);
    Uri::from_parts(parts)
        .map_err(|error| Failed::new(Failure::BadRequest, format!("request target: {error}")))
}

/// A header as text, where there is one and it is text.
pub fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Is this a gRPC call (gRPC over HTTP/2, "Content-Type")?
pub fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

#[cfg(test)]
mod tests;
