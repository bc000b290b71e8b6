//! What to do with a question: pure, bytes in, a decision out. A service is known as `name` and `name.weft`, one
//! of a namespace as `name.namespace` and `name.namespace.weft`, and where there is a registry also as
//! `NAME.service.consul` (docs/services.md). Only names without a dot and those below the two suffixes reach the
//! registry. Names are compared without regard to case and answered in the client's own spelling. Addresses are
//! IPv4: asked for another type, a name of the mesh exists and has none (RFC 2308 2.2).

use std::net::{Ipv4Addr, Ipv6Addr};

use hickory_proto::{
    op::{Edns, Header, Message, MessageType, Metadata, OpCode, Query, ResponseCode},
    rr::{
        DNSClass, Name, RData, Record, RecordType,
        rdata::{A, AAAA},
    },
    serialize::binary::{BinDecodable, BinDecoder},
};

use crate::{
    discovery::Directory,
    model::{Registered, ServiceName},
};

/// Clients ask again after this many seconds.
const TTL: u32 = 5;
/// What we say we take over UDP (the value of DNS Flag Day 2020).
const MAX_PAYLOAD: u16 = 1232;
/// The suffix that is ours alone.
const SUFFIX: &str = "weft";
/// The suffix that Consul's own DNS has for services.
const CONSUL_SUFFIX: [&str; 2] = ["service", "consul"];

/// What to do with the bytes of a question.
#[derive(Debug, PartialEq, Eq)]
pub enum Decision {
    /// No question at all: an answer to it could only start a quarrel.
    Silence,
    /// Send this.
    Answer(Vec<u8>),
    /// Not ours: ask the resolvers.
    Forward,
    /// Perhaps a service: ask the registry, and decide again.
    Ask(ServiceName),
}

/// Can a registry be asked about a name that the directory has not?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asking {
    /// There is none.
    Never,
    /// Yes.
    Possible,
    /// It was asked just now, and may have said nothing.
    Done,
}

/// Decides. `address_of` gives the virtual address of a service that the directory knows.
pub fn decide(
    question: &[u8],
    directory: &Directory,
    asking: Asking,
    address_of: impl FnOnce(&ServiceName) -> Option<Ipv4Addr>,
) -> Decision {
    let mut decoder = BinDecoder::new(question);
    let Ok(header) = Header::read(&mut decoder) else { return Decision::Silence };
    if header.metadata.message_type == MessageType::Response {
        return Decision::Silence;
    }
    let refuse = |code| Decision::Answer(respond(&header.metadata, code, None, None, false));
    match header.metadata.op_code {
        OpCode::Query => {}
        // RFC 2136, RFC 1996: not about names that we have, and for name servers that know what to do with them.
        OpCode::Update | OpCode::Notify => {
            let is_ours = Query::read(&mut decoder).is_ok_and(|zone| is_below_our_suffix(zone.name()));
            return if is_ours { refuse(ResponseCode::Refused) } else { Decision::Forward };
        }
        _ => return refuse(ResponseCode::NotImp),
    }
    let query = match (header.counts.queries, Query::read(&mut decoder)) {
        (1, Ok(query)) => query,
        _ => return refuse(ResponseCode::FormErr),
    };
    if query.query_class() != DNSClass::IN {
        return Decision::Forward;
    }
    let meaning = meaning(query.name(), directory, asking);
    let (code, data) = match meaning {
        Meaning::Foreign => return Decision::Forward,
        Meaning::Perhaps(name) => return Decision::Ask(name),
        Meaning::Undecided => (ResponseCode::ServFail, None),
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
    without_records(question, ResponseCode::ServFail)
}

/// The answer that there is nothing of what was asked for.
pub(super) fn nothing(question: &[u8]) -> Vec<u8> {
    without_records(question, ResponseCode::NoError)
}

fn without_records(question: &[u8], code: ResponseCode) -> Vec<u8> {
    let mut decoder = BinDecoder::new(question);
    let Ok(header) = Header::read(&mut decoder) else { return Vec::new() };
    let query = Query::read(&mut decoder).ok();
    respond(&header.metadata, code, query, None, false)
}

/// The question of a message that is a plain one (QUERY), with the name in small letters.
pub(super) fn asked(question: &[u8]) -> Option<(String, RecordType)> {
    let mut decoder = BinDecoder::new(question);
    let header = Header::read(&mut decoder).ok()?;
    let query = Query::read(&mut decoder).ok()?;
    let is_query = header.metadata.op_code == OpCode::Query;
    is_query.then(|| (query.name().to_ascii().to_ascii_lowercase(), query.query_type()))
}

fn is_below_our_suffix(name: &Name) -> bool {
    name.iter().next_back().is_some_and(|label| label.eq_ignore_ascii_case(SUFFIX.as_bytes()))
}

enum Meaning {
    /// Not a name of ours.
    Foreign,
    Service(ServiceName),
    /// The registry must be asked first.
    Perhaps(ServiceName),
    /// The registry does not say whether it is one of ours.
    Undecided,
    Localhost,
    /// The name exists and has no address: our suffix itself, or a namespace.
    NoAddress,
    /// A name below our suffix that no service has.
    Nothing,
}

fn meaning(name: &Name, directory: &Directory, asking: Asking) -> Meaning {
    let labels: Vec<String> =
        name.iter().map(|label| String::from_utf8_lossy(label).to_ascii_lowercase()).collect();
    let mut labels: Vec<&str> = labels.iter().map(String::as_str).collect();
    // RFC 6761 6.3: also what is below it.
    if labels.last() == Some(&"localhost") {
        return Meaning::Localhost;
    }
    let form = match labels[..] {
        [.., SUFFIX] => Form::Ours,
        [_, one, two] if [one, two] == CONSUL_SUFFIX && asking != Asking::Never => Form::Consul,
        [_] => Form::Bare,
        _ => Form::Dotted,
    };
    let name = match form {
        Form::Ours => {
            labels.pop();
            service(&labels)
        }
        Form::Consul => labels[0].parse().ok(),
        Form::Bare | Form::Dotted => service(&labels),
    };
    let known = name.as_ref().and_then(|name| directory.service(name)).map(|service| service.registered);
    match (name, known, form) {
        (Some(name), Some(Registered::Yes), _) => Meaning::Service(name),
        (_, _, Form::Dotted) => Meaning::Foreign,
        (Some(name), None, _) if asking == Asking::Possible => Meaning::Perhaps(name),
        (_, _, Form::Ours) if labels.is_empty() || is_namespace(&labels, directory) => Meaning::NoAddress,
        // Its callers are told by an answer of ours, which says more than DNS can.
        (Some(name), Some(_), Form::Ours) => Meaning::Service(name),
        (Some(name), None, Form::Ours) if asking == Asking::Done => Meaning::Service(name),
        (_, _, Form::Ours) => Meaning::Nothing,
        (Some(name), Some(Registered::Unknown), Form::Consul) => Meaning::Service(name),
        (Some(name), None, Form::Consul) if asking == Asking::Done => Meaning::Service(name),
        // It may be a host of this network: to guess would send traffic past the mesh.
        (Some(_), Some(Registered::Unknown), Form::Bare) => Meaning::Undecided,
        (Some(_), None, Form::Bare) if asking == Asking::Done => Meaning::Undecided,
        _ => Meaning::Foreign,
    }
}

/// How a name is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Below our suffix.
    Ours,
    /// One label below Consul's suffix for services.
    Consul,
    /// One label.
    Bare,
    /// Anything else.
    Dotted,
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
mod tests;
