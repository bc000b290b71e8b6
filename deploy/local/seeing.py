"""What the demo sees: spans, which it receives as OTLP/HTTP with JSON (the sidecars' exporter), traces as trees, and
metrics before and after. It is no tracing backend: it keeps a bounded number of spans in memory.
"""

import http.server
import json
import queue
import re
import sys
import threading
import time
import urllib.error
import urllib.request

SPANS_KEPT = 50_000
LONGEST_BODY = 16 * 1024 * 1024
FORWARD_PATIENCE = 5  # seconds
BAR = 7  # columns
LABEL = 53  # columns


class Span:
    """One span, with its attributes as a dictionary."""

    def __init__(self, resource, scope, raw):
        self.resource, self.scope, self.raw = resource, scope, raw
        self.trace, self.id, self.parent = raw["traceId"], raw["spanId"], raw.get("parentSpanId", "")
        self.start, self.end = int(raw["startTimeUnixNano"]), int(raw["endTimeUnixNano"])
        self.attributes = {entry["key"]: value_of(entry["value"]) for entry in raw.get("attributes", [])}
        self.workload = next(
            value_of(entry["value"]) for entry in resource["attributes"] if entry["key"] == "service.name"
        )

    def get(self, name):
        return self.attributes.get(name)

    def is_attempt(self):
        return self.get("weft.attempt") is not None

    def is_inbound(self):
        return self.get("weft.direction") == "inbound"

    def is_outbound_request(self):
        return self.get("weft.direction") == "outbound" and not self.is_attempt()

    def outcome(self):
        return str(self.get("weft.failure") or self.get("http.response.status_code") or "")


def value_of(value):
    """OTLP writes 64-bit integers as text in JSON."""
    if "intValue" in value:
        return int(value["intValue"])
    return next(iter(value.values()), None)


class Receiver:
    """An OTLP/HTTP receiver of traces on one address; hands them on where that is wanted."""

    def __init__(self, address, forward_to=None):
        self.spans, self.lock = [], threading.Lock()
        self.forward_to, self.forwarded, self.forward_error = forward_to, 0, None
        self.waiting = queue.Queue(1000)
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                length = int(self.headers.get("content-length", 0))
                if self.path != "/v1/traces" or length > LONGEST_BODY:
                    return self.send_error(404)
                body = self.rfile.read(length)
                if len(body) < length:
                    return  # a sidecar was killed while it sent
                receiver.take(body)
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_):
                pass

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, request, client_address):
                # so was one that does not wait for its answer
                if not isinstance(sys.exc_info()[1], ConnectionError):
                    super().handle_error(request, client_address)

        self.server = Server((address, 4318), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        if forward_to:
            threading.Thread(target=self.forward, daemon=True).start()

    def take(self, body):
        spans = []
        for resource_spans in json.loads(body)["resourceSpans"]:
            for scope_spans in resource_spans["scopeSpans"]:
                for raw in scope_spans["spans"]:
                    spans.append(Span(resource_spans["resource"], scope_spans.get("scope", {}), raw))
        with self.lock:
            self.spans.extend(spans)
            del self.spans[:-SPANS_KEPT]
        if self.forward_to:
            try:
                self.waiting.put_nowait(body)
            except queue.Full:
                self.forward_error = "it takes spans too slowly"

    def forward(self):
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while True:
            body = self.waiting.get()
            request = urllib.request.Request(self.forward_to, body, {"content-type": "application/json"})
            try:
                with opener.open(request, timeout=FORWARD_PATIENCE) as answer:
                    answer.read()
                self.forwarded += 1
            except (OSError, urllib.error.URLError, ValueError) as error:
                self.forward_error = str(error)
            self.waiting.task_done()

    def wait_until_forwarded(self):
        deadline = time.monotonic() + FORWARD_PATIENCE
        while self.waiting.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.02)
        if self.waiting.unfinished_tasks and not self.forward_error:
            self.forward_error = f"it does not answer within {FORWARD_PATIENCE} s"

    def traces(self):
        """Trace id to spans."""
        found = {}
        with self.lock:
            for span in self.spans:
                found.setdefault(span.trace, []).append(span)
        return found

    def export(self, wanted):
        """These traces as one OTLP JSON object, as the upload of the Jaeger UI takes it."""
        groups = {}
        for trace, spans in self.traces().items():
            for span in spans if trace in wanted else []:
                key = json.dumps([span.resource, span.scope], sort_keys=True)
                groups.setdefault(key, (span.resource, span.scope, []))[2].append(span.raw)
        return {
            "resourceSpans": [
                {"resource": resource, "scopeSpans": [{"scope": scope, "spans": spans}]}
                for resource, scope, spans in groups.values()
            ]
        }


def root_of(spans):
    """The root, if the spans are one tree; else none."""
    known = {span.id for span in spans}
    without_parent = [span for span in spans if span.parent not in known]
    if len(known) == len(spans) and len(without_parent) == 1 and not without_parent[0].parent.strip("0"):
        return without_parent[0]
    return None


# --- on the screen ---------------------------------------------------------------------------------------------

COLOURED = sys.stdout.isatty()


def coloured(code, text):
    return f"\033[{code}m{text}\033[0m" if COLOURED else text


def bold(text):
    return coloured("1", text)


def dim(text):
    return coloured("2", text)


def red(text):
    return coloured("31", text)


def green(text):
    return coloured("32", text)


def show_tree(spans):
    """One line for each span: when, how long, what, how it ended, and a bar."""
    root = root_of(spans)
    children = {}
    for span in sorted(spans, key=lambda span: span.start):
        children.setdefault(span.parent, []).append(span)
    print(dim(f"    {'at ms':>6}{'took':>7}  {'':{LABEL}} ended"))

    def show(span, lead, branch):
        at, took = (span.start - root.start) / 1e6, (span.end - span.start) / 1e6
        label = f"{lead}{branch}{label_of(span)}"
        outcome = span.outcome()
        failed = bool(span.get("weft.failure"))
        ended = f"{outcome:<19} "
        if failed:
            ended = red(ended)
        line = f"    {at:6.1f}{took:7.1f}  {label:{LABEL}} {ended}{bar(root, span, failed)}"
        print(line.rstrip())
        below = children.get(span.id, [])
        deeper = lead + {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
        for number, child in enumerate(below):
            show(child, deeper, "└─ " if number == len(below) - 1 else "├─ ")

    show(root, "", "")


def label_of(span):
    if span.is_attempt():
        reason = span.get("weft.retry.reason")
        return f"attempt {span.get('weft.attempt')}: {span.get('weft.endpoint')}" + (
            ", retry" if reason else ""
        )
    if span.is_inbound():
        return f"{span.workload} answers"
    return f"{span.workload} calls {span.get('weft.service')}"


def bar(root, span, failed):
    whole = max(1, root.end - root.start)
    begin = min(BAR - 1, round((span.start - root.start) / whole * BAR))
    length = max(1, round((span.end - span.start) / whole * BAR))
    text = " " * begin + "█" * min(length, BAR - begin)
    return red(text) if failed else dim(text)


# --- metrics ---------------------------------------------------------------------------------------------------

SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)")
LABELS = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def samples(text):
    """Name, labels and value of each sample of the Prometheus text format."""
    for line in text.splitlines():
        match = SAMPLE.match(line)
        if match:
            yield match[1], dict(LABELS.findall(match[2] or "")), float(match[3])


def total(text, name, **labels):
    """The sum of the samples with these labels."""
    return sum(
        value
        for found, given, value in samples(text)
        if found == name and all(given.get(label) == wanted for label, wanted in labels.items())
    )


def values_of(text, name, label, **labels):
    """The values of one label among those samples."""
    return sorted(
        {
            given[label]
            for found, given, value in samples(text)
            if found == name and value and all(given.get(key) == wanted for key, wanted in labels.items())
        }
    )
