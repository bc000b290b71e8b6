"""The service `orders` of the demo: an ordinary HTTP program that knows nothing of the mesh.

It asks `http://stock/` and counts in redis at `redis:6379`, both in plaintext and by their plain names. All it does
for the traces is what every program must: it copies the trace headers of a request to the requests it makes.
"""

import http.server
import json
import socket
import sys
import time
import urllib.error
import urllib.request

NAME = sys.argv[1]
PORT = int(sys.argv[2])
TRACE_HEADERS = ["traceparent", "tracestate", "baggage"]
PATIENCE = 10  # seconds
# As a program that thinks before it answers: some requests are under way whenever it is killed.
THINKS = 0.004  # seconds


def in_stock(number, headers):
    request = urllib.request.Request(f"http://stock/items/{number % 20}.json", headers=headers)
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return json.load(answer)


def count_visit(number):
    with socket.create_connection(("redis", 6379), timeout=PATIENCE) as redis:
        redis.sendall(f"INCR visits:{number}\r\n".encode())
        answer = redis.makefile().readline()
    if not answer.startswith(":"):
        raise OSError(f"redis said {answer!r}")
    return int(answer[1:])


class Orders(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 64 * 1024  # head and body in one packet, as any server for more than a demo does

    def do_GET(self):
        try:
            number = int(self.path.rsplit("/", 1)[1])
        except ValueError:
            return self.answer(404, {"error": "no such order"})
        headers = {name: self.headers[name] for name in TRACE_HEADERS if name in self.headers}
        try:
            item = in_stock(number, headers)
            visits = count_visit(number)
        except (OSError, urllib.error.URLError) as error:
            return self.answer(502, {"error": str(error), "served_by": NAME})
        time.sleep(THINKS)
        return self.answer(200, {"order": number, **item, "visits": visits, "served_by": NAME})

    def answer(self, status, content):
        body = json.dumps(content).encode() + b"\n"
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


server = Server(("127.0.0.1", PORT), Orders)
print("listening", flush=True)
server.serve_forever()
