"""Reads until the client has shut down its side, then answers with what it read.

usage: tcp_app.py PORT
"""

import hashlib
import socketserver
import sys


class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        data = self.rfile.read()
        self.wfile.write(f"{len(data)} {hashlib.sha256(data).hexdigest()}\n".encode() + data[:100])


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


Server(("0.0.0.0", int(sys.argv[1])), Handler).serve_forever()
