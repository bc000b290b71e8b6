use std::sync::Arc;

use serde_json::{Value, json};

use super::*;
use crate::model::Protocol;

fn entry(id: &str, address: &str, port: i64) -> Value {
    json!({
        "Node": {"ID": "0f65", "Node": "n1", "Address": "10.0.0.9", "Meta": {}},
        "Service": {
            "ID": id, "Service": "orders", "Tags": null, "Address": address, "Port": port, "Meta": null,
            "Weights": {"Passing": 1, "Warning": 1}, "Proxy": {"MeshGateway": {}},
        },
        "Checks": [{"CheckID": "serfHealth", "Status": "passing", "Output": "alive"}],
    })
}

fn read_it(entries: &Value) -> Result<Reading, Error> {
    read(&"orders".parse().unwrap(), entries.to_string().as_bytes())
}

#[test]
fn an_instance_becomes_an_endpoint() {
    let mut full = entry("a", "10.1.0.2", 8080);
    full["Service"]["Tags"] = json!(["v2", "canary"]);
    full["Service"]["Weights"] = json!({"Passing": 50, "Warning": 7});
    full["Service"]["Meta"] = json!({
        "weft-identity": "spiffe://d/ns/default/sa/orders, spiffe://d/ns/default/sa/old",
        "weft-protocol": "grpc", "weft-zone": "eu-1a", "weft-version": "1.2", "weft-namespace": "default",
        "other": "x",
    });
    let mut warned = entry("b", "", 1);
    warned["Service"]["Weights"] = json!({"Passing": 50, "Warning": 7});
    warned["Checks"][0]["Status"] = "warning".into();
    let mut down = entry("c", "::ffff:10.1.0.3", 1);
    down["Checks"][0]["Status"] = "critical".into();
    let mut resting = entry("d", "fd00::2", 1);
    resting["Service"]["Weights"] = json!({"Passing": 0, "Warning": 0});
    let reading = read_it(&json!([full, warned, down, resting])).unwrap();
    assert_eq!(reading.mistakes, [""; 0]);
    let [full, warned, down, resting] = &reading.instances[..] else { panic!("{reading:?}") };
    assert_eq!(full.endpoint.address, "10.1.0.2:8080".parse().unwrap());
    assert_eq!((full.endpoint.weight, full.endpoint.zone.as_deref()), (50, Some("eu-1a")));
    assert_eq!(full.endpoint.version.as_deref(), Some("1.2"));
    assert_eq!(full.endpoint.tags.iter().map(AsRef::as_ref).collect::<Vec<_>>(), ["v2", "canary"]);
    assert_eq!((full.identities.len(), full.protocol), (2, Some(Protocol::Http2)));
    assert_eq!(warned.endpoint.address, "10.0.0.9:1".parse().unwrap());
    assert_eq!((warned.endpoint.weight, warned.is_well), (7, true));
    assert_eq!((down.endpoint.address.to_string().as_str(), down.is_well), ("10.1.0.3:1", false));
    assert!(!resting.is_well && !resting.is_cut_off);
    assert!(Arc::ptr_eq(&full.key.0, &warned.key.0), "words are shared");
    assert_eq!(read_it(&json!([])).unwrap(), Reading::default());
}

#[test]
fn a_lost_node_is_told_from_an_app_that_is_down() {
    let own = json!({"CheckID": "service:a", "ServiceID": "a", "Status": "passing"});
    for (of_node, of_app, expected) in [
        ("passing", "passing", (true, false, 50)),
        ("passing", "warning", (true, false, 7)),
        ("critical", "passing", (false, true, 50)),
        ("critical", "warning", (false, true, 7)),
        ("passing", "critical", (false, false, 50)),
        ("critical", "critical", (false, false, 50)),
    ] {
        let mut one = entry("a", "10.1.0.2", 80);
        one["Service"]["Weights"] = json!({"Passing": 50, "Warning": 7});
        one["Checks"] = json!([one["Checks"][0], own]);
        one["Checks"][0]["Status"] = of_node.into();
        one["Checks"][1]["Status"] = of_app.into();
        let found = read_it(&json!([one])).unwrap().instances.remove(0);
        let read = (found.is_well, found.is_cut_off, found.endpoint.weight);
        assert_eq!(read, expected, "{of_node} {of_app}");
    }
}

#[test]
fn an_instance_that_cannot_be_used_is_named_with_its_field() {
    let cases = [
        ("/Service/Port", json!(0), "`Service.Port` is 0 or missing; expected a port from 1 to 65535"),
        ("/Service/Port", json!(65536), "`Service.Port` is 65536"),
        ("/Service/Address", json!("web.local"), "`Service.Address` is \"web.local\"; expected an IP"),
        ("/Service/Address", json!("240.0.0.1"), "expected an address to dial"),
        ("/Node/Address", json!(""), "`Node.Address` is \"\""),
        ("/Service/Meta", json!({"weft-protocol": "http"}), "`weft-protocol` is \"http\"; expected http1,"),
        ("/Service/Meta", json!({"weft-identity": "orders"}), "`weft-identity` is \"orders\""),
        ("/Service/Meta", json!({"weft-zone": "x".repeat(600)}), "`weft-zone` is "),
        ("/Service/Meta", json!({"weft-namespace": "shop"}), "but the service's name says \"default\""),
        ("/Service/Weights", json!({"Passing": -1, "Warning": 1}), "`Service.Weights` has -1"),
        ("/Checks/0/Status", json!("odd"), "`Checks.Status` is \"odd\""),
    ];
    for (place, value, expected) in cases {
        let address = if place == "/Node/Address" { "" } else { "10.1.0.2" };
        let mut bad = entry("bad", address, 80);
        *bad.pointer_mut(place).unwrap() = value;
        let reading = read_it(&json!([entry("good", "10.1.0.3", 80), bad])).unwrap();
        let [mistake] = &reading.mistakes[..] else { panic!("{place}: {reading:?}") };
        assert!(mistake.starts_with("service `orders`, instance `bad` on node `n1`: "), "{mistake}");
        assert!(mistake.contains(expected), "{mistake}");
        assert_eq!((reading.instances.len(), reading.unreadable.len()), (1, 1), "{place}");
    }
}

/// What a newer Consul leaves out, and what a program in between may make of the rest.
#[test]
fn an_entry_that_cannot_be_read_costs_that_entry_alone() {
    let without = |place: &str, key: &str| {
        let mut bad = entry("bad", "10.1.0.2", 80);
        bad.pointer_mut(place).unwrap().as_object_mut().unwrap().remove(key);
        bad
    };
    let with = |place: &str, value: Value| {
        let mut bad = entry("bad", "10.1.0.2", 80);
        *bad.pointer_mut(place).unwrap() = value;
        bad
    };
    let mut socket = without("/Service", "Port");
    socket["Service"]["SocketPath"] = "/run/orders.sock".into();
    let named = "instance `bad` on node `n1`: ";
    for (bad, place, expected) in [
        (without("/Service", "Port"), named, "`Service.Port` is 0 or missing; expected a port"),
        (socket, named, "`Service.SocketPath` is \"/run/orders.sock\""),
        (with("/Service/Port", json!("80")), named, "`Service.Port`: invalid type: string \"80\""),
        (with("/Service/Port", json!("x".repeat(1_000_000))), named, "`Service.Port`: invalid type: "),
        (with("/Service/Port", json!(1e300)), named, "`Service.Port`: "),
        (with("/Service/Tags", json!({"a": 1})), named, "`Service.Tags`: invalid type: map"),
        (with("/Service/Meta", json!({"a": 7})), named, "`Service.Meta.a`: invalid type: integer"),
        (with("/Checks", json!("none")), named, "`Checks`: invalid type: string"),
        (with("/Node/Address", json!(null)), named, "`Node.Address`: invalid type: null"),
        (without("/Service", "ID"), "entry 2 of the answer: ", "`Service`: missing field `ID`"),
        (with("/Service", json!(null)), "entry 2 of the answer: ", "`Service`: invalid type: null"),
        (without("", "Node"), "entry 2 of the answer: ", "missing field `Node`"),
        (json!(7), "entry 2 of the answer: ", "invalid type: integer `7`"),
        (json!([]), "entry 2 of the answer: ", "invalid"),
    ] {
        let all = json!([entry("good", "10.1.0.3", 80), bad, entry("other", "10.1.0.4", 80)]);
        let reading = read_it(&all).unwrap();
        let [mistake] = &reading.mistakes[..] else { panic!("{reading:?}") };
        assert!(mistake.starts_with(&format!("service `orders`, {place}")), "{mistake}");
        assert!(mistake.contains(expected) && mistake.len() < 600, "{mistake}");
        assert_eq!((reading.instances.len(), reading.unreadable.len()), (2, 1), "{mistake}");
    }
}

#[test]
fn identities_of_what_cannot_be_read_are_not_lost() {
    let identity = "spiffe://d/ns/default/sa/orders";
    let with = |place: &str, value: Value, meta: Value| {
        let mut bad = entry("bad", "10.1.0.2", 80);
        bad["Service"]["Meta"] = meta;
        *bad.pointer_mut(place).unwrap() = value;
        bad
    };
    let stated = || json!({"weft-identity": identity, "weft-zone": "z"});
    for (bad, identities, is_identity_unreadable) in [
        (with("/Service/Port", json!(0), stated()), 1, false),
        (with("/Service/Port", json!("80"), stated()), 1, false),
        (with("/Service/Tags", json!({"a": 1}), stated()), 1, false),
        (with("/Node", json!(null), stated()), 1, false),
        (with("/Checks", json!("none"), stated()), 1, false),
        (with("/Service/Meta/weft-zone", json!(7), stated()), 1, false),
        // Malformed, in an entry that can be read otherwise, and in those that cannot.
        (with("/Service/Meta/weft-identity", json!("orders"), stated()), 0, true),
        (with("/Service/Meta/weft-identity", json!(" ,"), stated()), 0, true),
        (with("/Service/Meta/weft-identity", json!([identity]), stated()), 0, true),
        (with("/Service/Port", json!(0), json!({"weft-identity": "orders"})), 0, true),
        (with("/Service/Tags", json!(7), json!({"weft-identity": "orders"})), 0, true),
        (with("/Service/Meta", json!("none"), json!({})), 0, true),
        // It has none, for certain.
        (with("/Service", json!("none"), json!({})), 0, false),
        (json!(7), 0, false),
        (with("/Service/Port", json!(0), json!(null)), 0, false),
        (with("/Service/Tags", json!(7), json!({"weft-identity": ""})), 0, false),
    ] {
        let reading = read_it(&json!([entry("good", "10.1.0.3", 80), bad])).unwrap();
        assert_eq!((reading.instances.len(), reading.unreadable.len()), (1, 1), "{bad}");
        let found = (reading.identities.len(), reading.is_identity_unreadable);
        assert_eq!(found, (identities, is_identity_unreadable), "{bad}");
        let told = reading.mistakes[0].contains("weft-identity");
        assert!(!is_identity_unreadable || told, "{:?}", reading.mistakes);
    }
}

#[test]
fn an_answer_without_an_end_of_entries_is_refused() {
    let commas = format!("[{}0]", "0,".repeat(MAX_INSTANCES));
    let error = read(&"orders".parse().unwrap(), commas.as_bytes()).unwrap_err();
    assert!(error.text.contains("more than 20000 instances; none is read"), "{error}");
}

#[test]
fn an_answer_of_another_shape_is_refused_with_its_field() {
    let good = json!([entry("a", "10.1.0.2", 80)]).to_string();
    let long_key = format!("[{{\"a\u{7f}{}\": [1", "x".repeat(1_000_000));
    for (body, expected) in [
        (long_key, "ends too early"),
        (good[..good.len() / 2].to_owned(), "the answer ends too early, after "),
        (String::new(), "ends too early, after 0 bytes"),
        ("<html><body>Welcome".to_owned(), "it begins <html><body>Welcome"),
        ("{\"error\": 1}".to_owned(), "expected a sequence"),
        (format!("{good}[]"), "something follows"),
        ("null".to_owned(), "expected a sequence"),
    ] {
        let error = read(&"orders".parse().unwrap(), body.as_bytes()).unwrap_err();
        assert_eq!(error.kind, Kind::BadAnswer);
        assert!(error.text.starts_with("service `orders`: ") && error.text.contains(expected), "{error}");
        assert!(error.text.len() < 600, "{error}");
    }
}

#[test]
fn hostile_bytes_do_no_harm() {
    let good = json!([entry("a", "10.1.0.2", 80)]).to_string().into_bytes();
    let mut random = fastrand::Rng::with_seed(3);
    for _ in 0..20_000 {
        let mut bytes = good.clone();
        for _ in 0..random.usize(1..5) {
            let at = random.usize(..bytes.len());
            bytes[at] = random.u8(..);
        }
        bytes.truncate(random.usize(..=good.len()));
        let _ = read(&"orders".parse().unwrap(), &bytes);
    }
    let deep = format!("{}1{}", "[".repeat(10_000), "]".repeat(10_000));
    let reading = read(&"orders".parse().unwrap(), deep.as_bytes()).unwrap();
    assert_eq!((reading.instances.len(), reading.mistakes.len()), (0, 1));
}
