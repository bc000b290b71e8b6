//! The HTTP connections from outside: which of them are idle, and which are closed where a further client finds the cap
//! reached. Idle ones of the source that has most go first, the longest idle of them, so that one client with thousands
//! of connections keeps nobody else out. Touched when a connection begins and ends, and when the cap is reached; never
//! by a request.

use std::{
    cmp::Reverse,
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::oneshot, time::Instant};

use super::silent::source_of;
use crate::http::Activity;

/// A connection that has been idle for less is in use: its client only pauses between two requests.
const IDLE: Duration = Duration::from_secs(1);
/// To choose takes a look at all of them. So of many idle connections some are closed at once: one of so many,
const ONE_OF: usize = 256;
/// and not more than this.
const AT_ONCE: usize = 64;

/// Where none was idle, nobody looks again for this long: a flood of clients must not cost a look at all for each.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// The HTTP connections of all workers.
#[derive(Debug, Default)]
pub struct IdleConnections(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    last_number: u64,
    /// When none was idle.
    looked_in_vain: Option<Instant>,
    open: HashMap<u64, Open>,
}

#[derive(Debug)]
struct Open {
    source: IpAddr,
    activity: Activity,
    close: oneshot::Sender<()>,
}

impl IdleConnections {
    /// A connection begins; it is one of them until the registration is dropped.
    pub fn register(self: &Arc<Self>, client: IpAddr, activity: Activity) -> Registration {
        let (close, closed) = oneshot::channel();
        let mut table = self.table();
        table.last_number += 1;
        let number = table.last_number;
        table.open.insert(number, Open { source: source_of(client), activity, close });
        Registration { connections: self.clone(), number, closed }
    }

    /// Tells idle connections to close: of a few one, of many some. False where none is idle.
    pub(super) fn make_room(&self) -> bool {
        let now = Instant::now();
        let mut table = self.table();
        if table.looked_in_vain.is_some_and(|then| now.saturating_duration_since(then) < LOOK_AGAIN) {
            return false;
        }
        let idle = table.open.iter().filter_map(|(number, open)| {
            let since = open.activity.idle_since()?;
            (now.saturating_duration_since(since) >= IDLE).then_some((open.source, since, *number))
        });
        let chosen = choose(idle.collect());
        for number in &chosen {
            if let Some(open) = table.open.remove(number) {
                // It may have ended meanwhile.
                let _ = open.close.send(());
            }
        }
        table.looked_in_vain = chosen.is_empty().then_some(now);
        !chosen.is_empty()
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// As if one after the other were taken from the source that has most by then, the longest idle first.
fn choose(mut idle: Vec<(IpAddr, Instant, u64)>) -> Vec<u64> {
    let count = (idle.len() / ONE_OF).clamp(1, AT_ONCE).min(idle.len());
    idle.sort_unstable_by_key(|(source, since, _)| (*source, Reverse(*since)));
    let mut ranked = Vec::with_capacity(idle.len());
    let mut before = None;
    let mut of_source = 0;
    for (source, since, number) in idle {
        of_source = if before == Some(source) { of_source + 1 } else { 1 };
        before = Some(source);
        ranked.push((Reverse(of_source), since, number));
    }
    if count < ranked.len() {
        ranked.select_nth_unstable(count);
    }
    ranked.into_iter().take(count).map(|(.., number)| number).collect()
}

/// One connection among them.
#[derive(Debug)]
pub struct Registration {
    connections: Arc<IdleConnections>,
    number: u64,
    closed: oneshot::Receiver<()>,
}

impl Registration {
    /// Resolves when the connection is to make room for another.
    pub async fn closed(&mut self) {
        if (&mut self.closed).await.is_err() {
            // Only what is told to close leaves the table.
            std::future::pending().await
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.connections.table().open.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use tokio::time::advance;

    use super::*;

    fn register(connections: &Arc<IdleConnections>, client: &str) -> (Registration, Activity) {
        let activity = Activity::new();
        (connections.register(client.parse().unwrap(), activity.clone()), activity)
    }

    fn is_closed((registration, _): &mut (Registration, Activity)) -> bool {
        registration.closed().now_or_never().is_some()
    }

    #[tokio::test(start_paused = true)]
    async fn the_longest_idle_of_the_source_that_has_most_is_closed() {
        let connections = Arc::new(IdleConnections::default());
        let mut alone = register(&connections, "10.0.0.1");
        let mut of_one = Vec::new();
        for address in ["2001:db8::1", "2001:db8::2", "2001:db8::3"] {
            advance(Duration::from_secs(1)).await;
            of_one.push(register(&connections, address));
        }
        advance(IDLE).await;
        of_one[0].1.begin();
        let mut closed = |order: &[usize]| {
            for index in order {
                assert!(connections.make_room());
                let now: Vec<usize> = (0..3).filter(|index| is_closed_once(&mut of_one[*index])).collect();
                assert_eq!(now, [*index]);
            }
        };
        // The first has a request in flight, and the source has two idle ones beside it.
        closed(&[1]);
        // Each has one now, and the other source's has been idle for longer.
        assert!(connections.make_room() && is_closed(&mut alone));
        closed(&[2]);
        assert!(!connections.make_room(), "a request is in flight");
        of_one[0].1.end(Instant::now() - IDLE);
        assert!(!connections.make_room(), "nobody looks again so soon");
        of_one[0].1.end(Instant::now());
        advance(LOOK_AGAIN).await;
        assert!(!connections.make_room(), "just used");
        advance(IDLE).await;
        assert!(connections.make_room() && is_closed(&mut of_one[0]));
        drop(of_one);
        let ended = register(&connections, "10.0.0.1");
        drop(ended);
        assert!(connections.table().open.is_empty());
    }

    fn is_closed_once(one: &mut (Registration, Activity)) -> bool {
        !one.0.closed.is_terminated() && is_closed(one)
    }

    #[tokio::test(start_paused = true)]
    async fn of_many_some_are_closed_at_once_and_every_other_source_keeps_its_own() {
        let connections = Arc::new(IdleConnections::default());
        let mut others: Vec<_> =
            (1..=100).map(|last| register(&connections, &format!("10.0.0.{last}"))).collect();
        let mut of_one: Vec<_> = (0..1500).map(|_| register(&connections, "10.1.0.1")).collect();
        advance(IDLE).await;
        assert!(connections.make_room());
        assert_eq!(of_one.iter_mut().filter_map(|one| is_closed(one).then_some(())).count(), 6);
        assert!(!others.iter_mut().any(is_closed));
    }
}
