//! Copies bytes both ways between two streams, each half closed by itself.

use std::{future::poll_fn, io, pin::Pin, task::Poll, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf, split},
    time::timeout,
};

use super::{
    Stream,
    socket::{close_cleanly, reset},
};

/// Bytes on the way at a time and direction: at first, and at most once a direction fills what it has.
const BUFFER: usize = 16 * 1024;
const BULK: usize = 256 * 1024;
/// After so long without a byte a direction is back at the first size.
const BURST_OVER: Duration = Duration::from_secs(1);

/// How many bytes went each way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Copied {
    /// From the first stream to the second.
    pub forth: u64,
    /// From the second stream to the first.
    pub back: u64,
}

/// Copies until both directions have ended. The end of one direction is passed on and the other goes on; an
/// error in one direction ends both, so that a cut is seen as a cut: whatever else ends the copying, a cancelled
/// future or a killed process too, both sides see a reset.
///
/// # Errors
/// The first error of either direction, with the bytes copied until then.
pub async fn copy_both_ways(first: Stream, second: Stream) -> (Copied, io::Result<()>) {
    reset(&first);
    reset(&second);
    let (mut first_read, mut first_write) = split(first);
    let (mut second_read, mut second_write) = split(second);
    let mut copied = Copied::default();
    let Copied { forth, back } = &mut copied;
    let result = tokio::try_join!(
        copy_one_way(&mut first_read, &mut second_write, forth),
        copy_one_way(&mut second_read, &mut first_write, back),
    );
    if result.is_ok() {
        close_cleanly(&first_read.unsplit(first_write));
        close_cleanly(&second_read.unsplit(second_write));
    }
    (copied, result.map(drop))
}

async fn copy_one_way(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    count: &mut u64,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let is_small = buffer.len() == BUFFER;
        let reading = read_what_is_there(from, &mut buffer);
        let (read, broke) = if is_small {
            reading.await
        } else if let Ok(read) = timeout(BURST_OVER, reading).await {
            read
        } else {
            buffer = vec![0; BUFFER];
            continue;
        };
        if read > 0 {
            to.write_all(&buffer[..read]).await?;
            to.flush().await?;
            *count += read as u64;
        }
        // A reset is told once; a read after it would look like a clean end.
        broke?;
        if read == 0 {
            return to.shutdown().await;
        }
        if read == buffer.len() && read < BULK {
            buffer = vec![0; BULK.min(read * 4)];
        }
    }
}

/// Waits for the first bytes, and takes what else is there: TLS gives a record at a time, and one large write costs
/// less than several small ones. 0 at the end. An error may come with bytes before it.
async fn read_what_is_there(
    from: &mut (impl AsyncRead + Unpin),
    buffer: &mut [u8],
) -> (usize, io::Result<()>) {
    let mut buffer = ReadBuf::new(buffer);
    poll_fn(|context| {
        while buffer.remaining() > 0 {
            let before = buffer.filled().len();
            match Pin::new(&mut *from).poll_read(context, &mut buffer) {
                Poll::Pending if before == 0 => return Poll::Pending,
                Poll::Ready(Err(error)) => return Poll::Ready((before, Err(error))),
                // The end of the stream is met again at the next read.
                Poll::Pending => break,
                Poll::Ready(Ok(())) if buffer.filled().len() == before => break,
                Poll::Ready(Ok(())) => {}
            }
        }
        Poll::Ready((buffer.filled().len(), Ok(())))
    })
    .await
}
