//! How long an HTTP/1 client may be waited for: long between requests, briefly once a head has begun. hyper knows
//! one time for both and asks its timer for it when it begins to wait; this timer gives the idle time, and cuts
//! it short at the first byte that comes. A client that trickles its head (slowloris) thus gets no more time
//! than one that sends half of it and stops. RFC 9112 9.5 leaves both times to us.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant as StdInstant},
};

use hyper::rt::{Sleep, Timer};
use tokio::time::Instant;

/// The timer of one connection, for hyper's `header_read_timeout`, which must be set to the idle time.
#[derive(Debug, Clone)]
pub(super) struct HeadTimer {
    /// Bytes read from the client.
    read: Arc<AtomicU64>,
    /// The same when the present wait began.
    before: Arc<AtomicU64>,
    head_timeout: Duration,
}

impl HeadTimer {
    pub(super) fn new(read: Arc<AtomicU64>, head_timeout: Duration) -> Self {
        HeadTimer { read, before: Arc::default(), head_timeout }
    }

    /// Has the client sent nothing since it was last waited for?
    pub(super) fn is_idle(&self) -> bool {
        self.read.load(Ordering::Relaxed) == self.before.load(Ordering::Relaxed)
    }
}

impl Timer for HeadTimer {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Sleep>> {
        self.before.store(self.read.load(Ordering::Relaxed), Ordering::Relaxed);
        let sleep = Box::pin(tokio::time::sleep(duration));
        Box::pin(HeadSleep { timer: self.clone(), sleep, begun: false })
    }

    fn sleep_until(&self, deadline: StdInstant) -> Pin<Box<dyn Sleep>> {
        self.sleep(deadline.saturating_duration_since(self.now()))
    }

    fn now(&self) -> StdInstant {
        Instant::now().into_std()
    }
}

struct HeadSleep {
    timer: HeadTimer,
    sleep: Pin<Box<tokio::time::Sleep>>,
    /// The head has begun.
    begun: bool,
}

impl Sleep for HeadSleep {}

impl Future for HeadSleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if !self.begun && !self.timer.is_idle() {
            self.begun = true;
            let end = Instant::now() + self.timer.head_timeout;
            if end < self.sleep.deadline() {
                self.sleep.as_mut().reset(end);
            }
        }
        self.sleep.as_mut().poll(context)
    }
}
