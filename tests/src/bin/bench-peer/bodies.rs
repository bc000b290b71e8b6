//! Many bytes: opaque connections and HTTP bodies, down and up, and ones that stall.

use std::{convert::Infallible, str::FromStr, time::Duration};

use anyhow::{Context, ensure};
use bytes::Bytes;
use futures_util::future::join_all;
use http_body_util::{BodyExt, StreamBody};
use hyper::{Request, Uri, body::Frame};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::spawn_local,
    time::{Instant, sleep, timeout},
};

use crate::{requests::authority, tally::Tally};

/// Written and read at a time.
pub const PIECE: usize = 64 * 1024;
/// After so long without progress an upload counts as stalled.
const STALLED: Duration = Duration::from_millis(500);

/// Who sends.
#[derive(Clone, Copy, PartialEq)]
pub enum Way {
    /// The server.
    Down,
    /// The client.
    Up,
}

impl FromStr for Way {
    type Err = anyhow::Error;

    fn from_str(word: &str) -> anyhow::Result<Way> {
        match word {
            "down" => Ok(Way::Down),
            "up" => Ok(Way::Up),
            _ => anyhow::bail!("expected down or up, not {word}"),
        }
    }
}

/// Bytes through opaque connections, as `serve::bytes` understands them, until the time is over.
pub async fn bytes(address: &str, way: Way, connections: usize, seconds: u64) -> anyhow::Result<()> {
    let (tally, begin) = (Tally::shared(), Instant::now());
    let end = begin + Duration::from_secs(seconds);
    let task = async || -> anyhow::Result<()> {
        let mut stream = TcpStream::connect(address).await?;
        let mut buffer = vec![0; PIECE];
        stream.write_all(if way == Way::Down { b"down\n" } else { b"up..\n" }).await?;
        while Instant::now() < end {
            let count = match way {
                Way::Down => stream.read(&mut buffer).await?,
                Way::Up => stream.write(&buffer).await?,
            };
            ensure!(count > 0, "closed early");
            tally.add_bytes(count);
        }
        Ok(())
    };
    for done in join_all((0..connections).map(|_| task())).await {
        if let Err(error) = done {
            tally.bad(&error);
        }
    }
    tally.print(begin);
    Ok(())
}

/// Bodies of so many bytes, one after the other on each connection. Those that began in time are finished.
pub async fn bodies(url: &str, way: Way, size: u64, connections: usize, seconds: u64) -> anyhow::Result<()> {
    let url: Uri = url.parse()?;
    let (tally, begin) = (Tally::shared(), Instant::now());
    let end = begin + Duration::from_secs(seconds);
    let task = async || -> anyhow::Result<()> {
        let stream = TcpStream::connect(authority(&url)?).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        spawn_local(connection);
        while Instant::now() < end {
            let begin = Instant::now();
            let sent = if way == Way::Up { size } else { 0 };
            let method = if way == Way::Up { "POST" } else { "GET" };
            let mut request =
                Request::builder().method(method).uri(url.path()).header("host", authority(&url)?);
            if way == Way::Up {
                request = request.header("content-length", size);
            }
            sender.ready().await?;
            let answer = sender.send_request(request.body(StreamBody::new(pieces(sent)))?).await?;
            ensure!(answer.status().is_success(), "status {}", answer.status());
            let (mut body, mut read) = (answer.into_body(), 0);
            while let Some(frame) = body.frame().await {
                read += frame?.data_ref().map_or(0, Bytes::len);
            }
            ensure!(way == Way::Up || read as u64 == size, "a body of {read} bytes instead of {size}");
            tally.add_bytes(usize::try_from(size)?);
            tally.good(begin.elapsed());
        }
        Ok(())
    };
    for done in join_all((0..connections).map(|_| task())).await {
        if let Err(error) = done {
            tally.bad(&error);
        }
    }
    tally.print(begin);
    Ok(())
}

/// So many zeros.
fn pieces(size: u64) -> impl tokio_stream::Stream<Item = Result<Frame<Bytes>, Infallible>> {
    let zeros = Bytes::from(vec![0; PIECE]);
    let count = size.div_ceil(PIECE as u64);
    tokio_stream::iter((0..count).map(move |number| {
        let length = (size - number * PIECE as u64).min(PIECE as u64);
        Ok(Frame::data(zeros.slice(..length as usize)))
    }))
}

/// Downloads whose answer is not read past its head, and uploads that the app does not read; until it is stopped.
pub async fn stall(down: &str, up: &str, count: usize) -> anyhow::Result<()> {
    let (down, up): (Uri, Uri) = (down.parse()?, up.parse()?);
    let mut held = Vec::new();
    for _ in 0..count {
        let host = authority(&down)?;
        let mut stream = TcpStream::connect(host).await?;
        stream.write_all(format!("GET {} HTTP/1.1\r\nhost: {host}\r\n\r\n", down.path()).as_bytes()).await?;
        let mut head = [0; 64];
        stream.read_exact(&mut head).await.context("a download did not begin")?;
        ensure!(
            head.starts_with(b"HTTP/1.1 200"),
            "a download began with {:?}",
            String::from_utf8_lossy(&head)
        );
        held.push(stream);
    }
    let uploads = (0..count).map(async |_| -> anyhow::Result<TcpStream> {
        let host = authority(&up)?;
        let mut stream = TcpStream::connect(host).await?;
        let head =
            format!("POST {} HTTP/1.1\r\nhost: {host}\r\ncontent-length: 1073741824\r\n\r\n", up.path());
        stream.write_all(head.as_bytes()).await?;
        let piece = vec![0; PIECE];
        // as much as goes in until nothing moves any more
        while let Ok(written) = timeout(STALLED, stream.write_all(&piece)).await {
            written?;
        }
        Ok(stream)
    });
    for done in join_all(uploads).await {
        held.push(done.context("an upload was refused")?);
    }
    sleep(STALLED).await;
    println!("stalled {}", held.len());
    std::future::pending().await
}
