use std::net::{Ipv4Addr, SocketAddr};

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata::A},
};

use super::*;
use crate::model::Service;

/// What a resolver of the tests does with a question.
#[derive(Clone, Copy)]
enum Manner {
    Answers(Ipv4Addr),
    /// Some messages over TCP, and then nothing.
    Transfers(u16),
    /// First sends answers that must not be believed.
    Lies(Ipv4Addr),
    Refuses,
    Silent,
}

fn message(bytes: &[u8]) -> Message {
    Message::from_vec(bytes).expect("a DNS message")
}

fn question(id: u16, name: &str) -> Message {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    message
}

fn answer_of(question: &Message, address: Ipv4Addr) -> Message {
    let mut answer = Message::response(question.metadata.id, OpCode::Query);
    answer.add_queries(question.queries.clone());
    let name = question.queries[0].name().clone();
    answer.add_answer(Record::from_rdata(name, 60, RData::A(A(address))));
    answer
}

/// A resolver on UDP and TCP of one loopback port; it tells which ids it was asked under.
async fn resolver(manner: Manner) -> (SocketAddr, tokio::sync::mpsc::UnboundedReceiver<u16>) {
    let (listener, socket) = loop {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        if let Ok(socket) = UdpSocket::bind(listener.local_addr().unwrap()).await {
            break (listener, socket);
        }
    };
    let (ids, asked) = tokio::sync::mpsc::unbounded_channel();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 4096];
        loop {
            tokio::select! {
                received = socket.recv_from(&mut buffer) => {
                    let (length, client) = received.unwrap();
                    let question = message(&buffer[..length]);
                    let _ = ids.send(question.metadata.id);
                    for answer in answers(&question, manner) {
                        socket.send_to(&answer.to_vec().unwrap(), client).await.unwrap();
                    }
                }
                accepted = listener.accept() => {
                    let (mut stream, _) = accepted.unwrap();
                    let mut bytes = vec![0; stream.read_u16().await.unwrap().into()];
                    stream.read_exact(&mut bytes).await.unwrap();
                    for answer in answers(&message(&bytes), manner) {
                        let framed = forward::framed(&answer.to_vec().unwrap()).unwrap();
                        stream.write_all(&framed).await.unwrap();
                    }
                }
            }
        }
    });
    (address, asked)
}

fn answers(question: &Message, manner: Manner) -> Vec<Message> {
    match manner {
        Manner::Silent => Vec::new(),
        Manner::Transfers(count) => (0..count)
            .map(|number| {
                let mut part = answer_of(question, Ipv4Addr::from(u32::from(number) + 1));
                part.metadata.op_code = question.metadata.op_code;
                part
            })
            .collect(),
        Manner::Answers(address) => vec![answer_of(question, address)],
        Manner::Refuses => {
            let mut answer = Message::error_msg(question.metadata.id, OpCode::Query, ResponseCode::Refused);
            answer.add_queries(question.queries.clone());
            vec![answer]
        }
        Manner::Lies(address) => {
            let lie = Ipv4Addr::new(6, 6, 6, 6);
            let mut other_id = answer_of(question, lie);
            other_id.metadata.id = !question.metadata.id;
            let mut other_question = answer_of(question, lie);
            other_question.queries[0].set_name(Name::from_ascii("evil.example.").unwrap());
            vec![other_id, other_question, answer_of(question, address)]
        }
    }
}

/// The responder with one service, `orders`.
async fn responder(resolvers: Vec<SocketAddr>) -> (SocketAddr, SocketAddr, Ipv4Addr) {
    responder_that_lets(resolvers, &[]).await
}

async fn responder_that_lets(
    resolvers: Vec<SocketAddr>,
    allowed: &[&str],
) -> (SocketAddr, SocketAddr, Ipv4Addr) {
    let directory = Arc::new(Directory::new(vec![Service::named("orders".parse().unwrap())]));
    let virtuals = Arc::new(VirtualAddresses::in_memory());
    let expected = virtuals.address_of(&"orders".parse().unwrap(), SystemTime::now()).unwrap();
    let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let places = (udp.local_addr().unwrap(), tcp.local_addr().unwrap());
    let rebinding_allowed = allowed.iter().map(|domain| (*domain).to_owned()).collect();
    let settings = Settings {
        udp: vec![udp],
        tcp: vec![tcp],
        resolvers,
        rebinding_allowed,
        reclaimer: Reclaimer::default(),
    };
    let (sender, receiver) = watch::channel(directory);
    tokio::spawn(async move {
        let _still_published = sender;
        let registry = Arc::new(Registry::none(receiver.clone()));
        run(settings, receiver, registry, virtuals, Arc::new(Metrics::new())).await
    });
    (places.0, places.1, expected)
}

async fn ask_udp(at: SocketAddr, question: &Message) -> Message {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.send_to(&question.to_vec().unwrap(), at).await.unwrap();
    let mut buffer = [0; 4096];
    let (length, from) =
        timeout(Duration::from_secs(20), socket.recv_from(&mut buffer)).await.unwrap().unwrap();
    assert_eq!(from, at);
    message(&buffer[..length])
}

async fn ask_tcp(stream: &mut TcpStream, question: &Message) -> Message {
    stream.write_all(&forward::framed(&question.to_vec().unwrap()).unwrap()).await.unwrap();
    let mut bytes = vec![0; stream.read_u16().await.unwrap().into()];
    stream.read_exact(&mut bytes).await.unwrap();
    message(&bytes)
}

fn address(answer: &Message) -> Option<Ipv4Addr> {
    match answer.answers.first().map(|record| &record.data) {
        Some(RData::A(A(address))) => Some(*address),
        _ => None,
    }
}

const THERE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);

#[tokio::test]
async fn mesh_names_are_answered_and_others_forwarded_over_both_transports() {
    let (resolver, mut asked) = resolver(Manner::Answers(THERE)).await;
    let (udp, tcp, orders) = responder(vec![resolver]).await;
    assert_eq!(address(&ask_udp(udp, &question(1, "orders.")).await), Some(orders));
    let answer = ask_udp(udp, &question(2, "wWw.example.org.")).await;
    assert_eq!((answer.metadata.id, address(&answer)), (2, Some(THERE)));
    assert!(answer.queries[0].name().eq_case(&Name::from_ascii("wWw.example.org.").unwrap()));
    let mut stream = TcpStream::connect(tcp).await.unwrap();
    assert_eq!(address(&ask_tcp(&mut stream, &question(3, "orders.weft.")).await), Some(orders));
    let answer = ask_tcp(&mut stream, &question(4, "www.example.org.")).await;
    assert_eq!((answer.metadata.id, address(&answer)), (4, Some(THERE)));
    // Ids are ours: with the client's own, whoever sees it could forge the answer.
    for _ in 0..8 {
        ask_udp(udp, &question(2, "www.example.org.")).await;
    }
    let mut ids = Vec::new();
    while let Ok(id) = asked.try_recv() {
        ids.push(id);
    }
    assert!(ids.len() == 9 && ids.iter().any(|id| *id != 2), "{ids:?}");
}

#[tokio::test]
async fn answers_to_other_questions_are_not_believed() {
    let (resolver, _asked) = resolver(Manner::Lies(THERE)).await;
    let (udp, _, _) = responder(vec![resolver]).await;
    assert_eq!(address(&ask_udp(udp, &question(9, "www.example.org.")).await), Some(THERE));
}

#[tokio::test]
async fn the_next_resolver_is_asked_where_one_refuses_or_is_not_there() {
    let closed = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (refuses, _first) = resolver(Manner::Refuses).await;
    let (answers, _second) = resolver(Manner::Answers(THERE)).await;
    let (udp, tcp, _) = responder(vec![closed, refuses, answers]).await;
    assert_eq!(address(&ask_udp(udp, &question(1, "www.example.org.")).await), Some(THERE));
    let mut stream = TcpStream::connect(tcp).await.unwrap();
    assert_eq!(address(&ask_tcp(&mut stream, &question(2, "www.example.org.")).await), Some(THERE));
    let (udp, _, _) = responder(vec![refuses]).await;
    let answer = ask_udp(udp, &question(3, "www.example.org.")).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::Refused);
}

#[tokio::test]
async fn no_resolver_is_a_failure_and_a_silent_one_too() {
    let (udp, _, orders) = responder(Vec::new()).await;
    let answer = ask_udp(udp, &question(5, "www.example.org.")).await;
    assert_eq!((answer.metadata.id, answer.metadata.response_code), (5, ResponseCode::ServFail));
    assert_eq!(address(&ask_udp(udp, &question(6, "orders.")).await), Some(orders));
    let (silent, _asked) = resolver(Manner::Silent).await;
    let (udp, _, _) = responder(vec![silent]).await;
    let answer = ask_udp(udp, &question(7, "www.example.org.")).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
}

#[tokio::test]
async fn rubbish_ends_nothing() {
    let (udp, tcp, orders) = responder(Vec::new()).await;
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for length in [0, 1, 11, 12, 500, 4097, 9000] {
        socket.send_to(&vec![0xff; length], udp).await.unwrap();
    }
    let mut stream = TcpStream::connect(tcp).await.unwrap();
    stream.write_all(&[0, 3, 1, 2, 3]).await.unwrap();
    assert_eq!(stream.read(&mut [0; 10]).await.unwrap(), 0, "the connection is closed");
    assert_eq!(address(&ask_udp(udp, &question(1, "orders.")).await), Some(orders));
}

#[tokio::test]
async fn no_foreign_name_leads_to_this_host_or_to_a_service() {
    for bad in [[127, 0, 0, 1], [0, 0, 0, 0], [240, 1, 2, 3]] {
        let (resolver, _asked) = resolver(Manner::Answers(bad.into())).await;
        let (udp, tcp, orders) = responder(vec![resolver]).await;
        let mut stream = TcpStream::connect(tcp).await.unwrap();
        for answer in [
            ask_udp(udp, &question(4, "rebind.example.")).await,
            ask_tcp(&mut stream, &question(4, "rebind.example.")).await,
        ] {
            assert_eq!((answer.metadata.id, answer.metadata.response_code), (4, ResponseCode::NoError));
            assert!(answer.answers.is_empty() && answer.queries.len() == 1, "{answer:?}");
        }
        // Our own answers are not looked at.
        assert_eq!(address(&ask_udp(udp, &question(1, "orders.")).await), Some(orders));
        assert_eq!(address(&ask_udp(udp, &question(1, "localhost.")).await), Some(Ipv4Addr::LOCALHOST));
        for (allowed, name, passes) in [
            ("", "rebind.example.", true),
            ("example", "Rebind.Example.", true),
            ("rebind.example", "rebind.example.", true),
            ("bind.example", "rebind.example.", false),
            ("other.example", "rebind.example.", false),
        ] {
            let (udp, _, _) = responder_that_lets(vec![resolver], &[allowed]).await;
            let found = address(&ask_udp(udp, &question(2, name)).await);
            assert_eq!(found, passes.then_some(bad.into()), "{name} with {allowed:?}");
        }
    }
}

#[tokio::test]
async fn a_zone_transfer_comes_whole_and_the_next_question_too() {
    let (resolver, _asked) = resolver(Manner::Transfers(500)).await;
    let (_, tcp, orders) = responder(vec![resolver]).await;
    for kind in [RecordType::AXFR, RecordType::IXFR] {
        let mut stream = TcpStream::connect(tcp).await.unwrap();
        let mut transfer = question(7, "example.org.");
        transfer.queries[0].set_query_type(kind);
        let first = ask_tcp(&mut stream, &transfer).await;
        assert_eq!((first.metadata.id, address(&first)), (7, Some([0, 0, 0, 1].into())));
        for number in 2..=500_u32 {
            let mut bytes = vec![0; stream.read_u16().await.unwrap().into()];
            stream.read_exact(&mut bytes).await.unwrap();
            assert_eq!(address(&message(&bytes)), Some(number.into()));
        }
        assert_eq!(address(&ask_tcp(&mut stream, &question(8, "orders.")).await), Some(orders));
    }
    let (_, tcp, _) = responder(Vec::new()).await;
    let mut stream = TcpStream::connect(tcp).await.unwrap();
    let mut transfer = question(7, "example.org.");
    transfer.queries[0].set_query_type(RecordType::AXFR);
    assert_eq!(ask_tcp(&mut stream, &transfer).await.metadata.response_code, ResponseCode::ServFail);
}

#[tokio::test]
async fn updates_and_notifications_go_on_as_they_are() {
    let (resolver, mut asked) = resolver(Manner::Transfers(1)).await;
    let (udp, tcp, _) = responder(vec![resolver]).await;
    for op_code in [OpCode::Update, OpCode::Notify] {
        let mut update = question(9, "example.org.");
        update.metadata.op_code = op_code;
        let mut stream = TcpStream::connect(tcp).await.unwrap();
        for answer in [ask_udp(udp, &update).await, ask_tcp(&mut stream, &update).await] {
            assert_eq!((answer.metadata.id, answer.metadata.op_code), (9, op_code));
            assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
        }
        let mut ours = question(9, "orders.weft.");
        ours.metadata.op_code = op_code;
        assert_eq!(ask_udp(udp, &ours).await.metadata.response_code, ResponseCode::Refused);
    }
    let mut count = 0;
    while asked.try_recv().is_ok() {
        count += 1;
    }
    assert_eq!(count, 2, "over UDP each once");
}
