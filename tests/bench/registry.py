"""What a registry costs the sidecars, and the sidecars the registry: a real Consul server, an agent beside the sidecars, and
sidecars that dial much or much is registered. Started by `registry`.

Each case has a pair of namespaces of its own: the agent and the sidecars in one, the server in the other. What flows
between sidecars and agent is what the loopback interface counts, what flows between agent and server is on the cable.
"""

import argparse
import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import socket
import sys
import time

from machine import Asked, Failed, Machine, Signals, run, wait
from polls import Probes, Recording

USER = 1337
SERVICES = 50  # that one sidecar dials, in the cases with many sidecars
IDLE = 30  # seconds of the measurement without a change
ONE, TWO = 8001, 8002  # where the app answers
TXN = 64  # operations in one transaction of Consul
STALE = 30  # seconds after which a change must be everywhere
APP = """
import asyncio
async def serve(reader, writer):
    try:
        while True:
            await reader.readuntil(b'\\r\\n\\r\\n')
            writer.write(b'HTTP/1.1 200 OK\\r\\ncontent-length: 2\\r\\n\\r\\nok')
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()
async def main():
    for port in (8001, 8002):
        await asyncio.start_server(serve, '0.0.0.0', port, backlog=16384)
    print('serving', flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def main():
    arguments = parse()
    machine = None
    try:
        machine = Machine(Signals())
        cases = {
            "endpoints": lambda place: endpoints(place, arguments.endpoints, arguments.rounds),
            "10x50": lambda place: sidecars(place, 10, ""),
            "200x50": lambda place: sidecars(place, 200, "limits { http_max_conns_per_client = 8192 }"),
        }
        for number, name in enumerate(name for name in cases if not arguments.case or name in arguments.case):
            if number == 0:
                print(f"Consul {run(['consul', 'version']).split()[1]}, {os.cpu_count()} processors\n", flush=True)
            cases[name](Place(machine, number + 1, name, arguments))
        return 0
    except Failed as failure:
        say(f"failed: {failure}")
        return 1
    except Asked as asked:
        say(f"stopped by {asked}")
        return 128 + asked.number
    finally:
        if machine:
            machine.stop()


def parse():
    parser = argparse.ArgumentParser(
        prog="tests/bench/registry", usage="tests/bench/registry --help shows the options", add_help=False
    )
    parser.add_argument("--case", action="append")
    parser.add_argument("--endpoints", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--binaries", required=True)
    return parser.parse_args()


# --- the world --------------------------------------------------------------------------------------------------


class Place:
    """A pair of namespaces with a Consul server in one, an agent in the other, and an app beside the agent."""

    def __init__(self, machine, number, name, arguments):
        self.machine, self.name = machine, name
        self.sidecar = os.path.join(arguments.binaries, "weft-sidecar")
        self.here, self.there = machine.pair(number)
        with self.here.entered(), open("/proc/sys/net/ipv4/ip_local_reserved_ports", "w") as file:
            file.write("8300-8600,20000-25000")
        self.folder = machine.path(name)
        os.makedirs(self.folder)
        os.chmod(self.folder, 0o777)
        self.app = self.start("app", [sys.executable, "-c", APP], self.here)
        self.stopped = []

    def start(self, name, arguments, namespace, **more):
        return self.machine.start(f"{self.name}-{name}", arguments, namespace, **more)

    def path(self, name):
        return os.path.join(self.folder, name)

    def start_consul(self, settings):
        self.server = self.consul("server", self.there, ["-server", "-bootstrap-expect", "1"], "")
        self.wait_for_consul(self.there, "/v1/status/leader")
        self.agent = self.consul("agent", self.here, ["-retry-join", self.there.address], settings)
        self.wait_for_consul(self.here, "/v1/status/leader")
        wait("the app listens", lambda: self.here.get(ONE, "/", timeout=0.1) is not None or accepts(self.here, ONE))

    def consul(self, name, namespace, more, settings):
        file = self.path(f"{name}.hcl")
        with open(file, "w") as hcl:
            hcl.write("telemetry { prometheus_retention_time = \"10m\" disable_hostname = true }\n" + settings)
        arguments = ["consul", "agent", "-node", f"{self.name}-{name}", "-bind", namespace.address, "-config-file", file]
        arguments += ["-data-dir", self.path(f"data-{name}"), "-disable-host-node-id", "-log-level", "warn"]
        return self.start(name, arguments + more, namespace)

    def wait_for_consul(self, namespace, path):
        wait("Consul has a leader", lambda: (namespace.get(8500, path, timeout=2) or (0, ""))[1].strip() not in ("", '""'))

    def put(self, path, body):
        with self.here.entered(), contextlib.closing(http.client.HTTPConnection("127.0.0.1", 8500, timeout=30)) as consul:
            consul.request("PUT", path, json.dumps(body))
            answer = consul.getresponse()
            text = answer.read()
            if answer.status != 200:
                raise Failed(f"Consul refuses {path}: {answer.status} {text[:300]}")
            return text

    def register(self, instances):
        """Many at a time, each (node, service, id, address, port, weight), on nodes that are in the catalog already."""
        operations = [{"Service": {"Verb": "set", "Node": node, "Service": {
            "ID": id, "Service": service, "Address": address, "Port": port,
            "Tags": ["v1", "measured"], "Meta": {"weft-zone": "eu-1a", "weft-version": "1.0"},
            "Weights": {"Passing": weight, "Warning": 1},
        }}} for node, service, id, address, port, weight in instances]  # fmt: skip
        for at in range(0, len(operations), TXN):
            self.put("/v1/txn", operations[at : at + TXN])

    def node(self, name):
        self.put("/v1/catalog/register", {"Node": name, "Address": "127.0.0.1"})

    def run_sidecar(self, number, more, environment=None):
        """Without identity and redirect: apps reach it at addresses of loopback, one for each service."""
        name = f"sidecar-{number}"
        arguments = [self.sidecar, "run", "--service", f"web-{number}", "--publish", "false", "--log", "warn"]
        arguments += ["--consul", "127.0.0.1:8500", "--advertise", self.here.address, "--admin-socket", self.socket(number)]
        arguments += ["--outbound-port", str(20000 + number), "--inbound-port", str(21000 + number)]
        arguments += ["--dns-port", str(22000 + number), "--admin", f"127.0.0.1:{23000 + number}"]
        return self.start(name, arguments + more, self.here, user=USER, environment=environment)

    def wait_until_ready(self, number, process):
        def is_ready():
            process.check()
            return (self.here.get(23000 + number, "/ready", timeout=1) or (0,))[0] == 200

        wait(f"sidecar {number} is ready", is_ready)

    def socket(self, number):
        return self.path(f"{number}.sock")

    def show(self, number, what):
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection:
            connection.settimeout(20)
            connection.connect(self.socket(number))
            connection.sendall(f"GET /{what} HTTP/1.1\r\nhost: sidecar\r\nconnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: connection.recv(1 << 20), b""))
        return json.loads(answer.split(b"\r\n\r\n", 1)[1])

    def bytes(self, interface):
        """Received and sent; on loopback each byte counts once."""
        with self.here.entered(), open("/proc/thread-self/net/dev") as file:
            fields = next(line for line in file if line.strip().startswith(interface + ":")).split(":")[1].split()
        return int(fields[0]) + (int(fields[8]) if interface != "lo" else 0)

    def connections(self):
        return len(self.here.run(["ss", "-Htn", "state", "established", "dst", "127.0.0.1:8500"]).splitlines())

    def stop(self):
        for process in reversed(self.machine.processes[:]):
            self.machine.forget(process)


def accepts(namespace, port):
    with contextlib.suppress(OSError), namespace.entered(), socket.socket() as connection:
        connection.settimeout(0.2)
        connection.connect(("127.0.0.1", port))
        return True
    return False


# --- one service with many endpoints ----------------------------------------------------------------------------


class Caller:
    """An app that calls through a sidecar over one connection, one request at a time."""

    def __init__(self, place, port):
        with place.here.entered():
            self.connection = socket.create_connection(("127.0.0.1", port), timeout=20)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def call(self):
        self.connection.sendall(b"GET / HTTP/1.1\r\nhost: big\r\n\r\n")
        answer = self.connection.recv(65536)
        while not answer.endswith(b"ok"):
            more = self.connection.recv(65536)
            if not more:
                raise Failed(f"the sidecar closed the connection: {answer[:200]}")
            answer += more
        if not answer.startswith(b"HTTP/1.1 200"):
            raise Failed(f"the sidecar answers {answer[:200]}")

    def call_for(self, seconds):
        """One call each 2 ms; gives the longest in ms."""
        end, longest = time.monotonic() + seconds, 0.0
        while (begin := time.monotonic()) < end:
            self.call()
            longest = max(longest, time.monotonic() - begin)
            time.sleep(0.002)
        return longest * 1000


def endpoints(place, count, rounds):
    """The longest polls of the worker when a service of so many endpoints is met, and when it changes."""
    place.start_consul("")
    say(f"registering {count} instances")
    nodes = [f"node-{number}" for number in range((count + 99) // 100)]
    address = lambda number: f"127.1.{number // 250}.{number % 250 + 1}"
    instances = lambda numbers, weight=100: [
        (nodes[number // 100], "big", f"big-{number}", address(number), ONE, weight) for number in numbers]  # fmt: skip

    def enter(some_nodes, numbers):
        for node in some_nodes:
            place.node(node)
        place.register(instances(numbers))

    enter(nodes, range(count))
    place.node("small")
    place.register([("small", "small", "small-1", "127.0.0.1", ONE, 100)])
    half = (count + 1) // 200
    seen = [Seen(*step) for step in (
        ("calls of another service, 1 s", 1, lambda _: None, "small"),
        ("the first call of the service, 2 s", 2, lambda _: Caller(place, 24001).call(), "small"),
        ("calls of the service without a change, 2 s", 2, lambda _: None, "big"),
        ("one instance changes its weight, 1 s", 1, lambda round: place.register(instances([7], 110 + round)), "big"),
        ("another, 1 s", 1, lambda round: place.register(instances([8], 110 + round)), "big"),
        (f"1,000 instances change theirs, in {-(-1000 // TXN)} steps, 3 s", 3,
         lambda round: place.register(instances(range(1000, 2000), 110 + round)), "big"),
        (f"half of them leave, in {len(nodes) - half} steps, 4 s", 4,
         lambda _: [place.put("/v1/catalog/deregister", {"Node": node}) for node in nodes[half:]], "big"),
        (f"they come back, in {-(-(count - half * 100) // TXN)} steps, 6 s", 6,
         lambda _: enter(nodes[half:], range(half * 100, count)), "big"),
    )]  # fmt: skip
    memory = []
    with Probes(place.sidecar) as probes:
        for round in range(rounds):
            say(f"round {round + 1} of {rounds}")
            memory.append(endpoints_once(place, round, probes, seen))
    read = len(place.here.get(8500, "/v1/health/service/big")[1])
    polls = [poll for step in seen for poll in step.polls]
    over = lambda what, ms: sum(1 for poll in polls if getattr(poll, what) * 1e3 > ms)
    paused = sum(poll.charged - poll.ran for poll in polls)
    print(f"One service of {count:,} endpoints (an answer of {read / 1e6:.1f} MB), {rounds} rounds; the sidecar has "
          f"{middle_of(memory):.0f} MB in the end. {len(polls):,} polls of its worker, of which {over('ran', 1)} ran for more than "
          f"1 ms, {over('ran', 2)} for more than 2 ms, the longest for {longest(polls, 'ran'):.2f} ms. Charged with pauses of the "
          f"processor ({paused * 1e3:.0f} ms): {over('charged', 1)}, {over('charged', 2)}, and {longest(polls, 'charged'):.2f} ms.\n")  # fmt: skip
    print("| ms | worker: longest poll ran, middle round | longest | longest turn ran, middle round | longest "
          "| worker, all | control thread | threads beside | longest call |")  # fmt: skip
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for step in seen:
        print(f"| {step.what} | " + " | ".join(step.figures()) + " |")
    for poll in polls:
        if poll.where:
            found = ", ".join(f"{times} x {where}" for where, times in poll.where.most_common(6))
            print(f"\nA poll that ran for {poll.ran * 1e3:.2f} ms; where the timer found it: {found}")
    print(flush=True)
    place.stop()


def endpoints_once(place, round, probes, seen):
    """All steps with a sidecar that is new. Gives its memory in the end, in MB."""
    upstreams = ["--upstream", "127.0.0.1:24000=small", "--upstream", "127.0.0.1:24001=big"]
    sidecar = place.run_sidecar(round, upstreams)
    place.wait_until_ready(round, sidecar)
    worker = next(thread for thread in threads(sidecar) if name_of(sidecar, thread) == "worker-0")
    callers, begun = {}, []
    with Recording(place, probes, f"recording-{round}", worker) as recording:
        for step in seen:
            if step.service not in callers:
                callers[step.service] = Caller(place, {"small": 24000, "big": 24001}[step.service])
            before = {thread: cpu_ms(sidecar, thread) for thread in threads(sidecar)}
            begun.append(time.monotonic())
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                going_on = pool.submit(callers[step.service].call_for, step.seconds)
                step.action(round)
                step.calls.append(going_on.result())
            spent = {thread: cpu_ms(sidecar, thread) - before.get(thread, 0) for thread in threads(sidecar)}
            step.worker.append(spent.pop(worker))
            step.control.append(spent.pop(str(sidecar.pid)))
            step.beside.append(sum(spent.values()))
        begun.append(time.monotonic())
        memory = sidecar.rss_mb()
        polls, turns = recording.stop()
    for step, begin, end in zip(seen, begun, begun[1:]):
        step.add([poll for poll in polls if begin <= poll.begin < end], [turn for turn in turns if begin <= turn.begin < end])
    place.machine.forget(sidecar)
    return memory


class Seen:
    """A step of each round, and what it took in each."""

    def __init__(self, what, seconds, action, service):
        self.what, self.seconds, self.action, self.service = what, seconds, action, service
        self.polls, self.poll_ms, self.turn_ms = [], [], []
        self.worker, self.control, self.beside, self.calls = [], [], [], []

    def add(self, polls, turns):
        if not polls or not turns:
            raise Failed(f"not one poll was seen in: {self.what}")
        self.polls += polls
        self.poll_ms.append(longest(polls, "ran"))
        self.turn_ms.append(longest(turns, "ran"))

    def figures(self):
        most = [figure for ms in (self.poll_ms, self.turn_ms) for figure in (f"{middle_of(ms):.2f}", f"{max(ms):.2f}")]
        return most + [f"{middle_of(ms):.0f}" for ms in (self.worker, self.control, self.beside, self.calls)]


def longest(stretches, what):
    return max(getattr(stretch, what) for stretch in stretches) * 1e3


def middle_of(figures):
    return sorted(figures)[len(figures) // 2]


def threads(process):
    return [str(thread) for thread in process.threads()]


def name_of(process, thread):
    with contextlib.suppress(OSError), open(f"/proc/{process.pid}/task/{thread}/comm") as file:
        return file.read().strip()
    return ""


def cpu_ms(process, thread):
    with contextlib.suppress(OSError), open(f"/proc/{process.pid}/task/{thread}/schedstat") as file:
        return int(file.read().split()[0]) / 1e6
    return 0.0


# --- many sidecars ----------------------------------------------------------------------------------------------


REQUESTS = re.compile(r"^weft_registry_requests_total\{result=\"([a-z_]+)\"\} (\d+)", re.M)


def sidecars(place, count, settings):
    """So many sidecars on one agent, each dialling the same services: at rest, and when all services change."""
    place.start_consul(settings)
    place.node("apps")
    names = [f"s{number}" for number in range(SERVICES)]
    place.register([("apps", name, name, "127.0.0.1", ONE, 100) for name in names])
    say(f"starting {count} sidecars")
    processes = []
    address = lambda number: f"127.0.{1 + number // 200}.{1 + number % 200}"
    for number in range(count):
        upstreams = [["--upstream", f"{address(number)}:{24000 + at}={name}"] for at, name in enumerate(names)]
        processes.append(place.run_sidecar(number, sum(upstreams, [])))
    for number, process in enumerate(processes):
        place.wait_until_ready(number, process)

    def dial(number):
        for at in range(SERVICES):
            answer = place.here.get(24000 + at, "/", address(number), timeout=20)
            if answer is None or answer[0] != 200:
                raise Failed(f"sidecar {number} answers {answer} for s{at}")

    begin = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(dial, range(count)))
    say(f"all services are known to all after {time.monotonic() - begin:.1f} s")
    time.sleep(15)

    def look():
        agents = {name: process.cpu_ns() / 1e9 for name, process in (("agent", place.agent), ("server", place.server))}
        asked = requests(place, count)
        return {"requests": sum(asked.values()), "bad": sum(asked.values()) - asked.get("ok", 0), "lo": place.bytes("lo"),
                "eth0": place.bytes("eth0"), "sidecars": sum(p.cpu_ns() for p in processes) / 1e9,
                "at": time.monotonic(), **agents}  # fmt: skip

    before = look()
    time.sleep(IDLE)
    rest = {key: value - before[key] for key, value in look().items()}
    seconds = rest["at"]
    say("one service changes")
    one, waiting = change(place, count, names[:1], TWO)
    say("all services change")
    changed = look()
    every, waiting = (change(place, count, names[1:], TWO) if not waiting else ([], waiting))
    spent = {key: value - changed[key] for key, value in look().items()}
    rss = sorted(process.rss_mb() for process in processes)
    figures = {
        "sidecars × services": f"{count} × {SERVICES}",
        "connections to the agent": f"{place.connections():,}",
        "requests per second at rest": f"{rest['requests'] / seconds:.0f}",
        "of those without a good answer": f"{rest['bad']}",
        "sidecars and agent, kB per second": f"{rest['lo'] / seconds / 1e3:.0f}",
        "agent and server, kB per second": f"{rest['eth0'] / seconds / 1e3:.0f}",
        "agent's CPU, % of a core": f"{100 * rest['agent'] / seconds:.1f}",
        "server's CPU, % of a core": f"{100 * rest['server'] / seconds:.1f}",
        "each sidecar's CPU, % of a core": f"{100 * rest['sidecars'] / seconds / count:.2f}",
        "each sidecar's memory, MB": f"{rss[len(rss) // 2]:.1f}",
        "agent's memory, MB": f"{place.agent.rss_mb():.0f}",
        "one service changes: half know after, s": middle(one),
        "one service changes: all know after, s": last(one),
        "all services change: half know after, s": middle(every),
        "all services change: all know after, s": last(every),
        "all services change: requests": f"{spent['requests']}",
        "all services change: agent's CPU, s": f"{spent['agent']:.2f}",
    }
    for name, value in figures.items():
        print(f"| {name} | {value} |")
    print(flush=True)
    if waiting:
        raise Failed(f"{len(waiting)} of {count * SERVICES} had not heard of the change after {STALE} s")
    place.stop()


def change(place, count, names, port):
    """Moves services to another port; gives after how many seconds each sidecar knew of each, and who does not."""
    begin = time.monotonic()
    place.register([("apps", name, name, "127.0.0.1", port, 100) for name in names])
    waiting, ages = {(number, name) for number in range(count) for name in names}, []
    while waiting and time.monotonic() - begin < STALE:
        for number in sorted({number for number, _ in waiting}):
            shown = place.show(number, "endpoints")
            for name in names:
                known = [endpoint["address"] for endpoint in shown[name]["endpoints"]]
                if (number, name) in waiting and known == [f"127.0.0.1:{port}"]:
                    waiting.remove((number, name))
                    ages.append(time.monotonic() - begin)
        time.sleep(0.02)
    return sorted(ages), waiting


def middle(ages):
    return f"{ages[len(ages) // 2]:.1f}" if ages else "never"


def last(ages):
    return f"{ages[-1]:.1f}" if ages else "never"


def requests(place, count):
    """What the sidecars asked of Consul, by result."""
    total = {}
    for number in range(count):
        answer = place.here.get(23000 + number, "/metrics", timeout=20)
        for result, asked in REQUESTS.findall(answer[1] if answer else ""):
            total[result] = total.get(result, 0) + int(asked)
    return total


def say(text):
    print(f"registry: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
