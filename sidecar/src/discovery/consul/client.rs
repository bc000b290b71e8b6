//! The client of Consul's HTTP API (version 1): questions with a time limit and a bound, answers with their
//! index. Several agents are tried in turn, from the one that answered last. It does not wait between attempts:
//! whoever asks knows how long.

use std::{
    fmt,
    net::IpAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    HeaderMap, Method, Request,
    header::{DATE, HOST, HeaderName, HeaderValue, USER_AGENT},
};
use tokio::{sync::Semaphore, time::timeout};

use super::{
    agent::{Agent, PROTOCOLS},
    error::{Error, Kind},
    loss::Waits,
    token::Token,
};
use crate::{
    config::{Consul, ConsulAddress, ConsulTls},
    telemetry::Metrics,
    tls::registry_client,
};

/// Blocking queries for services at a time over plain HTTP, each with a connection of its own; policies have one
/// more, which makes 32.
const PLAIN_SLOTS: usize = 31;
/// The same towards an agent on loopback, whose bound of connections all sidecars of the host share.
const LOOPBACK_SLOTS: usize = 11;
/// HTTP/1 connections beside the blocking queries for services: one for policies, the others for what is answered
/// at once.
const BESIDE: usize = 5;
/// The same on one HTTP/2 connection: fewer than the 250 streams that Consul takes.
const TLS_SLOTS: usize = 200;

/// What a blocking query may take beyond its wait: Consul adds up to a sixteenth of its own.
const BEYOND: Duration = Duration::from_secs(10);
/// Longest wait for an answer that waits for no change.
const AT_ONCE: Duration = Duration::from_secs(10);

const TOKEN: HeaderName = HeaderName::from_static("x-consul-token");
const INDEX: &str = "x-consul-index";
/// Since Consul 1.11.
const FILTERED: &str = "x-consul-results-filtered-by-acls";

/// Asks Consul.
pub struct Client {
    agents: Vec<Agent>,
    /// The one that answered last.
    current: AtomicUsize,
    token: Token,
    /// Places for blocking queries.
    pub(super) slots: Arc<Semaphore>,
    /// The blocking queries of now.
    pub(super) waits: Waits,
    /// Services that are watched.
    pub(super) watches: AtomicUsize,
    pub(super) metrics: Arc<Metrics>,
}

/// A question.
pub(super) struct Question<'a> {
    pub(super) method: Method,
    /// Path and query.
    pub(super) path: String,
    pub(super) body: Bytes,
    /// For all of it.
    pub(super) patience: Duration,
    /// The longest answer.
    pub(super) most: usize,
    /// Without our token.
    pub(super) is_anonymous: bool,
    /// What an ACL must allow, for the error.
    pub(super) permission: &'a str,
    /// None: the answer comes at once.
    pub(super) waiting: Option<Waiting>,
}

/// How a question waits for a change.
pub(super) struct Waiting {
    /// What is added to its path.
    added: String,
    /// From where in the history; it waits only there.
    place: Place,
    /// The same question for its index alone, as the leader knows it.
    check: String,
}

/// A place in the history of what was asked: the index of an answer, and by whom it was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// Above 0.
    pub(super) index: u64,
    /// The agent.
    agent: usize,
    /// Since its connections last broke.
    term: u64,
}

/// An answer with status 200.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answer {
    /// From `X-Consul-Index`, where it can be used.
    pub(super) place: Option<Place>,
    /// Consul says that an ACL hid something.
    pub(super) is_filtered: bool,
    /// The `Date` of the answer.
    pub(super) date: Option<String>,
    pub(super) body: Bytes,
}

impl Place {
    #[cfg(test)]
    pub(super) fn of(index: u64) -> Self {
        Place { index, agent: 0, term: 0 }
    }

    /// Does the same agent say a lower index here?
    pub(super) fn is_before(self, other: Place) -> bool {
        self.agent == other.agent && self.index < other.index
    }

    /// Was it given by the same agent, and no connection to it broke in between?
    pub(super) fn follows(self, before: Place) -> bool {
        (self.agent, self.term) == (before.agent, before.term)
    }
}

impl<'a> Question<'a> {
    /// A reading question whose answer comes at once.
    pub(super) fn get(path: String, permission: &'a str) -> Self {
        Question {
            method: Method::GET,
            path,
            body: Bytes::new(),
            patience: AT_ONCE,
            most: 1024 * 1024,
            is_anonymous: false,
            permission,
            waiting: None,
        }
    }

    /// The same question, as one that waits for a change after this place. `check` has the same index, no `stale`,
    /// and an answer that is as short as can be.
    pub(super) fn waiting(mut self, place: Place, wait: Duration, check: String) -> Self {
        let added = format!("&index={}&wait={}s", place.index, wait.as_secs().max(1));
        self.waiting = Some(Waiting { added, place, check });
        self.patience = wait + wait / 16 + BEYOND;
        self
    }

    /// A question that changes something.
    pub(super) fn put(path: String, body: impl Into<Bytes>, permission: &'a str) -> Self {
        Question { method: Method::PUT, body: body.into(), ..Question::get(path, permission) }
    }
}

impl Client {
    /// Makes a client; nothing is sent yet.
    ///
    /// # Errors
    /// The file for TLS that cannot be used.
    pub fn new(settings: &Consul, metrics: Arc<Metrics>) -> Result<Arc<Client>, String> {
        let ConsulTls { ca_file, client, server_name, verify } = &settings.tls;
        let has_tls = settings.addresses.iter().any(ConsulAddress::has_tls);
        let tls = if has_tls {
            let client = client.as_ref().map(|(certificate, key)| (Path::new(certificate), Path::new(key)));
            if !verify {
                tracing::warn!("Consul's certificate is not checked (consul-verify is false)");
            }
            Some(registry_client(ca_file.as_deref(), client, *verify, &PROTOCOLS)?)
        } else {
            None
        };
        let agent = |address: &ConsulAddress| {
            let tls = match address {
                ConsulAddress::Tcp { tls: true, host, .. } => {
                    tls.clone().map(|config| (config, server_name.clone().unwrap_or_else(|| host.clone())))
                }
                ConsulAddress::Tcp { .. } | ConsulAddress::Unix(_) => None,
            };
            // The blocking queries, one for policies, and a few that are answered at once.
            Agent::new(address.clone(), tls, slots(address).min(PLAIN_SLOTS) + BESIDE)
        };
        let slots = settings.addresses.iter().map(slots);
        Ok(Arc::new(Client {
            agents: settings.addresses.iter().map(agent).collect(),
            current: AtomicUsize::new(0),
            token: Token::new(settings.token.clone()),
            slots: Arc::new(Semaphore::new(slots.min().unwrap_or(LOOPBACK_SLOTS))),
            waits: Waits::default(),
            watches: AtomicUsize::new(0),
            metrics,
        }))
    }

    /// The agent that is asked first now, for the log.
    pub fn shown(&self) -> String {
        self.agents.get(self.current.load(Ordering::Relaxed)).map(Agent::shown).unwrap_or_default()
    }

    /// The agent of this place has no such history any more.
    pub(super) fn begin_term(&self, place: Place) {
        if let Some(agent) = self.agents.get(place.agent) {
            agent.begin_term();
        }
    }

    /// Asks the agents in turn until one can answer.
    pub(super) async fn ask(&self, question: &Question<'_>) -> Result<Answer, Error> {
        let result = self.ask_in_turn(question).await;
        self.metrics.registry_request(result.as_ref().map_or_else(|error| error.kind.label(), |_| "ok"));
        result
    }

    /// How many agents there are.
    pub(super) fn agents(&self) -> usize {
        self.agents.len()
    }

    /// The one that is asked first now.
    pub(super) fn current(&self) -> usize {
        self.current.load(Ordering::Relaxed)
    }

    /// Asks one agent and no other.
    pub(super) async fn ask_at(&self, at: usize, question: &Question<'_>) -> Result<Answer, Error> {
        let result = self.ask_one(at, question).await.map_err(|error| self.of_agent(at, error));
        self.metrics.registry_request(result.as_ref().map_or_else(|error| error.kind.label(), |_| "ok"));
        result
    }

    fn of_agent(&self, at: usize, error: Error) -> Error {
        Error { text: format!("Consul at {}: {}", self.agents[at].shown(), error.text), ..error }
    }

    async fn ask_in_turn(&self, question: &Question<'_>) -> Result<Answer, Error> {
        let first = self.current.load(Ordering::Relaxed);
        let mut last = Error::new(Kind::Unreachable, "no agent is set");
        for turn in 0..self.agents.len() {
            let at = (first + turn) % self.agents.len();
            match self.ask_one(at, question).await {
                Ok(answer) => {
                    self.current.store(at, Ordering::Relaxed);
                    return Ok(answer);
                }
                Err(error) => {
                    let is_of_the_agent = error.kind.is_of_the_agent();
                    last = self.of_agent(at, error);
                    if is_of_the_agent {
                        self.current.store((at + 1) % self.agents.len(), Ordering::Relaxed);
                    }
                    if !is_of_the_agent || question.waiting.is_some() {
                        break;
                    }
                }
            }
        }
        Err(last)
    }

    async fn ask_one(&self, at: usize, question: &Question<'_>) -> Result<Answer, Error> {
        let agent = &self.agents[at];
        let waiting = question.waiting.as_ref().filter(|waiting| waiting.place.agent == at);
        let open = waiting.map(|waiting| self.waits.open(&waiting.check, waiting.place));
        let lost = async {
            match &open {
                Some(open) => open.ended().await,
                None => std::future::pending().await,
            }
        };
        let asking = async {
            let request = match waiting {
                Some(Waiting { added, place, .. }) => {
                    Some((self.request(agent, question, added)?, place.term))
                }
                None => None,
            };
            let waiting = request.as_ref().map(|(request, term)| (request, *term));
            agent.ask(&self.request(agent, question, "")?, waiting, question.most).await
        };
        // Only where the index is of this agent's history does it wait for a change.
        let may_wait = waiting.is_some_and(|waiting| waiting.place.term == agent.term());
        let patience = if may_wait { question.patience } else { question.patience.min(AT_ONCE) };
        let said = tokio::select! {
            said = timeout(patience, asking) => said.unwrap_or_else(|_| {
                if !may_wait {
                    agent.forget_connections();
                }
                let text = format!("no answer within {}", humantime::format_duration(patience));
                Err(Error::new(Kind::Unreachable, text))
            })?,
            () = lost => {
                return Err(Error::new(Kind::WentBack, "its index went back; it is asked anew"));
            }
        };
        let is_filtered = said.head.headers.get(FILTERED).is_some_and(|value| value == "true");
        let place = index(&said.head.headers).map(|index| Place { index, agent: at, term: said.term });
        if !said.head.status.is_success() {
            let mut error = Error::of_status(said.head.status, &said.body, question.permission);
            // An empty part of the KV store: there is nothing, and there is an index to wait from.
            if error.kind == Kind::NotFound && place.is_some() && said.body.is_empty() {
                return Ok(Answer { place, is_filtered, date: None, body: Bytes::new() });
            }
            if error.kind == Kind::Denied && matches!(self.token.current(), Ok(None)) {
                error.text.push_str("; no token is set (--consul-token-file)");
            }
            return Err(error);
        }
        Ok(Answer {
            place,
            is_filtered,
            date: said.head.headers.get(DATE).and_then(|date| date.to_str().ok()).map(str::to_owned),
            body: said.body,
        })
    }

    fn request(
        &self,
        agent: &Agent,
        question: &Question<'_>,
        added: &str,
    ) -> Result<Request<Full<Bytes>>, Error> {
        let refused = |error: hyper::http::Error| Error::new(Kind::Refused, error.to_string());
        let origin = if agent.has_tls() { agent.shown() } else { String::new() };
        let mut request = Request::builder()
            .method(question.method.clone())
            .uri(format!("{origin}{}{added}", question.path))
            .header(HOST, agent.authority())
            .header(USER_AGENT, concat!("weft-sidecar/", env!("CARGO_PKG_VERSION")))
            .body(Full::new(question.body.clone()))
            .map_err(refused)?;
        let token = self.token.current().map_err(|why| Error::new(Kind::Denied, why))?;
        if let Some(token) = token.filter(|_| !question.is_anonymous) {
            request.headers_mut().insert(TOKEN, token);
        }
        Ok(request)
    }
}

/// How many blocking queries an agent gets.
fn slots(address: &ConsulAddress) -> usize {
    let is_loopback = |host: &str| {
        host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
    };
    match address {
        ConsulAddress::Tcp { tls: true, .. } => TLS_SLOTS,
        ConsulAddress::Tcp { host, .. } if !is_loopback(host) => PLAIN_SLOTS,
        ConsulAddress::Tcp { .. } | ConsulAddress::Unix(_) => LOOPBACK_SLOTS,
    }
}

/// An index of 0 would make a blocking query return at once, for ever (Consul's documentation, "Implementation
/// Details" of blocking queries): it counts as none.
fn index(headers: &HeaderMap<HeaderValue>) -> Option<u64> {
    headers.get(INDEX)?.to_str().ok()?.parse().ok().filter(|index| *index > 0)
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("agent", &self.shown()).finish_non_exhaustive()
    }
}
