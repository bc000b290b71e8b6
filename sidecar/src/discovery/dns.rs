//! The DNS responder (RFC 1035, 7766): names of mesh services get their virtual addresses, `localhost` its own,
//! everything else goes unchanged to the resolvers of the host and back. UDP questions over UDP, TCP questions
//! over TCP; everything bounded. It keeps no cache: the resolvers behind it have one.

mod answer;
mod forward;
mod rebinding;
mod resolv_conf;

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use hickory_proto::rr::RecordType;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{Semaphore, watch},
    task::JoinSet,
    time::{Instant, interval_at, sleep, timeout},
};

use self::{
    answer::{asked, failed, nothing},
    forward::{Forwarder, Transport},
};
use super::{Directory, Registry, VirtualAddresses};
use crate::{model::ServiceName, net::Reclaimer, telemetry::Metrics};

pub use self::{
    answer::{Asking, Decision, decide},
    forward::answers,
    resolv_conf::resolvers,
};

/// Questions on their way to a resolver at a time; a further one is not answered, and clients ask again.
const MAX_FORWARDED: usize = 1024;
/// TCP connections of clients at a time.
const MAX_CONNECTIONS: usize = 256;
/// A TCP client that asks nothing for so long is left (RFC 7766 6.2.3: a few seconds).
const IDLE: Duration = Duration::from_secs(10);
/// The longest question taken over UDP: far more than any real one.
const MAX_QUESTION: usize = 4096;
/// How often addresses of services long gone are looked for.
const FOLLOW: Duration = Duration::from_secs(3600);

/// Where to answer, and whom to ask.
#[derive(Debug)]
pub struct Settings {
    /// Bound sockets for questions over UDP.
    pub udp: Vec<std::net::UdpSocket>,
    /// Listeners for questions over TCP.
    pub tcp: Vec<std::net::TcpListener>,
    /// Resolvers for all other names, asked in this order; those that are our own sockets are left out.
    pub resolvers: Vec<SocketAddr>,
    /// Domains whose names may have addresses of this host, or virtual ones, by the answers of resolvers; an empty one
    /// stands for all. In small letters, without a dot at either end.
    pub rebinding_allowed: Vec<String>,
    /// Makes room where there is no descriptor for a question to a resolver.
    pub reclaimer: Reclaimer,
}

/// What every question needs.
#[derive(Debug)]
struct Responder {
    directory: watch::Receiver<Arc<Directory>>,
    registry: Arc<Registry>,
    virtuals: Arc<VirtualAddresses>,
    forwarder: Forwarder,
    rebinding_allowed: Vec<String>,
    /// The first answer that was held back is told in the log.
    held_back: AtomicBool,
    forwarded: Arc<Semaphore>,
    connections: Arc<Semaphore>,
    metrics: Arc<Metrics>,
}

/// Answers until it is dropped.
///
/// # Errors
/// Where a socket cannot be used, or one of its tasks ended with a panic.
pub async fn run(
    settings: Settings,
    directory: watch::Receiver<Arc<Directory>>,
    registry: Arc<Registry>,
    virtuals: Arc<VirtualAddresses>,
    metrics: Arc<Metrics>,
) -> io::Result<()> {
    let mut own = Vec::new();
    let mut tasks = JoinSet::new();
    let (mut udp, mut tcp) = (Vec::new(), Vec::new());
    for socket in settings.udp {
        socket.set_nonblocking(true)?;
        own.push(socket.local_addr()?);
        udp.push(Arc::new(UdpSocket::from_std(socket)?));
    }
    for listener in settings.tcp {
        listener.set_nonblocking(true)?;
        own.push(listener.local_addr()?);
        tcp.push(TcpListener::from_std(listener)?);
    }
    let responder = Arc::new(Responder {
        directory,
        registry,
        virtuals,
        forwarder: Forwarder::new(settings.resolvers, &own, settings.reclaimer),
        rebinding_allowed: settings.rebinding_allowed,
        held_back: AtomicBool::new(false),
        forwarded: Arc::new(Semaphore::new(MAX_FORWARDED)),
        connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
        metrics,
    });
    for socket in udp {
        tasks.spawn(serve_udp(Arc::clone(&responder), socket));
    }
    for listener in tcp {
        tasks.spawn(serve_tcp(Arc::clone(&responder), listener));
    }
    tasks.spawn(follow(responder.directory.clone(), Arc::clone(&responder.virtuals)));
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended {
            return Err(io::Error::other(format!("a task of the DNS responder ended: {error}")));
        }
    }
    Ok(())
}

/// Tells the virtual addresses which services there are.
async fn follow(mut directory: watch::Receiver<Arc<Directory>>, virtuals: Arc<VirtualAddresses>) {
    // Not at once: before the first real directory every service would seem gone.
    let mut hours = interval_at(Instant::now() + FOLLOW, FOLLOW);
    loop {
        tokio::select! {
            changed = directory.changed() => if changed.is_err() { return },
            _ = hours.tick() => {}
        }
        let now = Arc::clone(&directory.borrow_and_update());
        virtuals.follow(&now, SystemTime::now());
    }
}

async fn serve_udp(responder: Arc<Responder>, socket: Arc<UdpSocket>) {
    let mut buffer = vec![0; MAX_QUESTION + 1];
    loop {
        let (length, client) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(_) => {
                // An answer of ours met a closed port, or memory is short: neither ends the service.
                sleep(Duration::from_millis(1)).await;
                continue;
            }
        };
        if length > MAX_QUESTION {
            continue;
        }
        match responder.decide(&buffer[..length]) {
            Decision::Silence => {}
            Decision::Answer(answer) => {
                let _ = socket.send_to(&answer, client).await;
            }
            decision @ (Decision::Forward | Decision::Ask(_)) => {
                let Ok(permit) = Arc::clone(&responder.forwarded).try_acquire_owned() else { continue };
                let (responder, socket) = (Arc::clone(&responder), Arc::clone(&socket));
                let question = buffer[..length].to_vec();
                tokio::spawn(async move {
                    let answer = responder.find_out(&question, decision, Transport::Udp).await;
                    let _ = socket.send_to(&answer, client).await;
                    drop(permit);
                });
            }
        }
    }
}

async fn serve_tcp(responder: Arc<Responder>, listener: TcpListener) {
    loop {
        // The permit is always there in the end: connections are left when they are idle.
        let Ok(permit) = Arc::clone(&responder.connections).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let responder = Arc::clone(&responder);
                tokio::spawn(async move {
                    let _ = converse(&responder, stream).await;
                    drop(permit);
                });
            }
            Err(_) => sleep(Duration::from_millis(100)).await,
        }
    }
}

/// The questions of one TCP connection, one after the other. Each has its length in two bytes before it.
async fn converse(responder: &Responder, mut stream: TcpStream) -> io::Result<()> {
    while let Ok(length) = timeout(IDLE, stream.read_u16()).await? {
        let mut question = vec![0; length.into()];
        timeout(IDLE, stream.read_exact(&mut question)).await??;
        let answer = match responder.decide(&question) {
            Decision::Silence => return Ok(()),
            Decision::Answer(answer) => answer,
            decision => match responder.forwarded.try_acquire() {
                Ok(_permit) if decision == Decision::Forward && is_transfer(&question) => {
                    if forward::transfer(&responder.forwarder, &question, &mut stream, IDLE).await? {
                        continue;
                    }
                    responder.metrics.dns_query("failed");
                    failed(&question)
                }
                Ok(_permit) => responder.find_out(&question, decision, Transport::Tcp).await,
                Err(_) => failed(&question),
            },
        };
        let framed = forward::framed(&answer)?;
        timeout(IDLE, stream.write_all(&framed)).await??;
    }
    Ok(())
}

/// Is it answered by a number of messages?
fn is_transfer(question: &[u8]) -> bool {
    asked(question).is_some_and(|(_, kind)| matches!(kind, RecordType::AXFR | RecordType::IXFR))
}

impl Responder {
    fn decide(&self, question: &[u8]) -> Decision {
        let asking = if self.registry.is_there() { Asking::Possible } else { Asking::Never };
        self.decide_after(question, asking)
    }

    fn decide_after(&self, question: &[u8], asking: Asking) -> Decision {
        let directory = Arc::clone(&self.directory.borrow());
        let address_of = |name: &ServiceName| self.virtuals.address_of(name, SystemTime::now());
        let decision = decide(question, &directory, asking, address_of);
        match &decision {
            Decision::Answer(_) => self.metrics.dns_query("answered"),
            Decision::Forward => self.metrics.dns_query("forwarded"),
            Decision::Silence => self.metrics.dns_query("ignored"),
            // Decided again, and counted then.
            Decision::Ask(_) => {}
        }
        decision
    }

    /// The answer of whoever must be asked: the registry, the resolvers, or the one after the other.
    async fn find_out(&self, question: &[u8], decision: Decision, transport: Transport) -> Vec<u8> {
        let decision = match decision {
            Decision::Ask(name) => {
                self.registry.ask(&name).await;
                self.decide_after(question, Asking::Done)
            }
            other => other,
        };
        match decision {
            Decision::Answer(answer) => answer,
            _ => self.forward(question, transport).await,
        }
    }

    /// The resolvers' answer, or ours that none of them gave one.
    async fn forward(&self, question: &[u8], transport: Transport) -> Vec<u8> {
        match self.forwarder.ask(question, transport).await {
            Some(answer) if self.may_have(question, &answer) => answer,
            Some(_) => {
                self.metrics.dns_query("held_back");
                nothing(question)
            }
            None => {
                self.metrics.dns_query("failed");
                failed(question)
            }
        }
    }
}

impl Responder {
    /// Does the answer lead to where a foreign name may lead?
    fn may_have(&self, question: &[u8], answer: &[u8]) -> bool {
        let Some((name, _)) = asked(question) else { return true };
        if rebinding::is_harmless(answer) {
            return true;
        }
        let name = name.trim_end_matches('.');
        let is_within = |domain: &String| {
            let rest = name.strip_suffix(domain.as_str());
            domain.is_empty() || rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        };
        if self.rebinding_allowed.iter().any(is_within) {
            return true;
        }
        let what = "a resolver's answer would lead to this host or to a virtual address; it is held back";
        if self.held_back.swap(true, Ordering::Relaxed) {
            tracing::debug!(name, "{what}");
        } else {
            tracing::warn!(
                name,
                "{what}, and so are others like it (--dns-rebinding-allow DOMAIN lets them pass)"
            );
        }
        false
    }
}

#[cfg(test)]
mod tests;
