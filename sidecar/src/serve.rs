//! Accept loops: each worker accepts on its own listener, under one cap of connections, until the drain says
//! stop. A panic in a connection ends that connection and no other.

mod idle;
mod silent;

pub use idle::{IdleConnections, Registration};
pub use silent::SilentLimit;

use std::{future::Future, net::SocketAddr, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures_util::FutureExt;
use nix::errno::Errno;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout},
};

use crate::{drain::Draining, net};

/// Pause after `accept` failed for want of descriptors or memory, so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// A connection over the cap waits this long for one that makes room for it.
const ROOM_WITHIN: Duration = Duration::from_millis(500);
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

/// How many connections there may be.
#[derive(Debug, Clone)]
pub struct Cap {
    /// A permit for each.
    pub places: Arc<Semaphore>,
    /// What becomes of one over the cap.
    pub when_full: WhenFull,
    /// Idle connections that are closed to make room for it, where some are.
    pub idle: Option<Arc<IdleConnections>>,
}

impl Cap {
    /// A permit that is free.
    fn free(&self) -> Option<OwnedSemaphorePermit> {
        self.places.clone().try_acquire_owned().ok()
    }

    fn makes_room(&self) -> bool {
        self.idle.as_ref().is_some_and(|idle| idle.make_room())
    }

    /// The permit of a connection that ends. None where none ends in time, and the client is not to wait for longer.
    async fn next(&self) -> Option<OwnedSemaphorePermit> {
        loop {
            match timeout(ROOM_WITHIN, self.places.clone().acquire_owned()).await {
                Ok(place) => return place.ok(),
                Err(_) if self.when_full == WhenFull::Refuse => return None,
                Err(_) => drop(self.makes_room()),
            }
        }
    }
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
    let cap = Cap { places, when_full: WhenFull::Refuse, idle: None };
    accept_within(listener, cap, stop, tell, handle).await;
}

/// The same where the cap comes with what becomes of a connection over it. It waits for a moment where an idle one
/// makes room for it.
pub async fn accept_within<Handle, Handling>(
    listener: TcpListener,
    cap: Cap,
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
        let mut place = cap.free();
        if place.is_none() {
            let makes_room = cap.makes_room();
            let waits = cap.when_full == WhenFull::Wait;
            if waits && !makes_room && waits_told.is_none_or(|told| told.elapsed() >= WAITS_AGAIN) {
                waits_told = Some(Instant::now());
                tell(Incident::Waits(client));
            }
            if waits || makes_room {
                place = tokio::select! {
                    place = cap.next() => place,
                    () = stop.started() => return,
                };
            }
        }
        let Some(place) = place else {
            tell(Incident::Full(client));
            continue;
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
