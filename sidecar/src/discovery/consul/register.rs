//! Our own workload, registered with the local agent (`/v1/agent/service/register`) with a check that we feed: it
//! turns critical where no word comes within its time to live. Nothing that changes is in it, so a word that says
//! the same wakes nobody. An agent that forgot the workload is told again, and so is one where somebody registered
//! something else under its id; in a drain the workload is taken back.

use std::{collections::BTreeSet, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures_util::{FutureExt, future::join_all};
use serde_json::{Map, Value, json};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep},
};
use weft_proto::names;

use super::{
    backoff::{pause, spread},
    client::{Client, Question},
    error::{Error, Kind, printable},
};
use crate::{discovery::publish::Workload, model::Protocol};

/// Words per time to live: two may get lost.
const WORDS_PER_TTL: u32 = 3;
/// The longest registration that is read back.
const MAX_REGISTRATION: usize = 256 * 1024;
/// Longest wait for one answer of the agent, which is near; less where the time to live is short.
const PATIENCE: Duration = Duration::from_secs(3);
/// An agent that is away is asked again after at most this long.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// After so long without an answer of the registry a workload counts as registered for `/registered`.
const READINESS_PATIENCE: Duration = Duration::from_secs(10);

const WELL: &str = "the app answers its sidecar";
const UNWELL: &str = "the app does not answer its sidecar";

/// What is registered.
#[derive(Debug, Clone)]
pub struct Registration {
    /// The workload.
    pub workload: Workload,
    /// Its share of the traffic; none: Consul's default, 1.
    pub weight: Option<u16>,
    /// It is out when no word comes for so long.
    pub ttl: Duration,
    /// It is forgotten when it was out for so long.
    pub deregister_after: Duration,
}

/// A workload that is registered, or will be as soon as the agent answers.
#[derive(Debug)]
pub struct OwnRegistration {
    stop: watch::Sender<()>,
    task: JoinHandle<()>,
}

/// Registers the workload, and keeps it registered. `health` says whether the app is well.
pub fn register(
    client: Arc<Client>,
    registration: Registration,
    health: watch::Receiver<bool>,
    registered: watch::Sender<bool>,
    random: fastrand::Rng,
) -> OwnRegistration {
    let (stop, stopped) = watch::channel(());
    OwnRegistration {
        stop,
        task: tokio::spawn(keep(client, registration, health, registered, random, stopped)),
    }
}

/// Keeps the workload registered until it is stopped. A panic costs a pause, and not the place in the registry.
async fn keep(
    client: Arc<Client>,
    registration: Registration,
    mut health: watch::Receiver<bool>,
    registered: watch::Sender<bool>,
    mut random: fastrand::Rng,
    mut stopped: watch::Receiver<()>,
) {
    let workload = &registration.workload;
    let id = format!("{}-{}", workload.service, workload.instance);
    loop {
        let keeper = Keeper {
            client: client.clone(),
            id: id.clone(),
            registration: registration.clone(),
            random: random.fork(),
            at: None,
            left: BTreeSet::new(),
            words: 0,
            is_overwritten: false,
            registered: registered.clone(),
            failing: None,
        };
        let keeping = AssertUnwindSafe(keeper.run(&mut health, &mut stopped)).catch_unwind();
        if keeping.await.is_ok() {
            return;
        }
        tracing::error!("the registration of `{id}` ended with a panic, a bug of ours; it is made again");
        tokio::select! {
            // In a drain it is not made again: its check runs out.
            _ = stopped.changed() => return,
            () = sleep(LONGEST_PAUSE) => {}
        }
    }
}

impl OwnRegistration {
    /// Takes the workload back. It does not wait long for an agent that is away: the check runs out then.
    pub async fn withdraw(self) {
        drop(self.stop);
        let _ = self.task.await;
    }
}

struct Keeper {
    client: Arc<Client>,
    id: String,
    registration: Registration,
    random: fastrand::Rng,
    /// The agent that has the registration.
    at: Option<usize>,
    /// Agents that had it before, and may have it still.
    left: BTreeSet<usize>,
    /// Words since the registration was last compared.
    words: u32,
    /// Somebody else's registration stood under our id when it was.
    is_overwritten: bool,
    /// Told once others can find the workload; and where the registry does not answer for [`READINESS_PATIENCE`], as its
    /// outage must not stop a rollout.
    registered: watch::Sender<bool>,
    /// Since when the registry takes nothing.
    failing: Option<Instant>,
}

impl Keeper {
    async fn run(mut self, health: &mut watch::Receiver<bool>, stopped: &mut watch::Receiver<()>) {
        let mut failures = 0_u32;
        loop {
            let is_well = *health.borrow_and_update();
            let said = tokio::select! {
                said = self.say(is_well) => said,
                _ = stopped.changed() => {
                    // Any of them may have heard it.
                    self.left.extend(0..self.client.agents());
                    break;
                }
            };
            self.note_readiness(is_well, &said);
            let rest = match said {
                Ok(()) => {
                    if failures > 0 {
                        tracing::info!(id = self.id, "Consul takes our registration again");
                    }
                    failures = 0;
                    self.registration.ttl / WORDS_PER_TTL
                }
                Err(error) => {
                    if failures == 0 {
                        tracing::warn!("registration of `{}`: {error}; it is tried again", self.id);
                    }
                    failures = failures.saturating_add(1);
                    pause(failures, LONGEST_PAUSE, &mut self.random)
                }
            };
            // Never later than meant: a word that comes late is none.
            let rest = spread(rest.mul_f64(0.9), &mut self.random);
            tokio::select! {
                _ = stopped.changed() => break,
                () = sleep(rest) => {}
                Ok(()) = health.changed() => {}
            }
        }
        self.left.extend(self.at.take());
        for error in self.take_back().await {
            tracing::warn!("`{}` cannot be taken back: {error}; its check runs out instead", self.id);
        }
    }

    /// A registry that refuses is not away: then nobody can find the workload, and that must be seen.
    fn note_readiness(&mut self, is_well: bool, said: &Result<(), Error>) {
        let now = Instant::now();
        let taken = said.is_ok();
        let away = said.as_ref().is_err_and(|error| error.kind.is_of_the_agent());
        self.failing = if away { self.failing.or(Some(now)) } else { None };
        let waited = self.failing.is_some_and(|since| now - since >= READINESS_PATIENCE);
        if !is_well || !(taken || waited) {
            return;
        }
        let before = self.registered.send_replace(true);
        if waited && !before {
            tracing::warn!(
                id = self.id,
                "the registry has not answered for {READINESS_PATIENCE:?}: /registered says yes all the same"
            );
        }
    }

    /// Takes the registration back where it was left behind, everywhere at once: the next word is due soon. What did not
    /// work is tried again later.
    async fn take_back(&mut self) -> Vec<Error> {
        let path = format!("/v1/agent/service/deregister/{}", self.id);
        let left: Vec<usize> = self.left.iter().copied().collect();
        let taken = join_all(left.iter().map(|at| self.put(*at, path.clone(), Value::Null))).await;
        let mut failed = Vec::new();
        for (at, taken) in left.iter().zip(taken) {
            match taken {
                Err(error) if error.kind != Kind::NotFound => failed.push(error),
                _ => {
                    self.left.remove(at);
                }
            }
        }
        failed
    }

    /// Says how the app is, and registers it where the agent does not know it.
    async fn say(&mut self, is_well: bool) -> Result<(), Error> {
        let mut first = self.at.unwrap_or_else(|| self.client.current());
        if let Some(at) = self.at {
            let (status, output) = if is_well { ("passing", WELL) } else { ("critical", UNWELL) };
            let body = json!({"Status": status, "Output": output});
            match self.put(at, format!("/v1/agent/check/update/service:{}", self.id), body).await {
                Ok(()) => {
                    let _later = self.take_back().await;
                    self.words += 1;
                    if self.words < WORDS_PER_TTL || !self.was_overwritten(at, is_well).await {
                        return Ok(());
                    }
                }
                Err(error) if error.kind == Kind::NotFound => {
                    tracing::info!(id = self.id, "Consul forgot our registration: registering again");
                }
                // Another agent may take it.
                Err(error) if error.kind.is_of_the_agent() && self.client.agents() > 1 => first += 1,
                Err(error) => return Err(error),
            }
        }
        let body = document(&self.id, &self.registration, is_well);
        let mut last = None;
        for at in (first..first + self.client.agents()).map(|at| at % self.client.agents()) {
            let path = "/v1/agent/service/register?replace-existing-checks=true".to_owned();
            match self.put(at, path, body.clone()).await {
                Ok(()) => {
                    self.left.extend(self.at.replace(at));
                    self.left.remove(&at);
                    tracing::info!(id = self.id, is_well, "registered in Consul");
                    return Ok(());
                }
                Err(error) if error.kind.is_of_the_agent() => last = Some(error),
                Err(error) => return Err(error),
            }
        }
        last.map_or(Ok(()), Err)
    }

    /// Compares what the agent has under our id with what we registered, and tells what differs.
    async fn was_overwritten(&mut self, at: usize, is_well: bool) -> bool {
        self.words = 0;
        let path = format!("/v1/agent/service/{}", self.id);
        let permission = format!("service:read on `{}`", self.registration.workload.service);
        let patience = PATIENCE.min(self.registration.ttl / WORDS_PER_TTL);
        let question = Question { patience, most: MAX_REGISTRATION, ..Question::get(path, &permission) };
        // Where it cannot be read nothing is known to be wrong; the next word tells whether it is there.
        let Ok(answer) = self.client.ask_at(at, &question).await else { return false };
        let Ok(found) = serde_json::from_slice(&answer.body) else { return false };
        let ours = document(&self.id, &self.registration, is_well);
        let Some(difference) = difference(&ours, &found) else {
            self.is_overwritten = false;
            return false;
        };
        self.client.metrics.registration_overwritten();
        // Two that share an id write by turns, for ever.
        if !std::mem::replace(&mut self.is_overwritten, true) {
            tracing::warn!(
                "registration of `{}`: somebody registered something else under our id ({difference}); it is \
                 registered again. Does another sidecar run as the same --instance, or who else may write there?",
                self.id
            );
        }
        true
    }

    async fn put(&self, at: usize, path: String, body: Value) -> Result<(), Error> {
        let permission = format!("service:write on `{}`", self.registration.workload.service);
        let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
        let patience = PATIENCE.min(self.registration.ttl / WORDS_PER_TTL);
        let question = Question { patience, ..Question::put(path, body, &permission) };
        self.client.ask_at(at, &question).await.map(drop)
    }
}

/// The registration, as the agent takes it.
fn document(id: &str, registration: &Registration, is_well: bool) -> Value {
    let Registration { workload, weight, ttl, deregister_after } = registration;
    let endpoint = &workload.endpoint;
    let seconds = |time: &Duration| format!("{}s", time.as_secs().max(1));
    let mut document = json!({
        "ID": id,
        "Name": workload.service.as_str(),
        "Address": endpoint.address.ip(),
        "Port": endpoint.address.port(),
        "Tags": endpoint.tags,
        "Meta": meta(workload),
        "Check": {
            "CheckID": format!("service:{id}"),
            "Name": "The app, as its sidecar sees it",
            "TTL": format!("{}ms", ttl.as_millis()),
            "Status": if is_well { "passing" } else { "critical" },
            "DeregisterCriticalServiceAfter": seconds(deregister_after),
        },
    });
    if let Some(weight) = weight {
        document["Weights"] = json!({"Passing": weight, "Warning": weight});
    }
    document
}

/// Where the service that the agent gives back (`/v1/agent/service/ID`) is not the one that was registered.
fn difference(ours: &Value, found: &Value) -> Option<String> {
    let is_empty = |value: &Value| match value {
        Value::Null => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(members) => members.is_empty(),
        _ => false,
    };
    const COMPARED: [(&str, &str); 6] = [
        ("Name", "Service"),
        ("Address", "Address"),
        ("Port", "Port"),
        ("Tags", "Tags"),
        ("Meta", "Meta"),
        ("Weights", "Weights"),
    ];
    COMPARED.iter().find_map(|(written, read)| {
        let (ours, found) = (&ours[written], &found[read]);
        // Consul fills in weights where none are said.
        let same = ours == found || is_empty(ours) && (is_empty(found) || *read == "Weights");
        (!same).then(|| format!("`{read}` is {}, not {ours}", printable(&found.to_string())))
    })
}

fn meta(workload: &Workload) -> Map<String, Value> {
    let identities: Vec<&str> = workload.identities.iter().map(|identity| identity.as_str()).collect();
    let protocol = workload.protocol.map(|protocol| match protocol {
        Protocol::Http1 => "http1",
        Protocol::Http2 => "http2",
        Protocol::Tls => "tls",
        Protocol::Opaque => "tcp",
    });
    let endpoint = &workload.endpoint;
    let namespace = workload.service.as_str().split_once('_').map_or("default", |(_, namespace)| namespace);
    [
        (names::META_IDENTITY, identities.join(",")),
        (names::META_PROTOCOL, protocol.unwrap_or_default().to_owned()),
        (names::META_ZONE, endpoint.zone.as_deref().unwrap_or_default().to_owned()),
        (names::META_VERSION, endpoint.version.as_deref().unwrap_or_default().to_owned()),
        (names::META_NAMESPACE, namespace.to_owned()),
    ]
    .into_iter()
    .filter(|(_, value)| !value.is_empty())
    .map(|(key, value)| (key.to_owned(), value.into()))
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{discovery::consul::health, model::Endpoint};

    #[test]
    fn what_somebody_else_registered_under_our_id_is_found() {
        let workload = Workload {
            service: "orders".parse().unwrap(),
            instance: "a".to_owned(),
            protocol: None,
            identities: vec!["spiffe://weft.local/ns/default/sa/orders".parse().unwrap()],
            endpoint: Endpoint::at("10.1.0.2:8080".parse().unwrap()),
        };
        let (ttl, deregister_after) = (Duration::from_secs(15), Duration::from_secs(60));
        let registration = Registration { workload, weight: None, ttl, deregister_after };
        let ours = document("orders-a", &registration, true);
        // As Consul 1.8 and 1.14 give it back.
        let good = json!({
            "ID": "orders-a", "Service": "orders", "Tags": [], "Port": 8080, "Address": "10.1.0.2",
            "Meta": {"weft-identity": "spiffe://weft.local/ns/default/sa/orders", "weft-namespace": "default"},
            "Weights": {"Passing": 1, "Warning": 1}, "EnableTagOverride": false, "ContentHash": "1f2e",
            "Datacenter": "dc1", "TaggedAddresses": {"lan_ipv4": {"Address": "10.1.0.2", "Port": 8080}},
        });
        assert_eq!(difference(&ours, &good), None);
        for (key, value, expected) in [
            ("Port", json!(9), "`Port` is 9, not 8080"),
            ("Port", json!(null), "`Port` is null, not 8080"),
            ("Address", json!(""), "`Address` is \"\", not \"10.1.0.2\""),
            ("Service", json!("cart"), "`Service` is \"cart\", not \"orders\""),
            ("Meta", json!({}), "`Meta` is {}, not {"),
            ("Meta", json!(null), "`Meta` is null, not {"),
            ("Tags", json!(["v2"]), "`Tags` is [\"v2\"], not []"),
        ] {
            let mut bad = good.clone();
            bad[key] = value;
            let found = difference(&ours, &bad).unwrap();
            assert!(found.starts_with(expected), "{found}");
        }
        let mut without_tags = good.clone();
        without_tags["Tags"] = Value::Null;
        assert_eq!(difference(&ours, &without_tags), None);
        let weighed = document("orders-a", &Registration { weight: Some(7), ..registration }, true);
        assert!(difference(&weighed, &good).unwrap().starts_with("`Weights` is "));
    }

    #[test]
    fn what_we_register_others_can_read() {
        let endpoint = Endpoint {
            zone: Some("eu-1a".into()),
            version: Some("1.2".into()),
            ..Endpoint::at("[fd00::2]:8080".parse().unwrap())
        };
        let workload = Workload {
            service: "orders_shop".parse().unwrap(),
            instance: "a1".to_owned(),
            protocol: Some(Protocol::Http2),
            identities: vec!["spiffe://weft.local/ns/shop/sa/orders".parse().unwrap()],
            endpoint: endpoint.clone(),
        };
        let (ttl, deregister_after) = (Duration::from_secs(15), Duration::from_secs(60));
        let registration =
            Registration { workload: workload.clone(), weight: Some(7), ttl, deregister_after };
        let document = document("orders_shop-a1", &registration, true);
        assert_eq!(document["Check"]["TTL"], "15000ms");
        assert_eq!(document["Check"]["DeregisterCriticalServiceAfter"], "60s");
        // As Consul gives it back: the registration is the service, and the check is among the checks.
        let entry = json!([{
            "Node": {"Node": "n", "Address": "10.0.0.1"}, "Service": document, "Checks": [document["Check"]],
        }]);
        let reading = health::read(&workload.service, entry.to_string().as_bytes()).unwrap();
        assert_eq!(reading.mistakes, [""; 0]);
        let found = &reading.instances[0];
        assert_eq!(found.endpoint, Endpoint { weight: 7, ..endpoint });
        assert_eq!((found.protocol, &found.identities), (workload.protocol, &workload.identities));
        assert!(found.is_well);
    }
}
