//! What to do with a question: pure, bytes in, a decision out. A service is known as `name` and `name.weft`, one
//! of a namespace as `name.namespace` and `name.namespace.weft` (docs/services.md). Names are compared without
//! regard to case and answered in the client's own spelling. Addresses are IPv4: asked for another type, a name
//! of the mesh exists and has none (RFC 2308 2.2).

use std::net::{Ipv4Addr, Ipv6Addr};

use hickory_proto::{
    op::{Edns, Header, Message, MessageType, Metadata, OpCode, Query, ResponseCode},
    rr::{
        DNSClass, Name, RData, Record, RecordType,
        rdata::{A, AAAA},
    },
    serialize::binary::{BinDecodable, BinDecoder},
};

use crate::{discovery::Directory, model::ServiceName};

/// Clients ask again after this many seconds.
const TTL: u32 = 5;
/// What we say we take over UDP (the value of DNS Flag Day 2020).
const MAX_PAYLOAD: u16 = 1232;
/// The suffix that is ours alone.
const SUFFIX: &str = "weft";

/// What to do with the bytes of a question.
#[derive(Debug, PartialEq, Eq)]
pub enum Decision {
    /// No question at all: an answer to it could only start a quarrel.
    Silence,
    /// Send this.
    Answer(Vec<u8>),
    /// Not ours: ask the resolvers.
    Forward,
}

/// Decides. `address_of` gives the virtual address of a service that the directory knows.
pub fn decide(
    question: &[u8],
    directory: &Directory,
    address_of: impl FnOnce(&ServiceName) -> Option<Ipv4Addr>,
) -> Decision {
    let mut decoder = BinDecoder::new(question);
    let Ok(header) = Header::read(&mut decoder) else { return Decision::Silence };
    if header.metadata.message_type == MessageType::Response {
        return Decision::Silence;
    }
    let refuse = |code| Decision::Answer(respond(&header.metadata, code, None, None, false));
    if header.metadata.op_code != OpCode::Query {
        return refuse(ResponseCode::NotImp);
    }
    let query = match (header.counts.queries, Query::read(&mut decoder)) {
        (1, Ok(query)) => query,
        _ => return refuse(ResponseCode::FormErr),
    };
    if query.query_class() != DNSClass::IN {
        return Decision::Forward;
    }
    let meaning = meaning(query.name(), directory);
    let (code, data) = match meaning {
        Meaning::Foreign => return Decision::Forward,
        Meaning::Service(name) => match (wants(&query, RecordType::A), address_of(&name)) {
            (_, None) => (ResponseCode::ServFail, None),
            (true, Some(address)) => (ResponseCode::NoError, Some(RData::A(A(address)))),
            (false, Some(_)) => (ResponseCode::NoError, None),
        },
        Meaning::Localhost if wants(&query, RecordType::A) => {
            (ResponseCode::NoError, Some(RData::A(A(Ipv4Addr::LOCALHOST))))
        }
        Meaning::Localhost if wants(&query, RecordType::AAAA) => {
            (ResponseCode::NoError, Some(RData::AAAA(AAAA(Ipv6Addr::LOCALHOST))))
        }
        Meaning::Localhost | Meaning::NoAddress => (ResponseCode::NoError, None),
        Meaning::Nothing => (ResponseCode::NXDomain, None),
    };
    // RFC 6891 6.1.1: who sends an OPT record gets one.
    let has_edns = match header.counts.additionals {
        0 => false,
        _ => match Message::from_vec(question) {
            Ok(message) => message.edns.is_some(),
            Err(_) => return refuse(ResponseCode::FormErr),
        },
    };
    let record = data.map(|data| Record::from_rdata(query.name().clone(), TTL, data));
    Decision::Answer(respond(&header.metadata, code, Some(query), record, has_edns))
}

/// The answer that no answer could be had (SERVFAIL).
pub(super) fn failed(question: &[u8]) -> Vec<u8> {
    let mut decoder = BinDecoder::new(question);
    let Ok(header) = Header::read(&mut decoder) else { return Vec::new() };
    let query = Query::read(&mut decoder).ok();
    respond(&header.metadata, ResponseCode::ServFail, query, None, false)
}

enum Meaning {
    /// Not a name of ours.
    Foreign,
    Service(ServiceName),
    Localhost,
    /// The name exists and has no address: our suffix itself, or a namespace.
    NoAddress,
    /// A name below our suffix that no service has.
    Nothing,
}

fn meaning(name: &Name, directory: &Directory) -> Meaning {
    let labels: Vec<String> =
        name.iter().map(|label| String::from_utf8_lossy(label).to_ascii_lowercase()).collect();
    let mut labels: Vec<&str> = labels.iter().map(String::as_str).collect();
    // RFC 6761 6.3: also what is below it.
    if labels.last() == Some(&"localhost") {
        return Meaning::Localhost;
    }
    let ours = labels.last() == Some(&SUFFIX);
    if ours {
        labels.pop();
    }
    match service(&labels) {
        Some(name) if directory.service(&name).is_some() => Meaning::Service(name),
        _ if !ours => Meaning::Foreign,
        _ if labels.is_empty() || is_namespace(&labels, directory) => Meaning::NoAddress,
        _ => Meaning::Nothing,
    }
}

/// `orders` and `orders.default` are the service `orders`; `orders.shop` is `orders_shop`.
fn service(labels: &[&str]) -> Option<ServiceName> {
    match labels {
        [name] | [name, "default"] if !name.contains('_') => name.parse().ok(),
        [name, namespace] if !name.contains('_') => format!("{name}_{namespace}").parse().ok(),
        _ => None,
    }
}

/// RFC 8020: what has names below it exists.
fn is_namespace(labels: &[&str], directory: &Directory) -> bool {
    let [namespace] = labels else { return false };
    let of = |name: &str| name.split_once('_').map_or("default", |(_, namespace)| namespace).to_owned();
    directory.services().any(|service| of(service.name.as_str()) == *namespace)
}

fn wants(query: &Query, kind: RecordType) -> bool {
    query.query_type() == kind || query.query_type() == RecordType::ANY
}

fn respond(
    question: &Metadata,
    code: ResponseCode,
    query: Option<Query>,
    answer: Option<Record>,
    has_edns: bool,
) -> Vec<u8> {
    let mut message = Message::response(question.id, question.op_code);
    message.metadata = Metadata::response_from_request(question);
    message.metadata.recursion_available = true;
    message.metadata.authoritative = matches!(code, ResponseCode::NoError | ResponseCode::NXDomain);
    message.metadata.response_code = code;
    message.add_queries(query);
    message.add_answers(answer);
    if has_edns {
        let mut edns = Edns::new();
        edns.set_max_payload(MAX_PAYLOAD);
        message.set_edns(edns);
    }
    // What was read can be written; and if not, silence is an answer too.
    message.to_vec().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Service;

    fn directory() -> Directory {
        let service = |name: &str| Service {
            name: name.parse().unwrap(),
            protocol: None,
            identities: Vec::new(),
            addresses: Vec::new(),
            endpoints: Vec::new(),
        };
        Directory::new(["orders", "cart_shop"].map(service).into())
    }

    fn question(name: &str, kind: RecordType) -> Message {
        let mut message = Message::new(77, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        message
    }

    fn ask(bytes: &[u8]) -> Decision {
        decide(bytes, &directory(), |name| {
            Some(Ipv4Addr::new(240, 0, 0, u8::try_from(name.as_str().len()).unwrap()))
        })
    }

    fn answered(message: &Message) -> Message {
        match ask(&message.to_vec().unwrap()) {
            Decision::Answer(bytes) => Message::from_vec(&bytes).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn names_mean_what_is_documented() {
        use RecordType::{A, AAAA, ANY, TXT};
        for (name, kind, expected) in [
            ("orders.", A, "NoError 240.0.0.6"),
            ("OrDers.", A, "NoError 240.0.0.6"),
            ("orders.weft.", A, "NoError 240.0.0.6"),
            ("orders.WEFT.", ANY, "NoError 240.0.0.6"),
            ("orders.default.", A, "NoError 240.0.0.6"),
            ("orders.default.weft.", A, "NoError 240.0.0.6"),
            ("cart.shop.", A, "NoError 240.0.0.9"),
            ("cart.shop.weft.", A, "NoError 240.0.0.9"),
            ("orders.", AAAA, "NoError"),
            ("orders.weft.", TXT, "NoError"),
            ("weft.", A, "NoError"),
            ("shop.weft.", A, "NoError"),
            ("default.weft.", A, "NoError"),
            ("cart.weft.", A, "NXDomain"),
            ("orders.shop.weft.", A, "NXDomain"),
            ("a.orders.weft.", A, "NXDomain"),
            ("cart_shop.weft.", A, "NXDomain"),
            ("nothing.weft.", AAAA, "NXDomain"),
            ("localhost.", A, "NoError 127.0.0.1"),
            ("app.LOCALHOST.", A, "NoError 127.0.0.1"),
            ("localhost.", AAAA, "NoError ::1"),
            ("localhost.", TXT, "NoError"),
            ("cart.", A, "forward"),
            ("orders.shop.", A, "forward"),
            ("orders.example.org.", A, "forward"),
            ("cart_shop.", A, "forward"),
            ("orders.weft.example.", A, "forward"),
            (".", A, "forward"),
        ] {
            let found = match ask(&question(name, kind).to_vec().unwrap()) {
                Decision::Forward => "forward".to_owned(),
                Decision::Silence => "silence".to_owned(),
                Decision::Answer(bytes) => {
                    let answer = Message::from_vec(&bytes).unwrap();
                    let records = answer.answers.iter().map(|record| format!(" {}", record.data));
                    format!("{:?}{}", answer.metadata.response_code, records.collect::<String>())
                }
            };
            assert_eq!(found, expected, "{name} {kind}");
        }
    }

    #[test]
    fn an_answer_repeats_the_question_in_its_own_spelling() {
        let asked = question("oRdErS.wEfT.", RecordType::A);
        let answer = answered(&asked);
        assert_eq!(answer.metadata.id, 77);
        assert_eq!(answer.metadata.message_type, MessageType::Response);
        assert!(answer.metadata.recursion_desired && answer.metadata.recursion_available);
        assert!(answer.queries[0].name().eq_case(asked.queries[0].name()));
        assert!(answer.answers[0].name.eq_case(asked.queries[0].name()));
        assert_eq!(answer.answers[0].ttl, TTL);
        assert!(answer.edns.is_none());
        let mut with_edns = asked;
        with_edns.set_edns(Edns::new());
        assert_eq!(answered(&with_edns).edns.map(|edns| edns.max_payload()), Some(MAX_PAYLOAD));
    }

    #[test]
    fn what_is_no_question_gets_an_error_or_silence() {
        let good = question("orders.", RecordType::A);
        let code = |message: &Message| answered(message).metadata.response_code;
        let mut answer = good.clone();
        answer.metadata.message_type = MessageType::Response;
        assert_eq!(ask(&answer.to_vec().unwrap()), Decision::Silence);
        let mut update = good.clone();
        update.metadata.op_code = OpCode::Update;
        assert_eq!(code(&update), ResponseCode::NotImp);
        let mut two = good.clone();
        two.add_query(good.queries[0].clone());
        assert_eq!(code(&two), ResponseCode::FormErr);
        let mut none = good.clone();
        none.queries.clear();
        assert_eq!(code(&none), ResponseCode::FormErr);
        let bytes = good.to_vec().unwrap();
        for length in 0..bytes.len() {
            match ask(&bytes[..length]) {
                Decision::Silence => assert!(length < 12),
                Decision::Answer(bytes) => {
                    let code = Message::from_vec(&bytes).unwrap().metadata.response_code;
                    assert_eq!(code, ResponseCode::FormErr, "{length}");
                }
                Decision::Forward => panic!("half a question was forwarded"),
            }
        }
    }

    #[test]
    fn a_full_table_is_a_failure_and_not_a_missing_name() {
        let bytes = question("orders.", RecordType::A).to_vec().unwrap();
        let Decision::Answer(bytes) = decide(&bytes, &directory(), |_| None) else { panic!() };
        assert_eq!(Message::from_vec(&bytes).unwrap().metadata.response_code, ResponseCode::ServFail);
        assert_eq!(failed(b"short"), b"");
    }

    #[test]
    fn hostile_bytes_do_no_harm() {
        let good = question("orders.weft.", RecordType::A).to_vec().unwrap();
        let mut random = fastrand::Rng::with_seed(3);
        for _ in 0..50_000 {
            let mut bytes = good.clone();
            for _ in 0..random.usize(1..5) {
                let at = random.usize(..bytes.len());
                bytes[at] = random.u8(..);
            }
            bytes.truncate(random.usize(..=good.len()));
            ask(&bytes);
            failed(&bytes);
        }
        // A name that points at itself.
        let mut looped = good[..12].to_vec();
        looped.extend([0xc0, 12, 0, 1, 0, 1]);
        ask(&looped);
    }
}
