"""The machine below the benchmark: network namespaces in pairs, processes that never outlive us, and the kernel's own
accounts (processor time, memory, steal). Nothing here knows what is measured.

Traffic stays inside the namespaces. Each process leads a session of its own and dies with this program; `stop` leaves
neither process, namespace nor file. Needs root.
"""

import contextlib
import ctypes
import os
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time

PATIENCE = 30  # seconds for anything to start
STOP_PATIENCE = 5  # seconds for everything to stop by itself
FILES = 200_000  # descriptors: some cases hold tens of thousands of connections
PREFIX = "wbench"
PROXY_PORTS = "15000-15099"  # where proxies listen, their admin included
CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None, use_errno=True)


class Failed(Exception):
    """The benchmark cannot go on; the text says why."""


class Asked(Exception):
    """Somebody asked the benchmark to stop."""

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """SIGINT, SIGTERM and SIGHUP become `Asked`, but never between the start of a process and its entry in our list."""

    def __init__(self):
        self.asked, self.is_held = None, False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self.handle)

    def handle(self, number, _frame):
        self.asked = number
        if not self.is_held:
            raise Asked(number)

    @contextlib.contextmanager
    def held(self):
        before, self.is_held = self.is_held, True
        try:
            yield
        finally:
            self.is_held = before
        if self.asked and not before:
            raise Asked(self.asked)


class Namespace:
    """A network namespace with loopback, one address and a default route to its partner."""

    def __init__(self, name, address):
        self.name, self.address = name, address
        run(["ip", "netns", "add", name])
        self.file = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)

    @contextlib.contextmanager
    def entered(self):
        """This thread, what it opens and what it starts are in the namespace."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            set_namespace(self.file)
            yield
        finally:
            set_namespace(home)
            os.close(home)

    def run(self, arguments):
        with self.entered():
            return run(arguments)

    def get(self, port, path, host="127.0.0.1", timeout=5):
        """GET over plain HTTP: status and body, or None if nobody answers. Cheap: it is asked every millisecond."""
        with contextlib.suppress(OSError), self.entered(), socket.socket() as connection:
            connection.settimeout(timeout)
            connection.connect((host, port))
            connection.sendall(f"GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
            return int(answer.split(b" ", 2)[1]), answer.split(b"\r\n\r\n", 1)[1].decode(errors="replace")
        return None

    def remove(self):
        os.close(self.file)
        subprocess.run(["ip", "netns", "delete", self.name], stderr=subprocess.DEVNULL)


def set_namespace(file):
    if LIBC.setns(file, CLONE_NEWNET) != 0:
        raise Failed(f"entering a network namespace failed: {os.strerror(ctypes.get_errno())}")


class Process:
    """A process of ours, and what the kernel knows about it."""

    def __init__(self, popen, name, log):
        self.popen, self.name, self.log = popen, name, log
        self.pid = popen.pid

    def check(self):
        if self.popen.poll() is not None:
            raise Failed(f"{self.name} ended with {self.popen.returncode}: {tail(self.log)}")

    def cpu_ns(self):
        """Time on a processor, all threads, as the scheduler counts it."""
        total = 0
        for thread in self.threads():
            with contextlib.suppress(OSError), open(f"/proc/{self.pid}/task/{thread}/schedstat") as file:
                total += int(file.read().split()[0])
        return total

    def threads(self):
        with contextlib.suppress(OSError):
            return [int(name) for name in os.listdir(f"/proc/{self.pid}/task")]
        return []

    def rss_mb(self):
        with contextlib.suppress(OSError), open(f"/proc/{self.pid}/status") as file:
            for line in file:
                if line.startswith("VmRSS:"):
                    return int(line.split()[1]) / 1024
        return 0.0

    def stop(self, patience=STOP_PATIENCE):
        """Asks first; with a patience of 0 it does not ask."""
        if patience and self.popen.poll() is None:
            self.popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(patience)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.popen.wait()


class Machine:
    """All namespaces, processes and files of one run."""

    def __init__(self, signals):
        if os.geteuid() != 0:
            raise Failed("network namespaces and redirects need root: sudo tests/bench/run")
        self.signals, self.processes, self.namespaces = signals, [], []
        remove_leftovers()
        self.files = raise_file_limit()
        with signals.held():
            self.folder = tempfile.mkdtemp(prefix="weft-bench-")
        os.chmod(self.folder, 0o755)

    def path(self, *parts):
        return os.path.join(self.folder, *parts)

    def pair(self, number):
        """Two namespaces with a cable between them: of the client and of the server."""
        names = [f"{PREFIX}{os.getpid()}-{number}{end}" for end in "cs"]
        ends = []
        for last, name in enumerate(names, start=1):
            with self.signals.held():
                ends.append(Namespace(name, f"10.99.{number}.{last}"))
                self.namespaces.append(ends[-1])
        run(["ip", "link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1]])
        for end, other in (ends, reversed(ends)):
            end.run(["ip", "link", "set", "lo", "up"])
            end.run(["ip", "addr", "add", end.address + "/24", "dev", "eth0"])
            end.run(["ip", "link", "set", "eth0", "up"])
        for end, other in (ends, ends[::-1]):
            end.run(["ip", "route", "add", "default", "via", other.address])
            with end.entered():
                write("/proc/sys/net/ipv4/ip_local_port_range", "10240 65535")
                # a connection that happens to get a port of a proxy would keep the next one from starting
                write("/proc/sys/net/ipv4/ip_local_reserved_ports", PROXY_PORTS)
                write("/proc/sys/net/ipv4/tcp_max_syn_backlog", "16384")
                write("/proc/sys/net/core/somaxconn", "16384")
                # a port may be used again at once: many cases open tens of thousands of connections
                write("/proc/sys/net/ipv4/tcp_tw_reuse", "1")
        return ends

    def start(self, name, arguments, namespace, user=0, environment=None):
        """Starts a program in a namespace; its output goes to a log of its own."""
        log = self.path(f"{name}.log")
        with self.signals.held(), namespace.entered(), open(log, "ab") as output:
            try:
                popen = subprocess.Popen(
                    arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=self.folder,
                    env={**clean_environment(), **(environment or {})}, start_new_session=True,
                    user=user, group=user, extra_groups=[], preexec_fn=die_with_parent,
                )  # fmt: skip
            except OSError as error:
                raise Failed(f"{name}: {shlex.join(arguments[:2])}: {error}") from error
            process = Process(popen, name, log)
            self.processes.append(process)
        return process

    def run(self, arguments, namespace, timeout):
        """Runs a load generator to its end and gives what it printed."""
        popen = None
        try:
            with self.signals.held(), namespace.entered():
                popen = subprocess.Popen(
                    arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                    cwd=self.folder, env=clean_environment(), text=True, start_new_session=True,
                    preexec_fn=die_with_parent,
                )  # fmt: skip
            output, errors = popen.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise Failed(f"{shlex.join(arguments)} did not end within {timeout} s") from None
        finally:
            if popen and popen.poll() is None:
                popen.kill()
                popen.communicate()
        if popen.returncode != 0:
            raise Failed(f"{shlex.join(arguments)} ended with {popen.returncode}: {(errors or output).strip()[-500:]}")
        return output

    def forget(self, process):
        process.stop(patience=0)
        self.processes.remove(process)

    def stop(self):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        for process in self.processes:
            if process.popen.poll() is None:
                process.popen.terminate()
        for process in self.processes:
            process.stop(1)
        for namespace in self.namespaces:
            namespace.remove()
        shutil.rmtree(self.folder, ignore_errors=True)


def raise_file_limit():
    """As many descriptors as this machine grants; gives how many."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
        return FILES
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def die_with_parent():
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def clean_environment():
    """Nothing of the user's settings for Weft, OpenTelemetry or proxies reaches what is measured."""
    return {name: os.environ[name] for name in ("PATH", "LANG", "HOME") if name in os.environ}


def remove_leftovers():
    """Namespaces of a run that was killed."""
    listed = os.listdir("/run/netns") if os.path.isdir("/run/netns") else []
    for name in listed:
        owner = name[len(PREFIX) :].split("-")[0] if name.startswith(PREFIX) else ""
        if owner.isdigit() and not os.path.exists(f"/proc/{owner}"):
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL)


def run(arguments, timeout=PATIENCE):
    try:
        done = subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failed(f"{shlex.join(arguments)}: {error}") from error
    if done.returncode != 0:
        raise Failed(f"{shlex.join(arguments)} ended with {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def wait(what, is_so, pause=0.01, explain=lambda: "", patience=PATIENCE):
    """Looks again and again."""
    begin = time.monotonic()
    while not is_so():
        if time.monotonic() - begin > patience:
            raise Failed(f"waited {patience} s in vain until {what}. {explain()}")
        time.sleep(pause)


def write(path, text):
    with open(path, "w") as file:
        file.write(text)
    return path


def tail(path):
    with contextlib.suppress(OSError), open(path, errors="replace") as file:
        return "\n    " + "\n    ".join(file.read().strip().splitlines()[-8:])
    return ""


class Span:
    """What the machine did between `begin` and `end`: steal, and load that is not ours, in percent of all processors."""

    def __init__(self, processes):
        self.processes = processes
        self.begin = self.look()

    def look(self):
        with open("/proc/stat") as file:
            fields = [int(word) for word in file.readline().split()[1:]]
        user, nice, system, idle, iowait, _irq, softirq, steal = fields[:8]
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        own = time.process_time() + children.ru_utime + children.ru_stime
        own += sum(process.cpu_ns() for process in self.processes) / 1e9
        return {"all": sum(fields[:8]), "steal": steal, "busy": user + nice + system, "own": own}

    def end(self):
        now = self.look()
        passed = {key: now[key] - self.begin[key] for key in now}
        whole = max(1, passed["all"])
        own = passed["own"] * os.sysconf("SC_CLK_TCK")
        return {
            "steal_percent": round(100 * passed["steal"] / whole, 1),
            "foreign_percent": round(max(0.0, 100 * (passed["busy"] - own) / whole), 1),
        }
