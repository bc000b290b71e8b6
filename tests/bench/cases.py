"""The cases: what is done to a peer, and what is counted. A case gives one sample; main.py repeats it in turns, each
time with proxies that were started for it.
"""

import contextlib
import dataclasses
import threading
import time

import counting
import load
from apps import LARGE
from machine import Failed, Span, tail, wait

WARM_UP = 1  # seconds of the same load before it counts
IDLE_CONNECTIONS = {False: 20_000, True: 2_000}  # quick or not
SERVICES, ENDPOINTS = 1_000, 10
SETTLED = 30  # seconds after the last call
STALLED = 100  # downloads, and as many uploads


@dataclasses.dataclass
class Case:
    """One thing to measure. `measure(peer, run)` gives a sample: names to figures."""

    name: str
    title: str
    measure: object
    connections: int = 0
    quick: bool = True
    rounds: int = 0  # if not as many as the run has
    wants: object = lambda peer: True  # which peers take part
    own_start: bool = False  # starts the proxies by itself


class Run:
    """What all cases of a run share: how long, how thorough, and the capacity that fixed rates are a share of."""

    def __init__(self, seconds, is_quick):
        self.seconds, self.is_quick = seconds, is_quick
        self.saturation = {}  # peer to requests per second of `CAPACITY_CASE`

    def note(self, case, peer, sample):
        if case.name == CAPACITY_CASE and peer.proxies:
            self.saturation.setdefault(peer.name, []).append(sample["requests_per_second"])

    def capacity(self, peers):
        """Of the slowest peer with proxies, measured now where it was not yet."""
        for peer in peers:
            if peer.proxies and peer.name not in self.saturation:
                url = f"http://{peer.host('http1')}/"
                load.wrk(peer.place, url, 32, WARM_UP)
                self.saturation[peer.name] = [load.wrk(peer.place, url, 32, 2)["requests_per_second"]]
        return min((max(rates) for rates in self.saturation.values()), default=5000)


class Watch:
    """Accounts of both proxies around a measurement: processor time, largest resident memory, steal, foreign load."""

    def __init__(self, peer):
        self.peer = peer

    def __enter__(self):
        self.peer.check()
        self.highest, self.highest_client, self.ended = 0.0, 0.0, threading.Event()
        self.sampler = threading.Thread(target=self.sample, daemon=True)
        self.span = Span(self.peer.place.machine.processes)
        self.before = [process.cpu_ns() for process in self.peer.proxies]
        self.sampler.start()
        return self

    def sample(self):
        while True:
            sizes = [process.rss_mb() for process in self.peer.proxies]
            self.highest = max([self.highest, *sizes])
            self.highest_client = max([self.highest_client, *sizes[:1]])
            if self.ended.wait(0.2):
                return

    def __exit__(self, *_):
        self.cpu = [process.cpu_ns() - ns for process, ns in zip(self.peer.proxies, self.before)]
        self.machine = self.span.end()
        self.ended.set()
        self.sampler.join()

    def sample_of(self, result, per="request"):
        """What the generator said, and the accounts divided by what it counted."""
        done, unit, factor = (result["requests"], "us", 1000) if per == "request" else (result["bytes"], "ns", 1)
        accounts = {}
        if self.cpu and done:
            accounts = {f"cpu_{unit}_per_{per}": sum(self.cpu) / factor / done}
            for end, spent in zip(("client", "server"), self.cpu):
                accounts[f"cpu_{unit}_per_{per}_{end}"] = spent / factor / done
            accounts["rss_mb_load"] = self.highest
        shown = {name: value for name, value in result.items() if name != "requests"}
        return {**shown, **accounts, **self.machine}


# --- requests ----------------------------------------------------------------------------------------------------


def loaded(generate, per="request"):
    """A case that is a generator under watch, with some of the same load before."""

    def measure(peer, run):
        generate(peer, WARM_UP)
        with Watch(peer) as watch:
            result = generate(peer, run.seconds)
        return watch.sample_of(result, per)

    return measure


def http1(connections):
    def generate(peer, seconds):
        return load.wrk(peer.place, f"http://{peer.host('http1')}/", connections, seconds)

    title = f"HTTP/1, {connections} connection{'s' if connections > 1 else ''}"
    return Case(f"http1-{connections}", title, loaded(generate), connections, quick=connections < 2000)


def http2(connections, streams, quick=True):
    def generate(peer, seconds):
        return load.h2load(peer.place, f"http://{peer.host('http2')}/", connections, streams, seconds)

    title = f"HTTP/2, {connections} connections with {streams} streams"
    return Case(f"http2-{connections}x{streams}", title, loaded(generate), connections, quick)


def grpc(kind, connections=4, streams=8):
    def generate(peer, seconds):
        url = f"http://{peer.host('grpc')}/bench.Echo/{kind.title()}"
        return load.bench_peer(peer.place, ["grpc", url, kind, connections, streams, seconds], seconds)

    title = {
        "unary": f"gRPC unary, {connections} connections with {streams} calls at a time",
        "stream": f"gRPC streaming, messages to and fro, {connections} connections with {streams} streams",
    }[kind]
    return Case(f"grpc-{kind}", title, loaded(generate), connections)


def connect(scheme, concurrency=32):
    def generate(peer, seconds):
        url = f"{scheme}://{peer.host({'http': 'http1', 'tcp': 'tcp'}[scheme])}/"
        return load.bench_peer(peer.place, ["connect", url, concurrency, seconds], seconds)

    titles = {
        "http": "New client connections, each with one HTTP/1 request",
        "tcp": "New opaque connections, each with a full handshake between the proxies",
    }
    return Case(f"connect-{scheme}", f"{titles[scheme]}, {concurrency} at a time", loaded(generate), concurrency)


def at_rate(percent, connections=64):
    """Latency counts from the moment when a request was due."""

    def measure(peer, run):
        rate = run.capacity(run.peers) * percent / 100
        url = f"http://{peer.host('http1')}/"
        ask = lambda seconds: load.bench_peer(  # noqa: E731
            peer.place, ["rate", url, connections, rate, seconds], seconds
        )
        ask(WARM_UP)
        with Watch(peer) as watch:
            result = ask(run.seconds)
        return {"offered_per_second": rate, **watch.sample_of(result)}

    title = f"HTTP/1 at {percent} % of the slowest proxy's capacity, {connections} connections, from when it was due"
    return Case(f"rate-{percent}", title, measure, connections, quick=percent == 60)


# --- bytes -------------------------------------------------------------------------------------------------------


def opaque(way, connections=1):
    def generate(peer, seconds):
        result = load.bench_peer(peer.place, ["bytes", peer.host("tcp"), way, connections, seconds], seconds)
        return only_bytes(result)

    return Case(f"tcp-{way}", f"Opaque TCP, {way}, one connection", loaded(generate, "byte"), 1, quick=way == "down")


def body(way):
    def generate(peer, seconds):
        path = {"down": "large", "up": "bodies/sink"}[way]
        url = f"http://{peer.host('http1')}/{path}"
        result = load.bench_peer(peer.place, ["body", url, way, LARGE, 1, seconds], seconds)
        return only_bytes(result)

    return Case(f"body-{way}", f"HTTP bodies of 100 MiB, {way}, one connection", loaded(generate, "byte"), 1, False)


def only_bytes(result):
    return {
        "requests": result["requests"],
        "bytes": result["bytes"],
        "mb_per_second": result["bytes"] / result["seconds"] / 1e6,
        "errors": result["errors"],
        "first_error": result["first_error"],
    }


# --- counts and memory ---------------------------------------------------------------------------------------------


def counts(peer, run):
    """System calls and allocations of both proxies under the load of http1-32."""
    url = f"http://{peer.host('http1')}/"
    load.wrk(peer.place, url, 32, WARM_UP)
    sample = {}
    for name, counter in (("system_calls", counting.system_calls), ("allocations", counting.allocations)):
        try:
            with counter(peer.proxies) as count:
                before = count()
                result = load.wrk(peer.place, url, 32, min(run.seconds, 2))
                passed = [after - first for after, first in zip(count(), before)]
        except counting.Unavailable as why:
            sample[f"no_{name}"] = str(why)
            continue
        each = [number / (result["requests"] or 1) for number in passed]
        sample[f"{name}_per_request"] = sum(each) / len(each)
        sample |= {f"{name}_per_request_{end}": number for end, number in zip(("client", "server"), each)}
    return sample


def start(peer, _run):
    """From the start of the process to its own word that it is ready, and memory soon after."""
    peer.restart()
    return {
        "ready_ms": max(peer.ready_ms),
        "ready_ms_client": peer.ready_ms[0],
        "ready_ms_server": peer.ready_ms[1],
        **idle_memory(peer),
    }


def idle_memory(peer):
    sizes = [process.rss_mb() for process in peer.proxies]
    return dict(zip(("rss_mb_idle", "rss_mb_idle_client", "rss_mb_idle_server"), [max(sizes, default=None), *sizes]))


@contextlib.contextmanager
def background(peer, arguments, word):
    """A generator that does its work, says a word, and keeps what it has until we are done; gives its number."""
    place = peer.place
    command = [place.tools["bench-peer"], *map(str, arguments)]
    process = place.start(arguments[0], command, place.client)
    with open(process.log, "rb") as log:
        log.seek(0, 2)
        begin = log.tell()
    said = []

    def done():
        process.check()
        with open(process.log) as log:
            log.seek(begin)
            said[:] = [line for line in log if line.startswith(word)]
        return said

    try:
        wait(f"{arguments[0]} said {word}", done, explain=lambda: tail(process.log), patience=180)
        yield int(said[0].split()[1].rstrip(":")), said[0].strip()
    finally:
        place.machine.forget(process)


def idle_connections(peer, run):
    """How much an idle HTTP/1 connection costs in the client's proxy and in the server's."""
    # what our own limit of descriptors leaves for two ends and some files
    count = min(IDLE_CONNECTIONS[run.is_quick], peer.place.machine.files - 500)
    url = f"http://{peer.host('http1')}/"
    load.wrk(peer.place, url, 32, WARM_UP)
    before = [process.rss_mb() for process in peer.proxies]
    with background(peer, ["hold", url, count], "held") as (held, said):
        after = [process.rss_mb() for process in peer.proxies]
        span = Span(peer.place.machine.processes)
        result = load.wrk(peer.place, url, 1, 1)
        if not result["requests"]:
            raise Failed(f"{peer.name} answers nothing beside {held} idle connections")
    sample = {"held": held, "wanted": count, "rss_mb_load": max(after), "p50_us": result["p50_us"], **span.end()}
    for end, first, last in zip(("client", "server"), before, after):
        sample[f"kb_per_connection_{end}"] = (last - first) * 1024 / max(1, held)
    sample["errors"] = count - held + result["errors"]
    if sample["errors"]:
        sample["first_error"] = f"{said}; {result['errors']} of {result['requests']} others were refused"
    return sample


def stalled(peer, run):
    """The time of other requests while downloads are not read and uploads are not taken, against the time without."""
    base = f"http://{peer.host('http1')}/"
    ask = lambda: load.bench_peer(  # noqa: E731
        peer.place, ["rate", base, 16, 500, min(run.seconds, 5)], run.seconds
    )
    without = ask()
    with background(peer, ["stall", base + "large", base + "bodies/stall", STALLED], "stalled"):
        with Watch(peer) as watch:
            result = ask()
    sample = watch.sample_of(result)
    sample |= {f"{name}_without": without[name] for name in ("p50_us", "p99_us", "p999_us")}
    return sample


def services(peer, _run):
    """Memory with many services known, when each was called once, when every endpoint was dialled, and some time after
    the last call."""
    place = peer.place
    urls = peer.plan.add_services(place, SERVICES, ENDPOINTS)
    peer.restart()
    try:
        known = max(process.rss_mb() for process in peer.proxies[:1])
        file = place.path("urls")
        with open(file, "w") as opened:
            opened.write("\n".join(urls))
        once = load.bench_peer(place, ["visit", file, 1], 60)
        called, connections_once = peer.proxies[0].rss_mb(), connections_between(place)
        with Watch(peer) as watch:
            result = load.bench_peer(place, ["visit", file, 4 * ENDPOINTS], 120)
        sample = watch.sample_of(result)
        sample |= {
            "rss_mb_known": known,
            "rss_mb_called": called,
            "connections_called": connections_once,
            "rss_mb_dialled": watch.highest_client,
            "connections_between": connections_between(place),
        }
        time.sleep(SETTLED)
        sample |= {"rss_mb_settled": peer.proxies[0].rss_mb(), "connections_settled": connections_between(place)}
        sample["errors"] += once["errors"]
        sample["first_error"] = once["first_error"] or sample["first_error"]
        return sample
    finally:
        peer.plan.remove_services(place)


def connections_between(place):
    """Open connections to the other sidecar, as the client's says."""
    lines = place.client.get(15020, "/metrics")[1].splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("weft_pool_connections{"))


has_proxies = lambda peer: len(peer.sides) == 2  # noqa: E731

CAPACITY_CASE = "http1-32"

CASES = [
    Case("start", "Start to ready, and idle memory", start, wants=has_proxies, own_start=True),
    http1(1),
    http1(32),
    http1(256),
    http1(2000),
    http2(4, 8),
    http2(32, 8, quick=False),
    grpc("unary"),
    grpc("stream"),
    at_rate(30),
    at_rate(60),
    connect("http"),
    connect("tcp"),
    opaque("down"),
    opaque("up"),
    body("down"),
    body("up"),
    Case("counts", "System calls and allocations per request, HTTP/1, 32 connections", counts, 32, rounds=1,
         wants=has_proxies),
    Case("stalled", f"Requests beside {STALLED} stalled downloads and {STALLED} stalled uploads, 500 a second", stalled,
         16, quick=False),
    Case("idle", "Idle HTTP/1 connections", idle_connections, quick=True, rounds=1, wants=has_proxies),
    Case("services", f"{SERVICES:,} services with {ENDPOINTS} endpoints each, known and dialled", services, quick=False,
         rounds=1, wants=lambda peer: peer.plan.add_services, own_start=True),
]  # fmt: skip
