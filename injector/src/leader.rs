//! Which of several replicas writes: the one that holds a Lease. It renews the Lease every two seconds; where it has not for
//! ten, another one takes it. A holder counts as one for six seconds after the start of its last renewal, so that it has
//! stopped writing well before another begins. Only what one replica sees change is measured, with its own clock: clocks
//! of machines are never compared. kube has no such thing; the protocol is that of client-go.
//!
//! Leases: <https://kubernetes.io/docs/concepts/architecture/leases/>.

use std::{sync::Arc, time::Duration};

use k8s_openapi::{
    api::coordination::v1::{Lease as LeaseObject, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff::Timestamp,
};
use kube::{
    Api, Client, Error,
    api::{ObjectMeta, PostParams},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};

/// The Lease, as one replica sees it.
pub struct Leader {
    api: Api<LeaseObject>,
    name: String,
    /// Of this replica.
    identity: String,
    /// Until then this replica leads.
    until: watch::Sender<Option<Instant>>,
}

/// A replica's right to write; it ends by itself.
#[derive(Clone)]
pub struct Term(watch::Receiver<Option<Instant>>);

const RENEW: Duration = Duration::from_secs(2);
const EXPIRY: Duration = Duration::from_secs(10);
/// From the start of a renewal that succeeded.
const HELD: Duration = Duration::from_secs(6);
/// For one attempt.
const TIME_LIMIT: Duration = Duration::from_secs(3);

/// What a replica does with the Lease that it sees.
#[derive(Debug, PartialEq, Eq)]
enum Move {
    Renew,
    Take,
    Wait,
}

/// What is the same for as long as nobody renews.
type Seen = (Option<String>, Option<MicroTime>);

impl Leader {
    /// A replica called `identity`, which asks for the Lease of that name as soon as [`Leader::campaign`] runs.
    pub fn new(client: Client, namespace: &str, name: &str, identity: &str) -> Arc<Leader> {
        Arc::new(Leader {
            api: Api::namespaced(client, namespace),
            name: name.to_owned(),
            identity: identity.to_owned(),
            until: watch::Sender::new(None),
        })
    }

    /// Tells when this replica leads.
    pub fn term(&self) -> Term {
        Term(self.until.subscribe())
    }

    /// Takes the Lease when it is free, and renews it. Never ends.
    pub async fn campaign(&self) {
        let mut seen: Option<(Seen, Instant)> = None;
        let mut failed = false;
        loop {
            let start = Instant::now();
            let outcome = timeout(TIME_LIMIT, self.attempt(&mut seen)).await;
            match outcome
                .map_err(|_| format!("no answer within {TIME_LIMIT:?}"))
                .and_then(|outcome| outcome.map_err(|error| error.to_string()))
            {
                Ok(leads) => {
                    failed = false;
                    self.until.send_replace(leads.then(|| start + HELD));
                }
                // What was held is held until its time is over.
                Err(error) => {
                    if !std::mem::replace(&mut failed, true) {
                        tracing::warn!(%error, "Lease {} cannot be read or written; it is tried again", self.name);
                    }
                }
            }
            sleep(RENEW).await;
        }
    }

    /// Does this replica lead now?
    async fn attempt(&self, seen: &mut Option<(Seen, Instant)>) -> Result<bool, Error> {
        let Some(mut lease) = self.api.get_opt(&self.name).await? else {
            let metadata = ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() };
            let lease = LeaseObject { metadata, spec: Some(self.taken(None)) };
            return taken(self.api.create(&PostParams::default(), &lease).await);
        };
        let spec = lease.spec.take().unwrap_or_default();
        let now = Instant::now();
        let since = observe(seen, &spec, now);
        lease.spec = Some(match next(&spec, &self.identity, now.duration_since(since)) {
            Move::Wait => return Ok(false),
            Move::Take => self.taken(Some(&spec)),
            Move::Renew => LeaseSpec { renew_time: Some(MicroTime(Timestamp::now())), ..spec },
        });
        // The object carries its version: if somebody else was faster, this is a conflict.
        taken(self.api.replace(&self.name, &PostParams::default(), &lease).await)
    }

    fn taken(&self, before: Option<&LeaseSpec>) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            acquire_time: Some(now.clone()),
            renew_time: Some(now),
            lease_duration_seconds: i32::try_from(EXPIRY.as_secs()).ok(),
            lease_transitions: Some(
                before.map_or(0, |spec| spec.lease_transitions.unwrap_or(0).saturating_add(1)),
            ),
            ..LeaseSpec::default()
        }
    }

    /// Gives the Lease back, so that another replica need not wait for its end. Nothing may be written afterwards.
    pub async fn release(&self) {
        if self.until.send_replace(None).is_none_or(|until| until < Instant::now()) {
            return;
        }
        let released = async {
            let mut lease = self.api.get(&self.name).await?;
            let Some(spec) = lease.spec.as_mut() else { return Ok(()) };
            if spec.holder_identity.as_deref() == Some(&self.identity) {
                spec.holder_identity = None;
                self.api.replace(&self.name, &PostParams::default(), &lease).await?;
            }
            Ok::<(), Error>(())
        };
        if !matches!(timeout(TIME_LIMIT, released).await, Ok(Ok(()))) {
            tracing::warn!("Lease {} was not given back; another replica waits for its end", self.name);
        }
    }
}

impl Term {
    /// May this replica begin to write now?
    pub fn holds(&self) -> bool {
        self.0.borrow().is_some_and(|until| Instant::now() < until)
    }

    /// Waits until it may.
    pub async fn begins(&mut self) {
        while !self.holds() {
            if self.0.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// Waits until it may not any more.
    pub async fn ends(&mut self) {
        loop {
            let Some(until) = *self.0.borrow_and_update() else { return };
            tokio::select! {
                () = tokio::time::sleep_until(until) => if !self.holds() { return },
                changed = self.0.changed() => if changed.is_err() { return },
            }
        }
    }
}

/// A conflict means that somebody else was faster.
fn taken(outcome: Result<LeaseObject, Error>) -> Result<bool, Error> {
    match outcome {
        Ok(_) => Ok(true),
        Err(Error::Api(status)) if status.code == 409 => Ok(false),
        Err(error) => Err(error),
    }
}

/// Since when this replica sees the Lease as it is.
fn observe(seen: &mut Option<(Seen, Instant)>, spec: &LeaseSpec, now: Instant) -> Instant {
    let is = (spec.holder_identity.clone(), spec.renew_time.clone());
    match seen {
        Some((was, since)) if *was == is => *since,
        _ => {
            *seen = Some((is, now));
            now
        }
    }
}

fn next(spec: &LeaseSpec, identity: &str, unchanged: Duration) -> Move {
    match spec.holder_identity.as_deref() {
        None | Some("") => Move::Take,
        Some(holder) if holder == identity => Move::Renew,
        Some(_) if unchanged >= EXPIRY => Move::Take,
        Some(_) => Move::Wait,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held_by(holder: &str) -> LeaseSpec {
        LeaseSpec { holder_identity: Some(holder.to_owned()), ..LeaseSpec::default() }
    }

    #[test]
    fn a_lease_is_renewed_by_its_holder_and_taken_when_it_is_free_or_over() {
        let (fresh, over) = (Duration::from_secs(9), EXPIRY);
        for (spec, unchanged, expected) in [
            (held_by("a"), fresh, Move::Renew),
            (held_by("a"), over, Move::Renew),
            (held_by("b"), fresh, Move::Wait),
            (held_by("b"), over, Move::Take),
            (held_by(""), fresh, Move::Take),
            (LeaseSpec::default(), Duration::ZERO, Move::Take),
        ] {
            assert_eq!(next(&spec, "a", unchanged), expected, "{spec:?} {unchanged:?}");
        }
    }

    #[test]
    fn a_renewal_begins_the_wait_anew() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut seen = None;
        let mut spec = held_by("b");
        assert_eq!(observe(&mut seen, &spec, at(0)), at(0));
        assert_eq!(observe(&mut seen, &spec, at(9)), at(0));
        spec.renew_time = Some(MicroTime(Timestamp::UNIX_EPOCH));
        assert_eq!(observe(&mut seen, &spec, at(11)), at(11));
        assert_eq!(observe(&mut seen, &spec, at(20)), at(11));
    }

    #[tokio::test]
    async fn a_term_ends_by_itself_unless_it_is_renewed() {
        let until = watch::Sender::new(None);
        let mut term = Term(until.subscribe());
        assert!(!term.holds());
        let start = Instant::now();
        let (first, second) = (start + Duration::from_millis(200), start + Duration::from_millis(400));
        until.send_replace(Some(first));
        term.begins().await;
        until.send_replace(Some(second));
        term.ends().await;
        assert!(Instant::now() >= second && !term.holds());
        until.send_replace(Some(Instant::now() + HELD));
        assert!(term.holds());
        until.send_replace(None);
        term.ends().await;
    }

    #[test]
    fn a_holder_has_stopped_writing_before_another_takes_over() {
        assert!(HELD + crate::catalog::TIME_LIMIT < EXPIRY);
    }
}
