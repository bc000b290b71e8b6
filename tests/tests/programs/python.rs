//! Python's grpcio and websockets: each client prints all it saw as JSON.

use serde_json::Value;
use weft_tests::{Need, Pod, output_of, python};

use super::pair::{Pair, ROOT, app, can_run, start_app};

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
    let mut meshed = saw(&pair.client, "grpc_client.py", "orders:50051");
    // a trace is started where there is none
    let told = meshed["unary"][0]["metadata"].as_array_mut().unwrap();
    told.retain(|pair| pair[0] != "traceparent");
    let told = meshed["compressed"]["metadata"].as_array_mut().unwrap();
    told.retain(|pair| pair[0] != "traceparent");
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
