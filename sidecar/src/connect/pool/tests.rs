//! Idle connections of the pool, over real sockets. Each address of 127.0.0.0/8 counts as a server of its own.

use std::{
    pin::pin,
    sync::atomic::{AtomicUsize, Ordering},
};

use bytes::Bytes;
use futures_util::poll;
use http_body_util::BodyExt;
use hyper::{Request, Response};
use tokio::{
    net::{TcpListener, TcpSocket},
    sync::Notify,
};

use super::*;
use crate::{connect::Dialer, http::Body};

/// More than may grow old.
const MANY: u8 = 140;
const STAY: usize = 128;
const LIMIT: Duration = Duration::from_secs(10);

/// A server that takes every connection and says nothing.
async fn silent_server() -> u16 {
    let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            held.push(stream);
        }
    });
    port
}

/// A server that gives every HTTP/1 request this answer.
async fn server_of_http1(answer: String) -> Key {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        assert!(stream.read(&mut [0; 1024]).await.unwrap() > 0);
        // a client that has seen enough may close
        let _ = stream.write_all(answer.as_bytes()).await;
    });
    Key { address, security: Security::Plain, version: HttpVersion::Http1 }
}

#[tokio::test]
async fn an_answer_may_have_many_fields_and_its_bound_has_a_name() {
    let too_large = Err((Failure::ResponseHeadersTooLarge, false));
    for (fields, value, expected) in
        [(100, 1, Ok(100)), (1000, 1, Ok(1000)), (1001, 1, too_large), (2, 300 * 1024, too_large)]
    {
        let head: String =
            (1..fields).map(|number| format!("x-{number}: {}\r\n", "y".repeat(value))).collect();
        let key = server_of_http1(format!("HTTP/1.1 200 OK\r\n{head}content-length: 0\r\n\r\n")).await;
        let lease = pool().lend(&key, LIMIT).await.unwrap();
        let answer = lease.send(Request::new(Body::empty())).await;
        let seen = answer.map(|(answer, _)| answer.headers().len());
        assert_eq!(
            seen.map_err(|failed| (failed.failed.failure, failed.nothing_processed)),
            expected,
            "{fields}"
        );
    }
}

fn key(number: u8, port: u16) -> Key {
    let address = SocketAddr::from(([127, 0, 1, number], port));
    Key { address, security: Security::Plain, version: HttpVersion::Http2 }
}

fn pool() -> Arc<Pool> {
    pool_that_dials(Dialer::Direct)
}

fn pool_that_dials(dialer: Dialer) -> Arc<Pool> {
    let (_, credentials) = watch::channel(None);
    Pool::new(Connector::new(dialer, credentials, Duration::ZERO), Arc::new(Metrics::new()))
}

fn open(pool: &Pool) -> Vec<u8> {
    let mut open = Vec::new();
    for part in pool.shelves.all() {
        open.extend(part.iter().filter(|(_, shelf)| !shelf.http2.is_empty()).map(|(key, _)| {
            match key.address.ip() {
                std::net::IpAddr::V4(address) => address.octets()[3],
                std::net::IpAddr::V6(_) => 0,
            }
        }));
    }
    open.sort_unstable();
    open
}

#[tokio::test]
async fn of_many_idle_connections_the_youngest_stay_and_none_for_long() {
    let port = silent_server().await;
    let pool = pool();
    let in_use = pool.lend(&key(0, port), LIMIT).await.unwrap();
    for number in 1..=MANY {
        drop(pool.lend(&key(number, port), LIMIT).await.unwrap());
    }
    let now = Instant::now();
    pool.sweep(now + Duration::from_secs(9)).await;
    assert_eq!(open(&pool), (0..=MANY).collect::<Vec<_>>());
    pool.sweep(now + Duration::from_secs(10)).await;
    let youngest: Vec<u8> = (MANY - STAY as u8 + 1..=MANY).collect();
    assert_eq!(open(&pool), [&[0], &youngest[..]].concat(), "the one in use, and the youngest");
    pool.sweep(now + Duration::from_secs(50)).await;
    assert_eq!(open(&pool).len(), 1 + STAY);
    pool.sweep(now + Duration::from_secs(60)).await;
    assert_eq!(open(&pool), [0], "the one in use");
    drop(pool.lend(&key(1, port), LIMIT).await.unwrap());
    pool.shelves.make_room(Instant::now() + Duration::from_millis(100));
    assert_eq!(open(&pool), [0], "the one in use");
    drop(in_use);
    pool.shelves.make_room(Instant::now() + Duration::from_millis(100));
    assert!(open(&pool).is_empty());
}

#[tokio::test]
async fn a_sweep_closes_a_few_at_a_time_and_lets_others_run() {
    const OPEN: usize = 30;
    let port = silent_server().await;
    let pool = pool();
    let key = Key { version: HttpVersion::Http1, ..key(1, port) };
    for _ in 0..OPEN {
        pool.take_back(key.clone(), open_http1(&pool.connector, &key, LIMIT, None).await.unwrap());
    }
    let left = || pool.shelves.part(&key).get(&key).map_or(0, |shelf| shelf.http1.len());
    let mut sweep = pin!(pool.sweep(Instant::now() + Duration::from_secs(60)));
    let (mut before, mut steps) = (left(), 0);
    assert_eq!(before, OPEN);
    while poll!(sweep.as_mut()).is_pending() {
        assert!(before - left() <= 8, "{before} before a step, {} after it", left());
        before = left();
        steps += 1;
    }
    assert_eq!(left(), 0);
    assert!(steps >= 4, "{steps}");
}

#[tokio::test]
async fn a_server_that_closes_each_connection_is_dialled_once() {
    let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let dials = Arc::new(AtomicUsize::new(0));
    let counted = dials.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            counted.fetch_add(1, Ordering::Relaxed);
            drop(stream);
        }
    });
    let pool = pool();
    // Where the call is quicker than the end of the connection it gets a stream, as on any that breaks later.
    if let Err(failed) = pool.lend(&key(1, port), LIMIT).await {
        assert_eq!(failed.failure, Failure::ConnectRefused, "{failed:?}");
    }
    assert_eq!(dials.load(Ordering::Relaxed), 1);
}

/// A server of HTTP/2 that takes so many streams at a time, answers with a head and no end, and, after so many answers,
/// takes no more on that connection. Counts its connections.
async fn server(streams: u32, answers: usize) -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = connections.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            counted.fetch_add(1, Ordering::Relaxed);
            tokio::spawn(async move {
                let mut builder = h2::server::Builder::new();
                let mut connection =
                    builder.max_concurrent_streams(streams).handshake::<_, Bytes>(stream).await.unwrap();
                let mut held = Vec::new();
                while let Some(Ok((_, mut respond))) = connection.accept().await {
                    held.push(respond.send_response(Response::new(()), false).unwrap());
                    if held.len() == answers {
                        connection.graceful_shutdown();
                    }
                }
            });
        }
    });
    (port, connections)
}

/// Begins a call, and gives what keeps it in use.
async fn call(pool: &Arc<Pool>, key: &Key) -> (Response<Body>, InUse) {
    let request = Request::get("http://orders/").body(Body::empty()).unwrap();
    pool.lend(key, LIMIT).await.unwrap().send(request).await.map_err(|failed| failed.failed).unwrap()
}

#[tokio::test]
async fn a_server_of_few_streams_gets_more_connections() {
    let (port, connections) = server(2, usize::MAX).await;
    let (pool, key) = (pool(), key(1, port));
    let mut calls = Vec::new();
    for open in 1..=6 {
        calls.push(call(&pool, &key).await);
        assert_eq!(connections.load(Ordering::Relaxed), usize::div_ceil(open, 2), "{open} calls");
    }
}

#[tokio::test]
async fn connections_that_take_no_more_calls_leave_room_for_others() {
    let (port, connections) = server(100, 1).await;
    let (pool, key) = (pool(), key(1, port));
    let mut calls = Vec::new();
    for open in 1..=CONNECTIONS_PER_KEY + 10 {
        calls.push(call(&pool, &key).await);
        assert_eq!(connections.load(Ordering::Relaxed), open);
        // The GOAWAY comes after the head of the answer.
        let is_open = || {
            pool.shelves
                .part(&key)
                .get(&key)
                .is_some_and(|shelf| shelf.http2.iter().any(|c| Http2Stream::take(c).is_some()))
        };
        while is_open() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// A server that takes two streams at a time, and answers at once, whole, without reading what is sent to it until it is
/// told to let go of it.
async fn hasty_server() -> (u16, Arc<AtomicUsize>, Arc<Notify>) {
    let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (connections, let_go) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
    let (counted, told) = (connections.clone(), let_go.clone());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            counted.fetch_add(1, Ordering::Relaxed);
            let told = told.clone();
            tokio::spawn(async move {
                let mut builder = h2::server::Builder::new();
                let mut connection =
                    builder.max_concurrent_streams(2).handshake::<_, Bytes>(stream).await.unwrap();
                let mut held = Vec::new();
                loop {
                    tokio::select! {
                        asked = connection.accept() => {
                            let Some(Ok((request, mut respond))) = asked else { return };
                            let answer = respond.send_response(Response::new(()), true).unwrap();
                            held.push((request, respond, answer));
                        }
                        () = told.notified() => held.clear(),
                    }
                }
            });
        }
    });
    (port, connections, let_go)
}

/// A call from its beginning to the end of its answer.
async fn whole_call(pool: &Arc<Pool>, key: &Key, body: Body) {
    let request = Request::post("http://orders/").body(body).unwrap();
    let sending = pool.lend(key, LIMIT).await.unwrap().send(request);
    let sent = timeout(LIMIT, sending).await.expect("a stream for it");
    let (response, in_use) = sent.map_err(|failed| failed.failed).unwrap();
    response.into_body().collect().await.unwrap();
    in_use.finished();
}

#[tokio::test]
async fn a_request_that_was_answered_early_keeps_its_stream_until_it_ends() {
    let (port, connections, let_go) = hasty_server().await;
    // Answers without an end: bodies for requests.
    let (source, endless) = (key(0, server(100, usize::MAX).await.0), pool());
    let (pool, key) = (pool(), key(1, port));
    let mut sources = Vec::new();
    for calls in 1..=6 {
        let (body, in_use) = call(&endless, &source).await;
        sources.push(in_use);
        whole_call(&pool, &key, body.into_body()).await;
        assert_eq!(connections.load(Ordering::Relaxed), usize::div_ceil(calls, 2), "{calls} calls");
    }
    let later = || Instant::now() + Duration::from_secs(60);
    pool.sweep(later()).await;
    assert_eq!(open(&pool), [1], "a stream that still sends is no idle one");
    let_go.notify_waiters();
    let idle = || {
        let shelves = pool.shelves.part(&key);
        shelves[&key].http2.iter().filter(|connection| connection.idle_for(later()).is_some()).count()
    };
    while idle() < 3 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    for _ in 0..10 {
        whole_call(&pool, &key, Body::empty()).await;
    }
    assert_eq!(connections.load(Ordering::Relaxed), 3, "there is room again");
    pool.sweep(later()).await;
    assert_eq!(open(&pool), [0; 0]);
}

#[tokio::test]
async fn a_request_that_ends_before_its_answer_keeps_its_stream_too() {
    let (port, connections) = server(1, usize::MAX).await;
    let (pool, key) = (pool(), key(1, port));
    let request = Request::post("http://orders/").body(Body::whole("short")).unwrap();
    let sent = pool.lend(&key, LIMIT).await.unwrap().send(request).await;
    let held = sent.map_err(|failed| failed.failed).unwrap();
    drop(call(&pool, &key).await);
    assert_eq!(connections.load(Ordering::Relaxed), 2);
    drop(held);
    drop(call(&pool, &key).await);
    assert_eq!(connections.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn a_dial_that_panics_fails_those_who_wait_for_it_and_nobody_later() {
    let (port, connections) = server(100, usize::MAX).await;
    let first = Arc::new(AtomicUsize::new(0));
    let dialer = Dialer::Handed(Arc::new(move |_| {
        let is_first = first.fetch_add(1, Ordering::Relaxed) == 0;
        Box::pin(async move {
            assert!(!is_first, "a bug in the dial");
            TcpSocket::new_v4()
        })
    }));
    let (pool, key) = (pool_that_dials(dialer), key(1, port));
    let failed = pool.lend(&key, LIMIT).await.err().unwrap();
    assert_eq!(failed.failure, Failure::Internal, "{failed:?}");
    drop(call(&pool, &key).await);
    drop(call(&pool, &key).await);
    assert_eq!(connections.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_dial_that_panicked_leaves_nothing_behind() {
    let dialer = Dialer::Handed(Arc::new(|_| Box::pin(async { panic!("a bug in the dial") })));
    let (pool, key) = (pool_that_dials(dialer), key(1, 1));
    assert!(pool.lend(&key, LIMIT).await.is_err());
    pool.sweep(Instant::now()).await;
    assert!(pool.shelves.part(&key).is_empty());
}
