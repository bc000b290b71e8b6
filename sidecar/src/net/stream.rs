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
    half_close: Option<Arc<HalfClose>>,
    /// Boxed, as few streams have it and futures hold several.
    aside: Option<Box<Aside>>,
}

/// What a stream does beside carrying bytes.
#[derive(Debug, Default)]
struct Aside {
    cut: Option<Arc<AtomicBool>>,
    write_errors: WriteErrors,
    /// How the last read began.
    noted: Option<Vec<u8>>,
}

/// Bytes that are noted of a read: enough for most request lines.
const NOTED_BYTES: usize = 256;

/// Who hears of an error of writing.
#[derive(Debug, Default)]
enum WriteErrors {
    /// The writer, at once.
    #[default]
    Told,
    /// The reader, behind all that has come. What is still written after the error goes nowhere.
    Held(Option<io::Error>),
}

#[derive(Debug)]
enum Io {
    Tcp(TcpStream),
    Tls(Box<TlsStream<Stream>>),
}

impl Stream {
    /// Puts bytes back: they are read before anything else.
    pub fn unread(&mut self, bytes: Bytes) {
        self.ahead = match self.ahead.is_empty() {
            true => bytes,
            false => [bytes, self.ahead.clone()].concat().into(),
        };
    }

    /// The bytes that were put back and not read yet.
    pub fn peeked(&self) -> &[u8] {
        &self.ahead
    }

    /// Counts the bytes that are read from now on.
    pub fn count_reads(&mut self) -> Arc<AtomicU64> {
        self.read.get_or_insert_default().clone()
    }

    /// Set to true, it makes the end of this stream a reset: for whoever learns that something was cut after it
    /// gave the stream away.
    pub fn cut_flag(&mut self) -> Arc<AtomicBool> {
        self.aside.get_or_insert_default().cut.get_or_insert_default().clone()
    }

    /// For the server of an HTTP/1 client that may shut down its sending side. None over TLS.
    pub fn half_close(&mut self) -> Option<Arc<HalfClose>> {
        match &self.io {
            Io::Tcp(_) => Some(self.half_close.get_or_insert_default().clone()),
            Io::Tls(_) => None,
        }
    }

    /// The protocol that its TLS agreed on (ALPN); none without TLS.
    pub fn alpn(&self) -> Option<&[u8]> {
        match &self.io {
            Io::Tcp(_) => None,
            Io::Tls(tls) => tls.get_ref().1.alpn_protocol(),
        }
    }

    /// How its TLS agreed on a key.
    #[cfg(test)]
    pub fn key_exchange(&self) -> Option<rustls::NamedGroup> {
        match &self.io {
            Io::Tcp(_) => None,
            Io::Tls(tls) => tls.get_ref().1.negotiated_key_exchange_group().map(|group| group.name()),
        }
    }

    /// From now on an error of writing is told to the reader, behind all that has come: a server may answer a request and
    /// close before it has read the whole of it, and its answer counts (RFC 9112 9.5).
    pub fn hold_write_errors(&mut self) {
        self.aside.get_or_insert_default().write_errors = WriteErrors::Held(None);
    }

    /// From now on the beginning of what was read last is at hand, for whoever must say what could not be read.
    pub fn note_reads(&mut self) {
        self.aside.get_or_insert_default().noted = Some(Vec::new());
    }

    /// How the last read began, where that is noted.
    pub fn noted(&self) -> &[u8] {
        self.aside.as_ref().and_then(|aside| aside.noted.as_deref()).unwrap_or_default()
    }

    /// From now on it only carries bytes: errors of writing are told at once, and nothing is noted.
    pub fn only_carry(&mut self) {
        if let Some(aside) = &mut self.aside {
            aside.write_errors = WriteErrors::Told;
            aside.noted = None;
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

impl Aside {
    /// These bytes were read; none: the end.
    fn read(&mut self, bytes: &[u8]) -> io::Result<()> {
        if bytes.is_empty() {
            return match &mut self.write_errors {
                WriteErrors::Held(held) => held.take().map_or(Ok(()), Err),
                WriteErrors::Told => Ok(()),
            };
        }
        if let Some(noted) = &mut self.noted {
            noted.clear();
            noted.extend_from_slice(&bytes[..bytes.len().min(NOTED_BYTES)]);
        }
        Ok(())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let cut = self.aside.as_ref().and_then(|aside| aside.cut.as_ref());
        if cut.is_some_and(|cut| cut.load(Ordering::Relaxed)) {
            reset(self);
        }
    }
}

impl From<TcpStream> for Stream {
    fn from(tcp: TcpStream) -> Self {
        Stream::over(Io::Tcp(tcp))
    }
}

impl From<TlsStream<Stream>> for Stream {
    fn from(tls: TlsStream<Stream>) -> Self {
        Stream::over(Io::Tls(Box::new(tls)))
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
        let came = buffer.filled().len() - before;
        if let Some(read) = &self.read {
            read.fetch_add(came as u64, Ordering::Relaxed);
        }
        match &mut self.aside {
            Some(aside) if polled.is_ready() => aside.read(&buffer.filled()[before..])?,
            _ => {}
        }
        polled
    }
}

impl Stream {
    fn over(io: Io) -> Self {
        Stream { ahead: Bytes::new(), io, read: None, half_close: None, aside: None }
    }

    /// Is an error of writing being held? Then nothing is written any more.
    fn is_broken(&self) -> bool {
        self.aside.as_ref().is_some_and(|aside| matches!(aside.write_errors, WriteErrors::Held(Some(_))))
    }

    /// Holds an error of writing where that is asked for; `count` is what was to be written.
    fn hold<T>(&mut self, written: Poll<io::Result<T>>, count: T) -> Poll<io::Result<T>> {
        match (self.aside.as_mut().map(|aside| &mut aside.write_errors), written) {
            (Some(WriteErrors::Held(held)), Poll::Ready(Err(error))) => {
                *held = Some(error);
                Poll::Ready(Ok(count))
            }
            (_, written) => written,
        }
    }

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

impl Stream {
    fn poll_write_through(&mut self, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match (&mut self.io, &self.half_close) {
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

    fn poll_write_parts(
        &mut self,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let Some(half_close) = &self.half_close {
            let first = parts.iter().find(|part| !part.is_empty()).map_or(&[][..], |part| part);
            if half_close.is_ahead() {
                return self.poll_write_through(context, first);
            }
            half_close.rest(first)?;
        }
        match &mut self.io {
            Io::Tcp(tcp) => Pin::new(tcp).poll_write_vectored(context, parts),
            Io::Tls(tls) => Pin::new(tls).poll_write_vectored(context, parts),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.is_broken() {
            return Poll::Ready(Ok(bytes.len()));
        }
        let written = self.poll_write_through(context, bytes);
        self.hold(written, bytes.len())
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let all = || parts.iter().map(|part| part.len()).sum();
        if self.is_broken() {
            return Poll::Ready(Ok(all()));
        }
        let written = self.poll_write_parts(context, parts);
        self.hold(written, all())
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
        if self.is_broken() {
            return Poll::Ready(Ok(()));
        }
        let flushed = match &mut self.io {
            Io::Tcp(tcp) => Pin::new(tcp).poll_flush(context),
            Io::Tls(tls) => Pin::new(tls).poll_flush(context),
        };
        self.hold(flushed, ())
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Tcp(tcp) => Pin::new(tcp).poll_shutdown(context),
            Io::Tls(tls) => Pin::new(tls).poll_shutdown(context),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use socket2::SockRef;

    use super::*;

    /// A server that answers and resets the connection, having read nothing of a long request.
    async fn answered_early() -> Stream {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut server, _) = listener.accept().await.unwrap();
        server.write_all(b"answer").await.unwrap();
        let stream = Stream::from(client);
        stream.tcp().writable().await.unwrap();
        stream.tcp().try_write(&[0; 100_000]).unwrap();
        drop(server);
        // The reset has come when the peer's side of the socket says so.
        while SockRef::from(stream.tcp()).peer_addr().is_ok() {
            tokio::task::yield_now().await;
        }
        stream
    }

    #[tokio::test]
    async fn an_error_of_writing_is_heard_behind_what_has_come() {
        let mut stream = answered_early().await;
        assert!(stream.write_all(&[0; 1000]).await.is_err(), "told at once, if nobody asked otherwise");

        let mut stream = answered_early().await;
        stream.hold_write_errors();
        for _ in 0..3 {
            stream.write_all(&[0; 1000]).await.unwrap();
            stream.flush().await.unwrap();
        }
        let mut came = Vec::new();
        let error = stream.read_to_end(&mut came).await.unwrap_err();
        assert_eq!(came, b"answer");
        assert!(
            [io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe].contains(&error.kind()),
            "{error}"
        );
        stream.only_carry();
        assert!(stream.write_all(&[0; 1000]).await.is_err());
    }
}
