//! Accept loops: each worker accepts on its own listener, under one cap of connections, until the drain says
//! stop. A panic in a connection ends that connection and no other.

mod silent;

pub use silent::SilentLimit;

use std::{future::Future, net::SocketAddr, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures_util::FutureExt;
use nix::errno::Errno;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::Instant,
};

use crate::{drain::Draining, net};

/// Pause after `accept` failed for want of descriptors or memory, so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// That clients wait is told of again after this long.
const WAITS_AGAIN: Duration = Duration::from_secs(60);

/// What an accept loop tells of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Incident {
    /// The cap of connections is reached; this client's connection was closed.
    Full(SocketAddr),
    /// The cap of connections is reached; this client's connection waits, and those behind it. Told once a minute.
    Waits(SocketAddr),
    /// This process may have no more descriptors (`RLIMIT_NOFILE`), or the system has none: the connection waits.
    NoDescriptor,
    /// The task of this client's connection ended with a panic: a bug of ours.
    Panicked(SocketAddr),
}

/// What becomes of a connection over the cap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenFull {
    /// It is closed at once: the cap is what the operator wants.
    Refuse,
    /// It waits, and those behind it in the queue of the listener: the cap is what this process can hold.
    Wait,
}

/// Accepts connections and runs `handle` for each in a task of its own, until `stop` begins. A connection over
/// the cap is closed at once rather than left waiting.
pub async fn accept<Handle, Handling>(
    listener: TcpListener,
    places: Arc<Semaphore>,
    stop: Draining,
    tell: impl Fn(Incident) + Clone + Send + 'static,
    handle: Handle,
) where
    Handle: Fn(TcpStream, SocketAddr) -> Handling,
    Handling: Future<Output = ()> + Send + 'static,
{
    accept_within(listener, (places, WhenFull::Refuse), stop, tell, handle).await;
}

/// The same where the cap comes with what becomes of a connection over it.
pub async fn accept_within<Handle, Handling>(
    listener: TcpListener,
    (places, when_full): (Arc<Semaphore>, WhenFull),
    mut stop: Draining,
    tell: impl Fn(Incident) + Clone + Send + 'static,
    handle: Handle,
) where
    Handle: Fn(TcpStream, SocketAddr) -> Handling,
    Handling: Future<Output = ()> + Send + 'static,
{
    if let Err(error) = net::set_options(&listener) {
        tracing::warn!(%error, "silent peers are not probed, and small writes may be delayed");
    }
    // A spell of failures is told of once: clients decide how long it is.
    let mut is_told = false;
    let mut waits_told: Option<Instant> = None;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.started() => return,
        };
        let (stream, client) = match accepted {
            Ok(accepted) => {
                is_told = false;
                accepted
            }
            Err(error) => {
                if !std::mem::replace(&mut is_told, true) {
                    tracing::warn!(%error, "cannot accept a connection");
                }
                if matches!(Errno::try_from(error), Ok(Errno::EMFILE | Errno::ENFILE)) {
                    tell(Incident::NoDescriptor);
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let place = match places.clone().try_acquire_owned() {
            Ok(place) => place,
            Err(_) if when_full == WhenFull::Wait => {
                if waits_told.is_none_or(|told| told.elapsed() >= WAITS_AGAIN) {
                    waits_told = Some(Instant::now());
                    tell(Incident::Waits(client));
                }
                tokio::select! {
                    Ok(place) = places.clone().acquire_owned() => place,
                    () = stop.started() => return,
                }
            }
            Err(_) => {
                tell(Incident::Full(client));
                continue;
            }
        };
        let tell = tell.clone();
        // Not an async block around it: that would keep room for the connection's future twice.
        tokio::spawn(AssertUnwindSafe(handle(stream, client)).catch_unwind().map(move |ended| {
            if ended.is_err() {
                tell(Incident::Panicked(client));
            }
            drop(place);
        }));
    }
}
