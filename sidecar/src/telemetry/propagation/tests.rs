use hyper::http::{HeaderMap, HeaderName, HeaderValue};

use super::super::trace::{Formats, Incoming, Parent, Sampler, TraceContext};
use super::Propagators;

const TRACE: u128 = 0x0af7651916cd43dd8448eb211c80319c;
const SPAN: u64 = 0xb7ad6b7169203331;
const W3C: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

fn headers(lines: &[(&str, &str)]) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in lines {
        let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
        map.append(name, HeaderValue::from_str(value).unwrap());
    }
    map
}

fn extract(lines: &[(&str, &str)]) -> Incoming {
    Propagators::DEFAULT.extract(&headers(lines))
}

fn said(trace_id: u128, decision: Option<bool>, debug: bool, formats: Formats) -> Incoming {
    let undecided = if decision.is_none() { formats } else { Formats::NONE };
    Incoming { parent: Some(Parent { trace_id, span_id: SPAN }), decision, debug, formats, undecided }
}

#[test]
fn each_format_is_read() {
    let (on, off) = (Some(true), Some(false));
    let low = TRACE as u64 as u128;
    let (w3c, b3, multi, jaeger) = (Formats::W3C, Formats::B3_SINGLE, Formats::B3_MULTI, Formats::JAEGER);
    let full = "0af7651916cd43dd8448eb211c80319c";
    let table: &[(&[(&str, &str)], Incoming)] = &[
        (&[("traceparent", W3C)], said(TRACE, on, false, w3c)),
        (&[("traceparent", &W3C.replace("-01", "-00"))], said(TRACE, off, false, w3c)),
        (&[("traceparent", &W3C.replace("-01", "-03"))], said(TRACE, on, false, w3c)),
        (&[("traceparent", &format!("cc{}-later", &W3C[2..]))], said(TRACE, on, false, w3c)),
        (&[("b3", &format!("{full}-b7ad6b7169203331"))], said(TRACE, None, false, b3)),
        (&[("b3", &format!("{full}-b7ad6b7169203331-1"))], said(TRACE, on, false, b3)),
        (&[("b3", &format!("{full}-b7ad6b7169203331-0-05e3ac9a4f6e3b90"))], said(TRACE, off, false, b3)),
        (&[("b3", "8448eb211c80319c-b7ad6b7169203331-d")], said(low, on, true, b3)),
        (&[("b3", "0")], Incoming { decision: off, formats: b3, ..Incoming::default() }),
        (&[("b3", "d")], Incoming { decision: on, debug: true, formats: b3, ..Incoming::default() }),
        (
            &[("X-B3-TraceId", full), ("X-B3-SpanId", "b7ad6b7169203331"), ("X-B3-Sampled", "1")],
            said(TRACE, on, false, multi),
        ),
        (
            &[("x-b3-traceid", "8448eb211c80319c"), ("x-b3-spanid", "b7ad6b7169203331"), ("x-b3-flags", "1")],
            said(low, on, true, multi),
        ),
        (&[("x-b3-sampled", "0")], Incoming { decision: off, formats: multi, ..Incoming::default() }),
        (&[("uber-trace-id", &format!("{full}:b7ad6b7169203331:0:1"))], said(TRACE, on, false, jaeger)),
        (
            &[("uber-trace-id", &format!("{full}%3Ab7ad6b7169203331%3A0%3A0"))],
            said(TRACE, off, false, jaeger),
        ),
        (
            &[("uber-trace-id", &format!("{}:b7ad6b7169203331:0:3", &full[1..]))],
            said(TRACE, on, true, jaeger),
        ),
    ];
    for (lines, expected) in table {
        assert_eq!(extract(lines), *expected, "{lines:?}");
    }
}

#[test]
fn what_is_malformed_counts_as_absent_and_is_not_passed_on() {
    let zeros = "00000000000000000000000000000000";
    let table: &[(&str, &str)] = &[
        ("traceparent", ""),
        ("traceparent", "00"),
        ("traceparent", &W3C.to_uppercase()),
        ("traceparent", &W3C[..54]),
        ("traceparent", &format!("{W3C}-extra")),
        ("traceparent", &format!("ff{}", &W3C[2..])),
        ("traceparent", &format!("cc{}x", &W3C[2..])),
        ("traceparent", &W3C.replace("0af7651916cd43dd8448eb211c80319c", zeros)),
        ("traceparent", &W3C.replace("b7ad6b7169203331", &zeros[..16])),
        ("traceparent", &W3C.replace('-', "_")),
        ("traceparent", &format!("00-+{}", &W3C[4..])),
        ("b3", ""),
        ("b3", "2"),
        ("b3", "0af7651916cd43dd8448eb211c80319c"),
        ("b3", "0af7651916cd43dd8448eb211c80319c-b7ad6b71692033"),
        ("b3", "0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-x"),
        ("b3", "0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-1-05e3ac9a4f6e3b90-1"),
        ("b3", "0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-1-zz"),
        ("x-b3-traceid", "8448eb211c80319c"),
        ("x-b3-traceid", "xyz"),
        ("x-b3-spanid", "b7ad6b7169203331"),
        ("x-b3-sampled", "maybe"),
        ("uber-trace-id", "1:2:3"),
        ("uber-trace-id", "0:2:0:1"),
        ("uber-trace-id", "1:2:0:1:1"),
        ("uber-trace-id", "1::0:1"),
        ("uber-trace-id", "+1:2:0:1"),
        ("uber-trace-id", &format!("1{}:2:0:1", zeros)),
    ];
    for (name, value) in table {
        assert_eq!(extract(&[(name, value)]), Incoming::default(), "{name}: {value}");
        let mut passed_on = headers(&[(name, value), ("tracestate", "a=1")]);
        let context = begin(&extract(&[(name, value)]), true);
        Propagators::DEFAULT.inject(&context, &mut passed_on);
        assert_eq!(passed_on.len(), 1, "{name}: {value} => {passed_on:?}");
        let parent = Propagators::DEFAULT.extract(&passed_on).parent.unwrap();
        assert_eq!((parent.trace_id, parent.span_id), (context.trace_id, context.span_id));
    }
    assert_eq!(extract(&[("traceparent", W3C), ("traceparent", W3C)]), Incoming::default());
}

fn begin(incoming: &Incoming, sampled: bool) -> TraceContext {
    let sampler = Sampler { parent_based: false, ratio: if sampled { 1.0 } else { 0.0 } };
    TraceContext::begin(incoming, &sampler, &mut fastrand::Rng::with_seed(11))
}

#[test]
fn the_first_format_wins_and_the_others_follow_it() {
    let jaeger = ("uber-trace-id", "5:6:0:1");
    let multi = [("x-b3-traceid", "0000000000000003"), ("x-b3-spanid", "0000000000000004")];
    let single = ("b3", "0000000000000001-0000000000000002-1");
    let w3c = ("traceparent", W3C);
    let winner = |lines: &[(&str, &str)]| extract(lines).parent.unwrap().trace_id;
    assert_eq!(winner(&[jaeger, multi[0], multi[1], single, w3c]), TRACE);
    assert_eq!(winner(&[jaeger, multi[0], multi[1], single]), 1);
    assert_eq!(winner(&[jaeger, multi[0], multi[1]]), 3);
    assert_eq!(winner(&[jaeger, ("b3", "0")]), 5, "ids win over a decision without ids");

    let mut all =
        headers(&[jaeger, multi[0], multi[1], single, w3c, ("tracestate", "a=1"), ("baggage", "k=v")]);
    let context = begin(&Propagators::DEFAULT.extract(&all), true);
    Propagators::DEFAULT.inject(&context, &mut all);
    for format in [Formats::W3C, Formats::B3_SINGLE, Formats::B3_MULTI, Formats::JAEGER] {
        let only = Propagators { read: format, always: Formats::NONE, ..Propagators::DEFAULT };
        let read = only.extract(&all);
        assert_eq!(read.parent, Some(Parent { trace_id: TRACE, span_id: context.span_id }), "{format:?}");
        assert_eq!(read.decision, Some(true), "{format:?}");
    }
    assert_eq!(all["x-b3-parentspanid"], "b7ad6b7169203331");
    assert_eq!(all["tracestate"], "a=1");
    assert_eq!(all["baggage"], "k=v");
}

#[test]
fn what_is_written_is_exact() {
    let short = TraceContext {
        trace_id: 0xabc,
        span_id: 0xdef,
        parent_id: 0,
        parent_is_remote: false,
        sampled: true,
        debug: true,
        decided: true,
        formats: Formats::ALL,
        undecided: Formats::NONE,
    };
    let mut map = HeaderMap::new();
    Propagators::DEFAULT.inject(&short, &mut map);
    assert_eq!(map["traceparent"], "00-00000000000000000000000000000abc-0000000000000def-01");
    assert_eq!(map["b3"], "0000000000000abc-0000000000000def-d");
    assert_eq!(map["x-b3-traceid"], "0000000000000abc");
    assert_eq!(map["x-b3-flags"], "1");
    assert!(!map.contains_key("x-b3-sampled") && !map.contains_key("x-b3-parentspanid"));
    assert_eq!(map["uber-trace-id"], "0000000000000abc:0000000000000def:0:3");

    let unsampled = TraceContext { sampled: false, debug: false, trace_id: TRACE, ..short };
    Propagators::DEFAULT.inject(&unsampled, &mut map);
    assert_eq!(map["traceparent"], "00-0af7651916cd43dd8448eb211c80319c-0000000000000def-00");
    assert_eq!(map["b3"], "0af7651916cd43dd8448eb211c80319c-0000000000000def-0");
    assert_eq!(
        (&map["x-b3-sampled"], map.contains_key("x-b3-flags")),
        (&HeaderValue::from_static("0"), false)
    );
    assert_eq!(map["uber-trace-id"], "0af7651916cd43dd8448eb211c80319c:0000000000000def:0:0");
}

/// What the next one gets of these headers: (name, value) of those that have to do with tracing, sorted. `SPAN` stands
/// for our span.
fn next_hop(propagators: &Propagators, lines: &[(&str, &str)], sampler: Sampler) -> Vec<(String, String)> {
    let mut map = headers(lines);
    let incoming = propagators.extract(&map);
    let context = TraceContext::begin(&incoming, &sampler, &mut fastrand::Rng::with_seed(7));
    propagators.inject(&context, &mut map);
    let shown = |value: &HeaderValue| {
        value.to_str().unwrap().replace(&format!("{:016x}", context.span_id), "SPAN").replace(
            &format!("{:032x}", context.trace_id),
            if incoming.parent.is_some() { "TRACE" } else { "NEW" },
        )
    };
    let mut seen: Vec<_> = map.iter().map(|(name, value)| (name.to_string(), shown(value))).collect();
    seen.sort();
    seen
}

#[test]
fn a_negative_decision_is_passed_on_only_where_the_caller_made_one_or_the_setting_says_so() {
    let (never, always) =
        (Sampler { parent_based: true, ratio: 0.0 }, Sampler { parent_based: true, ratio: 1.0 });
    let told = Propagators { unsampled: true, ..Propagators::DEFAULT };
    let full = "0af7651916cd43dd8448eb211c80319c";
    let open = format!("{full}-b7ad6b7169203331");
    let multi = [("x-b3-traceid", full), ("x-b3-spanid", "b7ad6b7169203331")];
    let no = W3C.replace("-01", "-00");
    type Lines<'a> = &'a [(&'a str, &'a str)];
    let table: &[(&Propagators, Sampler, Lines, Lines)] = &[
        (&Propagators::DEFAULT, never, &[], &[]),
        (&Propagators::DEFAULT, never, &[("baggage", "a=1")], &[("baggage", "a=1")]),
        (&Propagators::DEFAULT, never, &[("traceparent", "broken"), ("tracestate", "a=1")], &[]),
        (&Propagators::DEFAULT, always, &[], &[("traceparent", "00-NEW-SPAN-01")]),
        (&told, never, &[], &[("traceparent", "00-NEW-SPAN-00")]),
        (&Propagators::DEFAULT, never, &[("traceparent", &no)], &[("traceparent", "00-TRACE-SPAN-00")]),
        (
            &Propagators::DEFAULT,
            never,
            &[("x-b3-sampled", "0")],
            &[
                ("traceparent", "00-NEW-SPAN-00"),
                ("x-b3-sampled", "0"),
                ("x-b3-spanid", "SPAN"),
                ("x-b3-traceid", "NEW"),
            ],
        ),
        // Without a decision B3 stays without one, whatever we do ourselves.
        (&Propagators::DEFAULT, never, &[("b3", &open)], &[("b3", "TRACE-SPAN")]),
        (
            &Propagators::DEFAULT,
            always,
            &[("b3", &open)],
            &[("b3", "TRACE-SPAN"), ("traceparent", "00-TRACE-SPAN-01")],
        ),
        (
            &Propagators::DEFAULT,
            never,
            &multi,
            &[("x-b3-parentspanid", "b7ad6b7169203331"), ("x-b3-spanid", "SPAN"), ("x-b3-traceid", "TRACE")],
        ),
    ];
    for (propagators, sampler, came, expected) in table {
        let expected: Vec<_> =
            expected.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        assert_eq!(next_hop(propagators, came, *sampler), expected, "{propagators:?} {sampler:?} {came:?}");
    }
}

#[test]
fn what_one_format_says_and_another_cannot_survives_any_number_of_hops() {
    let full = "0af7651916cd43dd8448eb211c80319c";
    let (debug, open) = (format!("{full}-b7ad6b7169203331-d"), format!("{full}-b7ad6b7169203331"));
    let jaeger = format!("{full}:b7ad6b7169203331:0:3");
    let multi = [("x-b3-traceid", full), ("x-b3-spanid", "b7ad6b7169203331"), ("x-b3-flags", "1")];
    type Kept = fn(&HeaderMap) -> bool;
    let table: [(&[(&str, &str)], Kept); 4] = [
        (&[("b3", &debug)], |map| map["b3"].to_str().unwrap().ends_with("-d")),
        (&multi, |map| map["x-b3-flags"] == "1" && !map.contains_key("x-b3-sampled")),
        (&[("uber-trace-id", &jaeger)], |map| map["uber-trace-id"].to_str().unwrap().ends_with(":3")),
        (&[("b3", &open)], |map| map["b3"].to_str().unwrap().matches('-').count() == 1),
    ];
    for (came, kept) in table {
        let mut map = headers(came);
        for hop in 1..=4 {
            let context = begin(&Propagators::DEFAULT.extract(&map), true);
            Propagators::DEFAULT.inject(&context, &mut map);
            assert!(kept(&map), "{came:?} after {hop} hops: {map:?}");
            // `traceparent` is written from the first hop on, and is read first.
            assert!(map["traceparent"].to_str().unwrap().ends_with("-01"), "{came:?}");
        }
    }
    // Of another trace nothing is taken over.
    let other = extract(&[("traceparent", W3C), ("b3", "0000000000000001-0000000000000002-d")]);
    assert!(!other.debug, "{other:?}");
}

#[test]
fn only_the_chosen_formats_are_touched() {
    let none = Propagators { read: Formats::NONE, always: Formats::NONE, ..Propagators::DEFAULT };
    let sent = headers(&[("traceparent", "broken"), ("b3", "1"), ("tracestate", "a=1")]);
    let mut passed_on = sent.clone();
    none.inject(&begin(&none.extract(&sent), true), &mut passed_on);
    assert_eq!(passed_on, sent);

    let b3 = Propagators {
        read: Formats::B3_SINGLE.and(Formats::B3_MULTI),
        always: Formats::B3_SINGLE,
        ..Propagators::DEFAULT
    };
    let mut passed_on = headers(&[("traceparent", W3C), ("x-b3-sampled", "1")]);
    let context = begin(&b3.extract(&passed_on), true);
    assert_eq!(context.parent_id, 0);
    b3.inject(&context, &mut passed_on);
    assert_eq!(passed_on["traceparent"], W3C);
    assert!(passed_on.contains_key("b3") && passed_on.contains_key("x-b3-traceid"));
}

#[test]
fn no_text_makes_it_panic() {
    let mut random = fastrand::Rng::with_seed(5);
    let alphabet: Vec<char> = "0123456789abcdefABCDEF-:+%3A dé\u{80}".chars().collect();
    for _ in 0..20_000 {
        let text: String =
            (0..random.usize(0..70)).map(|_| alphabet[random.usize(0..alphabet.len())]).collect();
        let Ok(value) = HeaderValue::from_bytes(text.as_bytes()) else { continue };
        for name in ["traceparent", "b3", "x-b3-traceid", "uber-trace-id"] {
            let mut map = HeaderMap::new();
            map.insert(HeaderName::from_static(name), value.clone());
            let context = begin(&Propagators::DEFAULT.extract(&map), true);
            Propagators::DEFAULT.inject(&context, &mut map);
        }
    }
}
