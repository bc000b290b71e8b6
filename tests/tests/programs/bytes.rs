//! Opaque TCP: half-close, a client that says nothing, bytes by hash, and cuts that are seen as cuts.

use weft_tests::until;

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

#[test]
fn a_reset_is_seen_as_a_reset() {
    if !can_run(&[ROOT, PYTHON]) {
        return;
    }
    let mut pair = Pair::direct(&["orders", "nobody"]);
    let app = pair.start_app("tcp_app.py", 9000);
    let seen_by_app = || app.log().matches("was reset").count();
    let server_resets = |pair: &Pair| say(&pair.client, "orders", 9000, &["RESET", r"\x00"]);
    let client_resets = |pair: &Pair| say(&pair.client, "orders", 9000, &["--reset", r"\x00 half of it"]);
    assert!(server_resets(&pair).ends_with("[reset]"));
    client_resets(&pair);
    until("the app has seen the reset", || seen_by_app() == 1);
    pair.weave(&[("orders", 9000), ("nobody", 9001)]);
    assert!(server_resets(&pair).ends_with("[reset]"));
    client_resets(&pair);
    until("the app has seen the reset through the mesh", || seen_by_app() == 2);
    // nobody listens there: the connection stands already, so it is reset instead of refused
    assert_eq!(say(&pair.client, "nobody", 9001, &[r"\x00"]), "[reset]");
    assert_eq!(say(&pair.client, "nobody", 9001, &[]), "[reset]");
    pair.assert_secured();
}

#[test]
fn a_sidecar_that_is_killed_cuts_its_connections() {
    if !can_run(&[ROOT, PYTHON]) {
        return;
    }
    for killed in ["client", "server"] {
        let mut pair = Pair::direct(&["orders"]);
        let app = pair.start_app("tcp_app.py", 9000);
        pair.weave(&[("orders", 9000)]);
        let sidecar = if killed == "client" { &mut pair.from } else { &mut pair.to };
        let sidecar = sidecar.take().unwrap();
        let mut client = pair.client.command("python3");
        client.args([&super::pair::app("say.py"), "orders", "9000", r"\x00 half of it"]);
        let mut client = weft_tests::Process::start("say.py", client);
        until("the app's side of the connection stands", || {
            !pair.server.shell("ss -Htn state established sport = :9000").is_empty()
        });
        drop(sidecar);
        client.wait();
        assert_eq!(client.log(), "[reset]", "{killed}");
        until("the app has seen a cut", || app.log().contains("was reset"));
    }
}
