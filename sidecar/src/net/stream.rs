//! The one byte stream of the house: TCP, or TLS over it, with bytes that were read ahead given back first.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::TlsStream;

use super::{half_close::HalfClose, socket::reset};

/// A byte stream. What detection read ahead is put back with [`Stream::unread`] and read again first.
#[derive(Debug)]
pub struct Stream {
    ahead: Bytes,
    io: Io,
    read: Option<Arc<AtomicU64>>,
    cut: Option<Arc<AtomicBool>>,
    half_close: Option<Arc<HalfClose>>,
}

#[derive(Debug)]
enum Io {
    Tcp(TcpStream),
    Tls(Box<TlsStream<Stream>>),
}

impl Stream {
    /// Puts bytes back: they are read before anything else.
    pub fn unread(&mut self, bytes: Bytes) {
        debug_assert!(self.ahead.is_empty(), "bytes put back twice");
        self.ahead = bytes;
    }

    /// Counts the bytes that are read from now on.
    pub fn count_reads(&mut self) -> Arc<AtomicU64> {
        self.read.get_or_insert_default().clone()
    }

    /// Set to true, it makes the end of this stream a reset: for whoever learns that something was cut after it
    /// gave the stream away.
    pub fn cut_flag(&mut self) -> Arc<AtomicBool> {
        self.cut.get_or_insert_default().clone()
    }

    /// For the server of an HTTP/1 client that may shut down its sending side. None over TLS.
    pub fn half_close(&mut self) -> Option<Arc<HalfClose>> {
        match &self.io {
            Io::Tcp(_) => Some(self.half_close.get_or_insert_default().clone()),
            Io::Tls(_) => None,
        }
    }

    /// The TCP socket below.
    pub fn tcp(&self) -> &TcpStream {
        match &self.io {
            Io::Tcp(tcp) => tcp,
            Io::Tls(tls) => tls.get_ref().0.tcp(),
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.cut.as_ref().is_some_and(|cut| cut.load(Ordering::Relaxed)) {
            reset(self);
        }
    }
}

impl From<TcpStream> for Stream {
    fn from(tcp: TcpStream) -> Self {
        Stream { ahead: Bytes::new(), io: Io::Tcp(tcp), read: None, cut: None, half_close: None }
    }
}

impl From<TlsStream<Stream>> for Stream {
    fn from(tls: TlsStream<Stream>) -> Self {
        Stream { ahead: Bytes::new(), io: Io::Tls(Box::new(tls)), read: None, cut: None, half_close: None }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(half_close) = &self.half_close {
            half_close.reading();
        }
        let before = buffer.filled().len();
        let polled = self.poll_source(context, buffer);
        if let Some(read) = &self.read {
            read.fetch_add((buffer.filled().len() - before) as u64, Ordering::Relaxed);
        }
        polled
    }
}

impl Stream {
    fn poll_source(&mut self, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if !self.ahead.is_empty() {
            let count = self.ahead.len().min(buffer.remaining());
            buffer.put_slice(&self.ahead[..count]);
            self.ahead.advance(count);
            if self.ahead.is_empty() {
                self.ahead = Bytes::new();
            }
            return Poll::Ready(Ok(()));
        }
        match &mut self.io {
            Io::Tcp(tcp) => Pin::new(tcp).poll_read(context, buffer),
            Io::Tls(tls) => Pin::new(tls).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        match (&mut this.io, &this.half_close) {
            (Io::Tcp(tcp), Some(half_close)) => {
                let (rest, ahead) = half_close.rest(bytes)?;
                let count = ready!(Pin::new(tcp).poll_write(context, rest))?;
                half_close.written();
                Poll::Ready(Ok(ahead + count))
            }
            (Io::Tcp(tcp), None) => Pin::new(tcp).poll_write(context, bytes),
            (Io::Tls(tls), _) => Pin::new(tls).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let Some(half_close) = &self.half_close {
            let first = parts.iter().find(|part| !part.is_empty()).map_or(&[][..], |part| part);
            if half_close.is_ahead() {
                return self.poll_write(context, first);
            }
            half_close.rest(first)?;
        }
        match &mut self.io {
            Io::Tcp(tcp) => Pin::new(tcp).poll_write_vectored(context, parts),
            Io::Tls(tls) => Pin::new(tls).poll_write_vectored(context, parts),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Io::Tcp(tcp) => tcp.is_write_vectored(),
            Io::Tls(tls) => tls.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let (Io::Tcp(tcp), Some(half_close)) = (&self.io, &self.half_close) {
            half_close.look(tcp)?;
        }
        match &mut self.io {
            Io::Tcp(tcp) => Pin::new(tcp).poll_flush(context),
            Io::Tls(tls) => Pin::new(tls).poll_flush(context),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Tcp(tcp) => Pin::new(tcp).poll_shutdown(context),
            Io::Tls(tls) => Pin::new(tls).poll_shutdown(context),
        }
    }
}
