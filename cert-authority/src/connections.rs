//! The connections of workloads: how many may stand, which of them are idle, and which one gives way.
//!
//! Whoever connects has proven nothing yet, so a connection without a request in flight is worth nothing: it has
//! little time for its first request, is closed after a while without one, and gives way to a newcomer where all
//! places are taken. One with a request in flight is never closed here.

use std::{
    collections::HashMap,
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    sync::oneshot,
    time::{Instant, Sleep, sleep},
};

use crate::metrics::Metrics;

/// From the accept to the first complete request: the TLS handshake, the HTTP/2 preface and a CSR.
const FIRST_REQUEST: Duration = Duration::from_secs(10);
/// Without a request in flight.
const IDLE: Duration = Duration::from_secs(60);

/// All connections that stand.
pub struct Connections {
    maximum: usize,
    metrics: Arc<Metrics>,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    last_number: u64,
    standing: HashMap<u64, Standing>,
}

struct Standing {
    activity: Arc<Activity>,
    give_way: oneshot::Sender<()>,
}

impl Connections {
    /// None stands yet.
    pub fn new(maximum: usize, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Connections { maximum, metrics, table: Mutex::default() })
    }

    /// A place for a new connection. Where all are taken, the connection that has been idle for longest gives way;
    /// none where all have requests in flight.
    pub fn enter(self: &Arc<Self>) -> Option<Place> {
        let mut table = lock(&self.table);
        if table.standing.len() >= self.maximum && !table.make_room() {
            self.metrics.dropped.get_or_create(&[("reason", "too_many")]).inc();
            return None;
        }
        table.last_number += 1;
        let number = table.last_number;
        let activity =
            Arc::new(Activity(Mutex::new(State { asked: false, in_flight: 0, since: Instant::now() })));
        let (give_way, displaced) = oneshot::channel();
        table.standing.insert(number, Standing { activity: activity.clone(), give_way });
        self.metrics.connections.inc();
        let timer = Box::pin(sleep(FIRST_REQUEST));
        Some(Place { connections: self.clone(), number, activity, displaced, timer, ended: false })
    }
}

impl Table {
    fn make_room(&mut self) -> bool {
        let idle =
            self.standing.iter().filter_map(|(number, one)| Some((one.activity.idle_since()?, *number)));
        let Some((_, longest)) = idle.min() else { return false };
        if let Some(standing) = self.standing.remove(&longest) {
            let _ = standing.give_way.send(());
        }
        true
    }
}

/// The place of one connection, from its accept to its end.
pub struct Place {
    connections: Arc<Connections>,
    number: u64,
    activity: Arc<Activity>,
    displaced: oneshot::Receiver<()>,
    timer: Pin<Box<Sleep>>,
    ended: bool,
}

impl Place {
    /// What the requests of this connection tell of.
    pub fn activity(&self) -> &Arc<Activity> {
        &self.activity
    }

    /// Ready when the connection is to be closed, with the reason.
    pub fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<io::Error> {
        if self.ended {
            return Poll::Ready(io::ErrorKind::TimedOut.into());
        }
        if Pin::new(&mut self.displaced).poll(context).is_ready() {
            return Poll::Ready(self.end("displaced"));
        }
        while self.timer.as_mut().poll(context).is_ready() {
            let now = Instant::now();
            match self.activity.end() {
                Some((end, reason)) if end <= now => return Poll::Ready(self.end(reason)),
                Some((end, _)) => self.timer.as_mut().reset(end),
                None => self.timer.as_mut().reset(now + IDLE),
            }
        }
        Poll::Pending
    }

    fn end(&mut self, reason: &'static str) -> io::Error {
        self.ended = true;
        self.connections.metrics.dropped.get_or_create(&[("reason", reason)]).inc();
        io::Error::new(io::ErrorKind::TimedOut, reason)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.connections.metrics.connections.dec();
        lock(&self.connections.table).standing.remove(&self.number);
    }
}

/// What a connection is at.
#[derive(Debug)]
pub struct Activity(Mutex<State>);

#[derive(Debug)]
struct State {
    /// Has a request come?
    asked: bool,
    in_flight: u32,
    /// When the last request ended, or the connection began.
    since: Instant,
}

impl Activity {
    /// A request is in flight until the answer is dropped.
    pub fn begin(self: &Arc<Self>) -> InFlight {
        let mut state = lock(&self.0);
        state.asked = true;
        state.in_flight += 1;
        InFlight(self.clone())
    }

    fn idle_since(&self) -> Option<Instant> {
        let state = lock(&self.0);
        (state.in_flight == 0).then_some(state.since)
    }

    /// When it is to be closed if nothing comes, and why; none while a request is in flight.
    fn end(&self) -> Option<(Instant, &'static str)> {
        let state = lock(&self.0);
        match (state.in_flight, state.asked) {
            (0, false) => Some((state.since + FIRST_REQUEST, "timeout")),
            (0, true) => Some((state.since + IDLE, "idle")),
            _ => None,
        }
    }
}

/// One request in flight.
#[derive(Debug)]
pub struct InFlight(Arc<Activity>);

impl Drop for InFlight {
    fn drop(&mut self) {
        let mut state = lock(&self.0.0);
        state.in_flight -= 1;
        state.since = Instant::now();
    }
}

fn lock<Value>(mutex: &Mutex<Value>) -> MutexGuard<'_, Value> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::time::{advance, timeout};

    use super::*;

    async fn reason(place: &mut Place) -> Option<String> {
        let ended = timeout(Duration::ZERO, poll_fn(|context| place.poll_end(context))).await;
        ended.ok().map(|error| error.to_string())
    }

    fn connections(maximum: usize) -> (Arc<Connections>, Arc<Metrics>) {
        let metrics = Arc::new(Metrics::default());
        (Connections::new(maximum, metrics.clone()), metrics)
    }

    #[tokio::test(start_paused = true)]
    async fn the_longest_idle_gives_way_and_one_with_a_request_never_does() {
        let (connections, metrics) = connections(3);
        let mut busy = connections.enter().unwrap();
        let request = busy.activity().begin();
        advance(Duration::from_secs(1)).await;
        let mut first = connections.enter().unwrap();
        advance(Duration::from_secs(1)).await;
        let mut second = connections.enter().unwrap();
        let mut third = connections.enter().unwrap();
        assert_eq!(reason(&mut first).await.as_deref(), Some("displaced"));
        assert!(
            poll_fn(|context| first.poll_end(context)).await.kind() == io::ErrorKind::TimedOut,
            "still ended"
        );
        assert_eq!((reason(&mut busy).await, reason(&mut second).await), (None, None));

        let requests = (second.activity().begin(), third.activity().begin());
        assert!(connections.enter().is_none(), "nobody is idle");
        drop(request);
        assert!(connections.enter().is_some());
        assert_eq!(reason(&mut busy).await.as_deref(), Some("displaced"));
        assert_eq!((reason(&mut second).await, reason(&mut third).await), (None, None));
        drop((busy, first, second, third, requests));
        assert_eq!(metrics.connections.get(), 0);
        assert!(metrics.render().contains(r#"weft_ca_dropped_total{reason="too_many"} 1"#));
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_request_has_little_time_and_idle_connections_are_closed() {
        let (connections, _) = connections(9);
        let (mut silent, mut asking) = (connections.enter().unwrap(), connections.enter().unwrap());
        let request = asking.activity().begin();
        advance(FIRST_REQUEST - Duration::from_millis(5)).await;
        assert_eq!(reason(&mut silent).await, None);
        advance(Duration::from_millis(10)).await;
        assert_eq!(reason(&mut silent).await.as_deref(), Some("timeout"));

        // A stream of the bundle stands for as long as it likes.
        advance(IDLE * 5).await;
        assert_eq!(reason(&mut asking).await, None);
        drop(request);
        advance(IDLE - Duration::from_millis(5)).await;
        assert_eq!(reason(&mut asking).await, None);
        advance(Duration::from_millis(10)).await;
        assert_eq!(reason(&mut asking).await.as_deref(), Some("idle"));
    }
}
