"""The processes of the demo: the certificate authority, and one `weft-sidecar exec -- CMD` for each workload.

Every workload has a loopback address of its own, as a pod or host would have, so the usual ports are free. All files
are in one private temporary folder. Each process leads a session of its own and dies with this program, whatever
ends it; `stop` leaves neither process nor file.
"""

import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request

from apps import write_app_files
from registry import PORT as CONSUL_PORT, SERVER_PORTS, Consul

TRUST_DOMAIN = "demo"
PATIENCE = 30  # seconds for anything to start
STOP_PATIENCE = 5  # seconds for everything to stop by itself
APP_PORT = 8080
ADMIN_PORT = 15020
HERE = os.path.dirname(os.path.abspath(__file__))


class Failed(Exception):
    """The demo cannot go on; the text says why."""


class Asked(Exception):
    """Somebody asked the demo to stop."""

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """SIGINT, SIGTERM and SIGHUP become `Asked`, but never between the start of a process and its entry in our list."""

    def __init__(self):
        self.asked = None
        self.is_held = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self.handle)

    def handle(self, number, _frame):
        self.asked = number
        if not self.is_held:
            raise Asked(number)

    @contextlib.contextmanager
    def held(self):
        self.is_held = True
        try:
            yield
        finally:
            self.is_held = False
        if self.asked:
            raise Asked(self.asked)


class Workload:
    """One instance of a service: where it listens, what it runs, and the line it prints when it does."""

    def __init__(self, mesh, number, service, instance, program, port, command, ready_line):
        self.service, self.instance, self.port = service, instance, port
        self.program, self.command, self.ready_line = program, command, ready_line
        self.address = mesh.address(number)
        self.folder = os.path.join(mesh.folder, instance)
        self.socket = os.path.join(mesh.folder, instance + ".sock")
        self.log = os.path.join(self.folder, "log")
        self.access_log = os.path.join(self.folder, "access.log")
        self.pid_file = os.path.join(mesh.folder, instance + ".pid")
        self.process = None

    def endpoint(self):
        return f"{self.address}:{self.port}"

    def access(self):
        """The lines of its access log so far."""
        with open(self.access_log) as lines:
            return [json.loads(line) for line in lines if line.endswith("\n")]

    def metrics(self):
        url = f"http://{self.address}:{ADMIN_PORT}/metrics"
        with DIRECT.open(url, timeout=PATIENCE) as answer:
            return answer.read().decode()


# never through a proxy that the user's environment names
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def identity(service):
    return f"spiffe://{TRUST_DOMAIN}/ns/default/sa/{service}"


class Mesh:
    """Everything that runs, and where."""

    app_port = APP_PORT

    def __init__(self, binaries, signals, with_consul=False):
        self.signals = signals
        self.sidecar = os.path.join(os.path.abspath(binaries), "weft-sidecar")
        self.ca = os.path.join(os.path.abspath(binaries), "weft-ca")
        self.processes = []
        with signals.held():
            self.folder = tempfile.mkdtemp(prefix="weft-demo-")
        self.network = free_network()
        self.authority = f"{self.address(1)}:15080"
        self.consul = Consul(self.address(1)) if with_consul else None
        self.environment = self.clean_environment()
        self.workloads = self.plan()

    def address(self, number):
        return f"{self.network}.{number}"

    def path(self, *parts):
        return os.path.join(self.folder, *parts)

    def clean_environment(self):
        """Nothing of the user's settings for Weft, OpenTelemetry or proxies reaches the demo."""
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "TERM", "HOME") if name in os.environ}
        traces = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{self.address(1)}:4318",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json",
            "OTEL_TRACES_SAMPLER": "always_on",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        return {**kept, **traces, "TMPDIR": self.folder}

    def plan(self):
        orders = ["python3", "-B", os.path.join(HERE, "orders.py")]
        python = "Python's http.server"
        nginx = [shutil.which("nginx") or "nginx", "-c"]
        redis = ["redis-server", self.path("redis.conf")]
        return {
            workload.instance: workload
            for workload in [
                Workload(
                    self, 5, "redis", "redis", "redis-server", 6379, redis, "ready to accept connections"
                ),
                Workload(
                    self,
                    4,
                    "stock",
                    "stock",
                    "nginx, files",
                    APP_PORT,
                    nginx + [self.path("stock.conf")],
                    "start worker process ",
                ),
                Workload(
                    self,
                    3,
                    "orders",
                    "orders-1",
                    python,
                    APP_PORT,
                    orders + ["orders-1", str(APP_PORT)],
                    "listening",
                ),
                Workload(
                    self,
                    6,
                    "orders",
                    "orders-2",
                    python,
                    APP_PORT,
                    orders + ["orders-2", str(APP_PORT)],
                    "listening",
                ),
                Workload(
                    self,
                    2,
                    "web",
                    "web",
                    "nginx, reverse proxy",
                    APP_PORT,
                    nginx + [self.path("web.conf")],
                    "start worker process ",
                ),
            ]
        }

    # --- start -----------------------------------------------------------------------------------------------

    def prepare(self):
        """Files of the apps, the authority with its token for each service."""
        for name in ("services", "policies", "tokens", "visitor", *self.workloads):
            os.mkdir(self.path(name), 0o700)
        write_app_files(self)
        made = self.run([self.ca, "init", "--dir", self.path("ca"), "--trust-domain", TRUST_DOMAIN, "--json"])
        self.root_sha256 = json.loads(made)["root_sha256"]
        admin = f"{self.address(1)}:15081"
        serve = [self.ca, "serve", "--dir", self.path("ca"), "--listen", self.authority, "--admin", admin]
        serve += ["--audit", self.path("audit.log")]
        self.authority_process = self.start(serve, self.path("ca.log"))
        self.roots = self.path("roots.pem")
        with open(self.roots, "w") as roots:
            roots.write(self.run([self.ca, "root", "--dir", self.path("ca")]))
        for service in ("web", "orders", "stock", "redis", "visitor"):
            token = [
                "token",
                "create",
                "--dir",
                self.path("ca"),
                "--identity",
                identity(service),
                "--reusable",
            ]
            self.run([self.ca, *token, "--out", self.path("tokens", service)])

        def is_ready():
            self.alive(self.authority_process, "weft-ca", self.path("ca.log"))
            with contextlib.suppress(OSError):
                return DIRECT.open(f"http://{admin}/ready", timeout=1).status == 200

        wait("the authority is ready", is_ready)
        if self.consul:
            self.start_consul()

    def start_consul(self):
        log = self.path("consul.log")
        self.consul.process = self.start(self.consul.command(), log)

        def is_ready():
            self.alive(self.consul.process, "the Consul agent", log)
            return self.consul.is_ready()

        wait("the Consul agent is ready", is_ready, lambda: tail(log))

    def exec_arguments(self, service, address):
        """What every sidecar of the demo is told."""
        registry = self.consul.flags() if self.consul else ["--services-dir", self.path("services")]
        return [
            self.sidecar, "exec", "--service", service, "--advertise", address, *registry,
            "--authority", self.authority, "--authority-sha256", self.root_sha256,
            "--token-file", self.path("tokens", service),
            "--policies-dir", self.path("policies"),
            "--mtls", "strict", "--access-log", "all",
            "--settle-time", "50ms", "--drain-timeout", "2s",
        ]  # fmt: skip

    def launch(self, workload):
        """Starts a workload without waiting for it."""
        arguments = self.exec_arguments(workload.service, workload.address)
        arguments += ["--instance", workload.instance, "--port", str(workload.port)]
        arguments += ["--admin", f"{workload.address}:{ADMIN_PORT}", "--admin-socket", workload.socket]
        arguments += ["--access-log-file", workload.access_log, "--", *workload.command]
        open(workload.access_log, "a").close()
        workload.process = self.start(arguments, workload.log)
        with open(workload.pid_file, "w") as file:
            file.write(f"{workload.process.pid}\n")

    def wait_for(self, workload):
        """Until its app listens, and peers know where."""
        file = self.path("services", f"{workload.service}.{workload.instance}.yaml")

        def published():
            if self.consul:
                return self.consul.health(workload) == "passing"
            return os.path.exists(file)

        def listens():
            self.alive(workload.process, workload.instance, workload.log)
            with open(workload.log, errors="replace") as log:
                return workload.ready_line.lower() in log.read().lower() and published()

        wait(f"{workload.instance} listens", listens, lambda: tail(workload.log))

    def visitor_arguments(self):
        arguments = self.exec_arguments("visitor", self.address(9))
        # any free port: nobody scrapes a visitor, and several may be there at a time
        return arguments + [
            "--admin",
            f"{self.address(9)}:0",
            "--access-log-file",
            self.path("visitor", "access.log"),
        ]

    def visit(self, command):
        """Starts a command as a workload that nobody calls."""
        name = f"visitor-{len(self.processes)}"
        arguments = self.visitor_arguments() + ["--admin-socket", self.path(name + ".sock"), "--log", "warn"]
        return self.start(
            [*arguments, "--", *command], self.path("visitor", "log"), stdout=self.path(name + ".out")
        ), name

    def visit_output(self, process, name):
        """Waits for a visitor and gives its output."""
        wait(
            "the visitor is back",
            lambda: process.poll() is not None,
            lambda: tail(self.path("visitor", "log")),
        )
        if process.returncode != 0:
            raise Failed(
                f"the visitor's command ended with {process.returncode}: {tail(self.path('visitor', 'log'))}"
            )
        with open(self.path(name + ".out")) as output:
            return output.read()

    def visitor_access(self):
        with open(self.path("visitor", "access.log")) as lines:
            return [json.loads(line) for line in lines]

    def write_visitor_script(self):
        """A command for people that runs any other as the visitor."""
        lines = ["#!/bin/sh"]
        for name, value in self.environment.items():
            if name.startswith("OTEL_"):
                lines.append(f"export {name}={shlex.quote(value)}")
        socket_path = shlex.quote(self.folder) + "/visitor-$$.sock"
        lines.append(f"exec {shlex.join(self.visitor_arguments())} \\")
        lines.append(f'    --admin-socket {socket_path} --log warn -- "$@"')
        script = "\n".join(lines) + "\n"
        with open(self.path("as-visitor"), "w") as file:
            file.write(script)
        os.chmod(self.path("as-visitor"), 0o700)

    # --- processes -------------------------------------------------------------------------------------------

    def start(self, arguments, log, stdout=None):
        with self.signals.held(), open(log, "ab") as errors, open(stdout or log, "ab") as output:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *arguments],
                stdin=subprocess.DEVNULL, stdout=output, stderr=errors,
                env=self.environment, cwd=self.folder, start_new_session=True,
            )  # fmt: skip
            self.processes.append(process)
        return process

    def run(self, arguments, with_errors=False):
        """Runs a short command to its end, which no signal interrupts."""
        with self.signals.held():
            done = subprocess.run(
                arguments,
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
            )
        if done.returncode != 0:
            raise Failed(f"{shlex.join(arguments[:3])} failed: {done.stderr.strip()}")
        return done.stdout + done.stderr if with_errors else done.stdout

    def show(self, workload, view):
        return json.loads(self.run([self.sidecar, "show", view, "--admin-socket", workload.socket]))

    def alive(self, process, name, log):
        if process.poll() is not None:
            raise Failed(f"{name} ended with {process.returncode}: {tail(log)}")

    def kill(self, workload):
        """As if its machine had lost power: sidecar and app at once."""
        os.killpg(workload.process.pid, signal.SIGKILL)
        workload.process.wait()

    def stop(self):
        """Ends everything, asking first, and removes the folder. Gives the names of what had to be killed."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        # the registry after those who leave it
        agent = [self.consul.process] if self.consul and self.consul.process else []
        others = [process for process in self.processes if process not in agent]
        stubborn = end(others) + end(agent)
        shutil.rmtree(self.folder, ignore_errors=True)
        return stubborn


def end(processes):
    """Asks them to end, and kills those that do not. Gives the names of these."""
    stubborn = []
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + STOP_PATIENCE
    for process in processes:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            stubborn.append(shlex.join(process.args[3:6]))
        # whatever is left of its session
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return stubborn


def free_network():
    """A part of 127.0.0.0/8 where nobody listens on the ports that we need."""
    for _ in range(50):
        network = f"127.{random.randrange(16, 250)}.{random.randrange(1, 250)}"
        wanted = [(1, port) for port in (15080, 15081, 4318, CONSUL_PORT, *SERVER_PORTS)]
        wanted += [(number, port) for number in range(2, 7) for port in (APP_PORT, 6379, ADMIN_PORT)]
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for number, port in wanted:
                listener = stack.enter_context(socket.socket())
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((f"{network}.{number}", port))
            return network
    raise Failed(
        "ports 4318, 6379, 8080, 8300, 8301, 8500, 15020, 15080 and 15081 are taken on every loopback address "
        "that was tried"
    )


def wait(what, is_so, explain=lambda: ""):
    """Looks again and again."""
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        if time.monotonic() > deadline:
            raise Failed(f"waited {PATIENCE} s in vain until {what}. {explain()}")
        time.sleep(0.02)


def tail(path):
    try:
        with open(path, errors="replace") as file:
            return "\n    " + "\n    ".join(file.read().strip().splitlines()[-8:])
    except OSError:
        return ""
