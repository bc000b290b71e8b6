//! What happens where the process has no descriptor left (EMFILE, ENFILE): connections that nobody uses are closed, and
//! the socket is asked for once more. Whoever keeps idle connections registers how they are closed; everything that
//! opens a socket for the traffic goes through [`Reclaimer::open`]. It decides nothing about which connections are idle.

use std::{
    fmt, io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use nix::libc;

/// A closed connection frees its descriptor when its driver has run, which another thread may have to do.
const DRIVERS_RUN: Duration = Duration::from_millis(20);

/// Closes idle connections when descriptors run out. Cheap to clone; all clones know the same connections.
#[derive(Clone, Default)]
pub struct Reclaimer(Arc<Mutex<Vec<Close>>>);

type Close = Box<dyn Fn() + Send + Sync>;

impl fmt::Debug for Reclaimer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Reclaimer").finish_non_exhaustive()
    }
}

impl Reclaimer {
    /// `close` closes some connections that nobody uses. It is called seldom, from any thread, and must not call back.
    pub fn register(&self, close: impl Fn() + Send + Sync + 'static) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(close));
    }

    /// Closes idle connections. Their descriptors are free a moment later.
    pub fn reclaim(&self) {
        for close in self.0.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            close();
        }
    }

    /// Opens a socket. Where no descriptor is left it closes idle connections and tries once more, also if there were
    /// none: another caller may just have closed them.
    ///
    /// # Errors
    /// Those of `open`.
    pub async fn open<T, Opening>(&self, open: impl Fn() -> Opening) -> io::Result<T>
    where
        Opening: Future<Output = io::Result<T>>,
    {
        match open().await {
            Err(error) if is_out_of_descriptors(&error) => {
                self.reclaim();
                // Boxed, as it is rare.
                Box::pin(async {
                    tokio::time::sleep(DRIVERS_RUN).await;
                    open().await
                })
                .await
            }
            opened => opened,
        }
    }
}

/// Did this fail because the process, or the system, has no descriptor left?
pub fn is_out_of_descriptors(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

#[cfg(test)]
mod tests {
    use std::{
        future::ready,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use super::*;

    async fn outcome(errors: &[Option<i32>]) -> (usize, usize, io::Result<()>) {
        let (reclaimer, closed) = (Reclaimer::default(), Arc::new(AtomicUsize::new(0)));
        let count = closed.clone();
        reclaimer.register(move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        let tried = AtomicUsize::new(0);
        let opened = reclaimer
            .open(|| {
                let error = errors[tried.fetch_add(1, Ordering::Relaxed)];
                ready(error.map_or(Ok(()), |code| Err(io::Error::from_raw_os_error(code))))
            })
            .await;
        (tried.into_inner(), closed.load(Ordering::Relaxed), opened)
    }

    #[tokio::test(start_paused = true)]
    async fn a_want_of_descriptors_is_met_once() {
        let (emfile, enfile) = (Some(libc::EMFILE), Some(libc::ENFILE));
        assert!(matches!(outcome(&[None]).await, (1, 0, Ok(()))));
        assert!(matches!(outcome(&[emfile, None]).await, (2, 1, Ok(()))));
        assert!(matches!(outcome(&[enfile, None]).await, (2, 1, Ok(()))));
        assert!(matches!(outcome(&[emfile, emfile]).await, (2, 1, Err(_))));
        assert!(matches!(outcome(&[Some(libc::ECONNREFUSED)]).await, (1, 0, Err(_))));
    }
}
