use super::*;
use crate::model::Service;

fn directory() -> Directory {
    let service = |name: &str| Service::named(name.parse().unwrap());
    Directory::new(["orders", "cart_shop"].map(service).into())
}

fn question(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(77, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn ask(bytes: &[u8]) -> Decision {
    decide(bytes, &directory(), Asking::Never, |name| {
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
            Decision::Ask(name) => format!("ask {name}"),
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
fn a_registry_is_asked_for_mesh_names_alone() {
    let not_yes = |name: &str, registered| {
        let service = Service::named(name.parse().unwrap());
        Service { registered, ..service }
    };
    let directory = Directory::new(vec![
        Service::named("orders".parse().unwrap()),
        Service::named("cart_shop".parse().unwrap()),
        not_yes("absent", Registered::No),
        not_yes("unsure", Registered::Unknown),
    ]);
    for (name, possible, done) in [
        ("orders.", "240.0.0.1", "240.0.0.1"),
        ("Orders.Service.Consul.", "240.0.0.1", "240.0.0.1"),
        ("cart_shop.service.consul.", "240.0.0.1", "240.0.0.1"),
        ("cart.shop.", "240.0.0.1", "240.0.0.1"),
        ("new.", "ask new", "ServFail"),
        ("new.weft.", "ask new", "240.0.0.1"),
        ("new.space.weft.", "ask new_space", "240.0.0.1"),
        ("new.service.consul.", "ask new", "240.0.0.1"),
        ("new_space.service.consul.", "ask new_space", "240.0.0.1"),
        ("absent.", "forward", "forward"),
        ("absent.weft.", "240.0.0.1", "240.0.0.1"),
        ("absent.service.consul.", "forward", "forward"),
        ("unsure.", "ServFail", "ServFail"),
        ("unsure.weft.", "240.0.0.1", "240.0.0.1"),
        ("unsure.service.consul.", "240.0.0.1", "240.0.0.1"),
        ("example.org.", "forward", "forward"),
        ("www.example.org.", "forward", "forward"),
        ("v2.orders.service.consul.", "forward", "forward"),
        ("node.consul.", "forward", "forward"),
        ("a_b_c.service.consul.", "forward", "forward"),
        ("a.b.c.weft.", "NXDomain", "NXDomain"),
        ("weft.", "NoError", "NoError"),
    ] {
        for (asking, expected) in [(Asking::Possible, possible), (Asking::Done, done)] {
            let bytes = question(name, RecordType::A).to_vec().unwrap();
            let address_of = |_: &ServiceName| Some(Ipv4Addr::new(240, 0, 0, 1));
            let found = match decide(&bytes, &directory, asking, address_of) {
                Decision::Forward => "forward".to_owned(),
                Decision::Ask(name) => format!("ask {name}"),
                Decision::Silence => "silence".to_owned(),
                Decision::Answer(bytes) => {
                    let answer = Message::from_vec(&bytes).unwrap();
                    let code = format!("{:?}", answer.metadata.response_code);
                    answer.answers.first().map_or(code, |record| record.data.to_string())
                }
            };
            assert_eq!(found, expected, "{name} {asking:?}");
        }
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
    assert_eq!(ask(&update.to_vec().unwrap()), Decision::Forward);
    update.metadata.op_code = OpCode::Status;
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
            other => panic!("half a question: {other:?}"),
        }
    }
}

#[test]
fn a_full_table_is_a_failure_and_not_a_missing_name() {
    let bytes = question("orders.", RecordType::A).to_vec().unwrap();
    let Decision::Answer(bytes) = decide(&bytes, &directory(), Asking::Never, |_| None) else { panic!() };
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
