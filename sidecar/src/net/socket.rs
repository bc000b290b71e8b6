//! Making listeners and dialling, with the options every socket of the sidecar has.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    os::fd::AsFd,
    time::Duration,
};

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpSocket, TcpStream};

/// Connections that wait to be accepted, per listener.
const BACKLOG: i32 = 4096;
/// A silent peer is asked whether it lives after this long.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// A listener that several workers may open on the same address (`SO_REUSEPORT`): the kernel spreads the
/// connections over them. An IPv6 listener takes IPv6 only. Not blocking, for a runtime to take over.
///
/// # Errors
/// What `bind` and `listen` say.
pub fn listen_shared(address: SocketAddr) -> io::Result<TcpListener> {
    listener(address, true)
}

/// A listener that nobody shares.
///
/// # Errors
/// What `bind` and `listen` say.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    listener(address, false)
}

fn listener(address: SocketAddr, shared: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    socket.set_reuse_address(true)?;
    if shared {
        socket.set_reuse_port(true)?;
    }
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Dials an address. The caller sets the time limit.
///
/// # Errors
/// What `connect` says.
pub async fn dial(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    let stream = socket.connect(address).await?;
    set_options(&stream)?;
    Ok(stream)
}

/// No delay for small writes, and a probe of silent peers. What a listener accepts has its options (Linux).
///
/// # Errors
/// What `setsockopt` says.
pub fn set_options(socket: &impl AsFd) -> io::Result<()> {
    let socket = SockRef::from(socket);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE))
}

/// Makes the end of the connection a reset (RST) instead of a clean close, so that nobody takes a refusal for an
/// empty answer.
pub fn reset(stream: &super::Stream) {
    set_linger(stream, Some(Duration::ZERO));
}

/// Takes [`reset`] back: the connection has ended as it should.
pub(super) fn close_cleanly(stream: &super::Stream) {
    set_linger(stream, None);
}

fn set_linger(stream: &super::Stream, linger: Option<Duration>) {
    if let Err(error) = SockRef::from(stream.tcp()).set_linger(linger) {
        tracing::debug!(%error, "a connection may close in another way than it should");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_a_listener_accepts_has_its_options() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        set_options(&listener).unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (accepted, _) = listener.accept().await.unwrap();
        let accepted = SockRef::from(&accepted);
        assert!(accepted.tcp_nodelay().unwrap() && accepted.keepalive().unwrap());
        assert_eq!(accepted.tcp_keepalive_time().unwrap(), KEEPALIVE);
        assert_eq!(accepted.tcp_keepalive_interval().unwrap(), KEEPALIVE);
    }
}
