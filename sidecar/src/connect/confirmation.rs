//! The first byte of a server on a `weft-tcp2` connection: has its app taken the connection? TLS alone cannot say: its
//! handshake is over before the app is dialled. Nobody waits for the byte who has something to send: the client's bytes
//! go ahead, and whoever passes them on keeps them until the byte has come.

use std::{io, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};
use weft_proto::names;

use crate::net::Stream;

const TAKEN: u8 = 0;
const NOT_TAKEN: u8 = 1;
/// How long the client of a connection that was refused may take to close it.
const LINGER: Duration = Duration::from_secs(1);

/// Does the server of this connection begin with the byte?
pub fn is_confirmed(stream: &Stream) -> bool {
    stream.alpn() == Some(names::ALPN_TCP_CONFIRMED)
}

/// The app has taken the connection; its own bytes follow.
///
/// # Errors
/// What writing says.
pub async fn confirm(stream: &mut Stream) -> io::Result<()> {
    stream.write_all(&[TAKEN]).await?;
    stream.flush().await
}

/// The app has not taken the connection, and nothing of the client's bytes has reached it. What the client sent is read
/// and dropped, as a socket that is closed with unread bytes is reset, and the byte might be lost.
pub async fn refuse(mut stream: Stream) {
    let said = async {
        stream.write_all(&[NOT_TAKEN]).await?;
        stream.shutdown().await?;
        let mut unread = [0; 1024];
        while stream.read(&mut unread).await? > 0 {}
        io::Result::Ok(())
    };
    // Who does not close in time sees a reset.
    let _ = timeout(LINGER, Box::pin(said)).await;
}

/// Waits for the byte. Cancel safe.
///
/// # Errors
/// What reading says; `InvalidData` for another byte, `UnexpectedEof` for none.
pub async fn app_has_taken(stream: &mut Stream) -> io::Result<bool> {
    let mut byte = [0];
    match (stream.read(&mut byte).await?, byte[0]) {
        (0, _) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it closed before its app was reached")),
        (_, TAKEN) => Ok(true),
        (_, NOT_TAKEN) => Ok(false),
        (_, other) => Err(io::Error::new(io::ErrorKind::InvalidData, format!("it began with {other}"))),
    }
}
