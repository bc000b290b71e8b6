//! A small stock of sockets that were made inside a namespace, so that a connection to the app need not wait for
//! the helper. Bounded: it holds a few more than there are connections waiting for one. Makes no sockets itself.

use std::{
    collections::VecDeque,
    io,
    os::fd::OwnedFd,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::sync::Semaphore;

use super::message::MOST_SOCKETS;

/// When fewer than this are there for nobody in particular, more are asked for.
const LOW: usize = 8;
/// Up to this many.
const FULL: usize = 24;

/// The stock of one address family.
#[derive(Debug)]
pub(super) struct Stock {
    /// One permit for each entry of `shelf`.
    arrived: Semaphore,
    shelf: Mutex<Shelf>,
    waiting: AtomicUsize,
}

#[derive(Debug, Default)]
struct Shelf {
    sockets: VecDeque<io::Result<OwnedFd>>,
    asked: usize,
}

impl Stock {
    pub(super) fn new() -> Self {
        Stock {
            arrived: Semaphore::new(0),
            shelf: Mutex::new(Shelf::default()),
            waiting: AtomicUsize::new(0),
        }
    }

    /// Takes a socket. `ask` is called with a number of sockets to be made, if more are wanted.
    ///
    /// # Errors
    /// That of `ask`; that of the helper, which could not make one; `BrokenPipe` after [`Stock::close`].
    pub(super) async fn take(&self, ask: impl Fn(usize) -> io::Result<()>) -> io::Result<OwnedFd> {
        let _waiting = Waiting::new(&self.waiting);
        let more = self.lock().more(self.waiting.load(Ordering::Relaxed));
        if more > 0 {
            ask(more)?;
        }
        let gone = || io::Error::new(io::ErrorKind::BrokenPipe, "the namespace of the app is gone");
        self.arrived.acquire().await.map_err(|_| gone())?.forget();
        self.lock().sockets.pop_front().unwrap_or_else(|| Err(gone()))
    }

    /// Sockets came, and for `missing` more an error.
    pub(super) fn put(&self, sockets: Vec<OwnedFd>, missing: usize, errno: i32) {
        let mut shelf = self.lock();
        let count = sockets.len() + missing;
        shelf.asked = shelf.asked.saturating_sub(count);
        shelf.sockets.extend(sockets.into_iter().map(Ok));
        // an error for those who wait and for whom there is no socket, and none for those who come later
        let unserved = self.waiting.load(Ordering::Relaxed).saturating_sub(shelf.sockets.len());
        let failed = missing.min(unserved);
        shelf.sockets.extend((0..failed).map(|_| Err(io::Error::from_raw_os_error(errno))));
        let arrived = count - missing + failed;
        drop(shelf);
        self.arrived.add_permits(arrived);
    }

    /// No more will come: all who wait get an error.
    pub(super) fn close(&self) {
        self.arrived.close();
        self.lock().sockets.clear();
    }

    fn lock(&self) -> MutexGuard<'_, Shelf> {
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shelf {
    /// How many to ask for now, and counts them as asked.
    fn more(&mut self, waiting: usize) -> usize {
        let expected = self.sockets.len() + self.asked;
        if expected >= waiting + LOW {
            return 0;
        }
        let more = (waiting + FULL - expected).min(MOST_SOCKETS);
        self.asked += more;
        more
    }
}

/// Counts one who waits, until dropped.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Waiting(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{cell::Cell, net::UdpSocket};

    fn sockets(count: usize) -> Vec<OwnedFd> {
        (0..count).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap().into()).collect()
    }

    #[tokio::test]
    async fn it_is_filled_in_batches_and_stays_small() {
        let (stock, asked, batches) = (Stock::new(), Cell::new(0), Cell::new(0));
        for _ in 0..200 {
            stock
                .take(|count| {
                    asked.set(asked.get() + count);
                    batches.set(batches.get() + 1);
                    stock.put(sockets(count), 0, 0);
                    Ok(())
                })
                .await
                .unwrap();
        }
        assert!(batches.get() <= 200 / (FULL - LOW) + 2, "{} batches", batches.get());
        let left = stock.lock().sockets.len();
        assert!(left <= FULL + 1 && asked.get() == 200 + left, "{left} left of {}", asked.get());
    }

    #[tokio::test]
    async fn an_error_reaches_who_waits_and_the_next_is_asked_for_again() {
        let stock = Stock::new();
        let failing = |count| {
            stock.put(Vec::new(), count, 24);
            Ok(())
        };
        for _ in 0..3 {
            assert_eq!(stock.take(failing).await.unwrap_err().raw_os_error(), Some(24));
        }
        let working = |count| {
            stock.put(sockets(count), 0, 0);
            Ok(())
        };
        assert!(stock.take(working).await.is_ok());
    }

    #[tokio::test]
    async fn an_error_is_for_those_alone_who_get_no_socket() {
        let stock = Stock::new();
        let few = |count| {
            stock.put(sockets(1), count - 1, 24);
            Ok(())
        };
        assert!(stock.take(few).await.is_ok(), "one arrived, and one waits");
        assert_eq!(stock.lock().sockets.len(), 0, "no error stays for whoever comes later");
        let none = |_| Ok(());
        let (one, other, ()) = tokio::join!(stock.take(none), stock.take(none), async {
            stock.put(sockets(1), 5, 24);
        });
        // Which of them is polled first is not said.
        assert_ne!(one.is_ok(), other.is_ok());
        let error = one.and(other).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(24));
        assert_eq!(stock.waiting.load(Ordering::Relaxed), 0);
        assert_eq!(stock.lock().sockets.len(), 0);
    }

    #[tokio::test]
    async fn closing_wakes_who_waits() {
        let stock = Stock::new();
        let (taken, ()) = tokio::join!(stock.take(|_| Ok(())), async { stock.close() });
        assert_eq!(taken.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[tokio::test]
    async fn who_gives_up_waiting_leaves_no_growth_behind() {
        let (stock, asked) = (Stock::new(), Cell::new(0));
        for _ in 0..1000 {
            let taking = stock.take(|count| {
                asked.set(asked.get() + count);
                Ok(())
            });
            tokio::select! { biased; _ = taking => panic!("there is none"), () = std::future::ready(()) => {} }
        }
        assert!(asked.get() <= FULL + 1, "{}", asked.get());
    }
}
