"""A mesh under everything at once: what grows, and what fails? Started by `soak`.

Each pod is a network namespace with a sidecar and its redirects; a bridge joins them. The client's pod runs the load, the
three others nginx (HTTP/1 and HTTP/2) and an echo server. At most one of the three is out of order at a time, so that no
GET needs to fail. One loop does everything, by the clock.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import statistics
import sys
import time

from machine import PREFIX, Asked, Failed, Machine, Namespace, Signals, run, wait, write

USER = 1337  # of the sidecars: what they send is not redirected
NETWORK = "10.98.0"
DOMAIN = "soak"
LIFETIME = "10s"  # of certificates
HTTP1, HTTP2, ECHO = 8080, 8082, 9000
# The services, the addresses that mean them, and where their endpoints listen.
SERVICES = {"plain": ("10.96.0.1", HTTP1), "modern": ("10.96.0.2", HTTP2), "echo": ("10.96.0.3", ECHO)}
ENDPOINTS = ["a", "b", "c"]
BODY = "x" * 100

CHUNK = 10  # seconds of one run of a load generator
TALKERS, UPLOADS = 20, 240  # at a time
OUT_EVERY = 8  # seconds from one endpoint that is back until the next is taken out
OUT_FOR = 2  # seconds
AUTHORITY_EVERY, AUTHORITY_OUT_FOR = 25, 2  # seconds
BACK_WITHIN = 30  # seconds for whatever was restarted
SAMPLE_EVERY = 5  # seconds
TICK = 0.1  # seconds

REST = 80  # seconds after the load: idle connections are closed after 60

# Bounds. Medians of the first and the last third of the samples are compared, those of the warm-up left out: what caches
# and pools keep, and what an allocator gives back late, is there in both. Under load the descriptors of an endpoint
# follow its share of the uploads; at rest, before and after, they are exact.
WARM_UP = 0.15  # of the whole time
RSS_GROWTH, RSS_SLACK_MB = 0.15, 4
FDS_GROWTH, FDS_SLACK = 0.15, 64
RSS_MOST_MB, FDS_MOST = 250, 4000
REST_SLACK = 8  # descriptors
GETS_LEAST = 10  # per second, or there was no load
SLOWEST = 5  # seconds of a GET, or it counts as failed
PACE_LEAST = 0.5  # of the GETs that h2load was to make in one run; of what hangs at its end it tells nothing


def main():
    arguments = parse()
    machine = soak = None
    try:
        machine = Machine(Signals())
        soak = Soak(machine, arguments)
        soak.start()
        soak.run(arguments.minutes * 60)
        is_well = soak.report()
        if arguments.keep or not is_well:
            say(f"logs and samples: {keep(machine)}")
        return 0 if is_well else 1
    except Failed as failure:
        say(f"failed: {failure}")
        if soak and soak.ran:
            soak.report()
        if machine:
            say(f"logs and samples: {keep(machine)}")
        return 1
    except Asked as asked:
        say(f"stopped by {asked}")
        return 128 + asked.number
    finally:
        if machine:
            machine.stop()


def parse():
    parser = argparse.ArgumentParser(
        prog="tests/bench/soak", usage="tests/bench/soak --help shows the options", add_help=False
    )
    parser.add_argument("--minutes", type=int, default=30)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--binaries", required=True)
    return parser.parse_args()


def keep(machine):
    folder = f"{machine.folder}-kept"
    with contextlib.suppress(OSError):
        shutil.copytree(machine.folder, folder, ignore=shutil.ignore_patterns("ca", "*.sock", "*.token", "state-*"))
    return folder


def say(text):
    print(f"soak: {text}", file=sys.stderr, flush=True)


# --- the world --------------------------------------------------------------------------------------------------


class Pod:
    """A namespace on the bridge, and what runs in it."""

    def __init__(self, soak, number, name):
        machine, self.name, self.soak = soak.machine, name, soak
        with machine.signals.held():
            self.namespace = Namespace(f"{PREFIX}{os.getpid()}-{name}", f"{NETWORK}.{number}")
            machine.namespaces.append(self.namespace)
        run(["ip", "link", "add", "eth0", "netns", self.namespace.name, "type", "veth", "peer", "name", f"to-{name}",
             "netns", soak.wire.name])  # fmt: skip
        soak.wire.run(["ip", "link", "set", f"to-{name}", "master", "bridge", "up"])
        self.namespace.run(["ip", "link", "set", "lo", "up"])
        self.namespace.run(["ip", "addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0"])
        self.namespace.run(["ip", "link", "set", "eth0", "up"])
        self.namespace.run(["ip", "route", "add", "default", "via", f"{NETWORK}.254"])
        self.address = self.namespace.address
        self.sidecar = self.nginx = None

    def start_sidecar(self, service, more):
        """Without waiting for it."""
        soak = self.soak
        arguments = [
            soak.sidecar, "run", "--service", service, "--advertise", self.address, "--publish", "false",
            "--authority", soak.authority_address, "--authority-sha256", soak.root,
            "--token-file", soak.machine.path(f"{service}.token"), "--services-dir", soak.services,
            "--admin-socket", f"{soak.state_folder(self.name)}/admin.sock", "--state-dir", soak.state_folder(self.name),
            "--dns-upstream", "127.0.0.1", "--settle-time", "500ms", "--drain-timeout", "5s", "--log", "warn", *more,
        ]  # fmt: skip
        self.sidecar = soak.machine.start(f"sidecar-{self.name}", arguments, self.namespace, user=USER)

    def start_nginx(self):
        self.nginx = self.soak.machine.start(f"nginx-{self.name}", ["nginx", "-c", self.nginx_file()], self.namespace)

    def nginx_file(self):
        path = self.soak.machine.path
        parts = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = "".join(f"{part}_temp_path {path(f'{self.name}-{part}')};\n" for part in parts)
        return write(
            path(f"nginx-{self.name}.conf"),
            # without a master: what is killed is all of it
            f"daemon off;\nuser root;\nmaster_process off;\npid {path(f'nginx-{self.name}.pid')};\nerror_log stderr crit;\n"
            f"events {{ worker_connections 4096; }}\nhttp {{\naccess_log off;\nkeepalive_requests 1000000;\n{temporary}"
            f"server {{ listen {HTTP1} backlog=4096; location / {{ return 200 '{BODY}'; }}\n"
            # answered at once; what is still on its way is read and thrown away
            "location /gone { return 404; } }\n"
            f"server {{ listen {HTTP2} http2 backlog=4096; location / {{ return 200 '{BODY}'; }} }}\n}}\n",
        )

    def is_ready(self):
        """The sidecar is, and so is the app."""
        for process in (self.sidecar, self.nginx):
            if process:
                process.check()
        if (self.namespace.get(15020, "/ready", self.address, timeout=0.5) or (0,))[0] != 200:
            return False
        return not self.nginx or (self.namespace.get(HTTP1, "/", timeout=0.5) or (0,))[0] == 200


class Load:
    """A load generator that is run again and again, and what its runs counted."""

    def __init__(self, name, arguments, read):
        self.name, self.arguments, self.read = name, arguments, read
        self.process = None
        self.good = self.bad = self.runs = 0
        self.first_bad = ""


class Soak:
    """All pods, their load, what disturbs them, and what was seen."""

    def __init__(self, machine, arguments):
        self.machine = machine
        self.sidecar = os.path.join(arguments.binaries, "weft-sidecar")
        self.ca = os.path.join(arguments.binaries, "weft-ca")
        self.random = random.Random(11)
        self.services = machine.path("services")
        os.mkdir(self.services, 0o755)
        self.authority_address = f"{NETWORK}.100:15080"
        self.samples = []  # (seconds, name, MB, descriptors)
        self.disturbed = {}
        self.left_out = None
        self.retries = {}
        self.begun = time.monotonic()
        self.ran = 0.0

    def start(self):
        with self.machine.signals.held():
            self.wire = Namespace(f"{PREFIX}{os.getpid()}-wire", f"{NETWORK}.254")
            self.machine.namespaces.append(self.wire)
        self.wire.run(["ip", "link", "add", "bridge", "type", "bridge", "forward_delay", "0"])
        self.wire.run(["ip", "addr", "add", f"{NETWORK}.254/24", "dev", "bridge"])
        self.wire.run(["ip", "link", "set", "bridge", "up"])
        self.authority_pod = Pod(self, 100, "authority")
        made = run([self.ca, "init", "--dir", self.machine.path("ca"), "--trust-domain", DOMAIN, "--json"])
        self.root = json.loads(made)["root_sha256"]
        for service in ("client", "server"):
            token = ["token", "create", "--dir", self.machine.path("ca"), "--identity", identity(service)]
            file = self.machine.path(f"{service}.token")
            run([self.ca, *token, "--reusable", "--expires", "30d", "--out", file])
            os.chown(file, USER, USER)
        self.start_authority()
        wait("the authority is ready", self.authority_is_ready)
        self.client = Pod(self, 1, "client")
        self.pods = [Pod(self, number, name) for number, name in enumerate(ENDPOINTS, start=2)]
        self.write_services()
        for pod in [self.client, *self.pods]:
            pod.namespace.run([self.sidecar, "redirect", "apply"])
            if pod is self.client:
                pod.start_sidecar("client", [])
                continue
            pod.start_nginx()
            self.machine.start(f"echo-{pod.name}", self.traffic("echo", str(ECHO)), pod.namespace)
            self.start_server(pod)
        for pod in [self.client, *self.pods]:
            wait(f"the pod {pod.name} is ready", pod.is_ready)
        time.sleep(2)  # what the start itself opened
        self.at_rest = {name: [seen[1]] for name, seen in self.look().items()}
        self.start_load()
        say("everything runs")

    def start_server(self, pod):
        ports = [flag for port in (HTTP1, HTTP2, ECHO) for flag in ("--port", str(port))]
        pod.start_sidecar("server", ports)

    def state_folder(self, name):
        folder = self.machine.path(f"state-{name}")
        if not os.path.isdir(folder):
            os.mkdir(folder, 0o700)
            os.chown(folder, USER, USER)
        return folder

    def start_authority(self):
        serve = [self.ca, "serve", "--dir", self.machine.path("ca"), "--listen", self.authority_address]
        serve += ["--admin", f"{NETWORK}.100:15081", "--lifetime", LIFETIME, "--audit", self.machine.path("audit.log")]
        self.authority = self.machine.start("authority", serve, self.authority_pod.namespace)

    def authority_is_ready(self):
        self.authority.check()
        namespace = self.authority_pod.namespace
        return (namespace.get(15081, "/ready", f"{NETWORK}.100", timeout=0.5) or (0,))[0] == 200

    def write_services(self):
        """As a registry in motion: other weights, one endpoint left out in turn, and services that nobody calls."""
        second = int(time.monotonic() - self.begun)
        self.left_out = ENDPOINTS[second // 5 % len(ENDPOINTS)] if second % 5 == 0 else None
        for service, (address, port) in SERVICES.items():
            lines = [f"service: {service}", f"identities: [{identity('server')}]", f"addresses: ['{address}:80']"]
            lines.append("endpoints:")
            for pod in self.pods:
                if pod.name != self.left_out:
                    weight = self.random.randint(50, 150)
                    lines.append(f"- {{address: '{pod.address}:{port}', weight: {weight}}}")
            self.write_service(service, "\n".join(lines))
        number = second % 20
        addresses = ", ".join(f"{{address: '10.97.{number}.{self.random.randint(1, 250)}:80'}}" for _ in range(50))
        self.write_service(f"other-{number}", f"service: other-{number}\nendpoints: [{addresses}]")
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(self.services, f"other-{(number + 10) % 20}.yaml"))

    def write_service(self, name, text):
        aside = os.path.join(self.services, f".{name}")
        write(aside, text + "\n")
        os.replace(aside, os.path.join(self.services, f"{name}.yaml"))

    # --- load ---------------------------------------------------------------------------------------------------

    def traffic(self, *arguments):
        return [sys.executable, "-B", os.path.join(os.path.dirname(os.path.abspath(__file__)), "soak_traffic.py"), *arguments]

    def start_load(self):
        h2load = ["h2load", "-D", str(CHUNK)]
        plain, modern = (f"http://{SERVICES[name][0]}/" for name in ("plain", "modern"))
        # a new connection each time
        curl = ["curl", "-sS", "-m", str(SLOWEST), "--no-keepalive", "-H", "Connection: close", "-o", "/dev/null"]
        curl += ["-w", "%{http_code} %{size_download} %{errormsg}\\n", "--rate", "600/m", f"{plain}[1-{CHUNK * 8}]"]
        self.loads = [
            Load("HTTP/1", [*h2load, "--h1", "-c", "16", "--rps", "8", plain], lambda text: read_h2load(text, 16 * 8)),
            Load("HTTP/2", [*h2load, "-c", "4", "-m", "8", "--rps", "30", modern], lambda text: read_h2load(text, 4 * 30)),
            Load("curl", curl, read_curl),
        ]
        talk = self.traffic("talk", SERVICES["echo"][0], "80", str(TALKERS), self.machine.path("talk.json"))
        upload = self.traffic("upload", SERVICES["plain"][0], "80", "/gone", str(UPLOADS), self.machine.path("upload.json"))
        self.others = [
            self.machine.start("talk", talk, self.client.namespace),
            self.machine.start("upload", upload, self.client.namespace),
        ]

    def keep_load(self, load, is_over):
        if load.process and load.process.popen.poll() is None:
            return
        if load.process:
            with open(load.process.log) as log:
                text = log.read()
            os.remove(load.process.log)
            self.machine.forget(load.process)
            good, bad = load.read(text)
            load.good, load.bad, load.runs = load.good + good, load.bad + bad, load.runs + 1
            if bad:
                at = round(time.monotonic() - self.begun)
                say(f"{load.name}: {bad} GETs failed in the {CHUNK} s before second {at}")
                if not load.first_bad:
                    load.first_bad = f"second {at}: {text.strip()[-1500:]}"
                write(self.machine.path(f"bad-{load.name.replace('/', '')}-{at}.txt"), text)
            load.process = None
        if not is_over:
            load.process = self.machine.start(f"load-{load.name.replace('/', '')}", load.arguments, self.client.namespace)

    # --- what disturbs ------------------------------------------------------------------------------------------

    def take_out(self, number):
        """The app, its sidecar, or both, killed or asked to stop: in turn, and each endpoint in turn."""
        pod = self.pods[number % len(self.pods)]
        # The sidecar of the first pod lives as long as the soak.
        what = ("app killed", "sidecar killed", "sidecar stopped", "both killed")[number // len(self.pods) % 4]
        if pod is self.pods[0]:
            what = "app killed"
        self.disturbed[what] = self.disturbed.get(what, 0) + 1
        if what in ("app killed", "both killed"):
            self.machine.forget(pod.nginx)
            pod.nginx = None
        if what in ("sidecar killed", "both killed"):
            self.machine.forget(pod.sidecar)
            pod.sidecar = None
        if what == "sidecar stopped":
            pod.sidecar.popen.terminate()
        return pod

    def bring_back(self, pod):
        """False as long as a sidecar that was asked to stop has not."""
        if pod.sidecar and pod.sidecar.popen.poll() is not None:
            if pod.sidecar.popen.returncode != 0:
                raise Failed(f"sidecar-{pod.name} was asked to stop and ended with {pod.sidecar.popen.returncode}")
            self.machine.forget(pod.sidecar)
            pod.sidecar = None
        elif pod.sidecar and pod.nginx:
            return False
        if not pod.nginx:
            pod.start_nginx()
        if not pod.sidecar:
            self.start_server(pod)
        return True

    def disturb_endpoints(self, now):
        """One step of: wait, take one out, bring it back, wait until it answers."""
        if now < self.next_step:
            return
        if self.out is None:
            self.out, self.is_started = self.take_out(self.turn), False
            self.turn += 1
            self.next_step, self.out_since = now + OUT_FOR, now
        elif not self.is_started:
            self.is_started = self.bring_back(self.out)
        elif self.out.is_ready():
            self.out, self.next_step = None, now + OUT_EVERY
        if self.out and now - self.out_since > BACK_WITHIN:
            raise Failed(f"the pod {self.out.name} did not come back within {BACK_WITHIN} s")

    def disturb_authority(self, now):
        if now < self.next_authority:
            return
        if self.authority:
            self.disturbed["authority killed"] = self.disturbed.get("authority killed", 0) + 1
            self.machine.forget(self.authority)
            self.authority, self.next_authority = None, now + AUTHORITY_OUT_FOR
        else:
            self.start_authority()
            self.next_authority = now + AUTHORITY_EVERY

    # --- the loop -----------------------------------------------------------------------------------------------

    def run(self, seconds):
        self.begun = now = time.monotonic()
        end = now + seconds
        self.out, self.is_started, self.turn, self.out_since = None, False, 0, now
        self.next_step, self.next_authority = now + OUT_EVERY, now + AUTHORITY_EVERY / 2
        next_services, next_sample, next_word = now + 1, now + SAMPLE_EVERY, now + 60
        while (now := time.monotonic()) < end:
            self.ran = now - self.begun
            self.check()
            for load in self.loads:
                self.keep_load(load, is_over=False)
            self.disturb_endpoints(now)
            self.disturb_authority(now)
            if now >= next_services:
                self.write_services()
                next_services += 1
            if now >= next_sample:
                self.sample(now - self.begun)
                next_sample += SAMPLE_EVERY
            if now >= next_word:
                self.word()
                next_word += 60
            time.sleep(TICK)
        self.ran = seconds
        for load in self.loads:
            wait(f"the last {load.name} ends", lambda load=load: self.has_ended(load), pause=TICK)
        self.retries = self.count_retries()
        self.rest()

    def rest(self):
        """Without load, and with everything back."""
        for process in self.others:
            self.machine.forget(process)
        if not self.authority:
            self.start_authority()
        if self.out:
            wait(f"the pod {self.out.name} is started", lambda: self.is_started or self.bring_back(self.out))
        say(f"the load is over; descriptors at rest in {REST} s")
        time.sleep(REST)
        for pod in [self.client, *self.pods]:
            wait(f"the pod {pod.name} is ready", pod.is_ready)
        for name, (_, fds) in self.look().items():
            self.at_rest[name].append(fds)

    def count_retries(self):
        """Why the client's sidecar tried again, and why it did not, by its metrics."""
        _, text = self.client.namespace.get(15020, "/metrics", self.client.address) or (0, "")
        found = re.findall(r'(weft_attempts_total\{.*outcome="retry"|weft_retries_refused_total\{)(.*)\} (\d+)', text)
        counts = {}
        for metric, labels, count in found:
            what = "refused, " if "refused" in metric else ""
            reason = re.search(r'reason="([^"]*)"', labels)
            what += reason[1] if reason else "?"
            counts[what] = counts.get(what, 0) + int(count)
        return counts

    def has_ended(self, load):
        self.keep_load(load, is_over=True)
        return load.process is None

    def check(self):
        """Whatever nobody took out must run."""
        lasting = [self.client.sidecar, self.pods[0].sidecar, *self.others]
        for process in [*lasting, *([self.authority] if self.authority else [])]:
            process.check()
        for pod in self.pods:
            if pod is not self.out:
                pod.sidecar.check()
                pod.nginx.check()

    def sample(self, second):
        self.samples += [(second, name, rss, fds) for name, (rss, fds) in self.look().items()]

    def look(self):
        """Memory in MB and descriptors of what runs now."""
        watched = [("client", self.client.sidecar), ("authority", self.authority)]
        watched += [(pod.name, pod.sidecar) for pod in self.pods]
        seen = {}
        for name, process in watched:
            with contextlib.suppress(OSError):
                if process and process.popen.poll() is None:
                    seen[name] = (process.rss_mb(), len(os.listdir(f"/proc/{process.pid}/fd")))
        return seen

    def word(self):
        gets, bad = sum(load.good for load in self.loads), sum(load.bad for load in self.loads)
        last = {name: f"{rss:.0f} MB/{fds}" for _, name, rss, fds in self.samples}
        say(f"{self.ran / 60:.0f} min: {gets} GETs, {bad} failed; {', '.join(f'{key} {last[key]}' for key in sorted(last))}")

    # --- the verdict --------------------------------------------------------------------------------------------

    def report(self):
        """Prints the tables; says whether every bound held."""
        broken = []
        write(self.machine.path("samples.json"), json.dumps(self.samples))
        print(f"\n{self.ran / 60:.1f} minutes, {os.cpu_count()} processors\n")
        print("| load | requests | failed | bound |\n|---|---:|---:|---|")
        for load in getattr(self, "loads", []):
            print(f"| GET, {load.name} | {load.good + load.bad} | {load.bad} | none failed |")
            if load.bad:
                broken.append(f"{load.bad} GETs of {load.name} failed; the first: {load.first_bad}")
            if load.good < GETS_LEAST * self.ran / 2:
                broken.append(f"only {load.good} GETs of {load.name} in {self.ran:.0f} s: there was no load")
        for name, least, wrong in (("talk", "lines", "wrong"), ("upload", "status 404", None)):
            counts = self.counted(name)
            shown = ", ".join(f"{key} {counts[key]}" for key in sorted(counts) if key != "begun")
            bound = "no line wrong" if wrong else "answered, mostly 404"
            print(f"| {name} | {counts.get('begun', 0)} | {shown} | {bound} |")
            if counts.get(wrong, 0):
                broken.append(f"{counts[wrong]} lines came back wrong")
            if counts.get(least, 0) * 2 < counts.get("begun", 0):
                broken.append(f"{name}: {shown} of {counts.get('begun', 0)} begun")
        print(f"\nDisturbed: {', '.join(f'{what} {count} times' for what, count in sorted(self.disturbed.items()))}; ", end="")
        print(f"certificates of {LIFETIME}, service files written each second")
        print(f"\nRetries: {', '.join(f'{why} {count}' for why, count in sorted(self.retries.items())) or 'none'}\n")
        print("| process | MB at first | MB at last | most | descriptors at first | at last | most | at rest | flat |")
        print("|---|---:|---:|---:|---:|---:|---:|---:|---|")
        for name in ("client", *ENDPOINTS, "authority"):
            broken += self.flatness(name)
        print(f"\nBounds: medians of the first and last third after a warm-up of {WARM_UP:.0%}; memory may grow by {RSS_GROWTH:.0%}")
        print(f"and {RSS_SLACK_MB} MB, to {RSS_MOST_MB} MB at most; descriptors by {FDS_GROWTH:.0%} and {FDS_SLACK}, to {FDS_MOST},")
        print(f"and at rest, {REST} s after the load, by {REST_SLACK} over those before it.")
        broken += self.panics()
        for text in broken:
            print(f"\nBROKEN: {text}")
        print("\nAll bounds held." if not broken else f"\n{len(broken)} bounds are broken.", flush=True)
        return not broken

    def counted(self, name):
        with contextlib.suppress(OSError, ValueError), open(self.machine.path(f"{name}.json")) as file:
            return json.load(file)
        return {}

    def flatness(self, name):
        series = [(rss, fds) for second, of, rss, fds in self.samples if of == name and second >= self.ran * WARM_UP]
        third = len(series) // 3
        if third < 2:
            print(f"| {name} | | | | | | | | too few samples |")
            return [f"{name}: too few samples ({len(series)})"]
        broken, cells = [], []
        for what, column, growth, slack, most in (
            ("MB", 0, RSS_GROWTH, RSS_SLACK_MB, RSS_MOST_MB),
            ("descriptors", 1, FDS_GROWTH, FDS_SLACK, FDS_MOST),
        ):
            values = [sample[column] for sample in series]
            first, last, highest = statistics.median(values[:third]), statistics.median(values[-third:]), max(values)
            cells += [f"{value:.{1 - column}f}" for value in (first, last, highest)]
            if last > first * (1 + growth) + slack:
                broken.append(f"{name}: {what} grew from {first:.1f} to {last:.1f}")
            if highest > most:
                broken.append(f"{name}: {highest:.1f} {what}, more than {most}")
        before, *after = self.at_rest[name]
        if after and after[0] > before + REST_SLACK:
            broken.append(f"{name}: {after[0]} descriptors at rest, and {before} before the load")
        cells.append(f"{before}, {after[0] if after else '?'}")
        print(f"| {name} | {' | '.join(cells)} | {'no' if broken else 'yes'} |")
        return broken

    def panics(self):
        found = []
        for name in sorted(os.listdir(self.machine.folder)):
            if name.endswith(".log") and name.startswith(("sidecar-", "authority")):
                with open(self.machine.path(name), errors="replace") as log:
                    found += [f"{name}: {line.strip()}" for line in log if "panicked at" in line][:1]
        return found


def identity(service):
    return f"spiffe://{DOMAIN}/ns/default/sa/{service}"


def read_h2load(text, pace):
    """Good and bad requests of one run. What hangs is what is missing of the pace, in requests a second."""
    statuses = re.search(r"status codes: (\d+) 2xx, (\d+) 3xx, (\d+) 4xx, (\d+) 5xx", text)
    requests = re.search(r"(\d+) failed, (\d+) errored, (\d+) timeout", text)
    if not statuses or not requests:
        raise Failed(f"h2load did not say what it counted: {text.strip()[-500:]}")
    good, *other = map(int, statuses.groups())
    bad = sum(other) + max(int(requests[1]), int(requests[2]) + int(requests[3]))
    missing = max(0, round(pace * CHUNK * PACE_LEAST) - good - bad)
    return good, bad + missing + (slowest(text) > SLOWEST)


def slowest(text):
    """Seconds of the slowest request that was answered."""
    found = re.search(r"time for request: +\S+ +([0-9.]+)(us|ms|s) ", text)
    return float(found[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1}[found[2]] if found else 0.0


def read_curl(text):
    """Lines of `-w`: status, bytes, error."""
    results = [line.split(" ") for line in text.splitlines() if re.match(r"\d{3} \d+ ", line + " ")]
    good = sum(result[:2] == ["200", str(len(BODY))] and not "".join(result[2:]) for result in results)
    return good, len(results) - good


sys.exit(main())
