//! Asks the resolvers of the host, one after the other, with the client's own bytes under an id of ours: random,
//! from a source port of its own (RFC 5452 9). An answer counts only if it comes from whom was asked, bears that
//! id and repeats the question. Nothing is cached and nothing but the id is changed.

use std::{io, net::Ipv4Addr, net::Ipv6Addr, net::SocketAddr, time::Duration};

use aws_lc_rs::rand;
use hickory_proto::{
    op::{Header, MessageType, OpCode, Query, ResponseCode},
    serialize::binary::{BinDecodable, BinDecoder},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    time::timeout,
};

use crate::net::Reclaimer;

/// How long one resolver may take. Clients ask again after five seconds (resolv.conf(5)).
const PATIENCE: Duration = Duration::from_secs(2);
/// How often the list of resolvers is gone through over UDP, where packets are lost.
const ROUNDS: usize = 2;
/// All resolvers and rounds together.
const PATIENCE_IN_ALL: Duration = Duration::from_secs(6);
/// The longest message over UDP.
const MAX_ANSWER: usize = 65_535;

/// How a question came, and so how it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transport {
    Udp,
    Tcp,
}

/// The resolvers to ask.
#[derive(Debug)]
pub(super) struct Forwarder {
    resolvers: Vec<SocketAddr>,
    reclaimer: Reclaimer,
}

impl Forwarder {
    /// Leaves out what would lead back to one of our own sockets.
    pub(super) fn new(resolvers: Vec<SocketAddr>, own: &[SocketAddr], reclaimer: Reclaimer) -> Self {
        let is_own = |resolver: &SocketAddr| {
            own.iter().any(|own| {
                let on_loopback = own.ip().is_unspecified() && resolver.ip().is_loopback();
                own.port() == resolver.port() && (own.ip() == resolver.ip() || on_loopback)
            })
        };
        let resolvers = resolvers.into_iter().filter(|resolver| !is_own(resolver)).collect();
        Forwarder { resolvers, reclaimer }
    }

    /// The answer with the client's id. None where no resolver gave one in time.
    pub(super) async fn ask(&self, question: &[u8], transport: Transport) -> Option<Vec<u8>> {
        let mut last = None;
        let asked = timeout(PATIENCE_IN_ALL, self.ask_each(question, transport, &mut last)).await;
        asked.ok().flatten().or(last)
    }

    /// The first answer that is more than the refusal to give one; such a refusal is left in `last`.
    async fn ask_each(
        &self,
        question: &[u8],
        transport: Transport,
        last: &mut Option<Vec<u8>>,
    ) -> Option<Vec<u8>> {
        let rounds = if transport == Transport::Udp { ROUNDS } else { 1 };
        for _ in 0..rounds {
            for resolver in &self.resolvers {
                let asked = match transport {
                    Transport::Udp => timeout(PATIENCE, self.ask_udp(question, *resolver)).await,
                    Transport::Tcp => timeout(PATIENCE, self.ask_tcp(question, *resolver)).await,
                };
                let Ok(Ok(mut answer)) = asked else { continue };
                answer[..2].copy_from_slice(&question[..2]);
                if !is_refusal(&answer) {
                    return Some(answer);
                }
                *last = Some(answer);
            }
            if last.is_some() {
                return None;
            }
        }
        None
    }

    async fn ask_udp(&self, question: &[u8], resolver: SocketAddr) -> io::Result<Vec<u8>> {
        let question = with_new_id(question)?;
        let any: SocketAddr = match resolver {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let socket = self.reclaimer.open(|| UdpSocket::bind(any)).await?;
        // A connected socket hears nobody else, and hears of a closed port at once.
        socket.connect(resolver).await?;
        socket.send(&question).await?;
        let mut answer = vec![0; MAX_ANSWER];
        loop {
            let length = socket.recv(&mut answer).await?;
            if answers(&question, &answer[..length]) {
                answer.truncate(length);
                answer.shrink_to_fit();
                return Ok(answer);
            }
        }
    }

    async fn ask_tcp(&self, question: &[u8], resolver: SocketAddr) -> io::Result<Vec<u8>> {
        let question = with_new_id(question)?;
        let mut stream = self.connect(resolver).await?;
        stream.write_all(&framed(&question)?).await?;
        let answer = read_message(&mut stream).await?;
        if answers(&question, &answer) { Ok(answer) } else { Err(io::ErrorKind::InvalidData.into()) }
    }

    /// Asks, and reads the first message. The client's own id stays: whoever could guess it cannot write here.
    async fn begin_transfer(
        &self,
        question: &[u8],
        resolver: SocketAddr,
    ) -> io::Result<(TcpStream, Vec<u8>)> {
        let mut server = self.connect(resolver).await?;
        server.write_all(&framed(question)?).await?;
        let first = read_message(&mut server).await?;
        if answers(question, &first) { Ok((server, first)) } else { Err(io::ErrorKind::InvalidData.into()) }
    }

    async fn connect(&self, resolver: SocketAddr) -> io::Result<TcpStream> {
        self.reclaimer.open(|| TcpStream::connect(resolver)).await
    }
}

/// Carries a zone transfer (RFC 5936, RFC 1995) to the client as it is: as many messages as come. It ends when the
/// server closes or is silent for `idle`, or the client is gone. False where nobody can be asked, or nobody answers.
pub(super) async fn transfer(
    forwarder: &Forwarder,
    question: &[u8],
    client: &mut TcpStream,
    idle: Duration,
) -> io::Result<bool> {
    for resolver in &forwarder.resolvers {
        let Ok(Ok((mut server, mut message))) =
            timeout(PATIENCE, forwarder.begin_transfer(question, *resolver)).await
        else {
            continue;
        };
        loop {
            timeout(idle, client.write_all(&framed(&message)?)).await??;
            tokio::select! {
                next = timeout(idle, read_message(&mut server)) => match next {
                    Ok(Ok(next)) => message = next,
                    _ => return Ok(true),
                },
                () = gone(client) => return Ok(true),
            }
        }
    }
    Ok(false)
}

/// Comes when the client has closed. A further question of it waits until the transfer is over.
async fn gone(client: &TcpStream) {
    if client.peek(&mut [0]).await.is_ok_and(|length| length > 0) {
        std::future::pending::<()>().await;
    }
}

async fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut message = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

/// A message with its length before it, as TCP has it (RFC 1035 4.2.2).
pub(super) fn framed(message: &[u8]) -> io::Result<Vec<u8>> {
    let length = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    Ok([&length.to_be_bytes(), message].concat())
}

/// The same question under an id that nobody can guess.
fn with_new_id(question: &[u8]) -> io::Result<Vec<u8>> {
    let mut copy = question.to_vec();
    let id = copy.get_mut(..2).ok_or(io::ErrorKind::InvalidInput)?;
    rand::fill(id).map_err(|_| io::Error::other("no randomness"))?;
    Ok(copy)
}

/// Is this an answer to that question? A server that could not read the question may leave it out.
pub fn answers(question: &[u8], answer: &[u8]) -> bool {
    let (Some((asked, query)), Some((header, repeated))) = (start(question), start(answer)) else {
        return false;
    };
    let matches = match (query, repeated) {
        (Some(query), Some(repeated)) => {
            repeated.name() == query.name()
                && repeated.query_type() == query.query_type()
                && repeated.query_class() == query.query_class()
        }
        // RFC 2136 3.8: an answer to an UPDATE may be a header and nothing else.
        (_, None) if asked.metadata.op_code != OpCode::Query => true,
        (Some(_), None) => header.metadata.response_code != ResponseCode::NoError,
        (None, _) => false,
    };
    header.metadata.id == asked.metadata.id
        && header.metadata.message_type == MessageType::Response
        && header.metadata.op_code == asked.metadata.op_code
        && matches
}

/// The header and the one question, if there is one. None for what cannot be read.
fn start(message: &[u8]) -> Option<(Header, Option<Query>)> {
    let mut decoder = BinDecoder::new(message);
    let header = Header::read(&mut decoder).ok()?;
    let query = match header.counts.queries {
        0 => None,
        1 => Some(Query::read(&mut decoder).ok()?),
        _ => return None,
    };
    Some((header, query))
}

/// Codes after which the C library asks the next name server too.
fn is_refusal(answer: &[u8]) -> bool {
    let code = start(answer).map(|(header, _)| header.metadata.response_code);
    matches!(code, Some(ResponseCode::ServFail | ResponseCode::NotImp | ResponseCode::Refused))
}

#[cfg(test)]
mod tests {
    use hickory_proto::{
        op::Message,
        rr::{Name, RecordType},
    };

    use super::*;

    fn message(id: u16, kind: MessageType, name: &str, code: ResponseCode) -> Vec<u8> {
        let mut message = Message::new(id, kind, OpCode::Query);
        message.metadata.response_code = code;
        if !name.is_empty() {
            message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
        }
        message.to_vec().unwrap()
    }

    #[test]
    fn only_an_answer_to_this_question_counts() {
        use MessageType::{Query, Response};
        let question = message(5, Query, "a.example.", ResponseCode::NoError);
        for (answer, expected) in [
            (message(5, Response, "a.example.", ResponseCode::NoError), true),
            (message(5, Response, "A.Example.", ResponseCode::NXDomain), true),
            (message(6, Response, "a.example.", ResponseCode::NoError), false),
            (message(5, Query, "a.example.", ResponseCode::NoError), false),
            (message(5, Response, "b.example.", ResponseCode::NoError), false),
            (message(5, Response, "", ResponseCode::FormErr), true),
            (message(5, Response, "", ResponseCode::NoError), false),
            (question[..11].to_vec(), false),
            (Vec::new(), false),
        ] {
            assert_eq!(answers(&question, &answer), expected, "{answer:?}");
        }
    }

    #[test]
    fn an_answer_to_an_update_may_be_a_header() {
        let with = |kind, name: &str, op_code| {
            let mut bytes = Message::from_vec(&message(5, kind, name, ResponseCode::NoError)).unwrap();
            bytes.metadata.op_code = op_code;
            bytes.to_vec().unwrap()
        };
        let update = with(MessageType::Query, "example.", OpCode::Update);
        for (answer, expected) in [
            (with(MessageType::Response, "example.", OpCode::Update), true),
            (with(MessageType::Response, "", OpCode::Update), true),
            (with(MessageType::Response, "other.", OpCode::Update), false),
            (with(MessageType::Response, "", OpCode::Query), false),
        ] {
            assert_eq!(answers(&update, &answer), expected, "{answer:?}");
        }
    }

    #[test]
    fn nobody_asks_himself() {
        let of = |text: &str| text.parse::<SocketAddr>().unwrap();
        let resolvers = vec![of("127.0.0.1:15053"), of("127.0.0.1:53"), of("10.0.0.1:53")];
        let own = [of("127.0.0.1:15053"), of("0.0.0.0:53")];
        assert_eq!(Forwarder::new(resolvers.clone(), &own, Reclaimer::default()).resolvers, resolvers[2..]);
        assert_eq!(
            Forwarder::new(resolvers.clone(), &own[..1], Reclaimer::default()).resolvers,
            resolvers[1..]
        );
    }
}
