//! Bodies that a client of HTTP/1 sends in pieces.

use std::convert::Infallible;

use http_body_util::BodyExt;
use hyper::{Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncWriteExt, DuplexStream, duplex},
    sync::mpsc,
};

use super::*;

/// Most bytes that are kept.
const LIMIT: usize = 8;

/// A request whose body is to come, and its client.
async fn request() -> (Replay, DuplexStream) {
    let (mut client, server) = duplex(1024);
    let (tell, mut told) = mpsc::unbounded_channel();
    let service = service_fn(move |request: Request<Incoming>| {
        tell.send(request.into_body()).unwrap();
        std::future::pending::<Result<Response<Body>, Infallible>>()
    });
    tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(server), service));
    client.write_all(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n").await.unwrap();
    (Replay::new(Body::from(told.recv().await.unwrap()), LIMIT), client)
}

async fn piece(client: &mut DuplexStream, text: &str) {
    client.write_all(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes()).await.unwrap();
}

async fn read(body: &mut Body) -> Result<Bytes, BodyError> {
    Ok(body.frame().await.expect("not the end")?.into_data().expect("data"))
}

#[tokio::test]
async fn a_body_that_was_taken_back_begins_anew_for_the_next_attempt_alone() {
    let (replay, mut client) = request().await;
    let mut first = replay.begin();
    piece(&mut client, "abcd").await;
    assert_eq!(read(&mut first).await.unwrap(), "abcd");
    assert!(replay.take_back());
    // What comes until the next attempt begins is not lost to the one before.
    piece(&mut client, "efgh").await;
    piece(&mut client, "").await;
    assert!(read(&mut first).await.is_err());
    assert!(!http_body::Body::is_end_stream(&first));
    assert_eq!(replay.begin().collect().await.unwrap().to_bytes(), "abcdefgh");
}

#[tokio::test]
async fn a_body_whose_beginning_is_gone_is_not_begun_again_as_a_shorter_one() {
    let (replay, mut client) = request().await;
    let mut first = replay.begin();
    for text in ["abcdefgh", "i"] {
        assert!(replay.can_begin());
        piece(&mut client, text).await;
        assert_eq!(read(&mut first).await.unwrap(), text);
    }
    assert!(!replay.can_begin() && !replay.take_back());
    piece(&mut client, "j").await;
    assert_eq!(read(&mut first).await.unwrap(), "j", "it goes on");
    piece(&mut client, "").await;
    assert!(first.frame().await.is_none());
    let mut second = replay.begin();
    assert!(!http_body::Body::is_end_stream(&second));
    assert!(read(&mut second).await.is_err());
}

#[tokio::test]
async fn a_body_that_its_client_broke_off_is_whole_to_no_attempt() {
    let (replay, mut client) = request().await;
    let mut first = replay.begin();
    piece(&mut client, "ab").await;
    assert_eq!(read(&mut first).await.unwrap(), "ab");
    drop(client);
    assert!(read(&mut first).await.is_err());
    assert!(replay.begin().collect().await.is_err());
}

#[tokio::test]
async fn the_body_of_an_earlier_attempt_does_not_keep_what_nobody_will_read() {
    let (replay, mut client) = request().await;
    let (tell, mut ended) = tokio::sync::oneshot::channel();
    {
        let mut state = lock(replay.shared.as_ref().unwrap());
        let source = std::mem::replace(&mut state.source, Body::empty());
        state.source = source.observed(|end| tell.send(end.bytes).unwrap());
    }
    // Its server answered before it had read the body, and takes nothing more of it.
    let _stalled = replay.begin();
    assert!(replay.take_back());
    let mut last = replay.begin();
    piece(&mut client, "abcd").await;
    assert_eq!(read(&mut last).await.unwrap(), "abcd");
    drop(replay);
    assert!(ended.try_recv().is_err(), "the last attempt still reads");
    drop(last);
    assert_eq!(ended.await.unwrap(), 4);
}
