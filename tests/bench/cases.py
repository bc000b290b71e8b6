"""The cases: what is done to a peer, and what is counted. A case gives one sample; main.py repeats it in turns."""

import contextlib
import dataclasses
import threading
import time

import load
from machine import Span

WARM_UP = 0.5  # seconds of load before the first measurement of a peer


@dataclasses.dataclass
class Case:
    """One thing to measure. `measure(peer, seconds)` gives a sample: names to figures."""

    name: str
    title: str
    measure: object
    connections: int = 0
    quick: bool = False
    rounds: int = 0  # if not as many as the run has
    peers: object = lambda peer: True


class Watch:
    """Accounts of both proxies around a measurement: processor time, largest resident memory, steal, foreign load."""

    def __init__(self, peer):
        self.peer = peer

    def __enter__(self):
        self.peer.check()
        self.highest, self.ended = 0.0, threading.Event()
        self.sampler = threading.Thread(target=self.sample, daemon=True)
        self.span = Span(self.peer.place.machine.processes)
        self.before = [process.cpu_ns() for process in self.peer.proxies]
        self.begin = time.monotonic()
        self.sampler.start()
        return self

    def sample(self):
        while True:
            sizes = [process.rss_mb() for process in self.peer.proxies]
            self.highest = max([self.highest, *sizes])
            if self.ended.wait(0.2):
                return

    def __exit__(self, *_):
        self.seconds = time.monotonic() - self.begin
        self.cpu = [process.cpu_ns() - ns for process, ns in zip(self.peer.proxies, self.before)]
        self.machine = self.span.end()
        self.ended.set()
        self.sampler.join()

    def sample_of(self, counted, result):
        """The sample: what the generator said, and the accounts divided by what was counted."""
        done = counted or 1
        accounts = {
            "cpu_us_per_request": sum(self.cpu) / 1000 / done,
            "cpu_us_per_request_client": self.cpu[0] / 1000 / done if self.cpu else None,
            "cpu_us_per_request_server": self.cpu[1] / 1000 / done if len(self.cpu) > 1 else None,
            "rss_mb_load": self.highest,
        }
        if not self.peer.proxies:
            accounts = {}
        return {**result, **accounts, **self.machine}


def http1(connections):
    def measure(peer, seconds):
        with Watch(peer) as watch:
            result = load.wrk(peer.place, f"http://{peer.host('http1')}/", connections, seconds)
        return watch.sample_of(result["requests"], result)

    return Case(
        f"http1-{connections}",
        f"HTTP/1, {connections} connections" if connections > 1 else "HTTP/1, 1 connection",
        measure,
        connections,
        quick=connections < 2000,
    )


def http2(connections, streams):
    def measure(peer, seconds):
        with Watch(peer) as watch:
            result = load.h2load(peer.place, f"http://{peer.host('http2')}/", connections, streams, seconds)
        return watch.sample_of(result["requests"], result)

    title = f"HTTP/2, {connections} connections with {streams} streams"
    return Case(f"http2-{connections}x{streams}", title, measure, connections, quick=True)


CASES = [http1(1), http1(32), http1(256), http1(2000), http2(4, 8)]


def settle(peer):
    """Lets a peer dial what it keeps open, and grow what it keeps."""
    with contextlib.suppress(Exception):
        load.wrk(peer.place, f"http://{peer.host('http1')}/", 32, 1)
