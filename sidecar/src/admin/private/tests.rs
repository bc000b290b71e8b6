use std::sync::atomic::{AtomicUsize, Ordering};

use hyper::Method;
use serde_json::json;

use super::super::client::ask;
use super::*;
use crate::telemetry::silent_log;

#[tokio::test]
async fn the_command_line_reads_and_turns_a_running_sidecar() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("admin.sock");
    let listener = listen_private(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let drains = Arc::new(AtomicUsize::new(0));
    let counter = drains.clone();
    let config: View = Arc::new(|| json!({ "service": "orders" }));
    let endpoints: View = Arc::new(|| json!([]));
    let (_log, log) = silent_log("info");
    let drain: Action = Arc::new(move || {
        counter.fetch_add(1, Ordering::SeqCst);
    });
    let views = BTreeMap::from([("config", config), ("endpoints", endpoints)]);
    let leave = Leave::default();
    tokio::spawn(serve_private(listener, Private { views, log, drain, leave: leave.clone() }));

    let get = async |name| ask(&path, Method::GET, name, None).await;
    assert_eq!(get("/config").await.unwrap(), json!({ "service": "orders" }));
    assert_eq!(get("/endpoints").await.unwrap(), json!([]));
    assert_eq!(get("/log").await.unwrap(), json!({ "filter": "info" }));
    let put = async |body: Value| ask(&path, Method::PUT, "/log", Some(&body)).await;
    assert_eq!(put(json!({ "filter": "warn" })).await.unwrap(), json!({ "filter": "warn" }));
    for wrong in [json!({ "filter": "x=loud" }), json!({ "level": "debug" }), json!(7)] {
        let reason = format!("{:#}", put(wrong.clone()).await.unwrap_err());
        assert!(reason.contains("expected"), "{wrong}: {reason}");
    }
    let long = put(json!({ "filter": "x".repeat(BODY_BYTES) })).await.unwrap_err();
    assert!(format!("{long:#}").contains("limit"), "{long:#}");
    assert_eq!(get("/log").await.unwrap(), json!({ "filter": "warn" }));
    let reason = format!("{:#}", get("/secrets").await.unwrap_err());
    assert!(reason.contains("/config, /endpoints, /log, /drain and /leave"), "{reason}");
    assert!(get("/drain").await.is_err());
    assert_eq!(drains.load(Ordering::SeqCst), 0);
    assert!(ask(&path, Method::POST, "/drain", None).await.is_ok());
    assert_eq!(drains.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_dead_socket_is_replaced_and_a_living_one_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("admin.sock");
    let first = listen_private(&path).unwrap();
    let error = listen_private(&path).unwrap_err();
    assert!(error.to_string().contains("another sidecar"), "{error}");
    drop(first);
    listen_private(&path).unwrap();
    let file = folder.path().join("precious");
    fs::write(&file, "data").unwrap();
    let error = listen_private(&file).unwrap_err();
    assert!(error.to_string().contains("precious"), "{error}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "data");
    let long = folder.path().join("x".repeat(200));
    assert!(listen_private(&long).unwrap_err().to_string().contains("xxx"));
}

#[tokio::test]
async fn without_a_sidecar_the_error_says_what_to_check() {
    let folder = tempfile::tempdir().unwrap();
    let error = ask(&folder.path().join("none.sock"), Method::GET, "/config", None).await.unwrap_err();
    assert!(error.to_string().contains("none.sock; is it running"), "{error}");
}

#[tokio::test]
async fn leaving_is_answered_when_it_is_done_and_twice_is_as_once() {
    let leave = Leave::default();
    let asking = tokio::spawn({
        let leave = leave.clone();
        async move { leave.ask().await }
    });
    leave.asked().await;
    assert!(!asking.is_finished());
    leave.done();
    asking.await.unwrap();
    leave.ask().await;
    // Nobody has to act on it again.
    let again = tokio::time::timeout(std::time::Duration::from_millis(50), leave.asked()).await;
    assert!(again.is_err());
}
