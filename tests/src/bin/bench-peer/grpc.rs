//! gRPC on the wire, by hand: unary calls, and messages to and fro on streams that stay open. Closed loop: each stream
//! sends its next message when the answer to the last one is there.

use std::{rc::Rc, str::FromStr, time::Duration};

use anyhow::{Context, ensure};
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::future::join_all;
use http_body_util::{BodyExt, StreamBody, combinators::BoxBody};
use hyper::{
    Request, Uri,
    body::{Frame, Incoming},
    client::conn::http2::SendRequest,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{net::TcpStream, sync::mpsc, task::spawn_local, time::Instant, time::timeout_at};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};

use crate::{requests::authority, tally::Tally};

/// Bytes of a message without its prefix.
const MESSAGE: usize = 100;
const LINGER: Duration = Duration::from_secs(10);

type Body = BoxBody<Bytes, std::convert::Infallible>;

/// What is called.
#[derive(Clone, Copy, PartialEq)]
pub enum Kind {
    /// A call for each message.
    Unary,
    /// One call for all messages.
    Stream,
}

impl FromStr for Kind {
    type Err = anyhow::Error;

    fn from_str(word: &str) -> anyhow::Result<Kind> {
        match word {
            "unary" => Ok(Kind::Unary),
            "stream" => Ok(Kind::Stream),
            _ => anyhow::bail!("expected unary or stream, not {word}"),
        }
    }
}

/// `streams` at a time on each of the connections.
pub async fn call(
    url: &str,
    kind: Kind,
    connections: usize,
    streams: usize,
    seconds: u64,
) -> anyhow::Result<()> {
    let url: Uri = url.parse()?;
    let mut senders = Vec::new();
    for _ in 0..connections {
        let stream = TcpStream::connect(authority(&url)?).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
        spawn_local(connection);
        senders.push(sender);
    }
    let (tally, begin) = (Tally::shared(), Instant::now());
    let end = begin + Duration::from_secs(seconds);
    let task = |sender: SendRequest<Body>| {
        let (url, tally) = (url.clone(), tally.clone());
        async move {
            while Instant::now() < end {
                let done = match kind {
                    Kind::Unary => unary(sender.clone(), &url, &tally).await,
                    Kind::Stream => stream(sender.clone(), &url, &tally, end).await,
                };
                if let Err(error) = done {
                    tally.bad(&error);
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
        }
    };
    let all = join_all(senders.iter().flat_map(|sender| (0..streams).map(|_| task(sender.clone()))));
    if timeout_at(end + LINGER, all).await.is_err() {
        tally.bad(&anyhow::anyhow!("unanswered {LINGER:?} after the end"));
    }
    tally.print(begin);
    Ok(())
}

fn request(url: &Uri, body: Body) -> anyhow::Result<Request<Body>> {
    Ok(Request::post(url.clone())
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(body)?)
}

fn message() -> Bytes {
    let mut message = BytesMut::with_capacity(MESSAGE + 5);
    message.put_u8(0);
    message.put_u32(MESSAGE as u32);
    message.put_bytes(b'x', MESSAGE);
    message.freeze()
}

async fn unary(mut sender: SendRequest<Body>, url: &Uri, tally: &Rc<Tally>) -> anyhow::Result<()> {
    let begin = Instant::now();
    let body = http_body_util::Full::new(message()).boxed();
    let answer = sender.send_request(request(url, body)?).await?.into_body();
    let answer = answer.collect().await?;
    let status = answer.trailers().and_then(|trailers| trailers.get("grpc-status")).cloned();
    ensure!(status.is_some_and(|status| status == "0"), "a call did not end with grpc-status 0");
    ensure!(answer.to_bytes().len() == MESSAGE + 5, "an answer is not as long as its question");
    tally.good(begin.elapsed());
    Ok(())
}

async fn stream(
    mut sender: SendRequest<Body>,
    url: &Uri,
    tally: &Rc<Tally>,
    end: Instant,
) -> anyhow::Result<()> {
    let (messages, sent) = mpsc::channel(1);
    let body = BodyExt::boxed(StreamBody::new(ReceiverStream::new(sent).map(|bytes| Ok(Frame::data(bytes)))));
    let mut begin = Instant::now();
    messages.send(message()).await?;
    let mut answer = sender.send_request(request(url, body)?).await?.into_body();
    loop {
        read_message(&mut answer).await?;
        tally.good(begin.elapsed());
        if Instant::now() >= end {
            return Ok(());
        }
        begin = Instant::now();
        messages.send(message()).await?;
    }
}

async fn read_message(body: &mut Incoming) -> anyhow::Result<()> {
    let mut length = 0;
    while length < MESSAGE + 5 {
        let frame = body.frame().await.context("the stream ended early")??;
        length += frame.data_ref().map_or(0, Bytes::len);
    }
    Ok(())
}
