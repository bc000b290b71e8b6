"""The load generators and how their output is read: wrk, h2load, and bench-peer of the tests crate, which counts
latency from the moment when a request should have begun.
"""

import json
import re

from machine import Failed, write

# wrk's own report is rounded; its hook knows the figures
WRK_REPORT = """
done = function(summary, latency, requests)
    local e = summary.errors
    io.write(string.format("\\nRESULT %d %d %d %d %d %d %d\\n", summary.requests, summary.duration,
        e.connect + e.read + e.write + e.timeout, e.status,
        latency:percentile(50), latency:percentile(99), latency:percentile(99.9)))
end
"""


def wrk(place, url, connections, seconds, headers=()):
    """HTTP/1 as fast as it goes. Latency is of a closed loop: each connection waits for its answer."""
    script = write(place.machine.path("report.lua"), WRK_REPORT)
    arguments = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "--latency", "-s", script]
    for header in headers:
        arguments += ["-H", header]
    output = place.machine.run([*arguments, url], place.client, seconds + 30)
    found = re.search(r"^RESULT (.*)$", output, re.M)
    if not found:
        raise Failed(f"wrk printed no result: {output[-300:]}")
    requests, microseconds, broken, refused, p50, p99, p999 = (int(word) for word in found[1].split())
    return {
        "requests": requests,
        "requests_per_second": requests / (microseconds / 1e6),
        "errors": broken + refused,
        "p50_us": p50,
        "p99_us": p99,
        "p999_us": p999,
    }


H2LOAD_DONE = re.compile(r"^finished in ([\d.]+)(us|ms|s), ([\d.]+) req/s", re.M)
H2LOAD_COUNT = re.compile(
    r"^requests: .*?(\d+) done, (\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout", re.M
)


def h2load(place, url, connections, streams, seconds, more=()):
    """HTTP/2 as fast as it goes; its log gives each request's microseconds."""
    log = place.machine.path("h2load.log")
    write(log, "")
    arguments = ["h2load", "-t1", f"-c{connections}", f"-m{streams}", f"-D{seconds}", f"--log-file={log}"]
    output = place.machine.run([*arguments, *more, url], place.client, seconds + 30)
    count, done = H2LOAD_COUNT.search(output), H2LOAD_DONE.search(output)
    if not count or not done:
        raise Failed(f"h2load printed no result: {output[-300:]}")
    _, good, failed, errored, timed_out = (int(word) for word in count.groups())
    with open(log) as lines:
        latencies = sorted(int(line.split("\t")[2]) for line in lines if line.count("\t") == 2)
    return {
        "requests": good,
        "requests_per_second": good / seconds,
        # what was under way when the time was over is no error
        "errors": failed - errored + timed_out,
        **percentiles(latencies),
    }


def percentiles(sorted_values):
    if not sorted_values:
        return {"p50_us": None, "p99_us": None, "p999_us": None}
    at = lambda share: sorted_values[min(len(sorted_values) - 1, int(len(sorted_values) * share))]  # noqa: E731
    return {"p50_us": at(0.5), "p99_us": at(0.99), "p999_us": at(0.999)}


def bench_peer(place, arguments, seconds):
    """bench-peer in the client's namespace; prints one JSON object."""
    output = place.machine.run([place.tools["bench-peer"], *map(str, arguments)], place.client, seconds + 60)
    try:
        return json.loads(output.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise Failed(f"bench-peer {arguments[0]} printed no result: {output[-300:]}") from None
