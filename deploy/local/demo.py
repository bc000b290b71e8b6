"""The story of the demo, told to a person and checked as it goes: who is who, one request through all hops, strangers
at the door, an instance that is killed under load. Started by `demo`, which sees to packages and binaries.

    visitor (curl) -> web (nginx) -> orders, two instances (Python) -> stock (nginx)
                                                                    -> redis
"""

import argparse
import json
import os
import ssl
import sys
import tempfile
import time
import urllib.parse

from mesh import Asked, Failed, Mesh, Signals, identity, wait
from registry import TIME_TO_LIVE
from seeing import Receiver, bold, dim, green, red, root_of, show_tree, total, values_of
from strangers import plaintext_answer, tls_answer, version_of

REQUESTS = 600
AT_A_TIME = 8
# Spans of one calm request: call and attempt on each of three hops, and an answer at the end of each.
CALM_SPANS = 9


class Story:
    def __init__(self, mesh, receiver):
        self.mesh, self.receiver = mesh, receiver
        self.wrong = []
        self.shown = []

    def check(self, is_so, text, why=""):
        """Tells one expectation and whether it came true."""
        if is_so:
            print(f"  {green('ok')}  {text}")
        else:
            self.wrong.append(text)
            print(f"  {red('NO')}  {text}{': ' if why else ''}{why}")

    def title(self, text):
        print(f"\n{bold(text)}")

    # --- 1 ---------------------------------------------------------------------------------------------------

    def who_is_who(self):
        self.title("1. Who is who")
        mesh = self.mesh
        mesh.prepare()
        # redis and stock first, web last: nginx asks for the name of its upstream once, when it starts
        for group in (["redis", "stock"], ["orders-1", "orders-2"], ["web"]):
            for name in group:
                mesh.launch(mesh.workloads[name])
            for name in group:
                mesh.wait_for(mesh.workloads[name])
        print(dim(f"    {'workload':10}{'program':23}{'reached at':21}identity that its certificate proves"))
        for workload in mesh.workloads.values():
            proven = (mesh.show(workload, "certificate") or {}).get("id")
            print(f"    {workload.instance:10}{workload.program:23}{workload.endpoint():21}{proven}")
            if proven != identity(workload.service):
                self.check(False, f"{workload.instance} has its identity", f"it has {proven}")
        print(f"    {'visitor':10}{'curl':23}{'(nobody calls it)':21}{identity('visitor')}")
        if mesh.consul:
            self.registered()

    def registered(self):
        """What Consul knows, where it is the registry."""
        consul, good = self.mesh.consul, True
        print(f"\n    Consul at {consul.url} knows, and there are no service files:\n")
        print(dim(f"    {'service':10}{'instance':11}{'address':21}{'health':10}identity to expect there"))
        for service in ("web", "orders", "stock", "redis"):
            known = consul.instances(service)
            for instance, address, health, expected in known:
                print(f"    {service:10}{instance:11}{address:21}{health:10}{expected}")
            workloads = [w for w in self.mesh.workloads.values() if w.service == service]
            wanted = sorted((w.instance, w.endpoint(), "passing", identity(service)) for w in workloads)
            good &= known == wanted
        self.check(good, "all five workloads registered themselves in Consul, and are well")

    # --- 2 ---------------------------------------------------------------------------------------------------

    def one_request(self):
        self.title("2. One request through all hops: curl http://web/orders/7")
        process, name = self.mesh.visit(["curl", "-sS", "--max-time", "20", "http://web/orders/7"])
        answer = self.mesh.visit_output(process, name)
        print(f"    {answer.strip()}")
        try:
            content = json.loads(answer)
        except ValueError:
            content = {}
        self.check(
            content.get("visits") == 1 and "item" in content,
            "nginx, Python, nginx and redis answered together",
        )
        trace = next(line["trace_id"] for line in self.mesh.visitor_access() if line["kind"] == "request")
        spans = self.complete_trace(trace, CALM_SPANS)
        self.hops(spans)
        print("\n    The trace, as each sidecar reported its part:\n")
        if root_of(spans):
            show_tree(spans)
        services = {span.workload for span in spans}
        wanted = {"visitor", "web", "orders", "stock"}
        self.check(
            bool(root_of(spans)) and len(spans) == CALM_SPANS and services == wanted,
            f"the trace is one tree of {CALM_SPANS} spans over visitor, web, orders and stock",
            f"{len(spans)} spans from {', '.join(sorted(services)) or 'nobody'}",
        )
        self.shown.append(trace)

    def complete_trace(self, trace, count):
        """Its spans, as soon as so many came; fewer if they do not."""
        try:
            wait("all spans came", lambda: len(self.receiver.traces().get(trace, [])) >= count)
        except Failed:
            pass
        return self.receiver.traces().get(trace, [])

    def hops(self, spans):
        print(
            "\n    Plaintext in the programs; between them mutual TLS. What the two sidecars of each hop say:\n"
        )
        print(dim(f"    {'hop':19}{'caller proved':37}{'callee proved':35}TLS"))
        good = True
        for caller, callee in (("visitor", "web"), ("web", "orders"), ("orders", "stock")):
            out = [
                s
                for s in spans
                if s.is_outbound_request() and (s.workload, s.get("weft.service")) == (caller, callee)
            ]
            into = [s for s in spans if s.is_inbound() and s.workload == callee]
            good &= bool(out) and bool(into) and self.hop(
                caller, callee,
                {into[0].get("weft.peer.identity"), out[0].get("weft.own.identity")},
                {out[0].get("weft.peer.identity"), into[0].get("weft.own.identity")},
                {out[0].get("weft.tls.version"), into[0].get("weft.tls.version")},
            )  # fmt: skip
        good &= self.redis_hop()
        self.check(good, "on every hop both sides proved the expected identity, with TLS 1.3")

    def redis_hop(self):
        """Not HTTP: no spans, but a line of the access log on either side. TLS is looked at from outside later."""
        redis = self.mesh.workloads["redis"]
        orders = [self.mesh.workloads[name] for name in ("orders-1", "orders-2")]

        def line(workloads, direction):
            for workload in workloads:
                for entry in workload.access():
                    if (entry["kind"], entry["direction"], entry["service"]) == (
                        "connection",
                        direction,
                        "redis",
                    ):
                        return entry
            return None

        try:
            wait(
                "both ends of redis's connection are logged",
                lambda: line(orders, "outbound") and line([redis], "inbound"),
            )
        except Failed:
            return False
        out, into = line(orders, "outbound"), line([redis], "inbound")
        return self.hop(
            "orders", "redis",
            {out["own_identity"], into["peer_identity"]},
            {out["peer_identity"], into["own_identity"]},
            {version_of(redis, self.mesh.roots)[0]},
        )  # fmt: skip

    def hop(self, caller, callee, callers, callees, versions):
        """Both ends must say the same."""
        say = lambda said: " and ".join(sorted(str(word) for word in said))  # noqa: E731
        hop = f"{caller} → {callee}"
        print(f"    {hop:19}{say(callers):37}{say(callees):35}{say(versions)}")
        return callers == {identity(caller)} and callees == {identity(callee)} and versions == {"1.3"}

    # --- 3 ---------------------------------------------------------------------------------------------------

    def strangers(self):
        self.title("3. Strangers at the door")
        all_refused = True
        for name in ("web", "stock", "orders-2", "redis"):
            workload = self.mesh.workloads[name]
            version, proven = version_of(workload, self.mesh.roots)
            answers = {
                "without a certificate": tls_answer(workload, self.mesh.roots, ssl.TLSVersion.TLSv1_3),
                "with TLS 1.2": tls_answer(workload, self.mesh.roots, ssl.TLSVersion.TLSv1_2),
                "in plaintext": plaintext_answer(workload),
            }
            let_in = [how for how, answer in answers.items() if answer]
            text = f"{workload.endpoint():19}OpenSSL sees TLS {version}, {proven}"
            self.check(version == "1.3" and proven == identity(workload.service), text)
            if let_in:
                self.check(False, f"{name} refuses strangers", f"it answered {', '.join(let_in)}")
            all_refused &= not let_in
        if all_refused:
            self.check(
                True, "each refused a caller without a certificate of the mesh, TLS 1.2, and plaintext"
            )

    # --- 4 ---------------------------------------------------------------------------------------------------

    def kill_under_load(self):
        self.title(f"4. kill -9 of orders-1 during {REQUESTS} requests, {AT_A_TIME} at a time")
        mesh = self.mesh
        web, victim, survivor = mesh.workloads["web"], mesh.workloads["orders-1"], mesh.workloads["orders-2"]
        before, known = web.metrics(), set(self.receiver.traces())
        load = ["curl", "-s", "-Z", "--parallel-max", str(AT_A_TIME), "--max-time", "60", "-o", "/dev/null"]
        process, name = mesh.visit([*load, "-w", "%{http_code}\n", f"http://web/orders/[1-{REQUESTS}]"])
        served = len(victim.access())
        wait("orders-1 is busy", lambda: len(victim.access()) > served + 40 or process.poll() is not None)
        mesh.kill(victim)
        statuses = mesh.visit_output(process, name).split()
        good = statuses.count("200")
        self.check(
            good == REQUESTS,
            f"{good} of {REQUESTS} requests were answered with 200",
            f"others: {set(statuses) - {'200'}}",
        )
        self.retried(known, victim, survivor)
        self.moved(before)
        if mesh.consul:
            self.is_out(victim, survivor)

    def is_out(self, victim, survivor):
        consul = self.mesh.consul
        text = f"Consul has orders-1 as critical, {TIME_TO_LIVE} after its last word, and orders-2 as passing"
        try:
            wait("Consul has noticed", lambda: consul.health(victim) in ("critical", None))
        except Failed:
            return self.check(False, text, f"orders-1 is {consul.health(victim)}")
        health = consul.health(survivor)
        self.check(health == "passing", text, f"orders-2 is {health}")

    def retried(self, known, victim, survivor):
        """A request whose first attempt met the dead instance."""

        def found():
            best = None
            for trace, spans in self.receiver.traces().items():
                attempts = [
                    span for span in spans if span.is_attempt() and span.get("weft.service") == "orders"
                ]
                ends = {span.get("weft.endpoint"): span for span in attempts}
                if (
                    trace in known
                    or set(ends) != {victim.endpoint(), survivor.endpoint()}
                    or not root_of(spans)
                ):
                    continue
                if not any(span.workload == "stock" for span in spans):
                    continue
                if (
                    ends[victim.endpoint()].get("weft.failure")
                    and ends[survivor.endpoint()].outcome() == "200"
                ):
                    # one that was under way tells more than one that was refused
                    if best is None or ends[victim.endpoint()].get("weft.failure") != "connect_refused":
                        best = spans
            return best

        try:
            wait("a trace shows the retry", found)
        except Failed:
            return self.check(False, "a trace shows a failed attempt at orders-1 and a good one at orders-2")
        # the spans of the last batch
        time.sleep(0.5)
        spans = found()
        if not spans:
            return self.check(False, "the trace of the retry is one tree")
        root = root_of(spans)
        attempts = [span for span in spans if span.is_attempt() and span.get("weft.service") == "orders"]
        print("\n    One of those that met the dead instance:\n")
        show_tree(spans)
        failed = next(span for span in attempts if span.get("weft.endpoint") == victim.endpoint())
        again = next(span for span in attempts if span.get("weft.endpoint") == survivor.endpoint())
        self.check(
            root.get("http.response.status_code") == 200 and again.get("weft.retry.reason") is not None,
            f"attempt {failed.get('weft.attempt')} at {victim.endpoint()}: {failed.get('weft.failure')}; "
            f"attempt {again.get('weft.attempt')} at {survivor.endpoint()}: 200",
        )
        self.shown.append(root.trace)

    def moved(self, before):
        after = self.mesh.workloads["web"].metrics()
        rows = [
            ("weft_requests_total", {"direction": "outbound", "service": "orders", "code": "200"}),
            ("weft_attempts_total", {"service": "orders", "outcome": "first"}),
        ]
        reasons = values_of(after, "weft_attempts_total", "reason", service="orders", outcome="retry")
        rows += [
            ("weft_attempts_total", {"service": "orders", "outcome": "retry", "reason": reason})
            for reason in reasons
        ]
        rows += [
            ("weft_ejections_total", {"service": "orders"}),
            ("weft_connections_total", {"direction": "inbound", "security": "mtls"}),
            ("weft_response_bytes_total", {"direction": "outbound", "service": "orders"}),
            ("weft_spans_exported_total", {}),
        ]
        print(
            f"\n    Metrics of web's sidecar that moved (http://{self.mesh.workloads['web'].address}:15020/metrics):\n"
        )
        for name, labels in rows:
            shown = name + (
                "{" + ", ".join(f'{key}="{value}"' for key, value in labels.items()) + "}" if labels else ""
            )
            print(f"    {shown:77}{total(before, name, **labels):6.0f} → {total(after, name, **labels):.0f}")
        rise = lambda name, **labels: total(after, name, **labels) - total(before, name, **labels)  # noqa: E731
        took = rise("weft_request_duration_seconds_sum", direction="outbound", service="orders")
        count = rise("weft_request_duration_seconds_count", direction="outbound", service="orders")
        print(dim(f"    mean time of a call of orders: {took / max(1, count) * 1000:.1f} ms"))
        requests = rise("weft_requests_total", direction="outbound", service="orders", code="200")
        retries = rise("weft_attempts_total", service="orders", outcome="retry")
        self.check(
            requests >= REQUESTS and retries > 0,
            f"web counted {requests:.0f} good requests and {retries:.0f} retries",
        )

    # --- the end ---------------------------------------------------------------------------------------------

    def traces_out(self, path, url):
        self.title("5. The traces")
        path = write_traces(self.receiver.export(self.shown), path)
        print(f"    Both traces above are in {path}")
        print("    (OTLP JSON: open it in the Jaeger UI with Search, Upload).")
        if url:
            self.receiver.wait_until_forwarded()
            error = self.receiver.forward_error
            self.check(not error and self.receiver.forwarded, f"all spans were taken by {url}", str(error))
            print(f"    In Jaeger look for the trace {self.shown[0] if self.shown else ''}")
        return path

    def stay(self, path):
        mesh = self.mesh
        mesh.launch(mesh.workloads["orders-1"])
        mesh.wait_for(mesh.workloads["orders-1"])
        mesh.write_visitor_script()
        folder, web = mesh.folder, mesh.workloads["web"]
        registry = mesh.consul.hints() if mesh.consul else ""
        self.title("The mesh keeps running, orders-1 again too. Try in another terminal, as this user:")
        print(
            f"""
    cd {folder}

    # as a program of the mesh: any command, with plain names
    ./as-visitor curl http://web/orders/7
    ./as-visitor redis-cli -h redis get visits:7

    # what a sidecar knows; its metrics; its access log
    {mesh.sidecar} show endpoints --admin-socket web.sock
    curl -s http://{web.address}:15020/metrics | grep weft_requests_total
    tail -n 2 web/access.log

    # kill an instance, and call again
    kill -9 $(cat orders-1.pid)
    ./as-visitor curl http://web/orders/8

    # a policy: calls of orders may take a millisecond. It applies at once; remove the file to undo it
    printf 'timeouts:\\n  request: 1ms\\n' > policies/.new && mv policies/.new policies/orders.yaml
    ./as-visitor curl -i http://web/orders/9
{registry}
Ctrl-C stops everything. What you did is then in {path}""",
            flush=True,
        )
        known = set(self.receiver.traces())
        try:
            while True:
                time.sleep(3600)
        except Asked:
            time.sleep(0.3)
            fresh = [trace for trace in self.receiver.traces() if trace not in known]
            write_traces(self.receiver.export(self.shown + fresh), path)


def write_traces(content, path):
    """Beside its place and renamed into it, so that nothing that stands there is followed or half overwritten."""
    folder = os.path.dirname(os.path.abspath(path)) if path else tempfile.gettempdir()
    handle, new = tempfile.mkstemp(dir=folder, prefix="weft-demo-trace-", suffix=".json")
    with os.fdopen(handle, "w") as file:
        json.dump(content, file, indent=1)
    if not path:
        return new
    os.chmod(new, 0o644)
    os.rename(new, path)
    return path


def arguments():
    parser = argparse.ArgumentParser(prog="demo.py", description="Started by deploy/local/demo.")
    parser.add_argument("--binaries", required=True)
    parser.add_argument("--trace-file", default="")
    parser.add_argument("--consul", action="store_true")
    parser.add_argument("--stay", action="store_true")
    parser.add_argument("--otlp", metavar="URL")
    given = parser.parse_args()
    if given.otlp:
        url = urllib.parse.urlsplit(given.otlp)
        if url.scheme != "http" or not url.hostname:
            parser.error(f"--otlp is {given.otlp}; expected http://HOST:PORT of an OTLP/HTTP receiver")
        if url.path.strip("/") == "":
            given.otlp = f"http://{url.netloc}/v1/traces"
    return given


def main():
    given = arguments()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    began = time.monotonic()
    mesh, story, code = None, None, 1
    try:
        mesh = Mesh(given.binaries, Signals(), given.consul)
        story = Story(mesh, Receiver(mesh.address(1), given.otlp))
        print(bold("Weft: the mesh on one machine") + dim(f"  (as user {os.getuid()})"))
        print(dim(f"Its files: {mesh.folder}"))
        story.who_is_who()
        story.one_request()
        story.strangers()
        story.kill_under_load()
        path = story.traces_out(given.trace_file, given.otlp)
        code = 1 if story.wrong else 0
        if given.stay:
            story.stay(path)
    except Failed as failed:
        print(red(f"demo: {failed}"), file=sys.stderr)
    except Asked as asked:
        print(f"\ndemo: stopped by {asked}", file=sys.stderr)
        code = 128 + asked.number
    finally:
        stubborn = mesh.stop() if mesh else []
    if stubborn:
        print(
            red(f"demo: these did not stop when asked, and were killed: {'; '.join(stubborn)}"),
            file=sys.stderr,
        )
        code = code or 1
    if story and story.wrong:
        print(red(f"\nNot as it should be: {'; '.join(story.wrong)}"), file=sys.stderr)
    if code == 0:
        took = time.monotonic() - began
        print(f"\n{green('All of it worked')}, in {took:.0f} s. Everything that was started is stopped.")
    return code


if __name__ == "__main__":
    sys.exit(main())
