//! Connections on which nobody has said anything yet, or not enough to tell what they are: how many may wait at a time,
//! from one source and altogether, so that a source that only opens connections keeps nobody else out. Who speaks at
//! once is never counted here.

use std::{
    collections::HashMap,
    future::Future,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::timeout;

use crate::model::{Failed, Failure, Result};

/// Silent connections of one source, where the cap of connections allows as many.
const OF_A_SOURCE: usize = 256;
/// So many at least, however low the cap is.
const AT_LEAST: usize = 16;

/// The silent connections of all workers.
#[derive(Debug)]
pub struct SilentLimit {
    of_a_source: usize,
    of_all: usize,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    by_source: HashMap<IpAddr, usize>,
    all: usize,
}

impl SilentLimit {
    /// At most half of `connections`, the cap of a direction, and a quarter from one source, which is never more than
    /// 256.
    pub fn new(connections: usize) -> Arc<Self> {
        Arc::new(SilentLimit {
            of_a_source: (connections / 4).clamp(AT_LEAST, OF_A_SOURCE),
            of_all: (connections / 2).max(AT_LEAST),
            waiting: Mutex::default(),
        })
    }

    /// Waits for somebody to speak on a connection from this address.
    ///
    /// # Errors
    /// `overloaded` where too many wait already.
    pub async fn wait<T>(&self, client: IpAddr, speaking: impl Future<Output = T>) -> Result<T> {
        let _silent = self.enter(client)?;
        Ok(speaking.await)
    }

    /// The same for what mostly comes at once: it is counted only from then on.
    ///
    /// # Errors
    /// `overloaded` where it does not come at once, and too many wait already.
    pub async fn wait_beyond<T>(
        &self,
        at_once: Duration,
        client: IpAddr,
        mut speaking: impl Future<Output = T> + Unpin,
    ) -> Result<T> {
        match timeout(at_once, &mut speaking).await {
            Ok(spoken) => Ok(spoken),
            Err(_) => self.wait(client, speaking).await,
        }
    }

    fn enter(&self, client: IpAddr) -> Result<Silent<'_>> {
        let source = source_of(client);
        let mut waiting = self.waiting();
        let of_this = waiting.by_source.get(&source).copied().unwrap_or(0);
        if of_this >= self.of_a_source || waiting.all >= self.of_all {
            let detail = format!(
                "{of_this} connections from {source} and {} of all wait without a word, or stopped within their first; more are \
                 not taken",
                waiting.all
            );
            return Err(Failed::new(Failure::Overloaded, detail));
        }
        waiting.by_source.insert(source, of_this + 1);
        waiting.all += 1;
        Ok(Silent { limit: self, source })
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One of those that wait.
struct Silent<'a> {
    limit: &'a SilentLimit,
    source: IpAddr,
}

impl Drop for Silent<'_> {
    fn drop(&mut self) {
        let mut waiting = self.limit.waiting();
        waiting.all -= 1;
        if let Some(of_this) = waiting.by_source.get_mut(&self.source) {
            *of_this -= 1;
            if *of_this == 0 {
                waiting.by_source.remove(&self.source);
            }
        }
    }
}

/// A host may have a whole /64 of IPv6 addresses: they count as one.
pub(super) fn source_of(client: IpAddr) -> IpAddr {
    match client.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use futures_util::FutureExt;

    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// Begins to wait, and is still there.
    fn waits<'a>(limit: &'a SilentLimit, from: &str) -> Option<impl Future<Output = Result<()>> + use<'a>> {
        let mut waiting = Box::pin(limit.wait(address(from), pending::<()>()));
        waiting.as_mut().now_or_never().is_none().then_some(waiting)
    }

    #[test]
    fn one_source_leaves_room_for_others_and_all_leave_room_for_those_who_speak() {
        let limit = SilentLimit::new(100);
        let held: Vec<_> = (0..25).map(|_| waits(&limit, "10.0.0.1").expect("a place")).collect();
        assert!(waits(&limit, "10.0.0.1").is_none());
        assert!(waits(&limit, "::ffff:10.0.0.1").is_none(), "the same source");
        let of_one_host: Vec<_> =
            (0..25).map(|number| waits(&limit, &format!("2001:db8::{number:x}")).expect("a place")).collect();
        assert!(waits(&limit, "2001:db8::ffff").is_none(), "the same host");
        assert!(waits(&limit, "10.0.0.2").is_none(), "half of all wait");
        drop(of_one_host);
        assert!(waits(&limit, "10.0.0.2").is_some());
        drop(held);
        assert!(waits(&limit, "10.0.0.1").is_some());
        assert!(limit.waiting().by_source.is_empty() && limit.waiting().all == 0);
        assert!(limit.wait(address("10.0.0.1"), ready(())).now_or_never().unwrap().is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn what_comes_at_once_is_not_counted_and_what_does_not_is() {
        let limit = SilentLimit::new(0);
        let held: Vec<_> = (0..AT_LEAST).map(|_| waits(&limit, "10.0.0.1").expect("a place")).collect();
        let at_once = Duration::from_millis(40);
        let comes = |after| Box::pin(tokio::time::sleep(after));
        let client = address("10.0.0.1");
        assert!(limit.wait_beyond(at_once, client, comes(at_once / 2)).await.is_ok());
        let late = limit.wait_beyond(at_once, client, comes(at_once * 2)).await;
        assert_eq!(late.unwrap_err().failure, Failure::Overloaded);
        drop(held);
        assert!(limit.wait_beyond(at_once, client, comes(at_once * 2)).await.is_ok());
        assert_eq!(limit.waiting().all, 0);
    }

    #[test]
    fn a_source_has_its_bound_however_many_connections_there_may_be() {
        let limit = SilentLimit::new(20_000);
        let held: Vec<_> = (0..OF_A_SOURCE).map(|_| waits(&limit, "10.0.0.1").expect("a place")).collect();
        assert!(waits(&limit, "10.0.0.1").is_none() && waits(&limit, "10.0.0.2").is_some());
        drop(held);
    }
}
