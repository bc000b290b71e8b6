"""The app of these tests: PORT NAME. The path says how it answers; every request is a line of its output."""
import http.client
import http.server
import os
import signal
import sys
import time
import urllib.parse

PORT, NAME = int(sys.argv[1]), sys.argv[2]
TRACE = ("traceparent", "tracestate", "baggage", "b3", "x-b3-traceid", "x-b3-spanid", "x-b3-parentspanid",
         "x-b3-sampled", "x-b3-flags", "uber-trace-id")


class App(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # head and body are two writes
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def do_GET(self):
        print(NAME, self.command, self.path, flush=True)
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        size, seconds = int(query.get("bytes", 0)), float(query.get("seconds", 0))
        if url.path == "/slow":
            self.slow(size, seconds, chunked="chunked" in query)
        elif url.path == "/upload":
            self.answer(200, str(self.read_body()).encode())
        elif url.path == "/hold":
            # takes nothing of the body before that file exists
            while not os.path.exists(query["until"]):
                time.sleep(0.05)
            self.answer(200, str(self.read_body()).encode())
        elif url.path == "/status":
            self.read_body()
            self.answer(int(query["code"]), b"status")
        elif url.path == "/early":
            # answers before it has read, and goes on to read
            self.answer(404, b"no")
            self.close_connection = True
            while self.rfile.read(1):
                pass
        elif url.path == "/cut":
            self.cut() if query["by"] == NAME else time.sleep(0.03)
            self.answer(200, NAME.encode())
        elif url.path == "/die":
            self.read_body()
            self.close_connection = True
        elif url.path == "/stale":
            # closes a kept connection without having said so
            self.answer(200, NAME.encode())
            self.close_connection = True
        elif url.path == "/call":
            self.call(query["next"])
        else:
            self.read_body()
            self.answer(200, NAME.encode())

    do_POST = do_PUT = do_GET

    def read_body(self):
        if self.headers.get("transfer-encoding") == "chunked":
            count = 0
            while length := int(self.rfile.readline(), 16):
                count += len(self.rfile.read(length))
                self.rfile.readline()
            self.rfile.readline()
            return count
        return len(self.rfile.read(int(self.headers.get("content-length", 0))))

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def cut(self):
        """Promises more than it sends."""
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.close_connection = True

    def slow(self, size, seconds, chunked):
        self.send_response(200)
        self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(size))))
        self.end_headers()
        pieces = 20
        for _ in range(pieces):
            piece = b"x" * (size // pieces)
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
            self.wfile.flush()
            time.sleep(seconds / pieces)
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def call(self, chain):
        """Calls the first of `a,b,c`, which calls the others, and passes the headers of the trace on."""
        first, _, rest = chain.partition(",")
        path = f"/call?next={rest}" if rest else "/"
        headers = {name: self.headers[name] for name in TRACE if name in self.headers}
        status, body = fetch(first, path, headers)
        self.answer(status, NAME.encode() + b" " + body)


def fetch(host, path, headers):
    connection = http.client.HTTPConnection(host, 80, timeout=10)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 256


def stop(*_):
    if len(sys.argv) > 3:
        print("last call:", fetch(sys.argv[3], "/last", {}), flush=True)
        sys.exit(7)
    sys.exit(0)


signal.signal(signal.SIGTERM, stop)
server = Server(("127.0.0.1", PORT), App)
print("listening", flush=True)
server.serve_forever()
