"""The bars of the project: what must hold for Weft, as ratios within one run or as figures of its own."""


class Bar:
    """A figure of Weft, or its ratio to Envoy's, and what it must be at most (or, with `at_least`, at least)."""

    def __init__(self, title, case, figure, limit, against=None, at_least=False, unit="", baseline=None):
        self.title, self.case, self.figure, self.limit = title, case, figure, limit
        self.against, self.at_least, self.unit, self.baseline = against, at_least, unit, baseline

    def value(self, rows):
        """What was reached, or None where it was not measured."""
        own = self.read(rows, "weft")
        if own is None or not self.against:
            return own
        other = self.read(rows, self.against)
        return own / other if other else None

    def read(self, rows, peer):
        found = figure(rows, peer, self.case, self.figure)
        if found is None or not self.baseline:
            return found
        base = figure(rows, self.baseline, self.case, self.figure)
        return None if base is None else found - base

    def is_met(self, value):
        return value >= self.limit if self.at_least else value <= self.limit

    def missed_by(self, value):
        """In percent of the bar."""
        return abs(value / self.limit - 1) * 100

    def write(self, value):
        ratio = f" × {self.against}" if self.against else ""
        return f"{value:.2f}{ratio}" if self.against else f"{round(value, 1):,g}{self.unit}"

    def written_limit(self):
        sign = "≥" if self.at_least else "≤"
        return f"{sign} {self.limit:,g}{f' × {self.against}' if self.against else self.unit}"


CPU, ALLOCATIONS = "cpu_us_per_request", "allocations_per_request"

BARS = [
    Bar("CPU per request, both proxies, HTTP/1, 32 connections", "http1-32", CPU, 0.28, "envoy"),
    # where the bar was set, 0.28 of Envoy was 1.45 of a bare pair: Envoy's share differs much between machines
    Bar("the same beside the bare pair", "http1-32", CPU, 1.45, "bare"),
    Bar("CPU per request at 1 connection", "http1-1", CPU, 0.35, "envoy"),
    Bar("the same at 256 connections", "http1-256", CPU, 0.35, "envoy"),
    Bar("CPU per call, gRPC unary", "grpc-unary", CPU, 0.35, "envoy"),
    Bar("heap allocations per request, client's proxy", "counts", ALLOCATIONS + "_client", 25),
    Bar("heap allocations per request, server's proxy", "counts", ALLOCATIONS + "_server", 25),
    Bar("latency added over direct, p50 at 1 connection", "http1-1", "p50_us", 0.45, "envoy", baseline="direct"),
    Bar("opaque TCP, throughput", "tcp-down", "mb_per_second", 1.0, "envoy", at_least=True),
    Bar("opaque TCP, CPU per byte", "tcp-down", "cpu_ns_per_byte", 0.8, "envoy"),
    Bar("new client connections per second", "connect-http", "requests_per_second", 2, "envoy", at_least=True),
    Bar("memory, idle", "start", "rss_mb_idle", 14, unit=" MB"),
    Bar("memory per idle HTTP/1 connection, client's proxy", "idle", "kb_per_connection_client", 32, unit=" KB"),
    Bar("memory per idle HTTP/1 connection, server's proxy", "idle", "kb_per_connection_server", 32, unit=" KB"),
    Bar("idle connections held", "idle", "held", 20_000, at_least=True),
    Bar("memory, 1,000 services × 10 endpoints, each service called once", "services", "rss_mb_called", 40, unit=" MB"),
    Bar("the same with every endpoint dialled (as the bar says)", "services", "rss_mb_dialled", 40, unit=" MB"),
    Bar("the same 30 s after the last call", "services", "rss_mb_settled", 40, unit=" MB"),
    Bar("start to ready", "start", "ready_ms", 40, unit=" ms"),
]


def figure(rows, peer, case, name):
    return next((row.get(name) for row in rows if row["peer"] == peer and row["case"] == case), None)


def table(rows):
    """The bars that this run can judge, as lines of Markdown."""
    judged = [(bar, bar.value(rows)) for bar in BARS]
    judged = [(bar, value) for bar, value in judged if value is not None]
    if not judged:
        return []
    lines = ["", "### Weft against its bars", "", "| | bar | reached | |", "|---|---:|---:|---|"]
    for bar, value in judged:
        verdict = "met" if bar.is_met(value) else f"**missed by {bar.missed_by(value):.0f} %**"
        if bar.figure == "held" and value == figure(rows, "weft", "idle", "wanted") < bar.limit:
            verdict = "all that were tried: this machine grants no more descriptors"
        lines.append(f"| {bar.title} | {bar.written_limit()} | {bar.write(value)} | {verdict} |")
    return lines
