//! One request of the app: made ready for its hop, then attempted until there is an answer or a reason to stop.
//! The loop is `attempts`; everything it asks is a step in another room.

use std::{net::SocketAddr, sync::Arc, time::SystemTime};

use hyper::{
    Request, Response, Version,
    header::{HeaderValue, RETRY_AFTER},
    http::{request::Parts, uri::Authority},
};
use tokio::time::{Instant, sleep, timeout_at};

use super::{Known, Outbound, Target, Upstream};
use crate::{
    balance::Picked,
    connect::{self, InUse, Key, Lease, Security, SendFailed},
    http::{self, Body, BodyEnd, Ended, Replay, Upgrade, headers, left_http},
    inbound::{Arrival, Caller},
    model::{Failed, Failure, HttpVersion, Protocol, Result},
    policy::{
        deadline::Deadline,
        response::{GrpcStatus, failure_speaks_against_endpoint, head_speaks_against_endpoint},
        retry::{self, Outcome, Refusal, Verdict},
    },
    telemetry::{Cut, Record, TraceContext},
    tls::VerifiedPeer,
};

/// The head of an answer and, beyond this sidecar, the connection it came on; or why there is none.
type Attempted = std::result::Result<(Response<Body>, Option<InUse>), SendFailed>;

/// A request on its way, whichever attempt it is.
struct Call<'a> {
    upstream: &'a Upstream,
    known: &'a Known,
    /// The one endpoint that the app dialled.
    only: Option<SocketAddr>,
    is_grpc: bool,
    /// It asks to leave HTTP: each attempt has an HTTP/1 connection of its own.
    upgrade: bool,
    head: Parts,
    body: Replay,
    /// By the app, and on the way.
    spoken: HttpVersion,
    version: HttpVersion,
    deadline: Deadline,
}

/// An answer, and what must be kept until its body has ended.
struct Answered {
    response: Response<Body>,
    /// None for a call of the app to itself.
    in_use: Option<InUse>,
    /// Counts as load of the endpoint.
    picked: Option<Picked>,
    deadline: Option<Instant>,
    left_http: bool,
}

impl Outbound {
    /// Answers a request of the app.
    pub(super) async fn answer(
        &self,
        request: Request<Body>,
        target: &Target,
        client: SocketAddr,
        spoken: HttpVersion,
        upgrade: &Upgrade,
        cut: &Cut,
    ) -> Response<Body> {
        let is_grpc = headers::is_grpc(request.headers());
        let (upstream, only) = match target {
            Target::Service(upstream) => (upstream, None),
            Target::Endpoint(upstream, endpoint) => (upstream, Some(endpoint.address)),
            // A connection to an address outside is passed through before anybody reads it.
            Target::Outside(_) => return http::answer(Failure::Internal, is_grpc),
        };
        let protocol = match spoken {
            HttpVersion::Http1 => Protocol::Http1,
            HttpVersion::Http2 => Protocol::Http2,
        };
        let mut record = self.telemetry.begin(&upstream.metrics, protocol, client, &request, cut);
        match self.request(request, spoken, upstream, only, upgrade, &mut record).await {
            Ok(answered) => observed(answered, record),
            Err(failed) => http::answer_failed(&mut record, failed, is_grpc),
        }
    }

    async fn request(
        &self,
        mut request: Request<Body>,
        spoken: HttpVersion,
        upstream: &Arc<Upstream>,
        only: Option<SocketAddr>,
        upgrade: &Upgrade,
        record: &mut Record,
    ) -> Result<Answered> {
        let authority = headers::check(&request, self.limits.header_fields)?;
        headers::remove_ours(request.headers_mut());
        let overloaded = |_| Failed::new(Failure::Overloaded, "the bound of requests at a time is reached");
        record.keep(self.requests.clone().try_acquire_owned().map_err(overloaded)?);
        let known = upstream.known();
        if http::wants_upgrade(&request) {
            http::frame_for_upgrade(&mut request, authority, || authority_of(upstream))?;
            let answered = Box::pin(self.upgrade(request, spoken, upstream, &known, only, upgrade, record));
            return answered.await;
        }
        let version = match known.security {
            Security::Mesh(_) => HttpVersion::Http2,
            Security::Plain | Security::Forbidden => spoken,
        };
        let absolute = headers::absolute_scheme(&request);
        headers::remove_per_hop(request.headers_mut());
        if let Some(scheme) = absolute.as_ref().filter(|_| version != spoken)
            && let Ok(scheme) = HeaderValue::from_str(scheme.as_str())
        {
            // Only a sidecar is told: nobody else is sent another version than was spoken.
            request.headers_mut().insert(headers::ABSOLUTE, scheme);
        }
        headers::frame_for(&mut request, version, authority, absolute, || authority_of(upstream))?;
        let call = Call::new(request, spoken, version, upstream, &known, only, record);
        self.attempts(&call, record).await
    }

    /// Attempt after attempt, until one is answered or there is a reason to stop.
    async fn attempts(&self, call: &Call<'_>, record: &mut Record) -> Result<Answered> {
        let mut tried: Vec<SocketAddr> = Vec::new();
        let mut why = None;
        call.upstream.budget().deposit(&call.known.policy.retries.budget, Instant::now());
        loop {
            let mut picked = call.upstream.pick(call.only, &tried, Instant::now())?;
            let endpoint = picked.address();
            let span = record.attempt(endpoint, why);
            let result = self.attempt(call, endpoint, record, &span).await;
            settle(call, &mut picked, record, &result);
            match call.again(&result, record.attempts()) {
                Verdict::Again { reason, after } => {
                    tried.push(endpoint);
                    why = Some(reason.label());
                    give_up(result, picked);
                    sleep(after).await;
                }
                Verdict::No { reason } => {
                    if reason != Refusal::NotNeeded {
                        record.handles().retry_refused(reason.label());
                    }
                    let (response, in_use) = result.map_err(|failed| failed.failed)?;
                    let deadline = call.deadline.at();
                    return Ok(Answered {
                        response,
                        in_use,
                        picked: Some(picked),
                        deadline,
                        left_http: false,
                    });
                }
            }
        }
    }

    /// One attempt: a connection, the request, the head of the answer, within the times of policy and caller.
    async fn attempt(
        &self,
        call: &Call<'_>,
        endpoint: SocketAddr,
        record: &mut Record,
        span: &TraceContext,
    ) -> Attempted {
        let started = Instant::now();
        let sending = self.send(call, endpoint, record, span, started);
        let Some(at) = call.deadline.attempt(call.known.policy.timeouts.attempt, started) else {
            return sending.await;
        };
        let late = |_| Err(no_answer(&call.deadline, at, endpoint, started).into());
        timeout_at(at, sending).await.unwrap_or_else(late)
    }

    async fn send(
        &self,
        call: &Call<'_>,
        endpoint: SocketAddr,
        record: &mut Record,
        span: &TraceContext,
        started: Instant,
    ) -> Attempted {
        if let Some(mut arrival) = self.own_arrival(endpoint).filter(|_| !call.upgrade) {
            arrival.cut = record.cut().clone();
            let request = call.request(record, span, started);
            let response = Box::pin(self.inbound.request(request, &arrival)).await?;
            return Ok((response, None));
        }
        let lease = self.lend(call, endpoint).await?;
        // Proven, whatever comes of the attempt now.
        record.peer(lease.peer().map(VerifiedPeer::id));
        let now = if lease.reused { started } else { Instant::now() };
        let (response, in_use) = lease.send(call.request(record, span, now)).await?;
        Ok((response, Some(in_use)))
    }

    /// The endpoint is this very workload: the inbound story takes the request without the network.
    pub(super) fn own_arrival(&self, endpoint: SocketAddr) -> Option<Arrival> {
        if !self.inbound.delivery.is_own(endpoint.ip()) {
            return None;
        }
        let app = self.inbound.delivery.address_of_app(endpoint).ok()?;
        let id = self.inbound.credentials.borrow().as_ref()?.id().clone();
        Some(Arrival {
            caller: Caller::Own(id),
            client: endpoint,
            meant: endpoint,
            app,
            upgrade: Upgrade::default(),
            cut: Cut::default(),
        })
    }

    /// The connection of one attempt: a place on a pooled one, or a new one where the request may leave HTTP.
    async fn lend(&self, call: &Call<'_>, endpoint: SocketAddr) -> Result<Lease> {
        let key = Key { address: endpoint, security: call.known.security.clone(), version: call.version };
        let limit = call.known.policy.timeouts.connect;
        if !call.upgrade {
            return self.pool.lend(&key, limit).await;
        }
        match self.own_arrival(endpoint) {
            Some(arrival) => Box::pin(self.inbound.lend_own(&arrival)).await,
            None => Box::pin(connect::one_off(&self.connector, &key, limit)).await,
        }
    }

    /// A request that stops being HTTP where the server agrees. Attempted like any other.
    #[expect(clippy::too_many_arguments, reason = "what a request is made of, each once")]
    async fn upgrade(
        &self,
        mut request: Request<Body>,
        spoken: HttpVersion,
        upstream: &Arc<Upstream>,
        known: &Known,
        only: Option<SocketAddr>,
        upgrade: &Upgrade,
        record: &mut Record,
    ) -> Result<Answered> {
        let client = hyper::upgrade::on(&mut request);
        let mut call = Call::new(request, spoken, HttpVersion::Http1, upstream, known, only, record);
        call.upgrade = true;
        let answered = self.attempts(&call, record).await?;
        if !left_http(&call.head.method, answered.response.status()) {
            return Ok(answered);
        }
        let Answered { mut response, in_use, picked, .. } = answered;
        if let Some(mut picked) = picked {
            picked.succeeded(Instant::now());
        }
        let server = hyper::upgrade::on(&mut response);
        upgrade.agreed(client, server, in_use.as_ref().and_then(InUse::peer).cloned());
        Ok(Answered { response, in_use, picked: None, deadline: None, left_http: true })
    }
}

/// Nothing came until `at`: the end of the request's time, or of the attempt's.
pub(super) fn no_answer(deadline: &Deadline, at: Instant, endpoint: SocketAddr, started: Instant) -> Failed {
    let failure = if deadline.at() == Some(at) { Failure::RequestTimeout } else { Failure::AttemptTimeout };
    let waited = humantime::format_duration(started.elapsed());
    Failed::new(failure, format!("{endpoint}: no answer after {waited}"))
}

impl<'a> Call<'a> {
    /// Its deadline begins now.
    fn new(
        request: Request<Body>,
        spoken: HttpVersion,
        version: HttpVersion,
        upstream: &'a Upstream,
        known: &'a Known,
        only: Option<SocketAddr>,
        record: &mut Record,
    ) -> Self {
        let grpc_timeout = headers::text(request.headers(), &headers::GRPC_TIMEOUT);
        let deadline = Deadline::start(known.policy.timeouts.request, grpc_timeout, None, Instant::now());
        let (head, body) = request.into_parts();
        let body = body.with_state(|| record.request_body());
        let body = Replay::new(body, known.policy.retries.body_bytes);
        let is_grpc = headers::is_grpc(&head.headers);
        Call { upstream, known, only, is_grpc, upgrade: false, head, body, spoken, version, deadline }
    }

    /// The request as this attempt sends it.
    fn request(&self, record: &Record, span: &TraceContext, now: Instant) -> Request<Body> {
        let mut request = Request::from_parts(self.head.clone(), self.body.begin());
        let head = request.headers_mut();
        record.inject(span, head);
        let timeout = self.deadline.grpc_header(headers::text(head, &headers::GRPC_TIMEOUT), now);
        if let Some(timeout) = timeout.and_then(headers::passing) {
            head.insert(headers::GRPC_TIMEOUT, timeout);
        }
        if self.known.is_mesh() && !self.upgrade {
            head.insert(headers::PROTOCOL, protocol_name(self.spoken));
            if let Some(deadline) = self.deadline.weft_header(now).and_then(headers::passing) {
                head.insert(headers::DEADLINE, deadline);
            }
        }
        request
    }

    /// Does the head of an answer speak against the endpoint? What comes after a good one may still do so.
    fn speaks_against_endpoint<B>(&self, response: &Response<B>) -> bool {
        !self.is_plain_success(response) && {
            let grpc = headers::text(response.headers(), &headers::GRPC_STATUS).map(GrpcStatus::parse);
            let label = mesh_failure(response, self.known);
            head_speaks_against_endpoint(label, response.status().as_u16(), grpc)
        }
    }

    /// A success whose other fields need no look: outside gRPC, the status says it all.
    fn is_plain_success<B>(&self, response: &Response<B>) -> bool {
        response.status().is_success() && !self.is_grpc
    }

    /// May the request be tried again? If so, its body has been taken from the attempt that was.
    fn again(&self, result: &Attempted, number: u32) -> Verdict {
        if matches!(result, Ok((response, _)) if self.is_plain_success(response)) {
            return Verdict::No { reason: Refusal::NotNeeded };
        }
        let now = Instant::now();
        let outcome = match result {
            Err(failed) => {
                Outcome::Failed { failure: failed.failed.failure, unprocessed: failed.nothing_processed }
            }
            Ok((response, _)) => match mesh_failure(response, self.known) {
                Some(failure) if failure.is_transport() => {
                    Outcome::Failed { failure, unprocessed: failure.nothing_processed() }
                }
                _ => Outcome::Answered {
                    status: response.status().as_u16(),
                    retry_after: headers::text(response.headers(), &RETRY_AFTER),
                    pushback: headers::text(response.headers(), &headers::GRPC_RETRY_PUSHBACK),
                },
            },
        };
        let attempt = retry::Attempt {
            number,
            method: self.head.method.as_str(),
            outcome,
            replayable: self.body.can_begin(),
            remaining: self.deadline.remaining(now),
        };
        let retries = &self.known.policy.retries;
        let budget = &mut self.upstream.budget();
        let verdict =
            retry::decide(retries, &attempt, budget, &mut fastrand::Rng::new(), now, SystemTime::now());
        match verdict {
            Verdict::Again { .. } if !self.body.take_back() => Verdict::No { reason: Refusal::Body },
            verdict => verdict,
        }
    }
}

/// The label that a sidecar put on an answer of its own. Nobody else is believed.
fn mesh_failure<B>(response: &Response<B>, known: &Known) -> Option<Failure> {
    let label = headers::text(response.headers(), &headers::FAILURE).filter(|_| known.is_mesh());
    label.and_then(Failure::from_label)
}

/// Tells the endpoint's state and the attempt's span how it went so far.
fn settle(call: &Call<'_>, picked: &mut Picked, record: &mut Record, result: &Attempted) {
    match result {
        Ok((response, _)) => {
            record.attempt_answered(response.status().as_u16());
            if call.is_grpc
                && let Some(status) = http::body::grpc_status(response.headers())
            {
                record.attempt_grpc_status(status);
            }
            match call.speaks_against_endpoint(response) {
                true => failed(picked, record),
                false => picked.answered(Instant::now()),
            }
        }
        Err(error) => {
            record.attempt_failed(&error.failed);
            if failure_speaks_against_endpoint(error.failed.failure) {
                failed(picked, record);
            }
        }
    }
}

/// The endpoint failed.
fn failed(picked: &mut Picked, record: &Record) {
    if let Some(ejection) = picked.failed(Instant::now()) {
        let (service, endpoint) = (record.handles().service(), ejection.address);
        record.telemetry().metrics().ejected(service);
        let lasts = humantime::format_duration(ejection.lasts);
        tracing::warn!(%service, %endpoint, %lasts, "endpoint ejected");
    }
}

/// Another attempt is made: nothing of this one is kept during the pause before it. An answer that is not read to its end
/// is judged by its head.
fn give_up(result: Attempted, mut picked: Picked) {
    if let Ok((response, _in_use)) = result {
        response.into_body().abandon();
        picked.succeeded(Instant::now());
    }
}

/// The answer has ended: now it is known whether it speaks against the endpoint. `cut`: why we cut its connection
/// meanwhile. Of an endpoint whose certificate has ended the next handshake tells.
fn judge(mut picked: Picked, ended: &Ended, cut: Option<&Failed>, record: &Record) {
    match http::end_speaks_against_endpoint(ended, record.request_body_failed().is_some()) {
        Some(false) => picked.completed(Instant::now()),
        Some(true) if cut.is_none_or(|reason| reason.failure != Failure::UntrustedPeer) => {
            failed(&mut picked, record);
        }
        Some(true) | None => {}
    }
}

/// The answer for the app; its body's end finishes the record and gives connection and endpoint back.
fn observed(answered: Answered, mut record: Record) -> Response<Body> {
    let Answered { response, in_use, picked, deadline, left_http } = answered;
    let (mut head, body) = response.into_parts();
    http::begin_answer(&mut record, &head);
    if left_http {
        headers::remove_framing(&mut head.headers);
    } else {
        headers::remove_per_hop(&mut head.headers);
    }
    if in_use.as_ref().is_some_and(|in_use| in_use.peer().is_none()) {
        // A server outside the mesh is not believed.
        headers::remove_ours(&mut head.headers);
    }
    head.version = Version::HTTP_11;
    let body = body.until(deadline).observed(move |ended| {
        http::end_answer(&mut record, ended);
        let cut = in_use.as_ref().and_then(InUse::cut);
        if let (BodyEnd::Cut(_), Some(reason)) = (&ended.how, cut) {
            record.fail(reason.clone());
        }
        if let Some(picked) = picked {
            judge(picked, ended, cut, &record);
        }
        if let (BodyEnd::Complete, Some(in_use)) = (&ended.how, in_use) {
            in_use.finished();
        }
    });
    Response::from_parts(head, body)
}

fn protocol_name(spoken: HttpVersion) -> HeaderValue {
    HeaderValue::from_static(match spoken {
        HttpVersion::Http1 => "h1",
        HttpVersion::Http2 => "h2",
    })
}

/// For a client that named no host (HTTP/1.0).
fn authority_of(upstream: &Upstream) -> Authority {
    Authority::try_from(upstream.name().as_str().replace('_', "."))
        .unwrap_or_else(|_| Authority::from_static("localhost"))
}

#[cfg(test)]
mod tests;
