//! HTTP/1: curl and hand-written bytes against nginx and an app that tells what it got.

use serde_json::Value;
use weft_tests::{Pod, output_of, until};

use super::pair::{CURL, NGINX, PYTHON, Pair, ROOT, can_run, comparable, curl, headers, say};

/// One command line of curl each.
const NGINX_CASES: [&str; 15] = [
    "http://orders:8080/file",
    "-I http://orders:8080/file",
    "--http1.0 http://orders:8080/file",
    "--http1.0 -H Connection:keep-alive http://orders:8080/file",
    "-r 100-199 http://orders:8080/file",
    "-H Accept-Encoding:gzip http://orders:8080/file.txt",
    "http://orders:8080/missing",
    "http://orders:8080/moved",
    "-L http://orders:8080/moved",
    "http://orders:8080/nothing",
    "-H If-None-Match:\"never\" http://orders:8080/file",
    "-X OPTIONS http://orders:8080/file",
    "-X PROPFIND http://orders:8080/file",
    "http://orders:8080/unavailable",
    // two requests on one connection
    "http://orders:8080/file http://orders:8080/file.txt -o /dev/null",
];

#[test]
fn what_nginx_answers_over_http1_is_the_same() {
    if !can_run(&[ROOT, CURL, NGINX]) {
        return;
    }
    let mut pair = Pair::direct(&["orders"]);
    let www = pair.folder("www");
    let folder = pair.folder("answers");
    std::fs::write(www.join("file"), (0..200_000).map(|n: u32| n as u8).collect::<Vec<u8>>()).unwrap();
    std::fs::write(www.join("file.txt"), "text and more text\n".repeat(5000)).unwrap();
    let _nginx = pair.start_nginx(
        &format!(
            "server {{ listen 8080; root {}; gzip on; gzip_types text/plain; default_type text/plain; absolute_redirect off;
             location /moved {{ return 301 /file; }} location /nothing {{ return 204; }}
             location /unavailable {{ return 503; }} }}",
            www.display()
        ),
        8080,
    );
    let ask = |pod: &Pod, case: &str| {
        let words: Vec<&str> = case.split(' ').collect();
        curl(pod, &folder, &words)
    };
    let mut known = ask(&pair.client, "http://orders:8080/file").headers;
    known.retain(|(name, _)| name == "etag");
    let conditional = format!("-H If-None-Match:{} http://orders:8080/file", known[0].1);
    let cases: Vec<&str> = NGINX_CASES.into_iter().chain([&*conditional]).collect();
    let direct: Vec<_> = cases.iter().map(|case| ask(&pair.client, case)).collect();
    assert!(direct[0].outcome.starts_with("200 HTTP/1 1 exit 0"), "{:?}", direct[0]);
    assert!(direct[15].outcome.starts_with("304 "), "{:?}", direct[15]);
    pair.weave(&[("orders", 8080)]);
    for (case, direct) in cases.iter().zip(direct) {
        assert_eq!(ask(&pair.client, case), direct, "curl {case}");
    }
    pair.assert_secured();
}

/// Requests to the app that tells what it got.
const TOLD_CASES: [&str; 14] = [
    "http://orders:8080/path/%20%2F?a=b&c=%00#fragment",
    "-d name=value http://orders:8080/form",
    "-X PUT --data-binary @BODY http://orders:8080/put",
    "-X POST -H Transfer-Encoding:chunked --data-binary @BODY http://orders:8080/chunked-upload",
    "-X POST -H Expect:100-continue --data-binary @BODY http://orders:8080/expect",
    "-X DELETE http://orders:8080/thing",
    "-X PURGE -H X-Empty; -H X-Twice:1 -H X-Twice:2 -H Cookie:a=1;b=2 http://orders:8080/headers",
    "-A agent -u user:password -e http://referer/ http://orders:8080/usual",
    "-H Host:elsewhere.example:99 http://orders:8080/host",
    "-H Host; http://orders:8080/empty-host",
    "-H Host:a<b>\"c`:80 http://orders:8080/odd-host",
    // the app is a forward proxy
    "-x http://orders:8080 http://elsewhere.example/a?b=c",
    "-x http://orders:8080 -d name=value http://elsewhere.example:81",
    "-x http://orders:8080 --request-target https://elsewhere.example/a http://elsewhere.example/",
];

#[test]
fn what_an_app_gets_over_http1_is_the_same() {
    if !can_run(&[ROOT, CURL, PYTHON]) {
        return;
    }
    let mut pair = Pair::direct(&["orders"]);
    let folder = pair.folder("answers");
    let upload = folder.join("upload");
    std::fs::write(&upload, (0..3_000_000_u32).map(|n| ((n * 7) >> 3) as u8).collect::<Vec<u8>>()).unwrap();
    let _app = pair.start_app("http_app.py", 8080);
    let ask = |pod: &Pod, case: &str| {
        let case = case.replace("BODY", &upload.display().to_string());
        let words: Vec<&str> = case.split(' ').collect();
        let answer = curl(pod, &folder, &words);
        assert!(answer.outcome.starts_with("200 "), "curl {case}: {answer:?}");
        let told: Value = serde_json::from_slice(&std::fs::read(folder.join("body")).unwrap()).unwrap();
        comparable_request(&told)
    };
    let direct: Vec<_> = TOLD_CASES.iter().map(|case| ask(&pair.client, case)).collect();
    pair.weave(&[("orders", 8080)]);
    for (case, direct) in TOLD_CASES.iter().zip(direct) {
        assert_eq!(ask(&pair.client, case), direct, "curl {case}");
    }
    pair.assert_secured();
}

/// The method, target and body that the app got, and the fields without the documented differences.
fn comparable_request(told: &Value) -> (Value, Value, Value, Vec<(String, String)>) {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let fields = told["fields"].as_array().unwrap().iter();
    let mut fields = comparable(fields.map(|field| (text(&field[0]), text(&field[1]))));
    // a request that says nothing of its length has none; a hop may say so
    fields.retain(|(name, value)| !(name == "content-length" && value == "0"));
    (told["request"].clone(), told["sha256"].clone(), told["bytes"].clone(), fields)
}

#[test]
fn odd_answers_are_the_same() {
    if !can_run(&[ROOT, CURL, PYTHON]) {
        return;
    }
    let mut pair = Pair::direct(&["orders"]);
    let folder = pair.folder("answers");
    let _app = pair.start_app("http_app.py", 8080);
    let paths = ["chunked", "until-close", "none", "known", "cookies", "odd"];
    let ask = |pod: &Pod, path: &str| {
        let mut answer = curl(pod, &folder, &[&format!("http://orders:8080/{path}")]);
        // the trailer of `chunked` comes in its own test
        answer.headers.retain(|(name, _)| name != "x-checksum");
        answer
    };
    let direct = paths.map(|path| ask(&pair.client, path));
    assert!(direct[5].headers.iter().any(|(name, value)| name == "x-latin" && value == "caf\u{e9}"));
    pair.weave(&[("orders", 8080)]);
    for (path, direct) in paths.iter().zip(direct) {
        assert_eq!(ask(&pair.client, path), direct, "{path}");
    }
    pair.assert_secured();
}

#[test]
fn what_an_answer_may_not_have_is_mended_or_refused() {
    if !can_run(&[ROOT, CURL, PYTHON]) {
        return;
    }
    let mut pair = Pair::direct(&["orders"]);
    let folder = pair.folder("answers");
    let _app = pair.start_app("http_app.py", 8080);
    pair.weave(&[("orders", 8080)]);
    let ask = |path: &str| curl(&pair.client, &folder, &[&format!("http://orders:8080/{path}")]);
    let spaced = ask("spaced");
    assert!(spaced.outcome.starts_with("200 "), "{spaced:?}");
    let field =
        |name: &str| spaced.headers.iter().find(|(other, _)| other == name).map(|(_, value)| value.as_str());
    assert_eq!(
        (field("x-spaced"), field("x-folded"), field("content-length")),
        (Some("yes"), Some("one two"), Some("2"))
    );
    for path in ["coded", "coded-until-close"] {
        let refused = ask(path);
        assert!(refused.outcome.starts_with("502 "), "{path}: {refused:?}");
        pair.to.as_ref().unwrap().wait_for_failure("bad_response", &["Transfer-Encoding"]);
    }
}

#[test]
fn an_answer_that_comes_before_the_body_was_read_is_passed_on() {
    if !can_run(&[ROOT, CURL, PYTHON]) {
        return;
    }
    let mut pair = Pair::direct(&["orders"]);
    let folder = pair.folder("answers");
    let upload = folder.join("upload");
    std::fs::write(&upload, vec![7; 30_000_000]).unwrap();
    let _app = pair.start_app("http_app.py", 8080);
    pair.weave(&[("orders", 8080)]);
    let upload = format!("@{}", upload.display());
    for coding in ["X-None: 1", "Transfer-Encoding: chunked"] {
        for _ in 0..10 {
            let full = [
                "-X",
                "POST",
                "-H",
                "Expect:",
                "-H",
                coding,
                "--data-binary",
                &upload,
                "http://orders:8080/full",
            ];
            let answer = curl(&pair.client, &folder, &full);
            assert!(answer.outcome.starts_with("413 "), "{coding}: {answer:?}");
            assert_eq!(
                std::fs::read(folder.join("body")).unwrap(),
                b"full\n".repeat(4000),
                "{coding}: {answer:?}"
            );
        }
    }
    for _ in 0..3 {
        assert_eq!(sends_first(&pair.client), "413 True\n");
    }
    let sides = [pair.from.as_ref().unwrap(), pair.to.as_ref().unwrap()];
    for line in sides.iter().flat_map(|sidecar| sidecar.access_log()) {
        assert!(line["path"] != "/full" || line["failure"].is_null() && line["status"] == 413, "{line}");
    }
}

/// What a client got that sends all of its request before it reads.
fn sends_first(pod: &Pod) -> String {
    const PROGRAM: &str = "import http.client\n\
        connection = http.client.HTTPConnection('orders', 8080, timeout=15)\n\
        connection.request('POST', '/full', b'x' * 30_000_000)\n\
        answer = connection.getresponse()\n\
        print(answer.status, len(answer.read()) > 0)";
    let mut client = pod.command("python3");
    client.args(["-c", PROGRAM]);
    output_of(client)
}

#[test]
fn a_client_that_reads_only_when_all_is_sent_gets_an_early_answer() {
    if !can_run(&[ROOT, NGINX, PYTHON]) {
        return;
    }
    let mut pair = Pair::direct(&["orders"]);
    let _nginx = pair.start_nginx("server { listen 8080; client_max_body_size 1k; }", 8080);
    assert_eq!(sends_first(&pair.client), "413 True\n");
    pair.weave(&[("orders", 8080)]);
    for _ in 0..5 {
        assert_eq!(sends_first(&pair.client), "413 True\n");
    }
    pair.assert_secured();
}

#[test]
fn an_answer_with_trailers_is_complete_and_its_connection_is_used_again() {
    if !can_run(&[ROOT, CURL, PYTHON]) {
        return;
    }
    let mut pair = Pair::direct(&["orders"]);
    let folder = pair.folder("answers");
    let app = pair.start_app("http_app.py", 8080);
    pair.weave(&[("orders", 8080)]);
    let stranger = pair.mesh.network.pod("stranger");
    let url = format!("http://{}:8080/chunked", pair.server.ipv4());
    // Read by a server of HTTP/2 for the peer, and by one of HTTP/1 for the stranger.
    for _ in 0..3 {
        for caller in [&pair.client, &stranger] {
            let answer = curl(caller, &folder, &["-H", "TE: trailers", &url]);
            assert!(answer.outcome.starts_with("200 "), "{answer:?}");
        }
    }
    assert_eq!(app.log().matches("accepted").count(), 1, "{}", app.log());
    let sides = [pair.from.as_ref().unwrap(), pair.to.as_ref().unwrap()];
    let lines: Vec<_> = sides.iter().flat_map(|sidecar| sidecar.access_log()).collect();
    assert_eq!(lines.len(), 9, "{lines:?}");
    for line in lines {
        assert!(line["path"] == "/chunked" && line["failure"].is_null(), "{line}");
    }
}

#[test]
fn an_answer_that_leaves_http_may_speak_of_a_body() {
    if !can_run(&[ROOT, PYTHON]) {
        return;
    }
    let mut pair = Pair::direct(&["orders"]);
    let _app = pair.start_app("http_app.py", 8080);
    pair.weave(&[("orders", 8080)]);
    for which in ["length", "coding"] {
        let connect = format!(r"CONNECT {which}:80 HTTP/1.1\r\nHost: {which}:80\r\n\r\n");
        let upgrade = format!(
            r"GET /{which} HTTP/1.1\r\nHost: orders\r\nConnection: Upgrade\r\nUpgrade: shout\r\n\r\n"
        );
        for (request, status) in [(&connect, "200"), (&upgrade, "101")] {
            let told =
                say(&pair.client, "orders", 8080, &["--half-close", request, &format!("?{status}"), "shout"]);
            assert!(told.ends_with("\r\n\r\nSHOUTBYE"), "{request}: {told}");
            let head = told.to_lowercase();
            assert!(!head.contains("content-length") && !head.contains("transfer-encoding"), "{told}");
        }
    }
}

#[test]
fn pipelining_trailers_connect_and_upgrade() {
    if !can_run(&[ROOT, PYTHON]) {
        return;
    }
    let mut pair = Pair::direct(&["orders"]);
    let _app = pair.start_app("http_app.py", 8080);
    let direct = hand_written(&pair.client);
    pair.weave(&[("orders", 8080)]);
    let meshed = hand_written(&pair.client);
    for ((name, direct), (_, meshed)) in direct.iter().zip(&meshed) {
        assert_eq!(meshed, direct, "{name}");
    }
    pair.assert_secured();
}

#[test]
fn work_stops_when_a_caller_is_gone_but_not_when_it_has_only_shut_down_its_side() {
    if !can_run(&[ROOT, PYTHON]) {
        return;
    }
    let mut pair = Pair::direct(&["orders"]);
    let mut app = pair.start_app("http_app.py", 8080);
    pair.weave(&[("orders", 8080)]);
    let caller = |then: &str| {
        let program = format!(
            "import socket, time\nconnection = socket.create_connection(('orders', 8080))\n\
             connection.sendall(b'GET /waits HTTP/1.1\\r\\nHost: orders\\r\\n\\r\\n')\n{then}\ntime.sleep(60)"
        );
        pair.client.start("python3", &["-c", &program])
    };
    let mut waits = caller("connection.shutdown(socket.SHUT_WR)\nprint(connection.recv(7), flush=True)");
    // What every answer begins with: the sidecar has seen the end and asks whether somebody is there.
    waits.wait_for_line("b'HTTP/1.'");
    let goes = caller("");
    until("both calls are at the app", || app.log().matches("waits").count() == 2);
    assert!(!app.log().contains("gone"));
    drop(goes);
    app.wait_for_line("the caller is gone");
    assert_eq!(app.log().matches("gone").count(), 1);
    assert!(!waits.has_ended());
    pair.from.as_ref().unwrap().wait_for_failure("client_gone", &[]);
}

/// Each with what was answered, made comparable.
fn hand_written(pod: &Pod) -> Vec<(&'static str, Vec<String>)> {
    let ask = |words: &[&str]| say(pod, "orders", 8080, words);
    let pipelined = ask(&[
        r"GET /1 HTTP/1.1\r\nHost: orders\r\n\r\nPOST /2 HTTP/1.1\r\nHost: orders\r\nContent-Length: 3\r\n\r\nabcGET /known HTTP/1.1\r\nHost: orders\r\n\r\nHEAD /4 HTTP/1.1\r\nHost: orders\r\nConnection: close\r\n\r\n",
    ]);
    let trailers = ask(&[
        r"POST /trailers HTTP/1.1\r\nHost: orders\r\nTE: trailers\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\nConnection: close\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 7\r\n\r\n",
    ]);
    let answered_trailers =
        ask(&[r"GET /chunked HTTP/1.1\r\nHost: orders\r\nTE: trailers\r\nConnection: TE, close\r\n\r\n"]);
    let old = ask(&[r"GET /old HTTP/1.0\r\n\r\n"]);
    let connect = ask(&[
        "--half-close",
        r"CONNECT inside:80 HTTP/1.1\r\nHost: inside:80\r\n\r\n",
        "?200",
        r"shout ",
        "?SHOUT",
        "more",
    ]);
    let upgrade = ask(&[
        "--half-close",
        r"GET /up HTTP/1.1\r\nHost: orders\r\nConnection: Upgrade\r\nUpgrade: shout\r\n\r\nat once ",
        "?AT ONCE",
        "more",
    ]);
    let half_closed = [
        r"GET /later HTTP/1.1\r\nHost: orders\r\n\r\n",
        r"GET /later HTTP/1.0\r\nHost: orders\r\n\r\n",
        r"GET /later HTTP/1.1\r\nHost: orders\r\n\r\nGET /later HTTP/1.1\r\nHost: orders\r\n\r\n",
        r"POST /later HTTP/1.1\r\nHost: orders\r\nContent-Length: 3\r\n\r\nabc",
        r"GET /half-closes HTTP/1.1\r\nHost: orders\r\n\r\n",
        r"GET /chunked HTTP/1.1\r\nHost: orders\r\n\r\n",
    ];
    let half_closed = half_closed.map(|request| answers(&ask(&["--half-close", request])).concat());
    let server_half_closes =
        ask(&[r"GET /half-closes HTTP/1.1\r\nHost: orders\r\nConnection: close\r\n\r\n"]);
    vec![
        ("half-closed", half_closed.to_vec()),
        ("the server half-closes", answers(&server_half_closes)),
        ("pipelined", answers(&pipelined)),
        ("trailers of a request", told_trailers(&trailers)),
        (
            "trailers of an answer",
            vec![answered_trailers.lines().filter(|line| line.to_lowercase() == "x-checksum: 42").collect()],
        ),
        ("HTTP/1.0 without a host", answers(&old)),
        ("CONNECT", after_head(&connect)),
        ("Upgrade", after_head(&upgrade)),
    ]
}

/// Status and path or header of each answer.
fn answers(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for line in text.split("\r\n") {
        if let Some((_, status)) = line.split_once("HTTP/1.") {
            // the version of a status line is the server's own
            found.push(status.split(' ').nth(1).unwrap_or_default().to_owned());
        }
        if line.starts_with("{") {
            let told: Value = serde_json::Deserializer::from_str(line).into_iter().next().unwrap().unwrap();
            found.push(format!("{} {}", told["request"][1], told["sha256"]));
        }
    }
    found
}

fn told_trailers(text: &str) -> Vec<String> {
    let body = text.split("\r\n\r\n").nth(1).unwrap_or_default();
    let told: Value = serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {text}"));
    vec![told["trailers"].to_string().to_lowercase(), told["sha256"].to_string()]
}

/// The status and what came after the head.
fn after_head(text: &str) -> Vec<String> {
    let (head, rest) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no head in {text:?}"));
    let status = head.split(' ').nth(1).unwrap_or_default().to_owned();
    vec![status, format!("{:?}", headers(head.as_bytes())), rest.to_owned()]
}
