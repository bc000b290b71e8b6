"""A gRPC service without generated code: messages are bytes.

usage: grpc_app.py PORT
"""

import hashlib
import json
import sys
import threading
from concurrent import futures

import grpc

cancelled = threading.Event()


def unary(request, context):
    """Tells what the call said; answers with metadata at both ends."""
    told = sorted((key, value.hex() if isinstance(value, bytes) else value) for key, value in context.invocation_metadata())
    context.send_initial_metadata((("initial", "first"), ("initial-bin", b"\x00\xff")))
    context.set_trailing_metadata((("trailing", "last"), ("trailing-bin", b"\x01\xfe")))
    return json.dumps({"metadata": told, "sha256": hashlib.sha256(request).hexdigest()}).encode()


def large(request, context):
    return request[::-1]


def server_stream(request, context):
    for number in range(int(request)):
        yield f"{number}".encode() * 100


def client_stream(requests, context):
    return json.dumps([len(request) for request in requests]).encode()


def both_stream(requests, context):
    for request in requests:
        yield request.upper()


def fail(request, context):
    context.set_trailing_metadata((("why-bin", b"\x00\x01"), ("why", "because")))
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, "no: 100 % nö")


def fail_late(request, context):
    for number in range(3):
        yield b"%d" % number
    context.abort(grpc.StatusCode.DATA_LOSS, "late")


def sleep(request, context):
    threading.Event().wait(3)
    return b"too late"


def remaining(request, context):
    return str(context.time_remaining()).encode()


def pause(request, context):
    """So many seconds of silence between two messages."""
    yield b"before"
    threading.Event().wait(float(request))
    yield b"after"


def endless(request, context):
    context.add_callback(cancelled.set)
    while context.is_active():
        yield b"again" * 1000


def was_cancelled(request, context):
    return str(cancelled.wait(10)).encode()


handlers = {
    "Unary": grpc.unary_unary_rpc_method_handler(unary),
    "Large": grpc.unary_unary_rpc_method_handler(large),
    "ServerStream": grpc.unary_stream_rpc_method_handler(server_stream),
    "ClientStream": grpc.stream_unary_rpc_method_handler(client_stream),
    "BothStream": grpc.stream_stream_rpc_method_handler(both_stream),
    "Fail": grpc.unary_unary_rpc_method_handler(fail),
    "FailLate": grpc.unary_stream_rpc_method_handler(fail_late),
    "Sleep": grpc.unary_unary_rpc_method_handler(sleep),
    "Remaining": grpc.unary_unary_rpc_method_handler(remaining),
    "Pause": grpc.unary_stream_rpc_method_handler(pause),
    "Endless": grpc.unary_stream_rpc_method_handler(endless),
    "WasCancelled": grpc.unary_unary_rpc_method_handler(was_cancelled),
}
# The second PING too many is met with "Too many pings", not the third.
options = [("grpc.max_receive_message_length", -1), ("grpc.http2.max_ping_strikes", 1)]
server = grpc.server(futures.ThreadPoolExecutor(16), options=options)
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("tests.Echo", handlers),))
server.add_insecure_port(f"0.0.0.0:{sys.argv[1]}")
server.start()
print("serving", flush=True)
server.wait_for_termination()
