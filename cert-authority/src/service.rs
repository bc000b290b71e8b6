//! The gRPC service: who asks, is it proven, what may be given, and one audit line for each answer.
//!
//! A caller proves an identity by a join token or by the certificate of the TLS connection; the answer is for
//! that identity and no other. DNS names are given by the policy of [`crate::dns_names`]. A token is used up only after everything else was found good. What the caller
//! learns of a refusal is less than what the audit says.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use futures_util::{Stream, StreamExt, stream};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::Instant,
};
use tokio_stream::wrappers::WatchStream;
use tonic::{Request, Response, Status};
use weft_proto::{
    ca::{
        Bundle, IssueRequest, IssueResponse, WatchBundleRequest,
        certificate_authority_server::CertificateAuthority,
    },
    certificate::Leaf,
    spiffe::SpiffeId,
};

use crate::{
    audit::{Audit, Line},
    authority::{Authority, Issued},
    connections::{Activity, InFlight},
    dns_names::{self, MAX_NAMES, Proof},
    kubernetes::{Attested, Cluster, Unproven, is_service_account_token},
    limit::Limit,
    metrics::Metrics,
    request,
    token::{Tokens, name_of},
};

/// Who is at the other end of a connection.
#[derive(Debug, Clone)]
pub struct Caller {
    /// From where.
    pub address: SocketAddr,
    /// The certificate that the TLS handshake has proven, where it was shown.
    pub leaf: Option<Arc<Leaf>>,
    /// What the connection is at.
    pub activity: Arc<Activity>,
}

/// How long certificates live.
#[derive(Debug, Clone, Copy)]
pub struct Lifetimes {
    /// Where the caller asks for none.
    pub default: Duration,
    /// At most.
    pub maximum: Duration,
}

/// The service and what it works with.
pub struct Service {
    /// Who signs now.
    pub authority: watch::Receiver<Arc<Authority>>,
    /// Turns true when the program stops.
    pub stopping: watch::Receiver<bool>,
    /// The join tokens.
    pub tokens: Tokens,
    /// The Kubernetes cluster whose service accounts are workloads, where there is one.
    pub cluster: Option<Cluster>,
    /// Where every decision is written.
    pub audit: Arc<Audit>,
    /// The numbers.
    pub metrics: Arc<Metrics>,
    /// How long certificates live.
    pub lifetimes: Lifetimes,
    /// Who may have DNS names in its certificate.
    pub serving_identities: Vec<SpiffeId>,
    /// Who has tried wrong tokens.
    pub guesses: Guesses,
    /// Places for streams of the trust bundle.
    pub streams: Streams,
    /// Lines of the log about certificates that could not be given.
    pub lines: Limit,
}

/// Places for streams of the trust bundle. A stream holds its connection for an hour, so strangers, who may have the
/// bundle too, get fewer of them than workloads that show their certificate, and both leave connections for those who
/// want a certificate.
pub struct Streams {
    workloads: Arc<Semaphore>,
    strangers: Arc<Semaphore>,
}

impl Streams {
    /// Half of the connections for workloads, a quarter for strangers.
    pub fn new(max_connections: usize) -> Self {
        let places = |count: usize| Arc::new(Semaphore::new(count.clamp(1, Semaphore::MAX_PERMITS)));
        Streams { workloads: places(max_connections / 2), strangers: places(max_connections / 4) }
    }

    fn enter(&self, caller: &Caller) -> Option<OwnedSemaphorePermit> {
        let places = if caller.leaf.is_some() { &self.workloads } else { &self.strangers };
        places.clone().try_acquire_owned().ok()
    }
}

/// The gRPC face of a shared [`Service`].
#[derive(Clone)]
pub struct Face(pub Arc<Service>);

/// Shorter certificates could not be renewed in time.
const MIN_LIFETIME: Duration = Duration::from_secs(5);

/// Why nothing was given. The words are for the audit.
struct Refusal {
    reason: Reason,
    detail: String,
}

/// What became of a service account's token.
enum Reviewed {
    TooManyGuesses,
    Answer(Result<Attested, Unproven>),
}

#[derive(Clone, Copy)]
enum Reason {
    BadRequest,
    NoProof,
    BadToken,
    BadCertificate,
    TooManyGuesses,
    DnsNames,
    Internal,
}

impl Reason {
    fn label(self) -> &'static str {
        match self {
            Reason::BadRequest => "bad_request",
            Reason::NoProof => "no_proof",
            Reason::BadToken => "bad_token",
            Reason::BadCertificate => "bad_certificate",
            Reason::TooManyGuesses => "too_many_guesses",
            Reason::DnsNames => "dns_names",
            Reason::Internal => "internal",
        }
    }
}

impl Refusal {
    fn new(reason: Reason, detail: impl ToString) -> Self {
        Refusal { reason, detail: detail.to_string() }
    }

    fn status(&self) -> Status {
        match self.reason {
            Reason::BadRequest => Status::invalid_argument(&self.detail),
            Reason::NoProof => Status::unauthenticated(
                "no proof of an identity: send a join token, or connect with a valid certificate",
            ),
            Reason::BadToken => {
                Status::unauthenticated("the token is unknown, used or expired; make another")
            }
            Reason::BadCertificate => Status::unauthenticated("the client certificate proves no identity"),
            Reason::TooManyGuesses => Status::resource_exhausted("too many wrong tokens; wait a minute"),
            Reason::DnsNames => Status::permission_denied(&self.detail),
            Reason::Internal => Status::internal("the authority could not sign; see its log"),
        }
    }
}

impl Service {
    /// Answers one request; blocks on files.
    fn issue(
        &self,
        caller: &Caller,
        asked: &IssueRequest,
        reviewed: Option<Reviewed>,
        now: SystemTime,
    ) -> Result<IssueResponse, Status> {
        let mut line = Line { address: Some(caller.address), proof: "none", ..Line::default() };
        let authority = self.authority.borrow().clone();
        let outcome = self.decide(&authority, caller, asked, reviewed, now, &mut line).and_then(|issued| {
            self.note_issued(&issued, &mut line, now)?;
            Ok(issued)
        });
        match outcome {
            Ok(issued) => Ok(IssueResponse {
                chain: issued.chain.iter().map(|certificate| certificate.to_vec()).collect(),
                bundle: Some(bundle(&authority)),
            }),
            Err(refusal) => {
                self.note_refused(&refusal, line, now);
                Err(refusal.status())
            }
        }
    }

    fn decide(
        &self,
        authority: &Authority,
        caller: &Caller,
        asked: &IssueRequest,
        reviewed: Option<Reviewed>,
        now: SystemTime,
        line: &mut Line,
    ) -> Result<Issued, Refusal> {
        let request =
            request::Request::parse(&asked.csr).map_err(|error| Refusal::new(Reason::BadRequest, error))?;
        line.public_key_sha256 = Some(request.fingerprint());
        line.dns_names = asked.dns_names.iter().take(MAX_NAMES).cloned().collect();
        let lifetime = self.lifetime(asked.lifetime_seconds)?;
        let is_join_token = !asked.join_token.is_empty() && reviewed.is_none();
        let proof = if reviewed.is_some() { Proof::ServiceAccount } else { Proof::Other };
        let id = if let Some(reviewed) = reviewed {
            self.prove_by_cluster(caller, &asked.join_token, reviewed, line)?
        } else if asked.join_token.is_empty() {
            self.prove_by_certificate(caller, now, line)?
        } else {
            self.prove_by_token(caller, &asked.join_token, now, line)?
        };
        line.identity = Some(id.to_string());
        let own = authority.own_id().map_err(|error| Refusal::new(Reason::Internal, error))?;
        if id == own {
            return Err(Refusal::new(Reason::BadCertificate, "nobody gets the authority's own identity"));
        }
        dns_names::check(&id, proof, &asked.dns_names, &self.serving_identities)
            .map_err(|why| Refusal::new(Reason::DnsNames, why))?;
        let internal = |error: anyhow::Error| Refusal::new(Reason::Internal, format!("{error:#}"));
        let issued = authority.sign(&request, &id, &asked.dns_names, lifetime, now).map_err(internal)?;
        self.audit.check(now).map_err(internal)?;
        if is_join_token {
            self.use_up(&asked.join_token, now)?;
        }
        Ok(issued)
    }

    fn lifetime(&self, seconds: u32) -> Result<Duration, Refusal> {
        match Duration::from_secs(seconds.into()) {
            Duration::ZERO => Ok(self.lifetimes.default),
            short if short < MIN_LIFETIME => Err(Refusal::new(
                Reason::BadRequest,
                format!("a lifetime of {seconds} s cannot be renewed in time; ask for 5 s or more"),
            )),
            asked => Ok(asked.min(self.lifetimes.maximum)),
        }
    }

    fn prove_by_certificate(
        &self,
        caller: &Caller,
        now: SystemTime,
        line: &mut Line,
    ) -> Result<SpiffeId, Refusal> {
        let Some(leaf) = &caller.leaf else {
            return Err(Refusal::new(Reason::NoProof, "neither a token nor a client certificate"));
        };
        line.proof = "certificate";
        line.identity = Some(leaf.id.to_string());
        line.proof_serial = Some(leaf.serial.clone());
        // The handshake may have been a while ago.
        if leaf.not_after <= now {
            return Err(Refusal::new(Reason::BadCertificate, "the client certificate has expired since"));
        }
        if leaf.id.trust_domain() != self.authority.borrow().trust_domain().as_str() {
            return Err(Refusal::new(Reason::BadCertificate, "it is of another trust domain"));
        }
        Ok(leaf.id.clone())
    }

    fn prove_by_token(
        &self,
        caller: &Caller,
        text: &str,
        now: SystemTime,
        line: &mut Line,
    ) -> Result<SpiffeId, Refusal> {
        line.proof = "token";
        line.token = Some(name_of(text));
        let from = caller.address.ip();
        match self.tokens.check(text, now) {
            // A good token always passes: whoever shares an address with a guesser must not be locked out.
            Ok(Ok(token)) => Ok(token.identity),
            Ok(Err(_)) if self.guesses.too_many(from) => {
                Err(Refusal::new(Reason::TooManyGuesses, "this address sent too many wrong tokens"))
            }
            Ok(Err(invalid)) => {
                self.guesses.note(from);
                Err(Refusal::new(Reason::BadToken, format!("the token is {invalid}")))
            }
            Err(error) => Err(Refusal::new(Reason::Internal, format!("{error:#}"))),
        }
    }

    fn prove_by_cluster(
        &self,
        caller: &Caller,
        text: &str,
        reviewed: Reviewed,
        line: &mut Line,
    ) -> Result<SpiffeId, Refusal> {
        line.proof = "service_account";
        line.token = Some(name_of(text));
        match reviewed {
            Reviewed::TooManyGuesses => {
                Err(Refusal::new(Reason::TooManyGuesses, "this address sent too many wrong tokens"))
            }
            Reviewed::Answer(Ok(attested)) => {
                line.pod = attested.pod;
                Ok(attested.id)
            }
            Reviewed::Answer(Err(Unproven::Refused(why))) => {
                self.guesses.note(caller.address.ip());
                Err(Refusal::new(Reason::BadToken, why))
            }
            Reviewed::Answer(Err(Unproven::Unknown(why))) => Err(Refusal::new(Reason::Internal, why)),
        }
    }

    /// What the cluster says of a token of its own; none where it is not asked.
    async fn review(&self, caller: &Caller, token: &str) -> Option<Reviewed> {
        let cluster = self.cluster.as_ref().filter(|_| is_service_account_token(token))?;
        // The cluster is not asked on behalf of somebody who guesses.
        if self.guesses.too_many(caller.address.ip()) {
            return Some(Reviewed::TooManyGuesses);
        }
        Some(Reviewed::Answer(cluster.review(token).await))
    }

    fn use_up(&self, text: &str, now: SystemTime) -> Result<(), Refusal> {
        let used = self.tokens.check(text, now).and_then(|checked| match checked {
            Ok(token) => self.tokens.consume(text, &token),
            Err(invalid) => Ok(Err(invalid)),
        });
        match used {
            Ok(Ok(())) => Ok(()),
            Ok(Err(invalid)) => Err(Refusal::new(Reason::BadToken, format!("the token is {invalid}"))),
            Err(error) => Err(Refusal::new(Reason::Internal, format!("{error:#}"))),
        }
    }

    /// Fails where the audit cannot be written: then nothing is given.
    fn note_issued(&self, issued: &Issued, line: &mut Line, now: SystemTime) -> Result<(), Refusal> {
        let time = |at| Some(humantime::format_rfc3339_seconds(at).to_string());
        let mut line = std::mem::take(line);
        let label = line.proof;
        line.event = "issued";
        line.serial = Some(issued.leaf.serial.clone());
        line.not_before = time(issued.leaf.not_before);
        line.not_after = time(issued.leaf.not_after);
        self.audit.write(line, now).map_err(|error| Refusal::new(Reason::Internal, format!("{error:#}")))?;
        self.metrics.issued.get_or_create(&[("proof", label)]).inc();
        Ok(())
    }

    /// While the audit has stalled: whoever is refused so holds no thread that waits to write of it.
    fn refuse_unwritten(&self) -> Refusal {
        let refusal = Refusal::new(Reason::Internal, "the audit is not taken; whoever reads it has stalled");
        let label = refusal.reason.label();
        self.metrics.refused.get_or_create(&[("reason", label)]).inc();
        self.audit.leave_out(label);
        refusal
    }

    fn note_refused(&self, refusal: &Refusal, mut line: Line, now: SystemTime) {
        let label = refusal.reason.label();
        self.metrics.refused.get_or_create(&[("reason", label)]).inc();
        line.event = "refused";
        line.reason = Some(label);
        line.detail = Some(refusal.detail.clone());
        if let Reason::Internal = refusal.reason
            && let Some(left_out) = self.lines.take()
        {
            tracing::error!(detail = refusal.detail, left_out, "a certificate could not be given");
        }
        // Where it cannot be written it is counted, and the audit has said so.
        let _ = self.audit.refused(line, now);
    }
}

#[tonic::async_trait]
impl CertificateAuthority for Face {
    async fn issue(&self, request: Request<IssueRequest>) -> Result<Response<IssueResponse>, Status> {
        let Some(caller) = request.extensions().get::<Caller>().cloned() else {
            return Err(Status::internal("the connection is unknown"));
        };
        let _in_flight = caller.activity.begin();
        let service = self.0.clone();
        if service.audit.has_stalled() {
            return Err(service.refuse_unwritten().status());
        }
        let began = Instant::now();
        let reviewed = service.review(&caller, &request.get_ref().join_token).await;
        let work = tokio::task::spawn_blocking(move || {
            service.issue(&caller, request.get_ref(), reviewed, SystemTime::now())
        });
        let answer = work.await.map_err(|_| Status::internal("the authority failed; see its log"))?;
        self.0.metrics.issue_seconds.observe(began.elapsed().as_secs_f64());
        answer.map(Response::new)
    }

    type WatchBundleStream = Pin<Box<dyn Stream<Item = Result<Bundle, Status>> + Send>>;

    async fn watch_bundle(
        &self,
        request: Request<WatchBundleRequest>,
    ) -> Result<Response<Self::WatchBundleStream>, Status> {
        let Some(caller) = request.extensions().get::<Caller>() else {
            return Err(Status::internal("the connection is unknown"));
        };
        let Some(place) = self.0.streams.enter(caller) else {
            return Err(Status::resource_exhausted("too many streams of the trust bundle; try again later"));
        };
        let watcher = Watcher::new(self.0.metrics.clone(), caller.activity.begin(), place);
        let mut last = None;
        let changes = WatchStream::new(self.0.authority.clone()).filter_map(move |authority| {
            let _counted = &watcher;
            let now = bundle(&authority);
            let changed = last.as_ref() != Some(&now);
            last = Some(now.clone());
            futures_util::future::ready(changed.then_some(Ok(now)))
        });
        let mut stopping = self.0.stopping.clone();
        let stopped = async move {
            let _ = stopping.wait_for(|stopping| *stopping).await;
        };
        let last_words = stream::once(async { Err(Status::unavailable("the authority is stopping")) });
        Ok(Response::new(Box::pin(changes.take_until(Box::pin(stopped)).chain(last_words))))
    }
}

fn bundle(authority: &Authority) -> Bundle {
    Bundle {
        trust_domain: authority.trust_domain().to_string(),
        roots: authority.roots().iter().map(|root| root.to_vec()).collect(),
    }
}

/// Counts one stream of the bundle while it lives.
struct Watcher {
    metrics: Arc<Metrics>,
    _in_flight: InFlight,
    _place: OwnedSemaphorePermit,
}

impl Watcher {
    fn new(metrics: Arc<Metrics>, in_flight: InFlight, place: OwnedSemaphorePermit) -> Self {
        metrics.watchers.inc();
        Watcher { metrics, _in_flight: in_flight, _place: place }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.metrics.watchers.dec();
    }
}

/// Wrong tokens by address. 256 bits are not guessed; whoever tries is told to wait.
#[derive(Default)]
pub struct Guesses(Mutex<HashMap<IpAddr, (Instant, u32)>>);

/// Wrong tokens that an address may send in a window.
const GUESSES: u32 = 30;
const WINDOW: Duration = Duration::from_secs(60);
/// Addresses remembered; when there are more, all are forgotten and counted afresh.
const ADDRESSES: usize = 4096;

impl Guesses {
    fn too_many(&self, address: IpAddr) -> bool {
        let table = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        table.get(&address).is_some_and(|(began, count)| began.elapsed() < WINDOW && *count >= GUESSES)
    }

    fn note(&self, address: IpAddr) {
        let mut table = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if table.len() >= ADDRESSES && !table.contains_key(&address) {
            table.clear();
        }
        let entry = table.entry(address).or_insert_with(|| (Instant::now(), 0));
        if entry.0.elapsed() >= WINDOW {
            *entry = (Instant::now(), 0);
        }
        entry.1 += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn wrong_tokens_are_limited_by_address_and_forgiven() {
        let guesses = Guesses::default();
        let (one, other) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        for _ in 0..GUESSES {
            assert!(!guesses.too_many(one));
            guesses.note(one);
        }
        assert!(guesses.too_many(one) && !guesses.too_many(other));
        tokio::time::advance(WINDOW).await;
        assert!(!guesses.too_many(one));
        guesses.note(one);
        assert!(!guesses.too_many(one), "the count began afresh");
    }
}
