use json_patch::{AddOperation, RemoveOperation, ReplaceOperation, jsonptr::PointerBuf};
use serde_json::json;

use super::*;

fn add(path: &str, value: Value) -> PatchOperation {
    PatchOperation::Add(AddOperation { path: PointerBuf::parse(path).unwrap(), value })
}

fn remove(path: &str) -> PatchOperation {
    PatchOperation::Remove(RemoveOperation { path: PointerBuf::parse(path).unwrap() })
}

fn replace(path: &str, value: Value) -> PatchOperation {
    PatchOperation::Replace(ReplaceOperation { path: PointerBuf::parse(path).unwrap(), value })
}

#[track_caller]
fn check(before: &str, operation: PatchOperation, after: &str) {
    let mut expected: Value = serde_saphyr::from_str(before).unwrap();
    json_patch::patch(&mut expected, std::slice::from_ref(&operation)).unwrap();
    let text = apply(before, &Patch(vec![operation])).unwrap();
    assert_eq!(text, after);
    assert_eq!(serde_saphyr::from_str::<Value>(&text).unwrap(), expected, "{text}");
}

#[test]
fn a_key_goes_to_the_end_of_its_mapping() {
    check(
        "a:\n  b: 1 # one\n\n# about c\nc: 2\n",
        add("/a/d", json!({ "e": [1, { "f": "x y" }] })),
        "a:\n  b: 1 # one\n  d:\n    e:\n    - 1\n    - f: \"x y\"\n\n# about c\nc: 2\n",
    );
    check("a: {b: 1}\n", add("/a/c", json!({ "d": 2 })), "a: {b: 1, \"c\": {\"d\":2}}\n");
    check("a: {}\nb: 1\n", add("/a/c", json!(true)), "a: {\"c\": true}\nb: 1\n");
    check("- a: 1\n- b: 2", add("/1/c", json!("yes")), "- a: 1\n- b: 2\n  c: \"yes\"");
    check("text: |\n  one\n  two\nx: 1\n", add("/z", json!(2)), "text: |\n  one\n  two\nx: 1\nz: 2\n");
    check("x: 1\ntext: |\n  one\n  two\n", add("/z", json!(2)), "x: 1\ntext: |\n  one\n  two\nz: 2\n");
}

#[test]
fn an_item_goes_before_another_and_its_comments_or_to_the_end() {
    check(
        "a:\n  # the first\n  - name: x\n  - name: y\n",
        add("/a/0", json!({ "name": "new", "args": ["--port", "80"] })),
        "a:\n  - args:\n    - \"--port\"\n    - \"80\"\n    name: new\n  # the first\n  - name: x\n  - name: y\n",
    );
    check("a:\n- 1\n- 2\nb: 3\n", add("/a/1", json!(5)), "a:\n- 1\n- 5\n- 2\nb: 3\n");
    check("a:\n- 1\n- 2\nb: 3\n", add("/a/2", json!(5)), "a:\n- 1\n- 2\n- 5\nb: 3\n");
    check("a: [1, 2]\n", add("/a/0", json!(5)), "a: [5, 1, 2]\n");
    check("a: [1, 2]\n", add("/a/2", json!(5)), "a: [1, 2, 5]\n");
    check("a: []\n", add("/a/0", json!(5)), "a: [5]\n");
}

#[test]
fn dashes_that_begin_no_item_are_no_dashes() {
    check("a:\n- &c-1\n  name: x\n", add("/a/0", json!(5)), "a:\n- 5\n- &c-1\n  name: x\n");
    check("a:\n- # b - c\n  name: x\n", add("/a/0", json!(5)), "a:\n- 5\n- # b - c\n  name: x\n");
    check("a:\n- b-c\n- d\n", remove("/a/1"), "a:\n- b-c\n");
}

#[test]
fn empty_lines_that_belong_to_a_text_stay_in_it() {
    check("a:\n  b: |+\n    x\n\n\nc: 1\n", add("/a/d", json!(2)), "a:\n  b: |+\n    x\n\n\n  d: 2\nc: 1\n");
    check("a:\n- |+\n  x\n\n", add("/a/1", json!(2)), "a:\n- |+\n  x\n\n- 2\n");
}

#[test]
fn what_goes_leaves_the_rest_as_it_was() {
    check("a:\n  b: 1\n  c:\n    d: 2\n  e: 3\n", remove("/a/c"), "a:\n  b: 1\n  e: 3\n");
    check("a:\n  b: 1\n  c: 2", remove("/a/c"), "a:\n  b: 1");
    check("- name: x\n  b: 1\n- name: y\n", remove("/0/name"), "- b: 1\n- name: y\n");
    check("a:\n- x: 1\n  y: 2\n- z: 3\n", remove("/a/0"), "a:\n- z: 3\n");
    check("a: {b: 1, c: 2}\n", remove("/a/b"), "a: {c: 2}\n");
    check("a: {b: 1, c: 2}\n", remove("/a/c"), "a: {b: 1}\n");
    check("a: [1]\n", remove("/a/0"), "a: []\n");
    check("a:\n  b:\n    c: 1\n", remove("/a/b/c"), "a:\n  b:\n    {}\n");
}

#[test]
fn a_value_changes_in_its_place() {
    check("a: 1 # one\nb: 2\n", replace("/a", json!("two words")), "a: \"two words\" # one\nb: 2\n");
    check("a:\nb: 2\n", replace("/a", json!({ "c": 1 })), "a:\n  c: 1\nb: 2\n");
    check("a:\n  c:\n    d: 1\nb: 2\n", replace("/a/c", json!({ "e": 1 })), "a:\n  c:\n    e: 1\nb: 2\n");
    check("a: {c: {d: 1}}\n", replace("/a/c", json!({ "e": 1 })), "a: {c: {\"e\":1}}\n");
    check("- a: 1\n- b\n", replace("/1", json!({ "c": 1, "d": 2 })), "- a: 1\n- c: 1\n  d: 2\n");
    check("a: []\nb: 2\n", replace("/a", json!([1, 2])), "a:\n  - 1\n  - 2\nb: 2\n");
}

#[test]
fn an_alias_is_not_written_into() {
    let text = "x: &x\n  a: 1\ny: *x\n";
    let message = apply(text, &Patch(vec![add("/y/b", json!(1))])).unwrap_err();
    assert!(message.contains("/y/b"), "{message}");
}

#[test]
fn text_that_yaml_reads_as_something_else_is_quoted() {
    for text in ["true", "No", "1", "1.5", "", "- a", "a: b", "#", "*x", "on", "null", "10m", "0x10", "1e3"] {
        let line = block(&json!({ "k": text }), 0);
        let back: Value = serde_saphyr::from_str(&line).unwrap();
        assert_eq!(back, json!({ "k": text }), "{line}");
    }
}
