"""Calls grpc_app.py in every way, and prints as JSON what it saw.

usage: grpc_client.py HOST:PORT
"""

import hashlib
import json
import queue
import random
import sys

import grpc

channel = grpc.insecure_channel(
    sys.argv[1], options=[("grpc.max_receive_message_length", -1), ("grpc.enable_retries", 0)]
)
# other tests keep the machine busy, and gRPC gives its first connection 20 seconds before it makes another
grpc.channel_ready_future(channel).result(60)
PREFIX = "/tests.Echo/"
TIMEOUT = 20


def pairs(metadata):
    return sorted((key, value.hex() if isinstance(value, bytes) else value) for key, value in metadata or ())


def failure(call):
    try:
        return f"no error but {call()!r}"
    except grpc.RpcError as error:
        return [error.code().name, error.details(), pairs(error.trailing_metadata())]


saw = {}
metadata = (("x-text", "text"), ("x-bytes-bin", bytes(range(256))), ("x-twice", "1"), ("x-twice", "2"))
answer, call = channel.unary_unary(PREFIX + "Unary").with_call(b"hello", metadata=metadata, timeout=TIMEOUT)
saw["unary"] = [json.loads(answer), pairs(call.initial_metadata()), pairs(call.trailing_metadata()), call.code().name]
answer = channel.unary_unary(PREFIX + "Unary")(b"z" * 100000, compression=grpc.Compression.Gzip, timeout=TIMEOUT)
saw["compressed"] = json.loads(answer)
saw["server stream"] = [len(part) for part in channel.unary_stream(PREFIX + "ServerStream")(b"500", timeout=TIMEOUT)]
saw["server stream of nothing"] = list(channel.unary_stream(PREFIX + "ServerStream")(b"0", timeout=TIMEOUT))
requests = (b"x" * size for size in range(0, 20000, 100))
saw["client stream"] = json.loads(channel.stream_unary(PREFIX + "ClientStream")(requests, timeout=TIMEOUT))

# ping-pong: the next message goes out when the one before has come back
waiting = queue.Queue()
calls = channel.stream_stream(PREFIX + "BothStream")(iter(waiting.get, None), timeout=TIMEOUT)
saw["both stream"] = []
for number in range(50):
    waiting.put(f"message {number}".encode())
    saw["both stream"].append(next(calls).decode())
waiting.put(None)
saw["both stream ends"] = [len(list(calls)), calls.code().name]

large = random.Random(1).randbytes(24 * 1024 * 1024)
answer = channel.unary_unary(PREFIX + "Large")(large, timeout=TIMEOUT)
saw["large"] = [len(answer), hashlib.sha256(answer).hexdigest()]

saw["fail"] = failure(lambda: channel.unary_unary(PREFIX + "Fail")(b"", timeout=TIMEOUT))
parts = []
saw["fail late"] = failure(lambda: parts.extend(channel.unary_stream(PREFIX + "FailLate")(b"", timeout=TIMEOUT)))
saw["fail late"].append(len(parts))
saw["no such method"] = failure(lambda: channel.unary_unary(PREFIX + "None")(b"", timeout=TIMEOUT))
saw["no such service"] = failure(lambda: channel.unary_unary("/tests.None/None")(b"", timeout=TIMEOUT))
saw["deadline"] = failure(lambda: channel.unary_unary(PREFIX + "Sleep")(b"", timeout=0.3))[0]
remaining = float(channel.unary_unary(PREFIX + "Remaining")(b"", timeout=15))
saw["the deadline is known to the app"] = 0 < remaining < 16  # rounded up on its way

endless = channel.unary_stream(PREFIX + "Endless")(b"")
for _ in range(3):
    next(endless)
endless.cancel()
saw["cancelled"] = channel.unary_unary(PREFIX + "WasCancelled")(b"", timeout=TIMEOUT).decode()
json.dump(saw, sys.stdout, indent=1, sort_keys=True, default=repr)
