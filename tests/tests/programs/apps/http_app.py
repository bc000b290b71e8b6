"""HTTP/1 by hand, so that every byte of an answer is chosen and every byte of a request is told.

usage: http_app.py PORT [NAME]
"""

import gzip
import hashlib
import json
import socket
import socketserver
import sys
import time

# Answers that leave HTTP must not speak of a body, and some do.
LENGTHS = {
    "length:80": "Content-Length: 5\r\n",
    "/length": "Content-Length: 5\r\n",
    "coding:80": "Transfer-Encoding: chunked\r\n",
    "/coding": "Transfer-Encoding: chunked\r\n",
}
FULL = b"full\n" * 4000
NAME = sys.argv[2] if len(sys.argv) > 2 else "app"


class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        print("accepted", flush=True)
        while self.request_line():
            pass

    def request_line(self):
        line = self.rfile.readline().decode("latin-1")
        if not line.strip():
            return False
        method, target, version = line.split()
        fields = self.fields()
        values = {name.lower(): value for name, value in fields}
        if method == "CONNECT":
            return self.leave_http("200 OK", LENGTHS.get(target, ""))
        if values.get("upgrade") == "shout":
            length = LENGTHS.get(target, "")
            return self.leave_http("101 Switching Protocols", f"Connection: Upgrade\r\nUpgrade: shout\r\n{length}")
        if target == "/full":
            # whoever closes with bytes unread resets the connection
            self.head("413 Content Too Large", f"Connection: close\r\nContent-Length: {len(FULL)}\r\n")
            self.wfile.write(FULL)
            return False
        if values.get("expect") == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body, trailers = self.body(values)
        keep = self.answer(method, target, version, fields, body, trailers)
        return keep and "close" not in values.get("connection", "").lower() and version == "HTTP/1.1"

    def fields(self):
        fields = []
        while (line := self.rfile.readline()) not in (b"\r\n", b""):
            name, value = line.decode("latin-1").split(":", 1)
            fields.append([name, value.strip()])
        return fields

    def body(self, values):
        if values.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(values.get("content-length", 0))), []
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body, self.fields()

    def answer(self, method, target, version, fields, body, trailers):
        path = target.split("?")[0]
        if path == "/later":
            time.sleep(0.7)
        if path == "/chunked":
            self.head("200 OK", "Transfer-Encoding: chunked\r\nTrailer: X-Checksum\r\n")
            for part in (b"one ", b"two ", b"three" * 5000):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            self.wfile.write(b"0\r\nX-Checksum: 42\r\n\r\n")
        elif path == "/until-close":
            self.head("200 OK", "Connection: close\r\n")
            self.wfile.write(b"until the end " * 1000)
            return False
        elif path == "/half-closes":
            self.head("200 OK", "Connection: close\r\n")
            self.wfile.write(b"until the end")
            self.connection.shutdown(socket.SHUT_WR)
            self.rfile.read()
            return False
        elif path == "/waits":
            print("waits", flush=True)
            self.rfile.read(1)
            print("the caller is gone", flush=True)
            return False
        elif path == "/spaced":
            self.head("200 OK", "X-Spaced : yes\r\nX-Folded: one\r\n two\r\nContent-Length : 2\r\n")
            self.wfile.write(b"ok")
        elif path == "/coded":
            coded = gzip.compress(b"text")
            self.head("200 OK", "Transfer-Encoding: gzip, chunked\r\n")
            self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(coded), coded))
        elif path == "/coded-until-close":
            self.head("200 OK", "Transfer-Encoding: gzip\r\n")
            self.wfile.write(gzip.compress(b"text"))
            return False
        elif path == "/none":
            self.head("204 No Content", "X-Nothing: here\r\n")
        elif path == "/known":
            self.head("304 Not Modified", 'ETag: "known"\r\n')
        elif path == "/cookies":
            self.head("200 OK", "Set-Cookie: a=1\r\nSet-Cookie: b=2; Path=/\r\nContent-Length: 0\r\n")
        elif path == "/odd":
            # an empty value, bytes beyond ASCII, a long value, a name with every mark that a token may have
            odd = "X-Empty:\r\nX-Latin: caf\xe9\r\nX-Long: " + "l" * 30000 + "\r\nX-!#$%&'*+.^_`|~: marks\r\n"
            self.head("299 Odd", odd + "Content-Length: 0\r\n")
        else:
            told = {
                "name": NAME,
                "request": [method, target, version],
                "fields": fields,
                "bytes": len(body),
                "sha256": hashlib.sha256(body).hexdigest(),
                "trailers": trailers,
            }
            text = json.dumps(told).encode()
            self.head("200 OK", f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n")
            if method != "HEAD":
                self.wfile.write(text)
        return True

    def head(self, status, fields):
        self.wfile.write(f"HTTP/1.1 {status}\r\nServer: by hand\r\n{fields}\r\n".encode("latin-1"))

    def leave_http(self, status, fields):
        self.head(status, fields)
        while data := self.rfile.read1(65536):
            self.wfile.write(data.upper())
        self.wfile.write(b"BYE")
        return False


class Server(socketserver.ThreadingTCPServer):
    address_family = socket.AF_INET6
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128


Server(("::", int(sys.argv[1])), Handler).serve_forever()
