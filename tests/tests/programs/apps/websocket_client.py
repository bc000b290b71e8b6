"""Talks to websocket_app.py, and prints as JSON what it saw.

usage: websocket_client.py URL
"""

import hashlib
import json
import random
import sys

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

saw = {}
with connect(sys.argv[1], subprotocols=["other", "chat"], max_size=None, open_timeout=15) as connection:
    saw["status"] = connection.response.status_code
    saw["headers"] = [
        [name.lower(), value]
        for name, value in connection.response.headers.raw_items()
        if name.lower() not in ("date", "sec-websocket-accept")
    ]
    saw["subprotocol"] = connection.subprotocol
    echoed = []
    for message in ("hello", "", "wörter " * 1000, b"\x00\xff", random.Random(1).randbytes(3 * 1024 * 1024)):
        connection.send(message)
        answer = connection.recv(timeout=15)
        data = answer if isinstance(answer, bytes) else answer.encode()
        echoed.append([answer == message, len(data), hashlib.sha256(data).hexdigest()])
    saw["echoed"] = echoed
    for question in ("path", "ping"):
        connection.send(question)
        saw[question] = connection.recv(timeout=15)
    saw["pong"] = connection.ping(b"client").wait(10)
    connection.send("close")
    try:
        connection.recv(timeout=15)
    except ConnectionClosed as closed:
        saw["closed"] = [closed.rcvd.code, closed.rcvd.reason]
json.dump(saw, sys.stdout, indent=1, sort_keys=True)
