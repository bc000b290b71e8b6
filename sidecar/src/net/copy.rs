//! Copies bytes both ways between two streams, each half closed by itself.

use std::{
    future::poll_fn,
    io,
    pin::{Pin, pin},
    task::Poll,
    time::Duration,
};

use futures_util::future::{Either, select};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf, split},
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
/// An end that the other side's reset has overtaken is here within this time.
const OVERTAKEN: Duration = Duration::from_millis(250);

/// What ended the copying before both sides had ended.
#[derive(Debug)]
pub struct Broken {
    /// On which stream.
    pub side: BrokenSide,
    /// What reading or writing it said.
    pub error: io::Error,
}

/// The stream that broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BrokenSide {
    /// The first one.
    First,
    /// The second one.
    Second,
}

/// Copies until both directions have ended. The end of one direction is passed on and the other goes on; an
/// error in one direction ends both, so that a cut is seen as a cut: whatever else ends the copying, a cancelled
/// future or a killed process too, both sides see a reset. `forth` and `back` hear of the bytes from the first
/// stream to the second and back, as they flow.
///
/// A reset after one side has ended is no error, though it is passed on: that is how a program closes a connection
/// on which something came that it did not read, as servers of TLS do with the last alert of their clients. The reset
/// may overtake that end. Whose it was is given back.
///
/// # Errors
/// The first error of either direction.
pub async fn copy_both_ways(
    first: Stream,
    second: Stream,
    forth: impl FnMut(u64),
    back: impl FnMut(u64),
) -> Result<Option<BrokenSide>, Broken> {
    use BrokenSide::{First, Second};
    reset(&first);
    reset(&second);
    let (mut first_read, mut first_write) = split(first);
    let (mut second_read, mut second_write) = split(second);
    let ended = {
        let forth = pin!(copy_one_way((&mut first_read, First), (&mut second_write, Second), forth));
        let back = pin!(copy_one_way((&mut second_read, Second), (&mut first_write, First), back));
        let (ended, other) = match select(forth, back).await {
            Either::Left((ended, back)) => (ended, Either::Left(back)),
            Either::Right((ended, forth)) => (ended, Either::Right(forth)),
        };
        match ended {
            Ok(()) => Ok(other.await),
            Err(broken) => Err(broken),
        }
    };
    let was_reset_by = match ended {
        Ok(Ok(())) => None,
        Ok(Err(broken)) if is_reset(&broken.error) => Some(broken.side),
        Err(broken) if is_reset(&broken.error) => {
            let other = if broken.side == First { &mut second_read } else { &mut first_read };
            if !Box::pin(ends_now(other)).await {
                return Err(broken);
            }
            Some(broken.side)
        }
        Ok(Err(broken)) | Err(broken) => return Err(broken),
    };
    if was_reset_by.is_none() {
        close_cleanly(&first_read.unsplit(first_write));
        close_cleanly(&second_read.unsplit(second_write));
    }
    Ok(was_reset_by)
}

/// Has the other side of a TCP connection gone away without another word?
fn is_reset(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected};
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected)
}

/// Does a stream end within a moment? What it still says has nowhere to go.
async fn ends_now(from: &mut (impl AsyncRead + Unpin)) -> bool {
    let reading = async {
        let mut lost = [0; 1024];
        loop {
            match from.read(&mut lost).await {
                Ok(0) => return true,
                Ok(_) => {}
                Err(_) => return false,
            }
        }
    };
    timeout(OVERTAKEN, Box::pin(reading)).await.unwrap_or(false)
}

async fn copy_one_way(
    (from, from_side): (&mut (impl AsyncRead + Unpin), BrokenSide),
    (to, to_side): (&mut (impl AsyncWrite + Unpin), BrokenSide),
    mut count: impl FnMut(u64),
) -> Result<(), Broken> {
    let broke = |side| move |error| Broken { side, error };
    let mut buffer = vec![0; BUFFER];
    loop {
        let is_small = buffer.len() == BUFFER;
        let reading = read_what_is_there(from, &mut buffer);
        let (read, ended) = if is_small {
            reading.await
        } else if let Ok(read) = timeout(BURST_OVER, reading).await {
            read
        } else {
            buffer = vec![0; BUFFER];
            continue;
        };
        if read > 0 {
            to.write_all(&buffer[..read]).await.map_err(broke(to_side))?;
            to.flush().await.map_err(broke(to_side))?;
            count(read as u64);
        }
        // A reset is told once; a read after it would look like a clean end.
        ended.map_err(broke(from_side))?;
        if read == 0 {
            return to.shutdown().await.map_err(broke(to_side));
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

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use socket2::SockRef;
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    async fn pair() -> (TcpStream, Stream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (near, Stream::from(listener.accept().await.unwrap().0))
    }

    fn reset_at_close(stream: &TcpStream) {
        SockRef::from(stream).set_linger(Some(Duration::ZERO)).unwrap();
    }

    async fn read_to_end(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.map(|_| all)
    }

    #[tokio::test]
    async fn bytes_are_counted_as_they_flow_and_not_at_the_end() {
        let ((mut client, first), (mut server, second)) = (pair().await, pair().await);
        let (forth, back) = (Cell::new(0), Cell::new(0));
        let copying = copy_both_ways(
            first,
            second,
            |count| forth.set(forth.get() + count),
            |count| back.set(back.get() + count),
        );
        let talking = async {
            client.write_all(b"question").await.unwrap();
            server.read_exact(&mut [0; 8]).await.unwrap();
            server.write_all(b"answer").await.unwrap();
            client.read_exact(&mut [0; 6]).await.unwrap();
        };
        // Cut in the middle: the copying never ends by itself.
        tokio::select! {
            _ = copying => unreachable!(),
            () = talking => {}
        }
        assert_eq!((forth.get(), back.get()), (8, 6));
    }

    #[tokio::test]
    async fn a_reset_after_the_other_side_has_ended_is_passed_on_and_no_failure() {
        // Who ends and who resets: a server that closes with bytes unread, and a client that does.
        for client_ends in [true, false] {
            let ((client, first), (server, second)) = (pair().await, pair().await);
            let (mut ends, resets) = if client_ends { (client, server) } else { (server, client) };
            let copying = copy_both_ways(first, second, |_| {}, |_| {});
            let talking = async {
                ends.write_all(b"bye").await.unwrap();
                ends.shutdown().await.unwrap();
                let mut resets = resets;
                read_to_end(&mut resets).await.unwrap();
                reset_at_close(&resets);
                drop(resets);
                read_to_end(&mut ends).await.unwrap_err()
            };
            let (copied, seen) = tokio::join!(copying, talking);
            let by = if client_ends { BrokenSide::Second } else { BrokenSide::First };
            assert_eq!(copied.unwrap(), Some(by));
            assert_eq!(seen.kind(), io::ErrorKind::ConnectionReset, "{client_ends}");
        }
    }

    #[tokio::test]
    async fn a_reset_that_overtakes_the_end_of_the_other_side_is_no_failure() {
        for client_ends in [true, false] {
            let ((client, first), (server, second)) = (pair().await, pair().await);
            let (mut ends, resets) = if client_ends { (client, server) } else { (server, client) };
            reset_at_close(&resets);
            drop(resets);
            let ending = async {
                ends.write_all(b"bye").await.unwrap();
                tokio::task::yield_now().await;
                ends.shutdown().await.unwrap();
            };
            let (copied, ()) = tokio::join!(copy_both_ways(first, second, |_| {}, |_| {}), ending);
            let by = if client_ends { BrokenSide::Second } else { BrokenSide::First };
            assert_eq!(copied.unwrap(), Some(by));
        }
    }

    #[tokio::test]
    async fn a_reset_before_any_end_is_a_failure_of_the_side_that_broke() {
        for client_resets in [true, false] {
            let ((client, first), (server, second)) = (pair().await, pair().await);
            let (resets, mut stays) = if client_resets { (client, server) } else { (server, client) };
            reset_at_close(&resets);
            drop(resets);
            let broken = copy_both_ways(first, second, |_| {}, |_| {}).await.unwrap_err();
            assert_eq!(broken.side == BrokenSide::First, client_resets, "{broken:?}");
            assert_eq!(read_to_end(&mut stays).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        }
    }
}
