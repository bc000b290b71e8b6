//! Headers between hops: what is checked, what is removed, how a message changes its framing between HTTP/1 and
//! HTTP/2 (RFC 9110 7.6, RFC 9113 8.2 and 8.3).

use hyper::{
    Method, Request, Response, Uri, Version,
    header::{self, Entry, HeaderMap, HeaderName, HeaderValue},
    http::{
        request,
        uri::{Authority, Parts, PathAndQuery, Scheme},
    },
};
use weft_proto::names;

use crate::model::{Failed, Failure, HttpVersion, Result};

/// gRPC over HTTP/2, "Requests": how long the caller waits.
pub const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
/// gRPC over HTTP/2, "Responses": how the call ended.
pub const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
/// gRPC retry design (A6): when the server wants the call again, if at all.
pub const GRPC_RETRY_PUSHBACK: HeaderName = HeaderName::from_static("grpc-retry-pushback-ms");
/// What the caller's app spoke.
pub const PROTOCOL: HeaderName = HeaderName::from_static(names::HEADER_PROTOCOL);
/// How long the caller waits.
pub const DEADLINE: HeaderName = HeaderName::from_static(names::HEADER_DEADLINE);
/// The scheme of an absolute target, which the caller's app sent to a proxy over HTTP/1.
pub const ABSOLUTE: HeaderName = HeaderName::from_static(names::HEADER_ABSOLUTE);
/// The label of a failure of the mesh.
pub const FAILURE: HeaderName = HeaderName::from_static(names::HEADER_FAILURE);

/// Refuses a request that two parsers could read differently, and gives the host it is for.
///
/// # Errors
/// [`Failure::BadRequest`]; [`Failure::HeadersTooLarge`] for more fields than `most_fields`.
pub fn check<B>(request: &Request<B>, most_fields: usize) -> Result<Option<Authority>> {
    if request.headers().len() > most_fields {
        return Err(Failed::new(Failure::HeadersTooLarge, format!("more than {most_fields} header fields")));
    }
    body_length(request)?;
    target(request)?;
    authority(request)
}

/// Where the body ends must be said once and plainly: one length in digits, or `chunked` alone. (hyper has
/// removed a Content-Length beside a Transfer-Encoding by now, and closes such a connection after the answer.)
fn body_length<B>(request: &Request<B>) -> Result<()> {
    let bad = |what: &str| Err(Failed::new(Failure::BadRequest, what));
    let mut codings = request.headers().get_all(header::TRANSFER_ENCODING).iter();
    let mut lengths = request.headers().get_all(header::CONTENT_LENGTH).iter();
    let (coding, length) = (codings.next(), lengths.next());
    if codings.next().is_some() || lengths.next().is_some() {
        return bad("more than one Transfer-Encoding or Content-Length");
    }
    if coding.is_some_and(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"chunked")) {
        return bad("a Transfer-Encoding other than chunked");
    }
    let is_number = |length: &HeaderValue| {
        !length.is_empty() && length.len() <= 19 && length.as_bytes().iter().all(u8::is_ascii_digit)
    };
    if length.is_some_and(|length| !is_number(length)) {
        return bad("a Content-Length that is no number");
    }
    if request.method() == Method::CONNECT && (coding.is_some() || length.is_some()) {
        return bad("CONNECT with a body");
    }
    Ok(())
}

/// Only the forms of RFC 9112 3.2: a path, an absolute URI, `*` for OPTIONS, host and port for CONNECT.
fn target<B>(request: &Request<B>) -> Result<()> {
    let uri = request.uri();
    let is_connect = request.method() == Method::CONNECT;
    let fits = match (uri.scheme().is_some(), uri.authority().is_some(), uri.path()) {
        (false, true, "") => is_connect,
        (_, _, "*") => request.method() == Method::OPTIONS,
        // An absolute URI may do without a path.
        (true, true, "") => !is_connect,
        (_, _, path) => !is_connect && path.starts_with('/'),
    };
    if fits { Ok(()) } else { Err(Failed::new(Failure::BadRequest, "a request target of no known form")) }
}

/// What a request says of the host it is for, read once; none where it says nothing, or where its Host is empty or odd and
/// goes on as it is. Refused: more than one Host, a Host that is no authority, user information, a port that is no number,
/// or a Host that contradicts `:authority`.
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
    let mut is_odd = false;
    let host = match host.map(HeaderValue::as_bytes) {
        None | Some(b"") => None,
        Some(bytes) => match Authority::try_from(bytes) {
            Ok(authority) if is_plain(&authority) => Some(authority),
            _ if is_odd_host(bytes) => {
                is_odd = true;
                None
            }
            _ => {
                let shown = String::from_utf8_lossy(bytes);
                return bad(&format!("the Host header is not a host with an optional port: {shown:?}"));
            }
        },
    };
    match (request.uri().authority(), host) {
        (Some(target), _) if !is_plain(target) => {
            bad("the request target carries user information or a port that is no number")
        }
        // RFC 9113 8.3.1.
        (Some(target), host)
            if request.version() == Version::HTTP_2
                && host.as_ref().map_or(is_odd, |host| target != host) =>
        {
            bad("the Host header and :authority differ")
        }
        // RFC 9112 3.2.2: the authority of an absolute target wins over Host.
        (Some(target), _) => Ok(Some(target.clone())),
        (None, host) => Ok(host),
    }
}

/// A host with at most a port that is a number, and no user information.
fn is_plain(authority: &Authority) -> bool {
    let rest = authority.as_str().strip_prefix(authority.host());
    let port = rest.map(|rest| rest.strip_prefix(':').unwrap_or(rest));
    !authority.as_str().contains('@')
        && !authority.host().is_empty()
        && port.is_some_and(|port| {
            port.is_empty() || port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok()
        })
}

/// A host that no URI may have and that still reads in one way only: marks that clients leave as they are, and bytes that
/// are no ASCII.
fn is_odd_host(host: &[u8]) -> bool {
    let colon = host.iter().position(|byte| *byte == b':').unwrap_or(host.len());
    let (name, port) = (&host[..colon], host.get(colon + 1..).unwrap_or_default());
    let is_port = |port: &[u8]| {
        port.iter().all(u8::is_ascii_digit)
            && str::from_utf8(port).is_ok_and(|port| port.parse::<u16>().is_ok())
    };
    let is_of_a_name =
        |byte: &u8| byte.is_ascii_alphanumeric() || *byte >= 0x80 || b"-._~\"<>`{}|^%".contains(byte);
    !name.is_empty() && name.iter().all(is_of_a_name) && (port.is_empty() || is_port(port))
}

/// Refuses an answer of HTTP/1 whose body has been coded for one hop in a way that would be lost on the next: its reader
/// would take the coded bytes for the body (RFC 9112 6.1).
///
/// # Errors
/// [`Failure::BadResponse`].
pub fn check_coding<B: http_body::Body>(answer: &Response<B>) -> Result<()> {
    if !answer.headers().contains_key(header::TRANSFER_ENCODING) || answer.body().is_end_stream() {
        return Ok(());
    }
    let values = answer.headers().get_all(header::TRANSFER_ENCODING).iter();
    let mut codings = values.flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    let is_framing = |coding: &[u8]| {
        let coding = coding.trim_ascii();
        coding.eq_ignore_ascii_case(b"chunked") || coding.eq_ignore_ascii_case(b"identity")
    };
    if codings.next().is_none_or(is_framing) && codings.next().is_none() {
        return Ok(());
    }
    let detail = "an answer with another Transfer-Encoding than chunked, which cannot be passed on; a Content-Encoding can";
    Err(Failed::new(Failure::BadResponse, detail))
}

/// The scheme of an absolute target, as a client of HTTP/1 sends it to a proxy. A target of HTTP/2 always has one.
pub fn absolute_scheme<B>(request: &Request<B>) -> Option<Scheme> {
    request.uri().scheme().filter(|_| request.version() != Version::HTTP_2).cloned()
}

/// Removes from the answer that ends HTTP on a connection what would speak of a body (RFC 9110 8.6, RFC 9112 6.1).
pub fn remove_framing(headers: &mut HeaderMap) {
    headers.remove(header::CONTENT_LENGTH);
    headers.remove(header::TRANSFER_ENCODING);
}

/// Removes what belongs to the connection the message came on. `TE: trailers` stays: it is a statement of the
/// client, which gRPC needs.
pub fn remove_per_hop(headers: &mut HeaderMap) {
    if headers.contains_key(header::CONNECTION) {
        remove_named_by_connection(headers);
    }
    // RFC 9112 6.3: it overrides the length, which is wrong then.
    if headers.contains_key(header::TRANSFER_ENCODING) {
        headers.remove(header::CONTENT_LENGTH);
    }
    remove_where(headers, |name| is_per_hop(name));
    if let Some(te) = headers.get(header::TE) {
        if te.as_bytes().split(|byte| *byte == b',').any(|part| part.trim_ascii() == b"trailers") {
            headers.insert(header::TE, HeaderValue::from_static("trailers"));
        } else {
            headers.remove(header::TE);
        }
    }
}

/// Header fields that belong to one connection (RFC 9110 7.6.1), beside those that `Connection` names.
fn is_per_hop(name: &HeaderName) -> bool {
    [header::CONNECTION, header::TRANSFER_ENCODING, header::UPGRADE].contains(name)
        || matches!(name.as_str(), "keep-alive" | "proxy-connection")
}

fn remove_named_by_connection(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
        .map(<[u8]>::trim_ascii)
        .filter(|token| !token.eq_ignore_ascii_case(b"keep-alive") && !token.eq_ignore_ascii_case(b"close"))
        .filter_map(|token| HeaderName::from_bytes(token).ok())
        .filter(|name| ![header::TE, header::HOST, header::CONTENT_LENGTH].contains(name))
        .collect();
    for name in named {
        headers.remove(name);
    }
}

/// Says how long the body of an HTTP/2 request is, where that is known and worth saying (RFC 9110 8.6).
pub fn say_length(head: &mut request::Parts, length: Option<u64>) {
    let body_is_usual = !matches!(head.method, Method::GET | Method::HEAD | Method::DELETE | Method::CONNECT);
    if let Some(length) = length.filter(|length| *length > 0 || body_is_usual)
        && let Entry::Vacant(place) = head.headers.entry(header::CONTENT_LENGTH)
    {
        place.insert(length.into());
    }
}

/// Removes from trailers what would change how the message is read or whom it is from (RFC 9110 6.5.1), and
/// what only the mesh may set.
pub fn clean_trailers(trailers: &mut HeaderMap) {
    const OF_A_HEAD: [HeaderName; 5] =
        [header::CONTENT_LENGTH, header::HOST, header::TE, header::TRAILER, header::AUTHORIZATION];
    if trailers.contains_key(header::CONNECTION) {
        remove_named_by_connection(trailers);
    }
    let is_unfit = |name: &&HeaderName| is_per_hop(name) || OF_A_HEAD.contains(name) || is_ours(name);
    remove_where(trailers, is_unfit);
}

/// Removes every header that only the mesh may set. An app or a stranger that sets one is not believed.
pub fn remove_ours(headers: &mut HeaderMap) {
    remove_where(headers, |name| is_ours(name));
}

fn is_ours(name: &HeaderName) -> bool {
    name.as_str().starts_with(names::HEADER_PREFIX)
}

/// Looking through them costs less than to ask for each name, and most messages have none of them, or one.
fn remove_where(headers: &mut HeaderMap, unwanted: impl Fn(&&HeaderName) -> bool) {
    while let Some(name) = headers.keys().find(&unwanted).cloned() {
        headers.remove(name);
    }
}

/// Gives a request the form of the next hop. `authority` is what [`check`] read; `fallback` stands where the
/// client named none (HTTP/1.0). A target that was `absolute` at the client stays so in HTTP/1. Goes after
/// [`remove_per_hop`].
///
/// # Errors
/// [`Failure::BadRequest`] where the target has no form on that hop.
pub fn frame_for<B: http_body::Body>(
    request: &mut Request<B>,
    version: HttpVersion,
    authority: Option<Authority>,
    absolute: Option<Scheme>,
    fallback: impl FnOnce() -> Authority,
) -> Result<()> {
    if request.method() == Method::CONNECT {
        return Err(Failed::new(Failure::BadRequest, "CONNECT within HTTP/2 is not carried; use HTTP/1"));
    }
    let path = path_of(request.uri())?;
    match version {
        HttpVersion::Http2 => {
            // An empty or odd Host stays what it is, without `:authority` (RFC 9113 8.3.1).
            let goes_on = authority.is_none() && request.headers().contains_key(header::HOST);
            *request.uri_mut() = if goes_on {
                uri(None, None, path)?
            } else {
                request.headers_mut().remove(header::HOST);
                uri(Some(Scheme::HTTP), Some(authority.unwrap_or_else(fallback)), path)?
            };
            *request.version_mut() = Version::HTTP_2;
        }
        HttpVersion::Http1 => {
            *request.uri_mut() = match absolute {
                Some(scheme) => uri(Some(scheme), authority.clone(), path)?,
                None => uri(None, None, path)?,
            };
            set_host(request.headers_mut(), authority, fallback)?;
            *request.version_mut() = Version::HTTP_11;
            say_that_a_body_comes(request);
            join_cookies(request.headers_mut());
        }
    }
    Ok(())
}

/// The host that was read is the one that is said: an absolute target wins over Host (RFC 9112 3.2.2).
pub(super) fn set_host(
    headers: &mut HeaderMap,
    authority: Option<Authority>,
    fallback: impl FnOnce() -> Authority,
) -> Result<()> {
    match (authority, headers.entry(header::HOST)) {
        (Some(authority), host) => {
            let value = host_value(&authority)?;
            match host {
                Entry::Occupied(mut host) => drop(host.insert(value)),
                Entry::Vacant(host) => drop(host.insert(value)),
            }
        }
        (None, Entry::Vacant(host)) => drop(host.insert(host_value(&fallback())?)),
        (None, Entry::Occupied(_)) => {}
    }
    Ok(())
}

/// hyper takes a GET or HEAD that says nothing of a body for one without, and would drop what the client sent.
fn say_that_a_body_comes<B: http_body::Body>(request: &mut Request<B>) {
    let says_nothing = !request.headers().contains_key(header::CONTENT_LENGTH);
    if says_nothing
        && matches!(*request.method(), Method::GET | Method::HEAD)
        && !request.body().is_end_stream()
    {
        request.headers_mut().insert(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
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

/// An absolute URI may do without a path; a request line may not (RFC 9112 3.2.1).
fn path_of(uri: &Uri) -> Result<PathAndQuery> {
    match (uri.path_and_query(), uri.query()) {
        // An empty one calls itself "/", and is written as nothing.
        (None, _) => Ok(PathAndQuery::from_static("/")),
        (Some(path), None) if path.as_str() == "/" => Ok(PathAndQuery::from_static("/")),
        (Some(path), _) if path.as_str().starts_with(['/', '*']) => Ok(path.clone()),
        (Some(_), None) => Err(Failed::new(Failure::BadRequest, "a request target without a path")),
        (Some(_), Some(query)) => PathAndQuery::try_from(format!("/?{query}"))
            .map_err(|error| Failed::new(Failure::BadRequest, format!("request target: {error}"))),
    }
}

fn uri(scheme: Option<Scheme>, authority: Option<Authority>, path: PathAndQuery) -> Result<Uri> {
    let mut parts = Parts::default();
    parts.scheme = scheme;
    parts.authority = authority;
    parts.path_and_query = Some(path);
    Uri::from_parts(parts)
        .map_err(|error| Failed::new(Failure::BadRequest, format!("request target: {error}")))
}

/// A value that is different on every request: not worth a place in HTTP/2's table of fields (RFC 7541 7.1.3), where
/// it would push out those that stay.
pub fn passing(text: String) -> Option<HeaderValue> {
    let mut value = HeaderValue::try_from(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// A header as text, where there is one and it is text.
pub fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Is this a gRPC call (gRPC over HTTP/2, "Content-Type")?
pub fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

#[cfg(test)]
mod tests;
