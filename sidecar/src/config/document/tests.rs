use super::*;

fn read(text: &str) -> Vec<String> {
    let mut mistakes = Mistakes::new(Path::new("a.yaml"));
    if let Some(mut root) = parse(text, &mut mistakes) {
        if let Some(item) = root.take("count") {
            item.number(1..=10, &mut mistakes);
        }
        if let Some(item) = root.take("wait") {
            item.duration(Duration::from_millis(1)..=Duration::from_secs(60), &mut mistakes);
        }
        if let Some(item) = root.take("kind") {
            item.word(&["one", "two"], &mut mistakes);
        }
        for item in root.take("places").map(|item| item.list(3, &mut mistakes)).unwrap_or_default() {
            if let Some(mut place) = item.section(&mut mistakes) {
                if let Some(item) = place.need("address", &mut mistakes) {
                    item.parsed::<std::net::SocketAddr>("an address and port", &mut mistakes);
                }
                place.finish(&mut mistakes);
            }
        }
        root.finish(&mut mistakes);
    }
    let found = mistakes.or_else(()).err().unwrap_or_default();
    found.iter().map(Mistake::to_string).collect()
}

#[test]
fn a_good_document_has_no_mistakes() {
    let text = "# about\ncount: 3\nwait: 1s 500ms\nkind: one\nplaces:\n  - address: 10.0.0.1:80\n  - {address: '[::1]:80'}\n";
    assert_eq!(read(text), [""; 0]);
    assert_eq!(read("count:\nplaces: []\n"), [""; 0]);
}

#[test]
fn every_mistake_is_listed_with_its_line_and_what_was_expected() {
    let text = "count: -1\nwait: 2m\nkind: three\ncolour: red\nplaces:\n  - address: nowhere\n    port: 1\n  - {}\n  - 7\n";
    assert_eq!(
        read(text),
        [
            "a.yaml:1: `count` is -1; expected a whole number from 1 to 10",
            "a.yaml:2: `wait` is \"2m\"; expected a duration from 1ms to 1m, for example 1s or 250ms",
            "a.yaml:3: `kind` is \"three\"; expected one, two",
            "a.yaml:4: `colour` is an unknown key; expected count, kind, places, wait",
            "a.yaml:6: `places[0].address` is \"nowhere\"; expected an address and port",
            "a.yaml:7: `places[0].port` is an unknown key; expected address",
            "a.yaml:8: `places[1].address` is missing",
            "a.yaml:9: `places[2]` is 7; expected a section of keys and values",
        ]
    );
}

#[test]
fn scalars_are_what_yaml_says() {
    for (text, expected) in [
        ("count: 1.5", "`count` is 1.5"),
        ("count: '1'", "`count` is \"1\""),
        ("count: true", "`count` is true"),
        ("count: [1, 2]", "`count` is a list of 2"),
        ("count: {a: 1}", "`count` is a section"),
        ("count: 99999999999999999999", "`count` is 100000000000000000000"),
        ("count: 9223372036854775807", "`count` is 9223372036854775807"),
        ("kind: yes", "`kind` is \"yes\""),
        ("kind: \"a\\u0007\\nb\"", "`kind` is \"a\\u{7}\\nb\""),
        ("places: [1, 2, 3, 4]", "expected a list of at most 3"),
        ("- 1", "the document is a list of 1; expected a section"),
        ("7", "the document is 7"),
    ] {
        let found = read(text);
        assert!(found.len() == 1 && found[0].contains(expected), "{text}: {found:?}");
    }
}

#[test]
fn what_is_no_yaml_of_ours_is_refused_with_its_line() {
    let deep = format!("count: {}1{}", "[".repeat(100), "]".repeat(100));
    for (text, line) in [
        ("count: 1\ncount: 2\n", "a.yaml:2:"),
        ("count: 1\n  wait: 1s\n", "a.yaml:"),
        ("count: &a 1\nwait: *a\n", "a.yaml:2:"),
        ("kind: {<<: {a: 1}}\n", "a.yaml:"),
        ("count: 1\n---\ncount: 2\n", "a.yaml:"),
        ("count: \"\n", "a.yaml:"),
        ("", "a.yaml"),
        (&deep, "a.yaml:1:"),
    ] {
        let found = read(text);
        assert!(found.len() == 1 && found[0].starts_with(line), "{text:?}: {found:?}");
        assert!(!found[0].contains('\n'), "{found:?}");
    }
}

#[test]
fn mistakes_are_bounded() {
    let text: String = (0..1_000).map(|number| format!("k{number}: 1\n")).collect();
    assert_eq!(read(&text).len(), MAX_MISTAKES);
}
