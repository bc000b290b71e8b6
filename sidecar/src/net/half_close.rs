//! A client of HTTP/1 that shuts down its sending side behind a request may wait for the answer, or may be gone:
//! TCP says both with the same FIN (RFC 9293 3.6). Only sending shows which it is: a closed socket answers with a
//! reset. So a client that waits is sent the bytes that every answer begins with (RFC 9112 4) as soon as its FIN
//! is seen, and the answer goes on behind them. Looks only while a request is in flight, a few times a second.

use std::{
    io::{self, ErrorKind},
    mem::MaybeUninit,
    sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    time::Duration,
};

use socket2::SockRef;
use tokio::{net::TcpStream, sync::Notify, time::sleep};

/// How often a client that waits for its answer is looked at.
const LOOK: Duration = Duration::from_millis(250);
/// The beginning of every answer, to clients of HTTP/1.0 too.
const BEGINNING: &[u8] = b"HTTP/1.";
/// Says to go on with the request, and is no beginning of its answer.
const CONTINUE: &[u8] = b"HTTP/1.1 100 ";

/// What the stream of an HTTP/1 client and its server know of each other. Both are in one task.
#[derive(Debug, Default)]
pub struct HalfClose {
    in_flight: AtomicBool,
    came: Notify,
    /// The stream is to look at the client when it is flushed next.
    due: AtomicBool,
    /// Writes of answers on the stream, and the same when the request came.
    writes: AtomicU64,
    before: AtomicU64,
    /// Bytes of the answer's beginning that were sent ahead of it.
    ahead: AtomicUsize,
}

impl HalfClose {
    /// A request was read, and its answer is worked on.
    pub fn request_came(&self) {
        self.before.store(self.writes.load(Ordering::Relaxed), Ordering::Relaxed);
        self.in_flight.store(true, Ordering::Relaxed);
        self.came.notify_one();
    }

    /// Wakes the task now and then while a request is in flight, so that its stream looks at the client. For the
    /// task that serves the stream; never resolves.
    pub async fn keep_looking(&self) {
        loop {
            self.came.notified().await;
            while self.in_flight.load(Ordering::Relaxed) {
                sleep(LOOK).await;
                self.due.store(true, Ordering::Relaxed);
                // Once more, as the stream may have been asked before this in the same turn.
                tokio::task::yield_now().await;
            }
        }
    }

    /// The server reads on: after an answer that means for the next request.
    pub(super) fn reading(&self) {
        if self.has_begun() {
            self.in_flight.store(false, Ordering::Relaxed);
        }
    }

    /// What is left to write of `bytes`, the next ones of the server, and how many of them were sent ahead.
    ///
    /// # Errors
    /// If what was sent ahead does not belong to them.
    pub(super) fn rest<'a>(&self, bytes: &'a [u8]) -> io::Result<(&'a [u8], usize)> {
        if !bytes.starts_with(CONTINUE) {
            self.writes.fetch_add(1, Ordering::Relaxed);
        }
        let ahead = self.ahead.load(Ordering::Relaxed);
        let rest = bytes.strip_prefix(&BEGINNING[..ahead]).filter(|rest| ahead == 0 || !rest.is_empty());
        rest.map(|rest| (rest, ahead)).ok_or_else(|| io::Error::from(ErrorKind::InvalidData))
    }

    /// Was a part of the answer sent ahead?
    pub(super) fn is_ahead(&self) -> bool {
        self.ahead.load(Ordering::Relaxed) > 0
    }

    /// The rest was written.
    pub(super) fn written(&self) {
        self.ahead.store(0, Ordering::Relaxed);
    }

    /// Looks at the client, if that is due. To be called when the server has nothing left to write.
    ///
    /// # Errors
    /// If the client is gone.
    pub(super) fn look(&self, tcp: &TcpStream) -> io::Result<()> {
        if !self.due.swap(false, Ordering::Relaxed) || !self.in_flight.load(Ordering::Relaxed) {
            return Ok(());
        }
        match SockRef::from(tcp).peek(&mut [MaybeUninit::uninit()]) {
            Ok(0) => {}
            Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
            Ok(_) | Err(_) => return Ok(()),
        }
        if let Some(error) = tcp.take_error()? {
            return Err(error);
        }
        if !self.has_begun() && !self.is_ahead() {
            match tcp.try_write(BEGINNING) {
                Ok(count) => self.ahead.store(count, Ordering::Relaxed),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn has_begun(&self) -> bool {
        self.writes.load(Ordering::Relaxed) > self.before.load(Ordering::Relaxed)
    }
}
