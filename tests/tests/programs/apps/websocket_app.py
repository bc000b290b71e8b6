"""A WebSocket server that echoes.

usage: websocket_app.py PORT
"""

import sys

from websockets.sync.server import serve


def echo(connection):
    for message in connection:
        if message == "close":
            connection.close(4001, "as you wish")
        elif message == "path":
            connection.send(connection.request.path)
        elif message == "ping":
            connection.send(str(connection.ping(b"server").wait(10)))
        else:
            connection.send(message)


serve(echo, "0.0.0.0", int(sys.argv[1]), subprotocols=["chat"], max_size=None).serve_forever()
