use hyper::{HeaderMap, Request, Response, Version, http::uri::Authority};

use super::{
    absolute_scheme, authority, check, check_coding, clean_trailers, frame_for, remove_ours, remove_per_hop,
};
use crate::{
    http::Body,
    model::{Failure, HttpVersion},
};

fn request(version: Version, uri: &str, headers: &[(&str, &str)]) -> Request<Body> {
    asks("GET", version, uri, headers)
}

fn asks(method: &str, version: Version, uri: &str, headers: &[(&str, &str)]) -> Request<Body> {
    let mut builder = Request::builder().method(method).version(version).uri(uri);
    for (name, value) in headers {
        builder = builder.header(*name, *value);
    }
    builder.body(Body::empty()).unwrap()
}

#[test]
fn a_host_that_reads_two_ways_is_refused() {
    type Headers = &'static [(&'static str, &'static str)];
    let cases: [(Version, &str, Headers); 12] = [
        (Version::HTTP_11, "/", &[]),
        (Version::HTTP_11, "/", &[("host", "a"), ("host", "a")]),
        (Version::HTTP_11, "/", &[("host", "a/b")]),
        (Version::HTTP_11, "/", &[("host", "user@a")]),
        (Version::HTTP_11, "/", &[("host", "a b")]),
        (Version::HTTP_11, "/", &[("host", "a:b")]),
        (Version::HTTP_11, "/", &[("host", "a:99999")]),
        (Version::HTTP_11, "/", &[("host", ":80")]),
        (Version::HTTP_11, "http://a:+1/", &[("host", "a")]),
        (Version::HTTP_11, "http://user@a/", &[("host", "a")]),
        (Version::HTTP_2, "http://a/", &[("host", "b")]),
        (Version::HTTP_2, "http://a/", &[("host", "<a>")]),
    ];
    for (version, uri, headers) in cases {
        let refused = authority(&request(version, uri, headers)).unwrap_err();
        assert_eq!(refused.failure, Failure::BadRequest, "{version:?} {uri} {headers:?}");
    }
}

#[test]
fn the_target_wins_over_host_and_old_clients_may_name_none() {
    let read = |version, uri, headers: &[(&str, &str)]| {
        authority(&request(version, uri, headers)).unwrap().map(|found| found.to_string())
    };
    assert_eq!(read(Version::HTTP_11, "/x", &[("host", "orders:80")]), Some("orders:80".into()));
    assert_eq!(read(Version::HTTP_11, "http://a/x", &[("host", "b")]), Some("a".into()));
    assert_eq!(read(Version::HTTP_2, "http://a/x", &[("host", "a")]), Some("a".into()));
    assert_eq!(read(Version::HTTP_10, "/x", &[]), None);
    assert_eq!(read(Version::HTTP_11, "/x", &[("host", "")]), None);
}

#[test]
fn what_belongs_to_one_connection_stays_there() {
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("connection", "keep-alive, X-Secret , close"),
        ("keep-alive", "timeout=5"),
        ("proxy-connection", "x"),
        ("transfer-encoding", "chunked"),
        ("upgrade", "h2c"),
        ("x-secret", "1"),
        ("te", "gzip, trailers"),
        ("x-kept", "1"),
    ] {
        headers.insert(name, value.parse().unwrap());
    }
    remove_per_hop(&mut headers);
    let mut left: Vec<_> =
        headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
    left.sort_unstable();
    assert_eq!(left, [("te", "trailers"), ("x-kept", "1")]);
}

#[test]
fn a_length_beside_chunks_is_not_passed_on() {
    let mut headers = HeaderMap::new();
    headers.append("content-length", "4".parse().unwrap());
    remove_per_hop(&mut headers);
    assert_eq!(headers["content-length"], "4");
    headers.append("transfer-encoding", "chunked".parse().unwrap());
    remove_per_hop(&mut headers);
    assert!(headers.is_empty(), "{headers:?}");
}

#[test]
fn nobody_else_sets_our_headers() {
    let mut headers = HeaderMap::new();
    for name in ["x-weft-deadline", "x-weft-anything", "x-other"] {
        headers.append(name, "1".parse().unwrap());
    }
    remove_ours(&mut headers);
    assert_eq!(headers.keys().map(|name| name.as_str()).collect::<Vec<_>>(), ["x-other"]);
}

#[test]
fn a_request_changes_its_framing_and_says_the_same() {
    let fallback = || Authority::from_static("fallback");
    let mut there = request(Version::HTTP_11, "/a?b=c", &[("host", "orders:8080"), ("cookie", "a=1")]);
    let named = authority(&there).unwrap();
    frame_for(&mut there, HttpVersion::Http2, named, None, fallback).unwrap();
    assert_eq!(there.uri(), "http://orders:8080/a?b=c");
    assert_eq!((there.version(), there.headers().contains_key("host")), (Version::HTTP_2, false));
    there.headers_mut().append("cookie", "b=2".parse().unwrap());

    let named = authority(&there).unwrap();
    frame_for(&mut there, HttpVersion::Http1, named, None, fallback).unwrap();
    assert_eq!((there.uri().to_string().as_str(), there.version()), ("/a?b=c", Version::HTTP_11));
    assert_eq!(there.headers()["host"], "orders:8080");
    assert_eq!(there.headers()["cookie"], "a=1; b=2");
}

#[test]
fn an_old_client_without_a_host_and_options_star_keep_a_form() {
    let mut old = request(Version::HTTP_10, "/x", &[]);
    frame_for(&mut old, HttpVersion::Http2, None, None, || Authority::from_static("10.0.0.1:80")).unwrap();
    assert_eq!(old.uri(), "http://10.0.0.1:80/x");
    let mut star = request(Version::HTTP_11, "*", &[("host", "a")]);
    let named = authority(&star).unwrap();
    frame_for(&mut star, HttpVersion::Http1, named, None, || Authority::from_static("x")).unwrap();
    assert_eq!(star.uri(), "*");
}

#[test]
fn an_absolute_target_stays_absolute_towards_http1() {
    let fallback = || Authority::from_static("fallback");
    for (target, there, on_the_way) in [
        ("http://other/a?b", "http://other/a?b", "http://other/a?b"),
        ("https://other:8443", "https://other:8443/", "http://other:8443/"),
        ("ftp://other/a", "ftp://other/a", "http://other/a"),
    ] {
        let begin = || request(Version::HTTP_11, target, &[("host", "orders")]);
        let absolute = absolute_scheme(&begin());
        let mut direct = begin();
        let named = authority(&direct).unwrap();
        frame_for(&mut direct, HttpVersion::Http1, named.clone(), absolute.clone(), fallback).unwrap();
        assert_eq!((direct.uri().to_string().as_str(), direct.version()), (there, Version::HTTP_11));

        let mut meshed = begin();
        frame_for(&mut meshed, HttpVersion::Http2, named, absolute.clone(), fallback).unwrap();
        assert_eq!(meshed.uri(), on_the_way);
        assert!(absolute_scheme(&meshed).is_none(), "a target of HTTP/2 says nothing");
        let named = authority(&meshed).unwrap();
        frame_for(&mut meshed, HttpVersion::Http1, named, absolute, fallback).unwrap();
        assert_eq!(meshed.uri().to_string(), there);
        assert_eq!(meshed.headers()["host"], meshed.uri().authority().unwrap().as_str());
    }
    assert!(absolute_scheme(&request(Version::HTTP_11, "/a", &[])).is_none());
}

#[test]
fn an_empty_or_odd_host_stays_what_it_is() {
    let fallback = || Authority::from_static("fallback");
    for host in
        [&b""[..], b"a<b>", b"a\"b`c:80", b"caf\xe9", b"caf\xc3\xa9.example:8080", b"{a}|b^c", b"a%20b"]
    {
        let mut there = request(Version::HTTP_11, "/x", &[]);
        there.headers_mut().insert("host", host.try_into().unwrap());
        for version in [HttpVersion::Http2, HttpVersion::Http1] {
            let named = check(&there, 100).unwrap();
            frame_for(&mut there, version, named, None, fallback).unwrap();
            assert_eq!((there.headers()["host"].as_bytes(), there.uri().to_string().as_str()), (host, "/x"));
        }
    }
    for host in ["a<b/c", "<@b", "a<b, c", "a<b:80:80", "a<b:http", "<a:99999", ":<", "a\\<b", "<a b"] {
        let refused = check(&request(Version::HTTP_11, "/", &[("host", host)]), 100).unwrap_err();
        assert!(refused.detail.contains(&format!("{host:?}")), "{refused}");
    }
}

#[test]
fn an_answer_with_a_coding_that_would_be_lost_is_refused() {
    let answer = |codings: &[&str], body: &'static str| {
        let mut answer = Response::new(Body::whole(body));
        for coding in codings {
            answer.headers_mut().append("transfer-encoding", coding.parse().unwrap());
        }
        answer
    };
    let lost: [&[&str]; 6] = [
        &["gzip, chunked"],
        &["gzip", "chunked"],
        &["GZIP"],
        &["chunked, chunked"],
        &["chunked", "chunked"],
        &["chunked, gzip"],
    ];
    for codings in lost {
        let refused = check_coding(&answer(codings, "body")).unwrap_err();
        assert_eq!(refused.failure, Failure::BadResponse, "{codings:?}");
        check_coding(&answer(codings, "")).unwrap();
    }
    let carried: [&[&str]; 4] = [&[], &["chunked"], &["Chunked "], &["identity"]];
    for codings in carried {
        check_coding(&answer(codings, "body")).unwrap();
    }
}

#[test]
fn a_length_or_target_that_reads_two_ways_is_refused() {
    type Headers = &'static [(&'static str, &'static str)];
    let cases: [(&str, &str, Headers); 13] = [
        ("POST", "/", &[("content-length", "5"), ("content-length", "5")]),
        ("POST", "/", &[("content-length", "+5")]),
        ("POST", "/", &[("content-length", "5, 5")]),
        ("POST", "/", &[("content-length", "")]),
        ("POST", "/", &[("content-length", "99999999999999999999")]),
        ("POST", "/", &[("transfer-encoding", "gzip, chunked")]),
        ("POST", "/", &[("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")]),
        ("GET", "orders", &[]),
        ("GET", "*", &[]),
        ("CONNECT", "/", &[]),
        ("CONNECT", "http://a/", &[]),
        ("CONNECT", "a:80", &[("content-length", "0")]),
        ("CONNECT", "a:80", &[("transfer-encoding", "chunked")]),
    ];
    for (method, uri, headers) in cases {
        let mut request = asks(method, Version::HTTP_11, uri, headers);
        request.headers_mut().insert("host", "a".parse().unwrap());
        let refused = check(&request, 100).unwrap_err();
        assert_eq!(refused.failure, Failure::BadRequest, "{method} {uri} {headers:?}");
    }
    let plain: [(&str, &str, Headers); 6] = [
        ("POST", "/", &[("content-length", "5")]),
        ("POST", "/", &[("transfer-encoding", "Chunked")]),
        ("GET", "http://a", &[]),
        ("GET", "/?*", &[]),
        ("OPTIONS", "*", &[]),
        ("CONNECT", "a:80", &[]),
    ];
    for (method, uri, headers) in plain {
        let mut request = asks(method, Version::HTTP_11, uri, headers);
        request.headers_mut().insert("host", "a".parse().unwrap());
        check(&request, 100).unwrap_or_else(|error| panic!("{method} {uri} {headers:?}: {error}"));
        assert_eq!(check(&request, 0).unwrap_err().failure, Failure::HeadersTooLarge);
    }
}

#[test]
fn the_host_of_an_absolute_target_replaces_the_other() {
    let mut there = request(Version::HTTP_11, "http://orders/x", &[("host", "evil")]);
    let named = authority(&there).unwrap();
    frame_for(&mut there, HttpVersion::Http1, named, None, || Authority::from_static("fallback")).unwrap();
    assert_eq!(
        (there.uri().to_string().as_str(), &there.headers()["host"]),
        ("/x", &"orders".parse().unwrap())
    );
}

#[test]
fn a_get_with_a_body_of_unknown_length_keeps_it() {
    let mut there = request(Version::HTTP_2, "http://orders/x", &[]).map(|_| Body::whole("body"));
    let named = authority(&there).unwrap();
    frame_for(&mut there, HttpVersion::Http1, named, None, || Authority::from_static("fallback")).unwrap();
    assert_eq!(there.headers()["transfer-encoding"], "chunked");
}

#[test]
fn trailers_say_nothing_of_framing_host_or_mesh() {
    let mut trailers = HeaderMap::new();
    for name in
        ["content-length", "host", "transfer-encoding", "connection", "x-weft-deadline", "grpc-status"]
    {
        trailers.insert(name, "1".parse().unwrap());
    }
    clean_trailers(&mut trailers);
    assert_eq!(trailers.keys().map(|name| name.as_str()).collect::<Vec<_>>(), ["grpc-status"]);
}

#[test]
fn a_request_line_always_has_a_path() {
    for (uri, expected) in [("http://orders", "/"), ("http://orders#a", "/"), ("http://orders?b=c", "/?b=c")]
    {
        let mut there = request(Version::HTTP_11, uri, &[("host", "orders")]);
        let named = check(&there, 100).unwrap();
        frame_for(&mut there, HttpVersion::Http1, named, None, || Authority::from_static("fallback"))
            .unwrap();
        assert_eq!(there.uri().to_string(), expected, "{uri}");
    }
}
