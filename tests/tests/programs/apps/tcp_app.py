"""Reads until the client has shut down its side, then answers with what it read. A client that begins with RESET
is reset in the middle of the answer.

usage: tcp_app.py PORT
"""

import hashlib
import os
import socket
import socketserver
import struct
import sys


class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        try:
            data = self.rfile.read(5)
            if data == b"RESET":
                return self.reset()
            data += self.rfile.read()
        except ConnectionResetError:
            return print("was reset", flush=True)
        print(f"read {len(data)}", flush=True)
        self.wfile.write(f"{len(data)} {hashlib.sha256(data).hexdigest()}\n".encode() + data[:100])

    def reset(self):
        self.wfile.write(b"partial")
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.request.detach())


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


Server(("0.0.0.0", int(sys.argv[1])), Handler).serve_forever()
