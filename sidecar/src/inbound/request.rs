//! One request that reaches the app: what its caller may claim, whether it may pass, delivery, the answer.

use hyper::{
    Method, Request, Response, Version,
    header::{HeaderMap, HeaderValue},
    http::uri::{Authority, Scheme},
};
use tokio::time::Instant;

use super::{APP_TIMEOUT, Arrival, Inbound, app_key, as_app};
use crate::{
    connect::{InUse, SendFailed},
    http::{self, Body, BodyEnd, headers},
    model::{Failed, Failure, HttpVersion, Protocol, Result},
    policy::{authorization::Permit, deadline::Deadline},
    telemetry::Record,
};

/// An answer of the app, and what must be kept until its body has ended.
struct Answered {
    response: Response<Body>,
    in_use: InUse,
    deadline: Option<Instant>,
    left_http: bool,
}

impl Inbound {
    /// Answers a request from a connection. A peer hears of an app that took nothing by a refused stream, which
    /// it may try elsewhere; anybody else by a status.
    pub(super) async fn answer(
        &self,
        request: Request<Body>,
        arrival: &Arrival,
        version: HttpVersion,
    ) -> std::result::Result<Response<Body>, h2::Error> {
        let is_grpc = headers::is_grpc(request.headers());
        let protocol = if version == HttpVersion::Http2 { Protocol::Http2 } else { Protocol::Http1 };
        match self.request(request, arrival).await {
            Ok(response) => Ok(response),
            Err(failed) if refuses_stream(arrival, protocol, failed.failure) => Err(http::refuse_stream()),
            Err(failed) => Ok(http::answer(failed.failure, is_grpc)),
        }
    }

    /// A request, from its head to the end of its answer.
    ///
    /// # Errors
    /// Why there is no answer of the app; `app_refused` means that nothing was processed.
    pub async fn request(&self, request: Request<Body>, arrival: &Arrival) -> Result<Response<Body>> {
        let protocol = if request.version() == Version::HTTP_2 { Protocol::Http2 } else { Protocol::Http1 };
        let mut record =
            self.telemetry.begin(&self.metrics, protocol, arrival.client, &request, &arrival.cut);
        record.peer(arrival.caller.identity());
        let is_grpc = headers::is_grpc(request.headers());
        match self.deliver(request, arrival, &mut record).await {
            Ok(answered) => Ok(observed(answered, record)),
            Err(failed) if refuses_stream(arrival, protocol, failed.failure) => {
                record.fail(failed.clone());
                Err(failed)
            }
            Err(failed) => {
                http::answer_failed(&mut record, failed.clone(), is_grpc);
                Err(failed)
            }
        }
    }

    async fn deliver(
        &self,
        mut request: Request<Body>,
        arrival: &Arrival,
        record: &mut Record,
    ) -> Result<Answered> {
        let added = if arrival.caller.is_sidecar() { http::SIDECAR_FIELDS } else { 0 };
        let authority = headers::check(&request, self.limits.header_fields + added)?;
        let claims = Claims::take(request.headers_mut(), arrival.caller.is_sidecar());
        let permit = self.permit(arrival)?;
        let overloaded = |_| Failed::new(Failure::Overloaded, "the bound of requests at a time is reached");
        record.keep(self.requests.clone().try_acquire_owned().map_err(overloaded)?);
        let mut request = request.map(|body| body.with_state(|| record.request_body()));
        let grpc_timeout = headers::text(request.headers(), &headers::GRPC_TIMEOUT);
        let deadline = Deadline::start(
            None,
            grpc_timeout,
            claims.deadline.as_ref().and_then(|value| value.to_str().ok()),
            Instant::now(),
        )
        .at();
        let spoken =
            if request.version() == Version::HTTP_2 { HttpVersion::Http2 } else { HttpVersion::Http1 };
        let version = claims.version.unwrap_or(spoken);
        record.inject(&record.trace().clone(), request.headers_mut());
        if http::wants_upgrade(&request) {
            http::frame_for_upgrade(&mut request, authority, || authority_of(arrival))?;
            let (response, in_use, left_http) = Box::pin(self.upgrade(request, arrival, &permit)).await?;
            return Ok(Answered { response, in_use, deadline: None, left_http });
        }
        let absolute = claims.absolute.or_else(|| headers::absolute_scheme(&request));
        headers::remove_per_hop(request.headers_mut());
        headers::frame_for(&mut request, version, authority, absolute, || authority_of(arrival))?;
        let sending = self.send(request, arrival, version, &permit);
        let (response, in_use) = match deadline {
            None => sending.await?,
            Some(at) => tokio::time::timeout_at(at, sending).await.map_err(|_| {
                Failed::new(
                    Failure::RequestTimeout,
                    format!("{}: no answer before the caller's deadline", arrival.app.now()),
                )
            })??,
        };
        Ok(Answered { response, in_use, deadline, left_http: false })
    }

    /// Sends to the app. A kept connection may have been closed by the app meanwhile: a safe request without a
    /// body is then sent again on a new one.
    async fn send(
        &self,
        request: Request<Body>,
        arrival: &Arrival,
        version: HttpVersion,
        permit: &Permit,
    ) -> Result<(Response<Body>, InUse)> {
        let lend = |address| async move { self.pool.lend(&app_key(address, version), APP_TIMEOUT).await };
        let lease = arrival.app.reach(lend).await.map_err(as_app)?;
        let may_be_stale = lease.reused && version == HttpVersion::Http1;
        let again = (may_be_stale && can_repeat(&request)).then(|| request_like(&request));
        let failed = match lease.send(request).await {
            Ok(answered) => return Ok(answered),
            Err(failed) => failed,
        };
        match again {
            Some(request) if failed.failed.failure == Failure::Reset => {
                Box::pin(self.send_again(request, arrival, permit)).await
            }
            _ => Err(app_failed(failed)),
        }
    }

    async fn send_again(
        &self,
        request: Request<Body>,
        arrival: &Arrival,
        permit: &Permit,
    ) -> Result<(Response<Body>, InUse)> {
        let lease = self.lend_alone(arrival, permit).await?;
        lease.send(request).await.map_err(app_failed)
    }

    /// A connection to the app that stops being HTTP, where the app agrees.
    async fn upgrade(
        &self,
        mut request: Request<Body>,
        arrival: &Arrival,
        permit: &Permit,
    ) -> Result<(Response<Body>, InUse, bool)> {
        let method = request.method().clone();
        let client = hyper::upgrade::on(&mut request);
        let lease = self.lend_alone(arrival, permit).await?;
        let (mut response, in_use) = lease.send(request).await.map_err(app_failed)?;
        let left_http = http::left_http(&method, response.status());
        if left_http {
            let server = hyper::upgrade::on(&mut response);
            arrival.upgrade.agreed(client, server, None);
        }
        Ok((response, in_use, left_http))
    }
}

/// What a sidecar tells of a request. Removed from every request, believed from a sidecar.
struct Claims {
    version: Option<HttpVersion>,
    /// The scheme of an absolute target.
    absolute: Option<Scheme>,
    deadline: Option<HeaderValue>,
}

impl Claims {
    fn take(headers: &mut HeaderMap, believed: bool) -> Self {
        let mut take = |name| headers.remove(name).filter(|_| believed);
        let version = match take(headers::PROTOCOL).as_ref().map(HeaderValue::as_bytes) {
            Some(b"h1") => Some(HttpVersion::Http1),
            Some(b"h2") => Some(HttpVersion::Http2),
            _ => None,
        };
        let absolute = take(headers::ABSOLUTE).and_then(|scheme| Scheme::try_from(scheme.as_bytes()).ok());
        let deadline = take(headers::DEADLINE);
        headers::remove_ours(headers);
        Claims { version, absolute, deadline }
    }
}

/// Is the caller told by a refused stream, and not by an answer?
fn refuses_stream(arrival: &Arrival, protocol: Protocol, failure: Failure) -> bool {
    failure == Failure::AppRefused && protocol == Protocol::Http2 && arrival.caller.is_sidecar()
}

/// The answer for the caller; its body's end finishes the record and gives the connection back.
fn observed(answered: Answered, mut record: Record) -> Response<Body> {
    let Answered { response, in_use, deadline, left_http } = answered;
    let (mut head, body) = response.into_parts();
    http::begin_answer(&mut record, &head);
    if left_http {
        headers::remove_framing(&mut head.headers);
    } else {
        headers::remove_per_hop(&mut head.headers);
    }
    headers::remove_ours(&mut head.headers);
    head.version = Version::HTTP_11;
    let body = body.until(deadline).observed(move |ended| {
        http::end_answer(&mut record, ended);
        if matches!(ended.how, BodyEnd::Complete) {
            in_use.finished();
        }
    });
    Response::from_parts(head, body)
}

/// Failures of the app have labels of their own. Where nothing was processed the caller may go elsewhere.
fn app_failed(failed: SendFailed) -> Failed {
    if failed.nothing_processed {
        return Failed::new(Failure::AppRefused, format!("the app took nothing: {}", failed.failed.detail));
    }
    as_app(failed.failed)
}

fn can_repeat(request: &Request<Body>) -> bool {
    let safe = matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
    safe && http_body::Body::is_end_stream(request.body())
}

/// The same request without a body.
fn request_like(request: &Request<Body>) -> Request<Body> {
    let mut copy = Request::new(Body::empty());
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.version_mut() = request.version();
    *copy.headers_mut() = request.headers().clone();
    copy
}

/// For a client that named no host (HTTP/1.0): the address that it dialled.
fn authority_of(arrival: &Arrival) -> Authority {
    Authority::try_from(arrival.meant.to_string()).unwrap_or_else(|_| Authority::from_static("localhost"))
}
