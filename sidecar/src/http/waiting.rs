//! How long an HTTP/1 client may be waited for: long between requests, briefly once a head has begun. hyper knows
//! one time for both and asks its timer for it when it begins to wait; this timer gives the idle time, and cuts
//! it short at the first byte that comes. A client that trickles its head (slowloris) thus gets no more time
//! than one that sends half of it and stops. RFC 9112 9.5 leaves both times to us.
//!
//! hyper asks anew for each request. A timer of tokio's for each would cost more than the rest of the waiting, so the
//! connection has one ([`HeadTimer::keep_time`]), which is set again only when it went off, or is late.

use std::{
    future::Future,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant as StdInstant},
};

use hyper::rt::{Sleep, Timer};
use tokio::time::{Instant, sleep_until};

use super::Activity;

/// The timer of one connection, for hyper's `header_read_timeout`, which must be set to the idle time.
#[derive(Debug, Clone)]
pub(super) struct HeadTimer(Arc<Wait>);

/// What the timer of a connection and its present wait know. All is in one task.
#[derive(Debug)]
struct Wait {
    /// Bytes read from the client.
    read: Arc<AtomicU64>,
    /// The same when the present wait began.
    before: AtomicU64,
    head_timeout: Duration,
    idle_timeout: Duration,
    activity: Activity,
    /// The end of the present wait, in nanoseconds from `start`; [`NEVER`] if there is none.
    end: AtomicU64,
    start: Instant,
    /// Which wait is the present one.
    number: AtomicU64,
}

const NEVER: u64 = u64::MAX;
/// No wait is longer: some 30 years.
const LONGEST: Duration = Duration::from_secs(1_000_000_000);

impl HeadTimer {
    pub(super) fn new(
        read: Arc<AtomicU64>,
        head_timeout: Duration,
        idle_timeout: Duration,
        activity: Activity,
    ) -> Self {
        let start = Instant::now();
        HeadTimer(Arc::new(Wait {
            read,
            before: 0.into(),
            head_timeout,
            idle_timeout,
            activity,
            end: NEVER.into(),
            start,
            number: 0.into(),
        }))
    }

    /// Has the client sent nothing since it was last waited for?
    pub(super) fn is_idle(&self) -> bool {
        self.0.read.load(Ordering::Relaxed) == self.0.before.load(Ordering::Relaxed)
    }

    /// Wakes the task when the present wait is over, so that hyper hears of it. For the task that serves the
    /// connection, behind the connection; never resolves.
    pub(super) async fn keep_time(&self) {
        let mut alarm = pin!(sleep_until(self.0.start + LONGEST));
        std::future::poll_fn(|context| {
            let end = self.0.end();
            let rings = alarm.is_elapsed();
            if rings || end.is_some_and(|end| end < alarm.deadline()) {
                // hyper has just looked; what has ended since it will see when it looks again.
                let soonest = Instant::now() + Duration::from_millis(1);
                alarm.as_mut().reset(end.map_or(self.0.start + LONGEST, |end| end.max(soonest)));
            }
            alarm.as_mut().poll(context)
        })
        .await
    }
}

impl Wait {
    fn end(&self) -> Option<Instant> {
        let end = self.end.load(Ordering::Relaxed);
        (end != NEVER).then(|| self.start + Duration::from_nanos(end))
    }

    fn set_end(&self, end: Instant) {
        let nanoseconds = end.saturating_duration_since(self.start).min(LONGEST).as_nanos();
        self.end.store(nanoseconds as u64, Ordering::Relaxed);
    }
}

impl Timer for HeadTimer {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Sleep>> {
        self.sleep_until((Instant::now() + duration).into_std())
    }

    fn sleep_until(&self, deadline: StdInstant) -> Pin<Box<dyn Sleep>> {
        let wait = self.0.clone();
        wait.before.store(wait.read.load(Ordering::Relaxed), Ordering::Relaxed);
        wait.set_end(deadline.into());
        // hyper has just added one to the other, and the clock need not be asked again.
        let now = deadline.checked_sub(wait.idle_timeout).map_or_else(Instant::now, Instant::from);
        wait.activity.end(now);
        let number = wait.number.fetch_add(1, Ordering::Relaxed) + 1;
        Box::pin(HeadSleep { wait, number, begun: false })
    }

    fn now(&self) -> StdInstant {
        Instant::now().into_std()
    }
}

/// One wait for one head.
struct HeadSleep {
    wait: Arc<Wait>,
    number: u64,
    /// The head has begun.
    begun: bool,
}

impl Sleep for HeadSleep {}

impl Future for HeadSleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        let Some(mut end) = self.wait.end() else { return Poll::Pending };
        let now = Instant::now();
        if !self.begun && self.wait.read.load(Ordering::Relaxed) != self.wait.before.load(Ordering::Relaxed) {
            self.begun = true;
            end = end.min(now + self.wait.head_timeout);
            self.wait.set_end(end);
        }
        if now >= end { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for HeadSleep {
    fn drop(&mut self) {
        // The next wait may have begun before this one is dropped.
        if self.wait.number.load(Ordering::Relaxed) == self.number {
            self.wait.end.store(NEVER, Ordering::Relaxed);
            self.wait.activity.begin();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    const IDLE: Duration = Duration::from_secs(3600);
    const HEAD: Duration = Duration::from_secs(30);

    /// As the server of a connection waits: hyper's sleep first, then the one timer.
    async fn ends(timer: &HeadTimer, sleep: &mut Pin<Box<dyn Sleep>>) {
        tokio::select! {
            biased;
            () = sleep => {}
            () = timer.keep_time() => unreachable!(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_may_be_idle_for_long_but_not_within_a_head() {
        let read = Arc::new(AtomicU64::new(0));
        let timer = HeadTimer::new(read.clone(), HEAD, IDLE, Activity::new());
        let begin = Instant::now();
        ends(&timer, &mut timer.sleep(IDLE)).await;
        assert!(timer.is_idle() && begin.elapsed() >= IDLE && begin.elapsed() < IDLE + HEAD);

        let begin = Instant::now();
        let mut sleep = timer.sleep(IDLE);
        assert!(ends(&timer, &mut sleep).now_or_never().is_none());
        tokio::time::advance(HEAD * 2).await;
        read.fetch_add(1, Ordering::Relaxed);
        ends(&timer, &mut sleep).await;
        assert!(!timer.is_idle() && begin.elapsed() >= HEAD * 3 && begin.elapsed() < HEAD * 4);
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_that_takes_the_place_of_another_ends() {
        let timer = HeadTimer::new(Arc::default(), HEAD, IDLE, Activity::new());
        let begin = Instant::now();
        let mut sleep = timer.sleep(IDLE);
        timer.reset(&mut sleep, (begin + IDLE * 2).into_std());
        ends(&timer, &mut sleep).await;
        assert!(begin.elapsed() >= IDLE * 2 && begin.elapsed() < IDLE * 3);
    }
}
