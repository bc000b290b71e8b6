"""An app with the OpenTelemetry SDK at its defaults: PORT. /recorded says how many of the requests since the last time it
would have exported a span of.
"""
import http.server
import sys

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

tracer = TracerProvider().get_tracer("app")
propagator = TraceContextTextMapPropagator()
seen = []


class App(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path == "/recorded":
            body = f"{sum(seen)} of {len(seen)}".encode()
            seen.clear()
        else:
            caller = propagator.extract({name.lower(): value for name, value in self.headers.items()})
            with tracer.start_as_current_span("GET", context=caller, kind=SpanKind.SERVER) as span:
                seen.append(span.is_recording())
            body = b"ok"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


http.server.ThreadingHTTPServer(("0.0.0.0", int(sys.argv[1])), App).serve_forever()
