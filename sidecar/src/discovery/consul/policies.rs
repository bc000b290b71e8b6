//! Policies from Consul's key-value store: one document per service at `weft/policies/SERVICE`, the same YAML as in
//! the policies directory (docs/policy.md). One blocking query watches all of them. A document with a mistake is
//! refused and reported, and the last good one stays; so does everything when Consul is away. After a gap (an
//! outage, or an index that went back) Consul may have lost its state: what is missing then stays until it is written
//! again, for nothing tells it from what somebody deleted. A file counts before Consul.

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use serde::Deserialize;
use tokio::{
    sync::{oneshot, watch},
    task::spawn_blocking,
    time::{Instant, sleep_until},
};
use weft_proto::names::POLICIES_PREFIX;

use super::{
    backoff::{LONGEST, pause, spread, turn},
    client::{Answer, Client, Place, Question},
    error::{Error, Kind},
    health::explain,
    watch::{ACL_CHECK, Access, WAIT, denied},
};
use crate::{
    config::{
        document::{EXPECTED_NAME, Mistake, Mistakes},
        policy_document,
    },
    discovery::{folder::log_new, policies::Policies},
    model::{MutualTls, Policy, ServiceName},
};

/// Documents, and bytes of one of them; as in a directory.
const MAX_DOCUMENTS: usize = 10_000;
const MAX_BYTES: usize = 1024 * 1024;
/// All of them, as Consul sends them.
const MAX_ANSWER: usize = 64 * 1024 * 1024;
/// Policies that change all the time are read no more often.
const LEAST_PAUSE: Duration = Duration::from_millis(500);
/// Where there are none, every change of any other key is an answer, for all sidecars at once.
const PAUSE_WITHOUT_ANY: Duration = Duration::from_secs(5);
/// Without an index nothing can be waited for.
const WITHOUT_INDEX: Duration = Duration::from_secs(10);

/// What one entry of the store is.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Entry {
    key: String,
    /// In base64; none for an empty value.
    #[serde(default)]
    value: Option<String>,
    modify_index: u64,
}

/// Whom to ask, and what a document does not say.
#[derive(Debug)]
pub struct PolicySettings {
    /// The client.
    pub client: Arc<Client>,
    /// What a document does not say.
    pub defaults: Policy,
}

/// Watches the documents and publishes the policies, with those of the files, at the first look and at every
/// change; and all mistakes that stand in the documents now. `looked` hears of the first look, whatever it found.
/// Ends when nobody listens any more.
pub async fn follow_policies(
    settings: PolicySettings,
    mut files: watch::Receiver<Arc<Policies>>,
    policies: watch::Sender<Arc<Policies>>,
    mistakes: watch::Sender<Vec<Mistake>>,
    looked: oneshot::Sender<()>,
    mut random: fastrand::Rng,
) {
    let PolicySettings { client, defaults } = settings;
    let mut store = Store::new(defaults);
    let (mut looked, mut failures, mut last_error) = (Some(looked), 0_u32, None::<Mistake>);
    let (mut has_files, mut last_place) = (true, None::<Place>);
    // It outlives changes of files: a question that is dropped would go on in the agent.
    let mut looking = Box::pin(look(client.clone(), Instant::now(), None, WAIT, None));
    // Until when an answer without documents is believed; none where the last one had some, or failed.
    let mut believed = None;
    loop {
        tokio::select! {
            found = &mut looking => {
                let (rest, wait_from) = match found {
                    Ok(Found { place, entries, believed: until }) => {
                        let is_empty_again = entries.is_empty() && believed.is_some();
                        believed = until;
                        let elsewhere = matches!((place, last_place), (Some(new), Some(old)) if !new.follows(old));
                        let (index, after_gap) = (place.map(|place| place.index), failures > 0 || elsewhere);
                        let is_later = store.take(index, entries, after_gap);
                        // All sidecars that failed together may be answered together.
                        let more = if failures > 0 { turn(1, &mut random) } else { Duration::ZERO };
                        (failures, last_error, last_place) = (0, None, place.or(last_place));
                        (rest_after(place, is_empty_again, &mut random) + more, place.filter(|_| is_later))
                    }
                    Err(error) => {
                        believed = None;
                        failures = failures.saturating_add(1);
                        // The agent is well where an index went back.
                        last_error = (error.kind != Kind::WentBack).then(|| mistake("", error.text));
                        (pause(failures, LONGEST, &mut random) + turn(1, &mut random), None)
                    }
                };
                let wait = WAIT.mul_f64(1.0 - 0.1 * random.f64());
                looking = Box::pin(look(client.clone(), Instant::now() + rest, wait_from, wait, believed));
                let _ = looked.take().map(|looked| looked.send(()));
            }
            changed = files.changed(), if has_files => has_files = changed.is_ok(),
            () = policies.closed() => return,
        }
        let (newer, mut found) = store.policies(&files.borrow_and_update());
        policies.send_if_modified(|known| {
            let changed = **known != newer;
            if changed {
                *known = Arc::new(newer);
            }
            changed
        });
        found.extend(last_error.clone());
        log_new("policy", &mistakes.borrow(), &found);
        mistakes.send_if_modified(|known| {
            let changed = *known != found;
            *known = found;
            changed
        });
    }
}

/// The rest after an answer.
fn rest_after(place: Option<Place>, is_empty_again: bool, random: &mut fastrand::Rng) -> Duration {
    match (place, is_empty_again) {
        (None, _) => WITHOUT_INDEX,
        (Some(_), true) => spread(PAUSE_WITHOUT_ANY, random),
        (Some(_), false) => LEAST_PAUSE,
    }
}

/// What one question found.
struct Found {
    /// Of the answer.
    place: Option<Place>,
    entries: Vec<Entry>,
    /// Where there are no documents: until when the next answer without any is believed. None where there are some,
    /// so that they do not vanish unasked.
    believed: Option<Instant>,
}

/// Asks once, after a rest; with an index it waits for a change. `believed`: as found the last time.
async fn look(
    client: Arc<Client>,
    rest_until: Instant,
    wait_from: Option<Place>,
    wait: Duration,
    believed: Option<Instant>,
) -> Result<Found, Error> {
    sleep_until(rest_until).await;
    let permission = format!("key:read on `{POLICIES_PREFIX}`");
    let path = format!("/v1/kv/{POLICIES_PREFIX}?recurse&stale");
    let mut question = Question { most: MAX_ANSWER, ..Question::get(path, &permission) };
    if let Some(place) = wait_from {
        question = question.waiting(place, wait, format!("/v1/kv/{POLICIES_PREFIX}?keys"));
    }
    let answer = client.ask(&question).await?;
    let entries = entries(&answer).await?;
    if !entries.is_empty() {
        return Ok(Found { place: answer.place, entries, believed: None });
    }
    let now = Instant::now();
    let believed = match believed.filter(|until| now < *until && !answer.is_filtered) {
        Some(until) => until,
        None => {
            check_acl(&client, &answer).await?;
            now + ACL_CHECK
        }
    };
    Ok(Found { place: answer.place, entries, believed: Some(believed) })
}

/// Consul hides what an ACL does not allow, and says there is nothing.
async fn check_acl(client: &Client, answer: &Answer) -> Result<(), Error> {
    let asked = [Access { resource: "key", access: "read", segment: POLICIES_PREFIX }];
    if !answer.is_filtered && denied(client, &asked).await?.is_none() {
        return Ok(());
    }
    let text = format!(
        "Consul at {} hides `{POLICIES_PREFIX}`; the token needs key:read there, see docs/consul.md",
        client.shown()
    );
    Err(Error::new(Kind::Denied, text))
}

/// What is known of the documents. Pure.
pub(super) struct Store {
    defaults: Policy,
    documents: BTreeMap<String, Document>,
    /// Of the last answer.
    index: Option<u64>,
}

/// One document.
struct Document {
    modify_index: u64,
    /// As last read without mistakes.
    good: Option<(ServiceName, Arc<Policy>)>,
    /// What is wrong with it now.
    mistakes: Vec<Mistake>,
}

impl Store {
    pub(super) fn new(defaults: Policy) -> Self {
        Store { defaults, documents: BTreeMap::new(), index: None }
    }

    /// Takes over what is there now; `after_gap`: it may have been lost in between. Then what is missing stays, and
    /// so it does after an index that went back. Says whether the index did not.
    pub(super) fn take(&mut self, index: Option<u64>, entries: Vec<Entry>, after_gap: bool) -> bool {
        let went_back = matches!((index, self.index), (Some(new), Some(old)) if new < old);
        let may_be_lost = went_back || after_gap;
        self.index = index;
        let mut older = std::mem::take(&mut self.documents);
        for entry in entries.into_iter().take(MAX_DOCUMENTS) {
            let Some(name) = entry.key.strip_prefix(POLICIES_PREFIX) else { continue };
            // A folder is an entry of its own in some tools.
            if name.is_empty() || name.ends_with('/') {
                continue;
            }
            // Consul names each once; of a key that comes twice the last good one counts all the same.
            let document = match older.remove(name).or_else(|| self.documents.remove(name)) {
                Some(known) if known.modify_index == entry.modify_index && !may_be_lost => known,
                known => {
                    let good = known.and_then(|known| known.good);
                    match self.read(name, &entry) {
                        Ok(read) => Document {
                            modify_index: entry.modify_index,
                            good: Some(read),
                            mistakes: Vec::new(),
                        },
                        Err(mistakes) => Document { modify_index: entry.modify_index, good, mistakes },
                    }
                }
            };
            self.documents.insert(name.to_owned(), document);
        }
        // What was kept before is missing still, and not deleted by anybody.
        older.retain(|_, document| document.good.is_some() && (may_be_lost || document.modify_index == 0));
        let room = MAX_DOCUMENTS.saturating_sub(self.documents.len());
        for (name, mut kept) in older.into_iter().take(room) {
            let text = "is gone after an outage, or after Consul lost its state; the last one stays until it is \
                        written again (then it can be deleted)";
            kept.mistakes = vec![mistake(&name, text.to_owned())];
            kept.modify_index = 0;
            self.documents.insert(name, kept);
        }
        !went_back
    }

    fn read(&self, name: &str, entry: &Entry) -> Result<(ServiceName, Arc<Policy>), Vec<Mistake>> {
        let refuse = |text: String| vec![mistake(name, text)];
        let service: ServiceName = name.parse().map_err(|_| {
            refuse(format!("the key names no service; expected {POLICIES_PREFIX} and {EXPECTED_NAME}"))
        })?;
        let value = entry.value.as_deref().unwrap_or_default();
        if value.len() / 4 * 3 > MAX_BYTES {
            return Err(refuse(format!("is longer than {MAX_BYTES} bytes")));
        }
        let bytes =
            BASE64_STANDARD.decode(value).map_err(|error| refuse(format!("is no base64: {error}")))?;
        let text = String::from_utf8(bytes).map_err(|error| {
            refuse(format!("is not UTF-8 text after byte {}", error.utf8_error().valid_up_to()))
        })?;
        let mut mistakes = Mistakes::new(Path::new(&shown(name)));
        let read = policy_document::read(&text, &self.defaults, &mut mistakes);
        let missing = || refuse("is no document".to_owned());
        let policy = mistakes.or_else(read)?.ok_or_else(missing)?;
        let strictest = self.defaults.outbound_mutual_tls;
        if strictest == MutualTls::Strict && policy.outbound_mutual_tls != strictest {
            let text = "`outbound_mutual_tls` is permissive, but this sidecar is told to be strict; expected it in \
                        the policies directory, for whoever may write the registry may not take that back";
            return Err(refuse(text.to_owned()));
        }
        Ok((service, Arc::new(policy)))
    }

    /// The policies now, files first; and all mistakes.
    pub(super) fn policies(&self, files: &Policies) -> (Policies, Vec<Mistake>) {
        let good = self.documents.values().filter_map(|document| document.good.clone());
        let mut policies: Policies = good.collect();
        policies.extend(files.iter().map(|(name, policy)| (name.clone(), policy.clone())));
        let mistakes = self.documents.values().flat_map(|document| document.mistakes.iter().cloned());
        (policies, mistakes.collect())
    }
}

async fn entries(answer: &Answer) -> Result<Vec<Entry>, Error> {
    if answer.body.is_empty() {
        return Ok(Vec::new());
    }
    let body = answer.body.clone();
    spawn_blocking(move || read(&body))
        .await
        .unwrap_or_else(|_| Err(Error::new(Kind::BadAnswer, "reading the policies panicked")))
}

/// The entries of an answer.
pub(super) fn read(body: &[u8]) -> Result<Vec<Entry>, Error> {
    serde_json::from_slice(body)
        .map_err(|_| explain::<Vec<Entry>>(&format!("policies in `{POLICIES_PREFIX}`"), body))
}

/// Where a document stands, for people.
fn shown(name: &str) -> String {
    let short: String = name.chars().take(150).collect();
    format!("consul:{POLICIES_PREFIX}{}", short.escape_debug())
}

fn mistake(name: &str, text: String) -> Mistake {
    Mistake { file: shown(name).into(), line: None, text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::consul::fake;

    fn store() -> Store {
        Store::new(Policy::default())
    }

    fn entry(name: &str, modify_index: u64, text: &str) -> Entry {
        let value = (!text.is_empty()).then(|| BASE64_STANDARD.encode(text));
        Entry { key: format!("{POLICIES_PREFIX}{name}"), value, modify_index }
    }

    /// Attempts by service, and the mistakes.
    fn state(store: &Store) -> (Vec<(String, u8)>, Vec<String>) {
        let (policies, mistakes) = store.policies(&Policies::default());
        let mut attempts: Vec<_> =
            policies.iter().map(|(name, policy)| (name.to_string(), policy.retries.attempts)).collect();
        attempts.sort();
        (attempts, mistakes.iter().map(ToString::to_string).collect())
    }

    #[tokio::test]
    async fn while_there_are_none_the_acl_is_asked_for_once_in_a_while() {
        let (client, asked) = fake::client(|path| match path {
            "/v1/internal/acl/authorize" => Some((1, "[]")),
            _ => Some((7, "[]")),
        })
        .await;
        let (mut believed, mut counts, begin) = (None, Vec::new(), Instant::now());
        for _ in 0..3 {
            believed = look(client.clone(), begin, None, WAIT, believed).await.unwrap().believed;
            counts.push(asked.lock().unwrap().iter().filter(|path| path.contains("authorize")).count());
        }
        look(client.clone(), begin, None, WAIT, Some(begin)).await.unwrap();
        counts.push(asked.lock().unwrap().iter().filter(|path| path.contains("authorize")).count());
        assert_eq!(counts, [1, 1, 1, 2]);
        let mut random = fastrand::Rng::with_seed(1);
        assert!(rest_after(Some(Place::of(7)), true, &mut random) >= PAUSE_WITHOUT_ANY);
        assert_eq!(rest_after(Some(Place::of(7)), false, &mut random), LEAST_PAUSE);
    }

    #[test]
    fn the_registry_makes_calls_stricter_and_never_laxer() {
        let (permissive, strict) =
            (MutualTls::Permissive, Policy { outbound_mutual_tls: MutualTls::Strict, ..Policy::default() });
        for (defaults, word, expected) in [
            (Policy::default(), "strict", Some(MutualTls::Strict)),
            (Policy::default(), "permissive", Some(permissive)),
            (strict.clone(), "strict", Some(MutualTls::Strict)),
            (strict, "permissive", None),
        ] {
            let mut store = Store::new(defaults.clone());
            let text = format!("outbound_mutual_tls: {word}");
            store.take(Some(5), vec![entry("orders", 5, &text)], false);
            let (policies, mistakes) = store.policies(&Policies::default());
            let found = policies.values().next().map(|policy| policy.outbound_mutual_tls);
            assert_eq!(found, expected, "{defaults:?} {word}");
            assert_eq!(mistakes.len(), usize::from(expected.is_none()), "{mistakes:?}");
            assert!(
                mistakes.iter().all(|one| one.to_string().contains("policies directory")),
                "{mistakes:?}"
            );
        }
    }

    #[test]
    fn a_bad_document_is_told_and_the_last_good_one_stays() {
        let mut store = store();
        store.take(
            Some(5),
            vec![entry("orders", 5, "retries: {attempts: 1}"), entry("", 1, ""), entry("a/", 1, "")],
            false,
        );
        assert_eq!(state(&store), (vec![("orders".to_owned(), 1)], Vec::new()));
        let long = "#".repeat(5_000_000);
        for (text, words) in [
            ("retries: {attempts: 11}", "consul:weft/policies/orders:1: `retries.attempts` is 11"),
            ("", "consul:weft/policies/orders"),
            (&long, "is longer than 1048576 bytes"),
        ] {
            store.take(Some(6), vec![entry("orders", 6 + text.len() as u64, text)], false);
            let (attempts, mistakes) = state(&store);
            assert_eq!(attempts, [("orders".to_owned(), 1)]);
            assert!(mistakes.len() == 1 && mistakes[0].contains(words), "{mistakes:?}");
        }
        let broken = Entry { value: Some("%".to_owned()), ..entry("orders", 90, "") };
        let binary = Entry { value: Some(BASE64_STANDARD.encode([0xff])), ..entry("cart", 90, "") };
        store.take(Some(90), vec![broken, binary, entry("Not A Service", 1, "{}")], false);
        let (_, mistakes) = state(&store);
        for words in ["is no base64", "cart: is not UTF-8", "names no service"] {
            assert!(mistakes.iter().any(|mistake| mistake.contains(words)), "{words}: {mistakes:?}");
        }
        store.take(Some(91), vec![entry("orders", 91, "retries: {attempts: 3}")], false);
        assert_eq!(state(&store), (vec![("orders".to_owned(), 3)], Vec::new()));
        assert!(store.take(Some(92), Vec::new(), false));
        assert_eq!(state(&store).0, []);
    }

    #[test]
    fn a_consul_that_lost_its_state_takes_no_policy_away() {
        let mut store = store();
        let one = |index| entry("orders", index, "retries: {attempts: 1}");
        store.take(Some(100), vec![one(5), entry("cart", 6, "retries: {attempts: 2}")], false);
        assert!(!store.take(Some(7), vec![entry("cart", 6, "retries: {attempts: 4}")], false));
        let (attempts, mistakes) = state(&store);
        assert_eq!(attempts, [("cart".to_owned(), 4), ("orders".to_owned(), 1)]);
        assert!(mistakes.len() == 1 && mistakes[0].contains("orders: is gone after"), "{mistakes:?}");
        store.take(Some(8), vec![entry("cart", 6, "retries: {attempts: 4}")], false);
        assert_eq!(state(&store).0.len(), 2, "still kept");
        store.take(Some(9), vec![one(9)], false);
        assert_eq!(state(&store), (vec![("orders".to_owned(), 1)], Vec::new()));
        store.take(Some(10), Vec::new(), false);
        assert_eq!(state(&store).0, [], "deleted by somebody");
    }

    #[test]
    fn nor_does_one_whose_index_has_passed_the_old_one_when_it_answers() {
        let mut store = store();
        let entry = |name, index| entry(name, index, "retries: {attempts: 1}");
        store.take(Some(30), vec![entry("a", 5), entry("b", 6)], false);
        assert!(store.take(Some(60), vec![entry("a", 50)], true));
        let (attempts, mistakes) = state(&store);
        assert_eq!(attempts, [("a".to_owned(), 1), ("b".to_owned(), 1)]);
        assert!(mistakes.len() == 1 && mistakes[0].contains("b: is gone after"), "{mistakes:?}");
        store.take(Some(61), vec![entry("a", 50), entry("b", 61)], false);
        store.take(Some(62), vec![entry("a", 50)], false);
        assert_eq!(state(&store), (vec![("a".to_owned(), 1)], Vec::new()), "deleted by somebody");
        // However often it is lost, no more are kept than are read.
        for round in 0..3 {
            let many = |number| Entry { key: format!("{POLICIES_PREFIX}s{round}-{number}"), ..entry("", 1) };
            store.take(Some(70), (0..6_000).map(many).collect(), true);
        }
        assert_eq!(store.documents.len(), MAX_DOCUMENTS);
    }
}
