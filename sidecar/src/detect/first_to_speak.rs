//! Where nobody declared a protocol and the client is silent, the server may be the one to speak first (MySQL,
//! SMTP, SSH). Both sides are listened to, and whoever speaks first decides.

use std::io;

use bytes::BytesMut;
use tokio::io::AsyncReadExt;

use super::{Heard, ReadAhead, read_ahead, read_ahead::PAUSE};
use crate::net::Stream;

/// Who spoke first. What was said is still to be read from the stream.
#[derive(Debug)]
pub enum FirstToSpeak {
    /// The client, and what it began with.
    Client(ReadAhead),
    /// The server, or it closed its side.
    Server,
}

/// Enough for a greeting; the rest stays in the socket.
const GREETING: usize = 4096;

/// Waits for the first byte of either side. No time limit: two silent sides are an idle connection.
///
/// # Errors
/// What reading either stream says.
pub async fn first_to_speak(client: &mut Stream, server: &mut Stream) -> io::Result<FirstToSpeak> {
    Ok(tokio::select! {
        heard = client_speaks(client) => FirstToSpeak::Client(heard?),
        spoke = server_speaks(server) => { spoke?; FirstToSpeak::Server }
    })
}

/// Waits for the server's first bytes, or until it closes its side. No time limit. Cancel safe: they are still to be
/// read from the stream.
///
/// # Errors
/// What reading the stream says.
pub async fn server_speaks(server: &mut Stream) -> io::Result<()> {
    let mut greeting = BytesMut::with_capacity(GREETING);
    server.read_buf(&mut greeting).await?;
    if !greeting.is_empty() {
        server.unread(greeting.freeze());
    }
    Ok(())
}

/// Waits for the client's first bytes. No time limit. Cancel safe: they are still to be read from the stream.
///
/// # Errors
/// What reading the stream says.
pub async fn client_speaks(client: &mut Stream) -> io::Result<ReadAhead> {
    loop {
        let ahead = read_ahead(client, PAUSE).await?;
        if ahead.heard != Heard::Silence || !ahead.bytes.is_empty() {
            return Ok(ahead);
        }
    }
}
