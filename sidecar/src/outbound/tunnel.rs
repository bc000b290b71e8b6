//! Bytes that are not HTTP: a connection of their own to an endpoint, or to an address outside the mesh.
//!
//! Another endpoint is tried as long as it is proven that the app of the first one has seen nothing: its sidecar says
//! so, or nothing of the client's bytes was passed on. The same decision, budget, pauses and deadline as for requests.

use std::{
    future::Future,
    io,
    net::SocketAddr,
    pin::pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::{BufMut, BytesMut};
use futures_util::future::Either;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::{Instant, sleep, timeout_at},
};

use super::{Known, Outbound, Target, Upstream, client_broke, request::no_answer};
use crate::{
    balance::{Ejection, Picked},
    connect::{self, Security, trust_in_bytes_ended, trust_is_over},
    detect::{self, Heard},
    model::{Failed, Failure, Result},
    net::{self, BrokenSide, Stream},
    policy::{
        deadline::Deadline,
        response::failure_speaks_against_endpoint,
        retry::{self, Outcome, Verdict},
    },
    telemetry::Connection,
    tls::{self, Alpn, VerifiedPeer},
};

/// Longest wait for an address outside the mesh.
const OUTSIDE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for an endpoint and its app to take a connection: the sidecar there waits for its app too.
const OPENING_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of a client that are passed on, and kept, before it is known whether the app has taken the connection. More than
/// what is on the way in the first round trip; the rest waits in the client's socket.
const KEPT: usize = 64 * 1024;
/// Bytes read at a time meanwhile.
const READ: usize = 4096;

/// An open connection to a server, for one client.
pub(super) struct Tunnel {
    stream: Stream,
    peer: Option<VerifiedPeer>,
    /// Bytes of the client that were passed on already.
    passed: u64,
    /// None for an upgraded connection, whose endpoint was judged by its answer.
    judged: Option<Judged>,
}

/// The endpoint of a tunnel, which counts as load there while it is open.
struct Judged {
    upstream: Arc<Upstream>,
    picked: Picked,
    has_spoken: bool,
}

/// A client while its tunnel is opened.
pub(super) struct Waiting<'a> {
    stream: &'a mut Stream,
    /// It has said nothing, and what it says first decides what it speaks.
    silent: bool,
    /// What it spoke when it no longer was silent.
    pub(super) heard: Option<Heard>,
    /// It has shut down its side.
    ended: bool,
    /// Bytes of it were passed on in this attempt.
    passed_on: bool,
}

/// Why an attempt has opened no tunnel.
enum Unopened {
    /// The client speaks HTTP: it needs none.
    Http,
    Failed {
        failed: Failed,
        /// It is proven that the app has seen nothing.
        unprocessed: bool,
    },
}

/// The server's side of an attempt that succeeded.
struct Opened {
    stream: Stream,
    peer: Option<VerifiedPeer>,
    passed: u64,
}

impl From<Failed> for Unopened {
    fn from(failed: Failed) -> Self {
        Unopened::Failed { unprocessed: failed.failure.nothing_processed(), failed }
    }
}

impl Outbound {
    /// Passes a connection to an address outside the mesh through untouched.
    pub(super) async fn pass_through(
        &self,
        stream: Stream,
        address: SocketAddr,
        record: &Connection,
    ) -> Result<()> {
        let server = self.connector.connect(address, &Security::Plain, Alpn::Tcp, OUTSIDE_TIMEOUT).await;
        // A failure is told as the app would have seen it.
        let secured = server.inspect_err(|_| net::reset(&stream))?;
        self.copy(Tunnel::of(secured.stream, None), stream, record).await
    }

    /// Connects to an endpoint of the target, and passes on what the client says meanwhile; none where that is HTTP.
    pub(super) async fn open_tunnel(
        &self,
        target: &Target,
        client: &mut Waiting<'_>,
        record: &mut Connection,
    ) -> Result<Option<Tunnel>> {
        let (upstream, only) = match target {
            Target::Service(upstream) => (upstream, None),
            Target::Endpoint(upstream, endpoint) => (upstream, Some(endpoint.address)),
            // Passed through before anybody reads it.
            Target::Outside(_) => return Err(Failed::new(Failure::Internal, "a tunnel to no service")),
        };
        let known = upstream.known();
        let policy = &known.policy;
        let deadline = Deadline::start(policy.timeouts.request, None, None, Instant::now());
        upstream.budget().deposit(&policy.retries.budget, Instant::now());
        let (mut tried, mut why) = (Vec::new(), None);
        loop {
            let mut picked = upstream.pick(only, &tried, Instant::now())?;
            let address = picked.address();
            record.endpoint(address);
            // Whom the attempt before has met.
            record.peer(None);
            upstream.metrics.attempt(why);
            let (failed, unprocessed) = match self
                .attempt_tunnel(address, &known, &deadline, client, record)
                .await
            {
                Ok(Opened { stream, peer, passed }) => {
                    // That the connection stands is the latency of the endpoint, and no success yet.
                    picked.answered(Instant::now());
                    let mut judged = Judged { upstream: upstream.clone(), picked, has_spoken: false };
                    let Some(first) = client.first_word(stream, peer.as_ref(), self).await? else {
                        return Ok(None);
                    };
                    match first {
                        Ok(stream) => return Ok(Some(Tunnel { stream, peer, passed, judged: Some(judged) })),
                        Err(failed) => {
                            self.speak_against(&mut judged);
                            (failed, true)
                        }
                    }
                }
                Err(Unopened::Http) => return Ok(None),
                Err(Unopened::Failed { failed, unprocessed }) => {
                    if failure_speaks_against_endpoint(failed.failure) {
                        self.eject(upstream, picked.failed(Instant::now()));
                    }
                    // No load during the pause.
                    drop(picked);
                    (failed, unprocessed)
                }
            };
            if only.is_some() {
                return Err(failed);
            }
            match again(upstream, &known, &failed, unprocessed, tried.len() as u32 + 1, &deadline) {
                Verdict::Again { reason, after } => {
                    tracing::debug!(%failed, "another endpoint is tried");
                    tried.push(address);
                    why = Some(reason.label());
                    sleep(after).await;
                }
                Verdict::No { reason } => {
                    upstream.metrics.retry_refused(reason.label());
                    return Err(failed);
                }
            }
        }
    }

    /// One attempt, within the times of the policy.
    async fn attempt_tunnel(
        &self,
        address: SocketAddr,
        known: &Known,
        deadline: &Deadline,
        client: &mut Waiting<'_>,
        record: &mut Connection,
    ) -> std::result::Result<Opened, Unopened> {
        let started = Instant::now();
        let by_policy = deadline.attempt(known.policy.timeouts.attempt, started);
        let longest = started + OPENING_TIMEOUT;
        client.begin_attempt();
        let at = by_policy.map_or(longest, |at| at.min(longest));
        let opening = async {
            let (mut stream, peer) = client.unless_http(self.connect(address, known)).await??;
            record.peer(peer.as_ref().map(VerifiedPeer::id));
            let passed = match connect::is_confirmed(&stream) {
                true => client.until_taken(&mut stream, address).await?,
                false => 0,
            };
            Ok(Opened { stream, peer, passed })
        };
        let opened = timeout_at(at, opening).await;
        opened.unwrap_or_else(|_| Err(client.timed_out(no_answer(deadline, at, address, started))))
    }

    async fn connect(&self, address: SocketAddr, known: &Known) -> Result<(Stream, Option<VerifiedPeer>)> {
        if let Some(arrival) = self.own_arrival(address) {
            return Ok((self.inbound.connect_own(&arrival).await?, None));
        }
        let limit = known.policy.timeouts.connect;
        let secured = self.connector.connect(address, &known.security, Alpn::ConfirmedTcp, limit).await?;
        Ok((secured.stream, secured.peer))
    }

    /// Copies both ways until both sides have ended, or the trust in the peer has. The endpoint is judged by its first
    /// byte, or by an end without one.
    pub(super) async fn copy(&self, tunnel: Tunnel, client: Stream, record: &Connection) -> Result<()> {
        let Tunnel { stream, peer, passed, mut judged } = tunnel;
        if passed > 0 {
            record.sent(passed);
        }
        let ended = {
            let received = |count| {
                record.received(count);
                if let Some(judged) = &mut judged {
                    judged.has_spoken();
                }
            };
            let copying = net::copy_both_ways(client, stream, |count| record.sent(count), received);
            tokio::select! {
                ended = copying => ended,
                over = self.trust_over(peer.as_ref()) => return Err(over),
            }
        };
        if let Some(judged) = &mut judged {
            match ended.as_ref().map_err(|broken| broken.side) {
                // After the client's end too: the endpoint has given nothing.
                Ok(Some(BrokenSide::Second)) | Err(BrokenSide::Second) if !judged.has_spoken => {
                    self.speak_against(judged);
                }
                // The client has gone: nothing is known of the endpoint.
                Err(BrokenSide::First) => {}
                _ => judged.has_spoken(),
            }
        }
        match ended {
            Ok(_) => Ok(()),
            Err(broken) if broken.side == BrokenSide::First => Err(client_broke(&broken.error)),
            Err(broken) => Err(Failed::new(Failure::Reset, broken.error.to_string())),
        }
    }

    /// Resolves when bytes may no longer be carried to and from this peer.
    async fn trust_over(&self, peer: Option<&VerifiedPeer>) -> Failed {
        let Some(peer) = peer else { return std::future::pending().await };
        trust_in_bytes_ended(peer, self.connector.credentials().clone(), self.connector.expired_peers())
            .await;
        trust_is_over(peer)
    }

    fn speak_against(&self, judged: &mut Judged) {
        let ejection = judged.picked.failed(Instant::now());
        self.eject(&judged.upstream, ejection);
    }

    /// Tells of an endpoint that was put out.
    fn eject(&self, upstream: &Upstream, ejection: Option<Ejection>) {
        if let Some(ejection) = ejection {
            self.telemetry.metrics().ejected(upstream.name().as_str());
            let lasts = humantime::format_duration(ejection.lasts);
            tracing::warn!(service = %upstream.name(), endpoint = %ejection.address, %lasts, "endpoint ejected");
        }
    }
}

impl Tunnel {
    /// To a server that no balancer has chosen, or whose answer was judged before.
    pub(super) fn of(stream: Stream, peer: Option<VerifiedPeer>) -> Tunnel {
        Tunnel { stream, peer, passed: 0, judged: None }
    }
}

impl Judged {
    /// The server has said something, or has ended without a fault.
    fn has_spoken(&mut self) {
        if !self.has_spoken {
            self.has_spoken = true;
            self.picked.succeeded(Instant::now());
        }
    }
}

impl<'a> Waiting<'a> {
    /// A client that has said nothing.
    pub(super) fn silent(stream: &'a mut Stream) -> Self {
        Waiting { stream, silent: true, heard: None, ended: false, passed_on: false }
    }

    /// A client that may say what it likes: it is known what it speaks.
    pub(super) fn known(stream: &'a mut Stream) -> Self {
        Waiting { stream, silent: false, heard: None, ended: false, passed_on: false }
    }

    /// The attempt before has left nothing behind: its end is met again, and what it said is read once more.
    fn begin_attempt(&mut self) {
        (self.ended, self.passed_on) = (false, false);
    }

    /// An attempt took too long. The app has seen nothing if nothing was passed on.
    fn timed_out(&self, failed: Failed) -> Unopened {
        Unopened::Failed { failed, unprocessed: !self.passed_on }
    }

    /// A silent client has spoken.
    fn spoke(&mut self, ahead: io::Result<detect::ReadAhead>) -> std::result::Result<(), Unopened> {
        let heard = ahead.map_err(|error| client_broke(&error))?.heard;
        (self.silent, self.heard) = (false, Some(heard));
        if heard.is_http() { Err(Unopened::Http) } else { Ok(()) }
    }

    /// Waits for something, unless the client speaks HTTP meanwhile. What it says is still to be read.
    async fn unless_http<T>(&mut self, waiting: impl Future<Output = T>) -> std::result::Result<T, Unopened> {
        let mut waiting = pin!(waiting);
        loop {
            tokio::select! {
                biased;
                ahead = detect::client_speaks(self.stream), if self.silent => self.spoke(ahead)?,
                done = waiting.as_mut() => return Ok(done),
            }
        }
    }

    /// Passes on what the client says until the server's sidecar has told whether the app has taken the connection. If it
    /// has not, all of it is to be read once more.
    async fn until_taken(
        &mut self,
        server: &mut Stream,
        address: SocketAddr,
    ) -> std::result::Result<u64, Unopened> {
        let mut kept = BytesMut::new();
        let mut broken = false;
        let taken = loop {
            let room = KEPT - kept.len();
            let passed = kept.len();
            tokio::select! {
                biased;
                taken = connect::app_has_taken(server) => break taken,
                said = next_of(self.stream, self.silent, &mut kept, room), if !self.ended && !broken && room > 0 => {
                    match said {
                        Either::Left(ahead) => self.spoke(ahead)?,
                        // An error of writing is looked at when the server's word has come, or has not.
                        Either::Right(Ok(0)) => {
                            self.ended = true;
                            broken = server.shutdown().await.is_err();
                        }
                        Either::Right(Ok(_)) => {
                            self.passed_on = true;
                            broken = pass_on(server, &kept[passed..]).await.is_err();
                        }
                        Either::Right(Err(error)) => return Err(client_broke(&error).into()),
                    }
                }
            }
        };
        let failed = match taken {
            Ok(true) => return Ok(kept.len() as u64),
            Ok(false) => {
                let detail = format!("{address}: its sidecar says that the app takes no connection");
                Unopened::Failed { failed: Failed::new(Failure::AppRefused, detail), unprocessed: true }
            }
            Err(error) => not_confirmed(address, &error, self.passed_on),
        };
        if !kept.is_empty() {
            self.stream.unread(kept.freeze());
        }
        Err(failed)
    }

    /// Where the client is still silent, waits for whoever speaks first; an error is the server's, and nothing of the
    /// client's was passed on. None where the client speaks HTTP.
    async fn first_word(
        &mut self,
        mut server: Stream,
        peer: Option<&VerifiedPeer>,
        outbound: &Outbound,
    ) -> Result<Option<Result<Stream>>> {
        if !self.silent {
            return Ok(Some(Ok(server)));
        }
        tokio::select! {
            biased;
            ahead = detect::client_speaks(self.stream) => match self.spoke(ahead) {
                Ok(()) => Ok(Some(Ok(server))),
                Err(Unopened::Http) => Ok(None),
                Err(Unopened::Failed { failed, .. }) => Err(failed),
            },
            spoke = detect::server_speaks(&mut server) => {
                let broke = |error: io::Error| Failed::new(Failure::Reset, error.to_string());
                Ok(Some(spoke.map(|()| server).map_err(broke)))
            }
            over = outbound.trust_over(peer) => Err(over),
        }
    }
}

/// The server's side ended before the word of its sidecar. TLS 1.3: its verdict on our certificate comes after we thought
/// the handshake done, and whoever refuses it reads nothing of what was passed on.
fn not_confirmed(address: SocketAddr, error: &io::Error, passed_on: bool) -> Unopened {
    let refused = tls::refused_by_peer(error);
    let (failure, why) = match refused {
        true => (Failure::Handshake, "it refuses our certificate: "),
        false => (Failure::Reset, ""),
    };
    let failed = Failed::new(failure, format!("{address}: {why}{error}"));
    Unopened::Failed { failed, unprocessed: refused || !passed_on }
}

/// What a client does next: a silent one begins to speak, of another one some bytes are read. Cancel safe.
async fn next_of(
    client: &mut Stream,
    silent: bool,
    into: &mut BytesMut,
    most: usize,
) -> Either<io::Result<detect::ReadAhead>, io::Result<usize>> {
    if silent {
        return Either::Left(detect::client_speaks(client).await);
    }
    into.reserve(most.min(READ));
    Either::Right(client.read_buf(&mut into.limit(most)).await)
}

async fn pass_on(to: &mut Stream, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes).await?;
    to.flush().await
}

/// May another endpoint be tried?
fn again(
    upstream: &Upstream,
    known: &Known,
    failed: &Failed,
    unprocessed: bool,
    number: u32,
    deadline: &Deadline,
) -> Verdict {
    let now = Instant::now();
    let attempt = retry::Attempt {
        number,
        // Bytes have no method that might be repeated.
        method: "",
        outcome: Outcome::Failed { failure: failed.failure, unprocessed },
        replayable: true,
        remaining: deadline.remaining(now),
    };
    let (policy, budget) = (&known.policy.retries, &mut upstream.budget());
    retry::decide(policy, &attempt, budget, &mut fastrand::Rng::new(), now, SystemTime::now())
}

#[cfg(test)]
mod tests;
