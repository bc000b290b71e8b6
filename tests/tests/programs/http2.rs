//! HTTP/2 with prior knowledge: curl, nghttp and h2load against nginx.

use weft_tests::{Need, Pod, output_of};

use super::pair::{CURL, NGINX, Pair, ROOT, can_run, curl};

const CASES: [&str; 6] = [
    "http://orders:8080/file",
    "-I http://orders:8080/file",
    "-r 100-199 http://orders:8080/file",
    "http://orders:8080/told?a=b",
    "http://orders:8080/missing",
    "http://orders:8080/nothing",
];

#[test]
fn curl_nghttp_and_h2load_see_the_same_over_http2() {
    if !can_run(&[ROOT, CURL, NGINX, Need::Program("nghttp", "nghttp2-client")]) {
        return;
    }
    let mut pair = Pair::direct(&["orders"]);
    let www = pair.folder("www");
    let folder = pair.folder("answers");
    std::fs::write(www.join("file"), (0..300_000).map(|n: u32| n as u8).collect::<Vec<u8>>()).unwrap();
    let _nginx = pair.start_nginx(
        &format!(
            "server {{ listen 8080 http2; root {}; location /nothing {{ return 204; }}
             location /told {{ return 200 \"$request $host $http_x_a $http_te\"; }} }}",
            www.display()
        ),
        8080,
    );
    let ask = |pod: &Pod, case: &str| {
        let mut words = vec!["--http2-prior-knowledge", "-H", "X-A: a", "-H", "TE: trailers"];
        words.extend(case.split(' '));
        curl(pod, &folder, &words)
    };
    let direct = CASES.map(|case| ask(&pair.client, case));
    assert!(direct[0].outcome.starts_with("200 HTTP/2 1 exit 0"), "{:?}", direct[0]);
    let (nghttp, h2load) = (nghttp(&pair.client), h2load(&pair.client));
    assert!(nghttp.iter().any(|line| line.contains(":status: 200")), "{nghttp:?}");
    pair.weave(&[("orders", 8080)]);
    for (case, direct) in CASES.iter().zip(direct) {
        assert_eq!(ask(&pair.client, case), direct, "curl {case}");
    }
    assert_eq!(self::nghttp(&pair.client), nghttp);
    assert_eq!(self::h2load(&pair.client), h2load);
    pair.assert_secured();
}

/// The answer's fields of three requests on one connection, and the hash of their bodies.
fn nghttp(pod: &Pod) -> Vec<String> {
    let mut nghttp = pod.command("nghttp");
    nghttp.args(["-v", "-n", "--no-dep", "-t", "15", "-H", "x-a: b"]);
    nghttp.args(["http://orders:8080/file", "http://orders:8080/told", "http://orders:8080/missing"]);
    let fields = output_of(nghttp);
    let received = fields.lines().filter(|line| line.contains("recv (stream_id="));
    let mut received: Vec<String> = received
        .filter(|line| !line.contains(" date: "))
        .filter_map(|line| line.split_once("recv ").map(|(_, field)| field.to_owned()))
        .collect();
    received.sort();
    received.push(pod.shell("nghttp -t 15 http://orders:8080/file | sha256sum"));
    received
}

/// How 2,000 requests went: 4 connections, 50 streams each.
fn h2load(pod: &Pod) -> Vec<String> {
    let told = pod.shell("h2load -n 2000 -c 4 -m 50 -T 20 http://orders:8080/told");
    let wanted =
        told.lines().filter(|line| line.starts_with("requests:") || line.starts_with("status codes:"));
    wanted.map(str::to_owned).collect()
}
