//! Streams against a server of h2, over real sockets.

use futures_util::TryFutureExt;
use h2::server;
use http_body_util::BodyExt;
use hyper::{HeaderMap, StatusCode, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::Instant,
};

use super::*;
use crate::http::{BodyEnd, Ended, body::BodyError};

type Server = server::Connection<TcpStream, Bytes>;
type Sent = Result<Response<Body>, SendFailed>;

/// A connection whose client side is driven, and the pings of it.
async fn connection() -> (SendRequest<Bytes>, Server, PingPong) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (client, server) =
        tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    let (sender, driver, pings) = handshake(Stream::from(client.unwrap()), stream_window(0)).await.unwrap();
    tokio::spawn(driver);
    (sender, server::handshake(server.unwrap().0).await.unwrap(), pings)
}

fn sending(sender: &SendRequest<Bytes>, body: impl Into<Bytes>) -> JoinHandle<Sent> {
    let request = Request::post("http://orders/").body(Body::whole(body)).unwrap();
    tokio::spawn(send(&mut sender.clone(), request))
}

async fn request(server: &mut Server) -> (Request<h2::RecvStream>, server::SendResponse<Bytes>) {
    server.accept().await.unwrap().unwrap()
}

/// Drives the server from here on.
fn drive(mut server: Server) {
    tokio::spawn(async move { while server.accept().await.is_some() {} });
}

async fn read(request: Request<h2::RecvStream>) -> Result<Vec<u8>, h2::Error> {
    let mut body = request.into_body();
    let mut read = Vec::new();
    while let Some(piece) = body.data().await {
        let piece = piece?;
        body.flow_control().release_capacity(piece.len())?;
        read.extend(piece);
    }
    Ok(read)
}

#[tokio::test]
async fn question_and_answer_with_their_length_and_trailers() {
    let (sender, mut server, _) = connection().await;
    let answer = sending(&sender, "question");
    let (question, mut respond) = request(&mut server).await;
    drive(server);
    assert_eq!(question.headers()["content-length"], "8");
    assert_eq!(read(question).await.unwrap(), b"question");
    let mut stream = respond.send_response(Response::new(()), false).unwrap();
    stream.send_data("answer".into(), false).unwrap();
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", 0.into());
    stream.send_trailers(trailers.clone()).unwrap();
    let answer = answer.await.unwrap().unwrap().into_body().collect().await.unwrap();
    assert_eq!(answer.trailers(), Some(&trailers));
    assert_eq!(answer.to_bytes(), "answer");
}

#[tokio::test]
async fn a_body_that_is_there_needs_no_task() {
    let (sender, mut server, _) = connection().await;
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let answer = sending(&sender, "question");
    let before = tasks();
    let (_question, _respond) = request(&mut server).await;
    assert_eq!(tasks(), before);
    drop(answer);
}

#[tokio::test]
async fn more_than_a_window_holds_arrives_whole() {
    let (sender, mut server, _) = connection().await;
    let body: Vec<u8> = (0..1_000_000_u32).map(|number| number as u8).collect();
    let answer = sending(&sender, body.clone());
    let (question, mut respond) = request(&mut server).await;
    drive(server);
    // The answer begins first: the rest of the question still goes on.
    respond.send_response(Response::new(()), true).unwrap();
    assert_eq!(answer.await.unwrap().unwrap().status(), StatusCode::OK);
    assert!(read(question).await.unwrap() == body);
}

/// What a server's window holds before it has given any.
const WINDOW: usize = 65_535;

#[tokio::test]
async fn an_end_without_bytes_needs_no_window() {
    // The body of another answer, as a body that an app sends over HTTP/2 may end too.
    let (source, mut server, _) = connection().await;
    let answer = sending(&source, "");
    let (_question, mut respond) = request(&mut server).await;
    drive(server);
    let mut stream = respond.send_response(Response::new(()), false).unwrap();
    stream.send_data(vec![0; WINDOW].into(), false).unwrap();
    let body = answer.await.unwrap().unwrap().into_body();

    let (sender, mut server, _) = connection().await;
    let request_with_it = Request::post("http://orders/").body(body).unwrap();
    let _answer = tokio::spawn(send(&mut sender.clone(), request_with_it));
    let (question, _respond) = request(&mut server).await;
    drive(server);
    let mut question = question.into_body();
    let mut read = 0;
    while read < WINDOW {
        read += question.data().await.unwrap().unwrap().len();
    }
    stream.send_data(Bytes::new(), true).unwrap();
    while let Some(last) = question.data().await {
        assert!(last.unwrap().is_empty());
    }
}

#[tokio::test]
async fn a_call_that_is_given_up_resets_its_stream() {
    let (sender, mut server, _) = connection().await;
    let answer = sending(&sender, vec![0; 1_000_000]);
    let (question, _respond) = request(&mut server).await;
    drive(server);
    let mut question = question.into_body();
    let first = question.data().await.unwrap().unwrap();
    assert!(!first.is_empty());
    answer.abort();
    let broken = loop {
        match question.data().await.expect("an end only by a reset") {
            Ok(piece) => question.flow_control().release_capacity(piece.len()).unwrap(),
            Err(error) => break error,
        }
    };
    assert_eq!(broken.reason(), Some(Reason::CANCEL));
}

#[tokio::test]
async fn an_answer_that_is_dropped_ends_what_is_left_of_its_request() {
    let (sender, mut server, _) = connection().await;
    let answer = sending(&sender, vec![0; 1_000_000]);
    let (question, mut respond) = request(&mut server).await;
    drive(server);
    let _never_ended = respond.send_response(Response::new(()), false).unwrap();
    drop(answer.await.unwrap().unwrap());
    assert_eq!(read(question).await.unwrap_err().reason(), Some(Reason::CANCEL));
}

/// The end of the body of an answer whose stream is reset after its first bytes.
async fn reset_with(reason: Reason) -> Result<(), BodyError> {
    let (sender, mut server, _) = connection().await;
    let answer = sending(&sender, "");
    let (_question, mut respond) = request(&mut server).await;
    drive(server);
    let mut stream = respond.send_response(Response::new(()), false).unwrap();
    stream.send_data("ans".into(), false).unwrap();
    let mut body = answer.await.unwrap().unwrap().into_body();
    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "ans");
    stream.send_reset(reason);
    body.frame().await.map_or(Ok(()), |ended| ended.map(|_| ()))
}

#[tokio::test]
async fn an_answer_that_was_cut_is_not_taken_for_whole() {
    for reason in [Reason::CANCEL, Reason::INTERNAL_ERROR, Reason::REFUSED_STREAM] {
        assert!(reset_with(reason).await.is_err(), "{reason}");
    }
    assert!(reset_with(Reason::NO_ERROR).await.is_err(), "before the end that h2 saw");
}

#[tokio::test]
async fn an_answer_ends_with_its_request_and_its_server_is_not_to_blame() {
    let (source, mut server, _) = connection().await;
    let answer = sending(&source, "");
    let (_question, mut respond) = request(&mut server).await;
    drive(server);
    let mut origin = respond.send_response(Response::new(()), false).unwrap();
    let body = answer.await.unwrap().unwrap().into_body();

    let (sender, mut server, _) = connection().await;
    let question = Request::post("http://orders/").body(body).unwrap();
    let answer = tokio::spawn(send(&mut sender.clone(), question));
    let (_question, mut respond) = request(&mut server).await;
    drive(server);
    let _never_ended = respond.send_response(Response::new(()), false).unwrap();
    let (tell, ended) = tokio::sync::oneshot::channel();
    let tell = |ended: &Ended| drop(tell.send(ended.how.clone()));
    let body = answer.await.unwrap().unwrap().into_body().observed(tell);
    origin.send_reset(Reason::CANCEL);
    assert!(body.collect().await.is_err());
    assert!(matches!(ended.await.unwrap(), BodyEnd::Abandoned));
}

/// Why the stream of a client ends whose answer comes from an answer that is reset after its first bytes.
async fn reset_beyond(reason: Reason) -> Option<Reason> {
    let (sender, mut far, _) = connection().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (hop, _) = listener.accept().await.unwrap();
    let forward = service_fn(move |_| {
        send(&mut sender.clone(), Request::new(Body::empty())).map_err(|failed| failed.failed)
    });
    tokio::spawn(
        hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(hop), forward),
    );
    let (mut client, driver) = client::handshake(near).await.unwrap();
    tokio::spawn(driver);
    let (answer, _) = client.send_request(Request::get("http://orders/").body(()).unwrap(), true).unwrap();
    let (_question, mut respond) = request(&mut far).await;
    drive(far);
    let mut stream = respond.send_response(Response::new(()), false).unwrap();
    stream.send_data("ans".into(), false).unwrap();
    let mut body = answer.await.unwrap().into_body();
    assert_eq!(body.data().await.unwrap().unwrap(), "ans");
    stream.send_reset(reason);
    body.data().await.unwrap().unwrap_err().reason()
}

#[tokio::test]
async fn the_reason_of_one_hop_is_not_told_to_the_next() {
    for reason in [Reason::REFUSED_STREAM, Reason::NO_ERROR, Reason::CANCEL] {
        assert_eq!(reset_beyond(reason).await, Some(Reason::INTERNAL_ERROR), "{reason}");
    }
}

#[tokio::test]
async fn after_a_goaway_it_takes_no_more_streams() {
    let (mut sender, mut server, _) = connection().await;
    assert!(is_open(&mut sender));
    let answer = sending(&sender, "");
    let (_question, mut respond) = request(&mut server).await;
    server.graceful_shutdown();
    drive(server);
    while is_open(&mut sender.clone()) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let refused = sending(&sender, "").await.unwrap().err().unwrap();
    assert!(refused.nothing_processed, "{refused:?}");
    // What was under way goes on.
    respond.send_response(Response::new(()), true).unwrap();
    assert_eq!(answer.await.unwrap().unwrap().status(), StatusCode::OK);
}

#[tokio::test]
async fn it_ends_when_nobody_holds_a_sender() {
    let (sender, mut server, _) = connection().await;
    drop(sender);
    // An end with GOAWAY, or a reset where something of ours was not read yet.
    assert!(!matches!(server.accept().await, Some(Ok(_))));
}

#[tokio::test(start_paused = true)]
async fn a_peer_is_silent_without_a_byte() {
    let (_sender, _never_polled, pings) = connection().await;
    let read = Arc::new(AtomicU64::new(0));
    let watching = silence(pings, read.clone());
    tokio::pin!(watching);
    for _ in 0..10 {
        read.fetch_add(1, Ordering::Relaxed);
        assert!(timeout(PING_AFTER, watching.as_mut()).await.is_err(), "bytes come");
    }
    let begin = Instant::now();
    watching.await;
    assert!(begin.elapsed() <= PING_AFTER * 2 + PING_TIMEOUT);
}
