//! DNS names for a server that is called from outside of the mesh: who gets them, and what such a certificate is good for.
//! The cluster is one that believes every token; the real one is asked in `cluster/certificate.rs`.

use std::{convert::Infallible, fs, net::SocketAddr, process::Command};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use rcgen::KeyPair;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tonic::Code;
use weft_proto::{ca::IssueRequest, certificate::Leaf};
use weft_sidecar::tls::{Bundle, Credentials};
use weft_tests::program;

use super::{Home, Serving, Workload, issue, request, request_for};

const INJECTOR: &str = "spiffe://weft.local/ns/weft-system/sa/weft-injector";
const NAME: &str = "weft-injector.weft-system.svc";

/// The API server: the token `ey.NAMESPACE:ACCOUNT.x` is good and of that account.
async fn cluster() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer));
            tokio::spawn(connection);
        }
    });
    address
}

async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let is_review = request.uri().path().ends_with("/tokenreviews");
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let mut object: Value = serde_json::from_slice(&body).unwrap_or_default();
    if is_review {
        let token = object["spec"]["token"].as_str().unwrap_or_default().to_owned();
        let account = token.split('.').nth(1).unwrap_or_default();
        let user = json!({ "username": format!("system:serviceaccount:{account}") });
        object["status"] = json!({ "authenticated": true, "audiences": ["weft-ca"], "user": user });
    }
    Ok(Response::new(Full::new(object.to_string().into())))
}

async fn start(home: &Home) -> Serving {
    let at = cluster().await;
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{ "name": "test", "cluster": { "server": format!("http://{at}") } }],
        "users": [{ "name": "test", "user": {} }],
        "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "test" } }],
    });
    fs::write(home.path("kubeconfig"), config.to_string()).unwrap();
    let mut command = Command::new(program("weft-ca"));
    command.env("KUBECONFIG", home.path("kubeconfig"));
    let log = fs::File::options().create(true).append(true).open(home.path("log")).unwrap();
    let more = ["--kubernetes", "--serving-identity", INJECTOR];
    Serving::run(home, command, log.into(), "127.0.0.1:0".parse().unwrap(), &more).await
}

fn asking(home: &Home, token: &str, names: &[&str]) -> IssueRequest {
    fs::write(home.path("asked"), token).unwrap();
    let dns_names = names.iter().map(|&name| name.to_owned()).collect();
    IssueRequest { dns_names, ..request(&home.path("asked")) }
}

#[tokio::test]
async fn dns_names_are_given_to_the_named_service_account_for_its_own_service_alone() {
    let home = Home::new();
    let serving = start(&home).await;
    let (injector, web) = ("ey.weft-system:weft-injector.x", "ey.shop:web.x");

    let given = issue(&home, serving.listen, None, asking(&home, injector, &[NAME])).await.unwrap();
    let (leaf, names) = Leaf::parse_serving(&given.chain[0]).unwrap();
    assert_eq!((leaf.id.as_str(), &names[..]), (INJECTOR, &[NAME.to_owned()][..]));
    let line = home.audit().pop().unwrap();
    assert_eq!((&line["event"], &line["dns_names"]), (&json!("issued"), &json!([NAME])));
    let plain = issue(&home, serving.listen, None, asking(&home, web, &[])).await.unwrap();
    assert!(Leaf::parse(&plain.chain[0]).is_ok(), "no DNS name");

    let join = fs::read_to_string(home.token(INJECTOR, &["--reusable"])).unwrap();
    let cases: [(&str, &[&str], &str); 4] = [
        (injector, &["web.shop.svc"], "does not get the DNS name web.shop.svc"),
        (injector, &[NAME, "*.svc"], "does not get the DNS name *.svc"),
        (web, &["web.shop.svc"], "no --serving-identity of the authority names it"),
        (&join, &[NAME], "by the token of a service account alone"),
    ];
    for (token, names, reason) in cases {
        let refused = issue(&home, serving.listen, None, asking(&home, token, names)).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
        assert!(refused.message().contains(reason), "{refused}");
        let line = home.audit().pop().unwrap();
        assert_eq!((&line["event"], &line["reason"]), (&json!("refused"), &json!("dns_names")));
        assert!(line["detail"].as_str().unwrap().contains(reason), "{line}");
    }
    let metrics = serving.get("/metrics").await;
    assert!(metrics.contains("weft_ca_refused_total{reason=\"dns_names\"} 4"), "{metrics}");
}

#[tokio::test]
async fn a_certificate_renews_no_names_and_one_with_names_is_no_peer() {
    let home = Home::new();
    let serving = start(&home).await;
    // By the certificate of the very same identity.
    let mut workload = Workload::start(home.settings(serving.listen, &home.token(INJECTOR, &[])));
    let held = workload.identified().await;
    let refused = issue(&home, serving.listen, Some(&held), asking(&home, "", &[NAME])).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");

    let key = KeyPair::generate().unwrap();
    fs::write(home.path("asked"), "ey.weft-system:weft-injector.x").unwrap();
    let asked = IssueRequest { dns_names: vec![NAME.to_owned()], ..request_for(&key, &home.path("asked")) };
    let given = issue(&home, serving.listen, None, asked).await.unwrap();
    let chain = given.chain.into_iter().map(CertificateDer::from).collect();
    let root = CertificateDer::from_pem_file(home.dir().join("roots.pem")).unwrap();
    let bundle = Bundle::new("weft.local".parse().unwrap(), vec![root]).unwrap();
    let refused = Credentials::new(chain, PrivateKeyDer::try_from(key.serialize_der()).unwrap(), bundle);
    let detail = refused.err().unwrap().detail;
    assert!(detail.contains(&format!("a DNS name ({NAME})")), "{detail}");
}

#[test]
fn a_serving_identity_that_is_none_is_refused_at_the_start() {
    let home = Home::new();
    for (more, reason) in [
        (&["--serving-identity", INJECTOR][..], "--kubernetes"),
        (&["--kubernetes", "--serving-identity", "spiffe://other/ns/a/sa/b"][..], "trust domain"),
        (&["--kubernetes", "--serving-identity", "weft-injector"][..], "not an identity"),
    ] {
        let listen = ["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"];
        let refused = home.command(&[&listen[..], more].concat());
        assert_eq!(refused.status.code(), Some(2));
        assert!(super::error_of(&refused).contains(reason), "{}", super::error_of(&refused));
    }
}
