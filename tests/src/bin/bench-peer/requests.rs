//! HTTP/1 requests: at a fixed rate, on new connections, and held idle.
//!
//! At a fixed rate a request is due at its time whether or not a connection is free; its latency counts from then, so
//! that a stall of the proxy is not hidden by the requests that it kept from being sent (coordinated omission).

use std::{
    cell::{Cell, RefCell},
    os::fd::{AsFd, OwnedFd},
    rc::Rc,
    time::Duration,
};

use anyhow::{Context, ensure};
use bytes::Bytes;
use futures_util::future::join_all;
use http_body_util::{BodyExt, Empty};
use hyper::{Request, Uri, client::conn::http1::SendRequest};
use hyper_util::rt::TokioIo;
use nix::sys::{
    time::TimeSpec,
    timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, unix::AsyncFd},
    net::TcpStream,
    sync::Semaphore,
    task::spawn_local,
    time::{Instant, sleep, timeout, timeout_at},
};

use crate::tally::Tally;

/// Longest wait for what is still under way when the time is over.
const LINGER: Duration = Duration::from_secs(10);
/// Longest wait for the first answer on a connection.
const PATIENCE: Duration = Duration::from_secs(5);
/// Connections that are opened at a time.
const AT_A_TIME: usize = 16;

/// Host and port of a URL.
pub fn authority(url: &Uri) -> anyhow::Result<&str> {
    url.authority().map(|authority| authority.as_str()).context("expected http://HOST:PORT/PATH")
}

pub fn get(url: &Uri) -> anyhow::Result<Request<Empty<Bytes>>> {
    Ok(Request::get(url.path()).header("host", authority(url)?).body(Empty::new())?)
}

async fn dial(url: &Uri) -> anyhow::Result<SendRequest<Empty<Bytes>>> {
    let stream = TcpStream::connect(authority(url)?).await?;
    stream.set_nodelay(true)?;
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    spawn_local(connection);
    Ok(sender)
}

async fn ask(sender: &mut SendRequest<Empty<Bytes>>, url: &Uri) -> anyhow::Result<()> {
    sender.ready().await?;
    let answer = sender.send_request(get(url)?).await?;
    ensure!(answer.status().is_success(), "status {}", answer.status());
    let mut body = answer.into_body();
    while let Some(frame) = body.frame().await {
        frame?;
    }
    Ok(())
}

/// `rate` requests per second, each due at its own time, over at most so many connections.
pub async fn at_rate(url: &str, connections: usize, rate: f64, seconds: u64) -> anyhow::Result<()> {
    let url: Uri = url.parse()?;
    ensure!(rate > 0.0 && connections > 0, "rate and connections must be more than 0");
    let interval = Duration::from_secs_f64(1.0 / rate);
    let count = (rate * seconds as f64) as u32;
    let tally = Tally::shared();
    let open = async || {
        let mut sender = dial(&url).await?;
        ask(&mut sender, &url).await?;
        anyhow::Ok(sender)
    };
    let mut senders = Vec::new();
    for opened in join_all((0..connections).map(|_| timeout(PATIENCE, open()))).await {
        match opened.context("the first request was not answered").flatten() {
            Ok(sender) => senders.push(sender),
            Err(error) => tally.bad(&error),
        }
    }
    if senders.is_empty() {
        tally.print(Instant::now());
        return Ok(());
    }
    let (due, next) = (Rc::new(Semaphore::new(0)), Rc::new(Cell::new(0)));
    // tokio's own timer counts milliseconds: too coarse here
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK)?;
    let begin = Instant::now();
    let every = Expiration::Interval(TimeSpec::from_duration(interval));
    timer.set(every, TimerSetTimeFlags::empty())?;
    #[expect(
        deprecated,
        reason = "`AsyncFd::new` is unsound for types without I/O safety only; an OwnedFd has it"
    )]
    let timer = AsyncFd::new(OwnedFd::from(timer))?;
    let end = begin + Duration::from_secs(seconds) + LINGER;
    let mut tasks = Vec::new();
    for sender in senders {
        let (url, tally, due, next) = (url.clone(), tally.clone(), due.clone(), next.clone());
        let worker = Worker { sender, url, tally, due, next };
        tasks.push(spawn_local(timeout_at(end, worker.run(begin, interval, count))));
    }
    let mut released = 0;
    while released < count {
        let mut ready = timer.readable().await?;
        if let Ok(Ok(ticks)) = ready.try_io(|timer| expirations(timer.get_ref())) {
            due.add_permits(usize::try_from(ticks)?);
            released = released.saturating_add(u32::try_from(ticks)?);
        }
    }
    // so that those who wait find that nothing is left
    due.add_permits(connections);
    for task in tasks {
        if task.await?.is_err() {
            tally.bad(&anyhow::anyhow!("unanswered {LINGER:?} after the end"));
        }
    }
    tally.print(begin);
    Ok(())
}

struct Worker {
    sender: SendRequest<Empty<Bytes>>,
    url: Uri,
    tally: Rc<Tally>,
    due: Rc<Semaphore>,
    next: Rc<Cell<u32>>,
}

impl Worker {
    async fn run(mut self, begin: Instant, interval: Duration, count: u32) {
        while let Ok(permit) = self.due.acquire().await {
            permit.forget();
            let number = self.next.get();
            if number >= count {
                return;
            }
            self.next.set(number + 1);
            // the first one is due one interval after the beginning
            let due = begin + interval * (number + 1);
            match ask(&mut self.sender, &self.url).await {
                Ok(()) => self.tally.good(due.elapsed()),
                Err(error) => {
                    self.tally.bad(&error);
                    match dial(&self.url).await {
                        Ok(sender) => self.sender = sender,
                        Err(_) => return,
                    }
                }
            }
        }
    }
}

/// How often it has expired since it was last asked.
fn expirations(timer: &OwnedFd) -> std::io::Result<u64> {
    let mut count = [0; 8];
    nix::unistd::read(timer.as_fd(), &mut count)?;
    Ok(u64::from_ne_bytes(count))
}

/// As many new connections, with one request each, as so many at a time manage.
pub async fn connecting(url: &str, concurrency: usize, seconds: u64) -> anyhow::Result<()> {
    let url: Uri = url.parse()?;
    let host = authority(&url)?;
    let (head, good) = match url.scheme_str() {
        Some("tcp") => ("echo\n".to_owned(), "echo\n"),
        _ => (
            format!("GET {} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n", url.path()),
            "HTTP/1.1 200",
        ),
    };
    let (tally, begin) = (Tally::shared(), Instant::now());
    let end = begin + Duration::from_secs(seconds);
    let once = async || {
        let mut stream = TcpStream::connect(host).await?;
        stream.write_all(head.as_bytes()).await?;
        let mut answer = Vec::with_capacity(1024);
        stream.read_to_end(&mut answer).await?;
        ensure!(answer.starts_with(good.as_bytes()), "answer {:?}", String::from_utf8_lossy(&answer));
        Ok(())
    };
    let task = async || {
        while Instant::now() < end {
            let begin = Instant::now();
            match once().await {
                Ok(()) => tally.good(begin.elapsed()),
                Err(error) => {
                    tally.bad(&error);
                    sleep(Duration::from_millis(10)).await;
                }
            }
        }
    };
    let all = join_all((0..concurrency).map(|_| task()));
    if timeout_at(end + LINGER, all).await.is_err() {
        tally.bad(&anyhow::anyhow!("unanswered {LINGER:?} after the end"));
    }
    tally.print(begin);
    Ok(())
}

/// So many requests to each URL of a file, on one connection each; some URLs at a time.
pub async fn visit(file: &str, times: usize) -> anyhow::Result<()> {
    let list = std::fs::read_to_string(file).with_context(|| file.to_owned())?;
    let (tally, begin, next) = (Tally::shared(), Instant::now(), Cell::new(0));
    let urls: Vec<&str> = list.lines().collect();
    let once = async |url: &str| {
        let url: Uri = url.parse()?;
        let mut sender = dial(&url).await?;
        for _ in 0..times {
            let begin = Instant::now();
            ask(&mut sender, &url).await?;
            tally.good(begin.elapsed());
        }
        Ok(())
    };
    let task = async || {
        while let Some(url) = urls.get(next.replace(next.get() + 1)) {
            if let Err(error) = once(url).await {
                tally.bad(&error);
            }
        }
    };
    join_all((0..AT_A_TIME).map(|_| task())).await;
    tally.print(begin);
    Ok(())
}

/// Holds idle connections, each of which has had a request, until it is stopped.
pub async fn hold(url: &str, count: usize) -> anyhow::Result<()> {
    let url: Uri = url.parse()?;
    let host = authority(&url)?;
    let head = format!("GET {} HTTP/1.1\r\nhost: {host}\r\n\r\n", url.path());
    let (held, why) = (RefCell::new(Vec::new()), RefCell::new(String::new()));
    let begun = Cell::new(0);
    let task = async || {
        while begun.replace(begun.get() + 1) < count && why.borrow().is_empty() {
            match one(host, &head).await {
                Ok(stream) => held.borrow_mut().push(stream),
                Err(error) => *why.borrow_mut() = format!(": {error:#}"),
            }
        }
    };
    join_all((0..AT_A_TIME).map(|_| task())).await;
    println!("held {}{}", held.borrow().len(), why.borrow());
    std::future::pending().await
}

async fn one(host: &str, head: &str) -> anyhow::Result<TcpStream> {
    let mut stream = TcpStream::connect(host).await?;
    stream.write_all(head.as_bytes()).await?;
    let mut answer = [0; 2048];
    let mut length = 0;
    // head and body are small: the body is the hundred bytes after the empty line
    while !answer[..length].windows(4).any(|part| part == b"\r\n\r\n") || !answer[..length].ends_with(b"xx") {
        ensure!(length < answer.len(), "the answer is too large");
        let count = stream.read(&mut answer[length..]).await?;
        ensure!(count > 0, "closed without an answer");
        length += count;
    }
    Ok(stream)
}
