"""What is compared: for each peer two commands, one beside the client and one beside the server, the rules that lead
connections to them, and where a client dials. Weft and Envoy are described in the same way as a peer of a file.

Envoy's configuration is in envoy.py; docs/benchmarks.md explains the file of further peers.
"""

import dataclasses
import json
import os
import re
import shlex
import time
import tomllib

import envoy
from machine import Failed, run, wait

USER = 1337  # of every proxy: what it sends is not redirected
APP_PORTS = {"http1": 8080, "http2": 8081, "grpc": 8082, "tcp": 8083}
OTLP_PORT = 4318
AUTHORITY_PORT = 15080
MANY_PORTS = 20_000  # and above: endpoints of the case `services`
SETTLE = 0.3  # seconds between ready and the first measurement
BARE_CASES = ["start", "http1", "rate", "connect-http", "counts"]
SAMPLED = 0.01  # share of the requests that are traced


@dataclasses.dataclass
class Side:
    """A proxy: its command, the lines of shell that lay its rules, and the URL that answers 200 once it is ready."""

    command: list
    rules: list
    ready: tuple
    environment: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Plan:
    """A peer as described, before anything runs."""

    name: str
    dial: str = "server"  # whom the client dials: the server itself, or the service in front of it
    setup: object = lambda place: None  # gives the two sides
    about: str = ""
    add_services: object = None  # tells it of many services; gives a URL for each
    remove_services: object = None
    cases: list = None  # beginnings of the names of cases that it takes part in; all, if none are given


class Place:
    """Where a peer runs: its pair of namespaces, a folder, the addresses."""

    def __init__(self, machine, number, name, tools):
        self.machine, self.number, self.name, self.tools = machine, number, name, tools
        self.client, self.server = machine.pair(number)
        self.service = f"10.99.{number}.100"
        self.folder = machine.path(name)
        os.makedirs(self.folder, exist_ok=True)
        os.chmod(self.folder, 0o777)

    def path(self, *parts):
        return os.path.join(self.folder, *parts)

    def start(self, name, arguments, namespace, **more):
        return self.machine.start(f"{self.name}-{name}", arguments, namespace, **more)


class Peer:
    """A peer that runs: the apps behind it, and up to two proxies."""

    def __init__(self, plan, place):
        self.plan, self.place, self.name = plan, place, plan.name
        self.apps, self.proxies, self.ready_ms = [], [], []
        self.sides = plan.setup(place) or ()
        for side, namespace in zip(self.sides, (place.client, place.server)):
            for rule in side.rules:
                namespace.run(["sh", "-ec", rule])

    def host(self, app):
        """HOST:PORT that a client dials to reach an app."""
        address = self.place.service if self.plan.dial == "service" else self.place.server.address
        return f"{address}:{APP_PORTS[app]}"

    def start(self):
        """Both proxies, the server's first; notes how long each took until it said that it is ready."""
        self.ready_ms = []
        for end in (1, 0):
            if end < len(self.sides):
                process, took = self.start_side(end)
                self.proxies.insert(0, process)
                self.ready_ms.append(took)

    def start_side(self, end):
        side, namespace = self.sides[end], (self.place.client, self.place.server)[end]
        begin = time.monotonic()
        process = self.place.start(
            ("client", "server")[end], side.command, namespace, user=USER, environment=side.environment
        )
        port, path = side.ready

        def is_ready():
            process.check()
            answer = namespace.get(port, path, timeout=1)
            return answer is not None and answer[0] == 200

        wait(f"{process.name} is ready", is_ready, pause=0.001, explain=lambda: f"Its log: {process.log}")
        return process, (time.monotonic() - begin) * 1000

    def restart(self):
        """New proxies, with nothing left of earlier load."""
        for process in self.proxies:
            self.place.machine.forget(process)
        self.proxies = []
        self.start()
        time.sleep(SETTLE if self.proxies else 0)

    def takes_part(self, case):
        if self.plan.cases and not any(case.name.startswith(name) for name in self.plan.cases):
            return False
        return bool(case.wants(self))

    def check(self):
        for process in self.apps + self.proxies:
            process.check()


# --- the two that are always there ------------------------------------------------------------------------------


def weft(place, sampled=SAMPLED):
    """With all that a user has by default: detection, metrics, log of failures, tracing of 1 %, retries, breakers."""
    sidecar, ca = place.tools["weft-sidecar"], place.tools["weft-ca"]
    made = run([ca, "init", "--dir", place.path("ca"), "--trust-domain", "bench", "--json"])
    root = json.loads(made)["root_sha256"]
    address = place.server.address
    for name in ("client", "server"):
        token = ["token", "create", "--dir", place.path("ca"), "--identity", identity(name), "--reusable"]
        run([ca, *token, "--out", place.path(name + ".token")])
        os.chown(place.path(name + ".token"), USER, USER)
    authority = f"{address}:{AUTHORITY_PORT}"
    serve = [ca, "serve", "--dir", place.path("ca"), "--listen", authority, "--audit", place.path("audit.log")]
    serve += ["--admin", f"{address}:15081"]
    process = place.start("authority", serve, place.server)

    def stands():
        process.check()
        return (place.server.get(15081, "/ready", host=address) or [0])[0] == 200

    wait("the authority is ready", stands)
    os.makedirs(place.path("services"))
    for app, port in APP_PORTS.items():
        write_service(place.path("services"), app, [f"{place.service}:{port}"], [f"{address}:{port}"])
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{address}:{OTLP_PORT}",
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": str(sampled),
        "OTEL_TRACES_EXPORTER": "otlp" if sampled else "none",
    }

    def side(name, namespace):
        command = [
            sidecar, "run", "--service", name, "--advertise", namespace.address, "--publish", "false",
            "--authority", authority, "--authority-sha256", root, "--token-file", place.path(name + ".token"),
            "--services-dir", place.path("services"), "--dns-upstream", "127.0.0.1",
            "--admin-socket", place.path(name + ".sock"),
        ]  # fmt: skip
        spared = f"{AUTHORITY_PORT},15081,{OTLP_PORT}"
        rules = [f"{shlex.quote(sidecar)} redirect apply --exclude-inbound-ports {spared}"]
        return Side(command, rules, (15020, "/ready"), environment)

    return side("client", place.client), side("server", place.server)


def identity(name):
    return f"spiffe://bench/ns/default/sa/{name}"


def write_service(folder, name, addresses, endpoints):
    """A service file, in JSON, which is YAML as well."""
    document = {
        "service": name,
        "identities": [identity("server")],
        "addresses": addresses,
        "endpoints": [{"address": endpoint} for endpoint in endpoints],
    }
    hidden = os.path.join(folder, f".{name}")
    with open(hidden, "w") as file:
        json.dump(document, file)
    os.rename(hidden, os.path.join(folder, f"{name}.yaml"))


def add_services(place, count, endpoints):
    """Service files with addresses of their own and endpoints on ports of their own, which all lead to the same app.
    Gives a URL for each."""
    address, last = place.server.address, MANY_PORTS + count * endpoints - 1
    rule = ["OUTPUT", "-p", "tcp", "-d", address, "--dport", f"{MANY_PORTS}:{last}", "-j", "REDIRECT"]
    place.server.run(["iptables", "-w", "-t", "nat", "-I", *rule, "--to-ports", str(APP_PORTS["http1"])])
    urls = []
    for number in range(count):
        first = MANY_PORTS + number * endpoints
        listed = [f"{address}:{port}" for port in range(first, first + endpoints)]
        own = f"10.230.{number >> 8}.{number & 255}:80"
        write_service(place.path("services"), f"many-{number}", [own], listed)
        urls.append(f"http://{own}/")
    return urls


def remove_services(place):
    for name in os.listdir(place.path("services")):
        if name.startswith("many-"):
            os.unlink(place.path("services", name))


def envoy_sides(place, between):
    """Two Envoys as a mesh would configure them; `between` is what they speak: http1 or http2."""
    certificates = envoy.make_certificates(place.folder, identity)
    sides = []
    for name, namespace, rules in (
        ("client", place.client, output_rules()),
        ("server", place.server, input_rules((OTLP_PORT,))),
    ):
        document = envoy.configuration(name, place, certificates[name], between, APP_PORTS, OTLP_PORT, SAMPLED)
        file = place.path(name + ".json")
        with open(file, "w") as opened:
            json.dump(document, opened, indent=1)
        command = [place.tools["envoy"], "-c", file, "--concurrency", "1", "--log-level", "error"]
        command += ["--disable-hot-restart", "--service-cluster", name, "--service-node", name]
        sides.append(Side(command, rules, (envoy.ADMIN_PORT, "/ready")))
    return sides


def output_rules():
    """What the app sends goes to port 15001, but for what the proxy's own user sends."""
    nat = "iptables -w -t nat -A"
    return [
        f"{nat} OUTPUT -p tcp -m owner --uid-owner {USER} -j RETURN",
        f"{nat} OUTPUT -p tcp -d 127.0.0.0/8 -j RETURN",
        f"{nat} OUTPUT -p tcp -j REDIRECT --to-ports 15001",
    ]


def input_rules(spared):
    nat = "iptables -w -t nat -A PREROUTING -p tcp"
    return [f"{nat} --dport {port} -j RETURN" for port in spared] + [f"{nat} ! -i lo -j REDIRECT --to-ports 15006"]


def bare(place):
    """Nothing around hyper and rustls: what is the least that a pair of proxies can cost? (tests/src/bin/bench-bare.rs)"""
    program, between, ready = place.tools["bench-bare"], "15006", "127.0.0.1:15000"
    run([program, "certificates", place.folder])
    os.chmod(place.path("key.pem"), 0o644)
    listen, server = "0.0.0.0:15001", f"{place.server.address}:{between}"
    client = [program, "client", place.folder, listen, server, ready]
    server = [program, "server", place.folder, f"0.0.0.0:{between}", f"127.0.0.1:{APP_PORTS['http1']}", ready]
    return Side(client, output_rules(), (15000, "/ready")), Side(server, [], (15000, "/ready"))


def plan_of_weft(name, sampled, about):
    setup = lambda place: weft(place, sampled)  # noqa: E731
    return Plan(name, "service", setup, about, add_services, remove_services)


def plan_of_envoy(name, between, about):
    return Plan(name, "service", lambda place: envoy_sides(place, between), about)


PLANS = {
    plan.name: plan
    for plan in (
        Plan("direct", about="no proxy, no redirect"),
        plan_of_weft("weft", SAMPLED, "HTTP/2 between, one worker, defaults, 1 % of requests traced"),
        plan_of_envoy("envoy", "http2", "HTTP/2 between, one worker, 1 % of requests traced"),
        plan_of_envoy("envoy-http1", "http1", "HTTP/1 between, one worker, 1 % of requests traced"),
        Plan("bare", "server", bare, "hyper and rustls alone, HTTP/2 between, one worker, no mesh", cases=BARE_CASES),
        plan_of_weft("weft-untraced", 0, "as weft, nothing traced"),
        plan_of_weft("weft-traced", 1, "as weft, every request traced"),
    )
}


# --- peers of a file --------------------------------------------------------------------------------------------

TEXTS = {"name", "client", "server", "ready", "setup", "dial"}
LISTS = {"client_rules", "server_rules", "cases"}
KEYS = TEXTS | LISTS | {"environment"}


def read_plans(path):
    """The peers of a file (TOML). Every mistake names the peer and the key."""
    try:
        with open(path, "rb") as file:
            entries = tomllib.load(file).get("peer")
    except (OSError, ValueError) as error:
        raise Failed(f"peers file {path}: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise Failed(f"peers file {path} holds no [[peer]]; see docs/benchmarks.md")
    return [plan_of(path, number, entry) for number, entry in enumerate(entries, start=1)]


def plan_of(path, number, entry):
    where = f"peers file {path}, peer {number}"
    unknown = set(entry) - KEYS
    if unknown:
        raise Failed(f"{where}: unknown key `{min(unknown)}`; known are {', '.join(sorted(KEYS))}")
    for key in sorted(KEYS & set(entry)):
        kind, word = (str, "text") if key in TEXTS else (list, "a list of texts") if key in LISTS else (dict, "a table")
        good = isinstance(entry[key], kind) and (kind is not list or all(isinstance(line, str) for line in entry[key]))
        if not good:
            raise Failed(f"{where}: `{key}` must be {word}")
    for key in ("name", "client", "server", "ready"):
        if not entry.get(key):
            raise Failed(f"{where}: `{key}` is missing")
    if not re.fullmatch(r"[a-z0-9-]{1,20}", entry["name"]) or entry["name"] in PLANS:
        raise Failed(f"{where}: `name` must be of a-z, 0-9 and -, at most 20 long, and none of {', '.join(PLANS)}")
    if entry.get("dial", "server") not in ("server", "service"):
        raise Failed(f"{where}: `dial` must be `server` or `service`")
    ready = re.fullmatch(r":(\d+)(/\S*)", entry["ready"])
    if not ready:
        raise Failed(f"{where}: `ready` must be a port and a path, such as `:15000/ready`")

    def setup(place):
        words = {
            "dir": place.folder,
            "client": place.client.address,
            "server": place.server.address,
            "service": place.service,
            "otlp": f"{place.server.address}:{OTLP_PORT}",
        }
        fill = lambda text: re.sub(r"\{(\w+)\}", lambda m: words.get(m[1], m[0]), text)  # noqa: E731
        if "setup" in entry:
            run(["sh", "-ec", fill(entry["setup"])])
        environment = {key: fill(str(value)) for key, value in entry.get("environment", {}).items()}
        return [
            Side(
                ["sh", "-c", "exec " + fill(entry[end])],
                [fill(rule) for rule in entry.get(end + "_rules", [])],
                (int(ready[1]), ready[2]),
                environment,
            )
            for end in ("client", "server")
        ]

    about = f"from {os.path.basename(path)}"
    return Plan(entry["name"], entry.get("dial", "server"), setup, about, cases=entry.get("cases"))
