//! Python's grpcio and websockets: each client prints all it saw as JSON.

use std::process::Command;

use serde_json::Value;
use weft_tests::{Need, Pod, identity, output_of, program, python};

use super::pair::{CURL, Pair, ROOT, app, can_run, start_app};

fn saw(pod: &Pod, client: &str, target: &str) -> Value {
    let mut command = pod.command(python());
    command.args([&app(client), target]);
    serde_json::from_str(&output_of(command)).expect("JSON of a client")
}

#[test]
fn grpcio_sees_the_same() {
    if !can_run(&[ROOT, Need::Python]) {
        return;
    }
    let mut pair = Pair::direct(&["orders"]);
    let _app = start_app(&pair.server, &python().display().to_string(), "grpc_app.py", 50051, &[]);
    let direct = saw(&pair.client, "grpc_client.py", "orders:50051");
    assert_eq!(direct["deadline"], "DEADLINE_EXCEEDED");
    assert_eq!(direct["large"][0], 24 * 1024 * 1024);
    pair.weave(&[("orders", 50051)]);
    let meshed = saw(&pair.client, "grpc_client.py", "orders:50051");
    for (what, direct) in direct.as_object().unwrap() {
        assert_eq!(meshed[what], *direct, "{what}");
    }
    pair.assert_secured();
}

#[test]
fn a_grpc_call_that_the_mesh_fails_gets_a_grpc_status() {
    if !can_run(&[ROOT, Need::Python]) {
        return;
    }
    let mut pair = Pair::direct(&["orders"]);
    pair.weave(&[("orders", 50051)]);
    // nobody listens there
    let mut command = pair.client.command(python());
    command.args(["-c", CALL, "orders:50051"]);
    assert_eq!(output_of(command), "UNAVAILABLE app_refused app_refused\n");
    // The record has what the caller saw.
    let from = pair.from.as_ref().expect("a sidecar");
    let line = from.wait_for_failure("app_refused", &[]);
    assert_eq!((&line["status"], &line["grpc_status"]), (&200.into(), &14.into()), "{line}");
    assert_eq!((&line["peer_identity"], &line["tls_version"]), (&identity("orders").into(), &"1.3".into()));
    let counted = "code=\"200\",failure=\"app_refused\"";
    assert!(from.metrics(&pair.client).contains(counted), "{}", from.metrics(&pair.client));
}

/// What the OpenTelemetry SDK of the app records of 100 GETs without trace headers.
fn recorded_by_the_app(pair: &Pair) -> String {
    let mut calls = pair.client.command("curl");
    calls.args(["-s", "-S", "-f", "-m", "60", "-o", "/dev/null", "http://orders:8080/[1-100]"]);
    output_of(calls);
    let mut ask = pair.client.command("curl");
    ask.args(["-s", "-S", "-f", "-m", "20", "http://orders:8080/recorded"]);
    output_of(ask)
}

#[test]
fn an_opentelemetry_sdk_records_what_it_would_without_the_mesh() {
    if !can_run(&[ROOT, CURL, Need::Python]) {
        return;
    }
    // A collector that nobody runs is enough: what counts is what the sidecars pass on.
    let collector = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318");
    let never = ("OTEL_TRACES_SAMPLER", "parentbased_always_off");
    let exporting = [collector, never];
    let told = ["--propagate-unsampled", "true"];
    for (variables, client, expected) in
        [(&[][..], &[][..], "100 of 100"), (&exporting, &[], "100 of 100"), (&exporting, &told, "0 of 100")]
    {
        let mut pair = Pair::direct(&["orders"]);
        let _app = start_app(&pair.server, &python().display().to_string(), "otel_app.py", 8080, &[]);
        assert_eq!(recorded_by_the_app(&pair), "100 of 100", "without the mesh");
        pair.weave_in(&[("orders", 8080)], client, &[], variables);
        assert_eq!(recorded_by_the_app(&pair), expected, "{variables:?} {client:?}");
        pair.assert_secured();
    }
}

/// One call, and what came of it.
const CALL: &str = "
import grpc, sys
channel = grpc.insecure_channel(sys.argv[1], options=[('grpc.enable_retries', 0)])
try:
    channel.unary_unary('/tests.Echo/Unary')(b'', timeout=15)
except grpc.RpcError as error:
    print(error.code().name, error.details(), dict(error.trailing_metadata() or error.initial_metadata()).get('x-weft-failure'))
";

#[test]
fn a_grpc_status_in_trailers_counts_for_the_breaker() {
    if !can_run(&[ROOT, Need::Python]) {
        return;
    }
    let mut pair = Pair::direct(&["orders"]);
    let _app = start_app(&pair.server, &python().display().to_string(), "grpc_app.py", 50051, &[]);
    pair.weave(&[("orders", 50051)]);
    for (method, status, failures) in [
        ("FailLate", "DATA_LOSS\n", 1),
        ("FailLate", "DATA_LOSS\n", 2),
        ("Endless", "CANCELLED\n", 2),
        ("ServerStream", "OK\n", 0),
        ("FailLate", "DATA_LOSS\n", 1),
        ("Fail", "FAILED_PRECONDITION\n", 0),
    ] {
        let mut command = pair.client.command(python());
        command.args(["-c", STREAM, "orders:50051", method]);
        assert_eq!(output_of(command), status);
        // The only endpoint of a service is never put out, and its failures in a row are shown.
        let mut show = Command::new(program("weft-sidecar"));
        show.args(["show", "endpoints", "--admin-socket"]).arg(pair.from.as_ref().unwrap().socket());
        let shown: Value = serde_json::from_str(&output_of(show)).unwrap();
        assert_eq!(shown["orders"]["endpoints"][0]["failures"], failures, "{method}: {shown}");
    }
}

/// A stream that is read to its end, or cancelled where it has none; and its status.
const STREAM: &str = "
import grpc, sys
channel = grpc.insecure_channel(sys.argv[1], options=[('grpc.enable_retries', 0)])
stream = channel.unary_stream('/tests.Echo/' + sys.argv[2])(b'3', timeout=15)
try:
    for _ in stream:
        if sys.argv[2] == 'Endless':
            stream.cancel()
    print('OK')
except grpc.RpcError as error:
    print(error.code().name)
";

/// A server of gRPC takes PINGs without data more often than every five minutes for an attack.
#[test]
fn a_grpc_stream_may_be_silent() {
    if !can_run(&[ROOT, Need::Python]) {
        return;
    }
    let mut pair = Pair::direct(&["orders"]);
    let _app = start_app(&pair.server, &python().display().to_string(), "grpc_app.py", 50051, &[]);
    pair.weave(&[("orders", 50051)]);
    let mut command = pair.client.command(python());
    command.args(["-c", PAUSE, "orders:50051"]);
    assert_eq!(output_of(command), "[b'before', b'after']\n");
}

/// A stream with 33 seconds of silence: a PING every ten seconds would end it after 30.
const PAUSE: &str = "
import grpc, sys
pieces = grpc.insecure_channel(sys.argv[1]).unary_stream('/tests.Echo/Pause')(b'33', timeout=60)
print(list(pieces))
";

#[test]
fn websockets_see_the_same() {
    if !can_run(&[ROOT, Need::Python]) {
        return;
    }
    let mut pair = Pair::direct(&["orders"]);
    let _app = start_app(&pair.server, &python().display().to_string(), "websocket_app.py", 8080, &[]);
    let talk = |pair: &Pair| saw(&pair.client, "websocket_client.py", "ws://orders:8080/chat/room?who=me");
    let direct = talk(&pair);
    assert_eq!(direct["closed"][0], 4001);
    pair.weave(&[("orders", 8080)]);
    let meshed = talk(&pair);
    for (what, direct) in direct.as_object().unwrap() {
        assert_eq!(meshed[what], *direct, "{what}");
    }
    pair.assert_secured();
}
