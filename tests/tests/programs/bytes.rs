//! Opaque TCP: half-close, a client that says nothing, bytes by hash.

use super::pair::{PYTHON, Pair, ROOT, can_run, say};

#[test]
fn a_client_that_shuts_down_its_side_still_reads_the_answer() {
    if !can_run(&[ROOT, PYTHON]) {
        return;
    }
    let mut pair = Pair::direct(&["orders"]);
    let _app = pair.start_app("tcp_app.py", 9000);
    let cases: [&[&str]; 4] = [
        &["--half-close", r"\x00\x01 not HTTP"],
        &["--half-close", r"\xff0123456789abcdef", "*1000000"],
        // one that begins like HTTP/2 and like nothing
        &["--half-close", "PRI"],
        // the client has nothing to say at all
        &["--half-close", ""],
    ];
    let direct = cases.map(|words| say(&pair.client, "orders", 9000, words));
    assert!(direct[1].starts_with("17000000 "), "{direct:?}");
    pair.weave(&[("orders", 9000)]);
    for (words, direct) in cases.iter().zip(&direct) {
        assert_eq!(say(&pair.client, "orders", 9000, words), *direct, "{words:?}");
    }
    pair.assert_secured();
}
