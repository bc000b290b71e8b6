//! The failure that should not be: a panic of ours. No input is known that causes one, so a panic is put into the
//! task of a real connection, under the accept loop that the sidecar runs.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use weft_sidecar::{
    config::AccessLogMode,
    drain,
    model::Failure,
    serve,
    telemetry::{AccessLog, AccessLogTarget, Direction, Metrics, Telemetry, TraceSettings},
};

use super::Test;

pub const A_BUG: Test = ("a_bug_ends_its_connection_and_no_other", &[Failure::Internal]);

#[tokio::test]
async fn a_bug_ends_its_connection_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("access.log");
    let metrics = Arc::new(Metrics::new());
    let target = AccessLogTarget::File(file.clone());
    let log = AccessLog::open(AccessLogMode::Failures, &target, &metrics).unwrap();
    let (telemetry, _) = Telemetry::new(&TraceSettings::read(|_| None, "web").0, log, metrics.clone());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (_drain, draining) = drain::Drain::new();
    let of_connections = telemetry.clone();
    let handle = move |mut stream: TcpStream, client: SocketAddr| {
        let record = of_connections.connection(Direction::Inbound, client);
        async move {
            let word = stream.read_u8().await.unwrap_or_default();
            assert_ne!(word, b'!', "a bug");
            drop(record);
        }
    };
    tokio::spawn(serve::accept(listener, Arc::new(Semaphore::new(9)), draining, |_| {}, handle));
    for word in [b"!", b"."] {
        let mut stream = TcpStream::connect(address).await.unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut stream, word).await.unwrap();
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
    }
    telemetry.flush(Duration::from_secs(5)).await;
    let log = std::fs::read_to_string(file).unwrap();
    assert_eq!(log.lines().count(), 1, "{log}");
    let label = Failure::Internal.label();
    assert!(log.contains(&format!("\"failure\":\"{label}\"")), "{log}");
    let counted = format!("weft_connection_failures_total{{direction=\"inbound\",failure=\"{label}\"}} 1");
    assert!(metrics.expose(false).contains(&counted), "{}", metrics.expose(false));
}
