use serde_json::{Value, json};

use super::*;

/// A cluster as JSON, which may be changed before it is mirrored.
struct Cluster {
    services: Vec<Value>,
    slices: Vec<Value>,
    pods: Vec<Value>,
}

impl Cluster {
    fn mirror(&self) -> Catalog {
        fn typed<T: serde::de::DeserializeOwned>(objects: &[Value]) -> Vec<Arc<T>> {
            objects.iter().map(|object| Arc::new(serde_json::from_value(object.clone()).unwrap())).collect()
        }
        let naming = Naming { trust_domain: "weft.local".parse().unwrap(), cluster: "k8s".into() };
        let (services, slices) = (typed::<Service>(&self.services), typed::<EndpointSlice>(&self.slices));
        mirror(&services, &slices, &typed::<Pod>(&self.pods), &naming)
    }

    /// What is in the catalog: node, id and status.
    fn mirrored(&self) -> Vec<String> {
        let catalog = self.mirror();
        catalog
            .iter()
            .flat_map(|(node, entry)| {
                entry.instances.iter().map(move |(id, instance)| format!("{node} {id} {:?}", instance.status))
            })
            .collect()
    }
}

fn service(namespace: &str, name: &str) -> Value {
    json!({
        "metadata": { "name": name, "namespace": namespace },
        "spec": {
            "selector": { "app": name }, "ipFamilies": ["IPv4"],
            "ports": [{ "name": "http", "port": 80, "targetPort": 8080, "appProtocol": "http" },
                      { "name": "metrics", "port": 9090 }],
        },
    })
}

fn slice(namespace: &str, service: &str, endpoints: Value) -> Value {
    json!({
        "metadata": {
            "name": format!("{service}-x1"), "namespace": namespace,
            "labels": { "kubernetes.io/service-name": service },
        },
        "addressType": "IPv4",
        "ports": [{ "name": "metrics", "port": 9090, "protocol": "TCP" },
                  { "name": "http", "port": 8080, "protocol": "TCP", "appProtocol": "http" }],
        "endpoints": endpoints,
    })
}

fn endpoint(pod: &str, address: &str, node: &str) -> Value {
    json!({
        "addresses": [address], "nodeName": node, "zone": "zone-a",
        "conditions": { "ready": true, "serving": true, "terminating": false },
        "targetRef": { "kind": "Pod", "name": pod, "uid": format!("uid-{pod}") },
    })
}

fn pod(namespace: &str, name: &str, node: &str) -> Value {
    json!({
        "metadata": {
            "name": name, "namespace": namespace, "uid": format!("uid-{name}"),
            "labels": { "app.kubernetes.io/version": "1.2" },
            "annotations": { "weft.dev/status": "{}" },
        },
        "spec": { "serviceAccountName": "seller", "nodeName": node, "containers": [] },
        "status": { "hostIP": format!("192.168.0.{}", &node[4..]) },
    })
}

/// Service `orders` of `shop` with a pod on each of two nodes.
fn shop() -> Cluster {
    Cluster {
        services: vec![service("shop", "orders")],
        slices: vec![slice(
            "shop",
            "orders",
            json!([endpoint("a", "10.1.0.1", "node1"), endpoint("b", "10.1.0.2", "node2")]),
        )],
        pods: vec![pod("shop", "a", "node1"), pod("shop", "b", "node2")],
    }
}

const A: &str = "k8s-node1 orders_shop:a:8080 Passing";
const B: &str = "k8s-node2 orders_shop:b:8080 Passing";

#[test]
fn a_pod_behind_a_service_is_an_instance_with_all_that_sidecars_read() {
    let catalog = shop().mirror();
    assert_eq!(catalog.keys().collect::<Vec<_>>(), ["k8s-node1", "k8s-node2"]);
    let node = &catalog["k8s-node1"];
    assert_eq!(node.address, "192.168.0.1");
    let meta = [
        ("weft-identity", "spiffe://weft.local/ns/shop/sa/seller"),
        ("weft-protocol", "http1"),
        ("weft-zone", "zone-a"),
        ("weft-version", "1.2"),
        ("weft-namespace", "shop"),
        ("weft-pod", "a"),
    ];
    let expected = Instance {
        service: "orders_shop".into(),
        address: "10.1.0.1".into(),
        port: 8080,
        meta: meta.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
        status: Status::Passing,
    };
    assert_eq!(node.instances, [("orders_shop:a:8080".to_owned(), expected)].into());
}

#[test]
fn what_is_mirrored_of_odd_objects() {
    type Change = fn(&mut Cluster);
    let cases: &[(&str, Change, &[&str])] = &[
        ("as it is", |_| (), &[A, B]),
        ("no Service, only its slices", |shop| shop.services.clear(), &[]),
        ("ExternalName", |shop| shop.services[0]["spec"]["type"] = json!("ExternalName"), &[]),
        ("no selector", |shop| shop.services[0]["spec"]["selector"] = Value::Null, &[]),
        ("no ports", |shop| shop.services[0]["spec"]["ports"] = Value::Null, &[]),
        ("no slices", |shop| shop.slices.clear(), &[]),
        ("another namespace's slice", |shop| shop.slices[0]["metadata"]["namespace"] = json!("other"), &[]),
        ("the first port is UDP", |shop| shop.slices[0]["ports"][1]["protocol"] = json!("UDP"), &[]),
        ("a pod that nobody knows yet", |shop| _ = shop.pods.remove(0), &[B]),
        ("another pod of that name", |shop| shop.pods[0]["metadata"]["uid"] = json!("new"), &[B]),
        (
            "not injected",
            |shop| shop.pods[0]["metadata"]["annotations"] = json!({ "weft.dev/mtls": "strict" }),
            &[B],
        ),
        ("without an address", |shop| shop.slices[0]["endpoints"][0]["addresses"] = json!([]), &[B]),
        ("without a node's address", |shop| shop.pods[0]["status"] = json!({}), &[B]),
        ("no pod at all", |shop| shop.slices[0]["endpoints"][0]["targetRef"] = Value::Null, &[B]),
        (
            "an account that is no part of an identity",
            |shop| shop.pods[0]["spec"]["serviceAccountName"] = json!("a/b"),
            &[B],
        ),
        (
            "a second family",
            |shop| {
                let mut second = shop.slices[0].clone();
                second["addressType"] = json!("IPv6");
                second["endpoints"][0]["addresses"] = json!(["fd00::1"]);
                shop.slices.insert(0, second);
            },
            &[A, B],
        ),
        ("only another family", |shop| shop.slices[0]["addressType"] = json!("IPv6"), &[]),
        (
            "the namespace default",
            |shop| {
                for object in shop.services.iter_mut().chain(&mut shop.slices).chain(&mut shop.pods) {
                    object["metadata"]["namespace"] = json!("default");
                }
            },
            &["k8s-node1 orders:a:8080 Passing", "k8s-node2 orders:b:8080 Passing"],
        ),
        (
            "two Services over one pod",
            |shop| {
                shop.services.push(service("shop", "sales"));
                shop.slices.push(slice("shop", "sales", json!([endpoint("a", "10.1.0.1", "node1")])));
            },
            &[A, "k8s-node1 sales_shop:a:8080 Passing", B],
        ),
        (
            "one endpoint in two slices",
            |shop| {
                let mut old = shop.slices[0].clone();
                old["endpoints"][0]["conditions"]["ready"] = json!(false);
                shop.slices.push(old);
            },
            &[A, B],
        ),
    ];
    for (name, change, expected) in cases {
        let mut cluster = shop();
        change(&mut cluster);
        assert_eq!(cluster.mirrored(), *expected, "{name}");
    }
}

#[test]
fn conditions_decide_who_is_called() {
    let ready = json!({ "ready": true, "serving": true, "terminating": false });
    let starting = json!({ "ready": false, "serving": false, "terminating": false });
    let leaving = json!({ "ready": false, "serving": true, "terminating": true });
    let gone = json!({ "ready": false, "serving": false, "terminating": true });
    let status = |a: &Value, b: &Value| {
        let mut cluster = shop();
        cluster.slices[0]["endpoints"][0]["conditions"] = a.clone();
        cluster.slices[0]["endpoints"][1]["conditions"] = b.clone();
        let status = |id: &str| {
            cluster
                .mirrored()
                .iter()
                .find_map(|line| Some(line.split_once(id)?.1.trim().to_owned()))
                .unwrap_or_else(|| "out".into())
        };
        [status("orders_shop:a:8080"), status("orders_shop:b:8080")]
    };
    for (a, b, expected) in [
        (&ready, &ready, ["Passing", "Passing"]),
        (&ready, &starting, ["Passing", "Critical"]),
        (&ready, &leaving, ["Passing", "out"]),
        (&starting, &leaving, ["Critical", "Passing"]),
        (&leaving, &leaving, ["Passing", "Passing"]),
        (&gone, &leaving, ["out", "Passing"]),
        (&gone, &starting, ["out", "Critical"]),
        (&json!({}), &Value::Null, ["Passing", "Passing"]),
    ] {
        assert_eq!(status(a, b), expected, "{a} {b}");
    }
}

#[test]
fn the_protocol_is_the_services_then_the_pods() {
    for (app_protocol, annotation, expected) in [
        (json!("http"), None, Some("http1")),
        (json!("kubernetes.io/h2c"), None, Some("http2")),
        (json!("http2"), None, Some("http2")),
        (json!("grpc"), None, Some("grpc")),
        (json!("https"), None, Some("tls")),
        (json!("tls"), None, Some("tls")),
        (json!("tcp"), Some("http1"), Some("tcp")),
        (json!("example.com/odd"), None, None),
        (json!("example.com/odd"), Some("grpc"), Some("grpc")),
        (Value::Null, None, None),
        (Value::Null, Some("tcp"), Some("tcp")),
    ] {
        let mut cluster = shop();
        cluster.slices[0]["ports"][1]["appProtocol"] = app_protocol.clone();
        if let Some(name) = annotation {
            cluster.pods[0]["metadata"]["annotations"]["weft.dev/protocol"] = json!(name);
        }
        let catalog = cluster.mirror();
        let meta = &catalog["k8s-node1"].instances["orders_shop:a:8080"].meta;
        assert_eq!(meta.get("weft-protocol").map(String::as_str), expected, "{app_protocol} {annotation:?}");
    }
}

#[test]
fn operations_are_only_what_differs_and_removals_come_last() {
    let full = shop().mirror();
    assert_eq!(difference(&full, &full), []);
    let kinds = |desired: &Catalog, actual: &Catalog| -> Vec<&'static str> {
        difference(desired, actual).iter().map(Operation::kind).collect()
    };
    assert_eq!(kinds(&full, &Catalog::new()), ["register", "register"]);
    assert_eq!(kinds(&Catalog::new(), &full), ["deregister_node", "deregister_node"]);

    let changed = |change: fn(&mut Cluster)| {
        let mut cluster = shop();
        change(&mut cluster);
        kinds(&cluster.mirror(), &full)
    };
    let not_ready: fn(&mut Cluster) =
        |shop| shop.slices[0]["endpoints"][0]["conditions"]["ready"] = json!(false);
    assert_eq!(changed(not_ready), ["register"]);
    assert_eq!(changed(|shop| _ = shop.pods.remove(0)), ["deregister_node"]);
    assert_eq!(
        changed(|shop| shop.pods[0]["status"]["hostIP"] = json!("192.168.0.9")),
        ["register"],
        "another address of the node"
    );
    // A Service that is deleted and made again under another name.
    let renamed: fn(&mut Cluster) = |shop| {
        shop.services = vec![service("shop", "sales")];
        let endpoints = shop.slices[0]["endpoints"].clone();
        shop.slices = vec![slice("shop", "sales", endpoints)];
    };
    assert_eq!(changed(renamed), ["register", "register", "deregister", "deregister"]);

    // What somebody else changed in the catalog is written again.
    let mut touched = full.clone();
    let instance = touched.get_mut("k8s-node2").unwrap().instances.get_mut("orders_shop:b:8080").unwrap();
    instance.status = Status::Unknown;
    assert_eq!(kinds(&full, &touched), ["register"]);
}
