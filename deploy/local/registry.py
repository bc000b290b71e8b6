"""The Consul agent of `demo --consul`: a real one in `-dev` mode, with nothing on disk, on an address of the demo alone.

Workloads register there by themselves and find each other there; no service files exist then. This file starts the
agent and says what it knows. It registers nothing.
"""

import contextlib
import json
import urllib.request

PORT = 8500
SERVER_PORTS = (8300, 8301)
# What a killed instance has left before it is out; short, so that the demo can show it.
TIME_TO_LIVE = "3s"
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Consul:
    def __init__(self, address):
        self.address = address
        self.url = f"http://{address}:{PORT}"
        self.process = None

    def command(self):
        settings = "disable_update_check = true"
        ports = ["-dns-port=-1", "-grpc-port=-1", "-serf-wan-port=-1"]
        return [
            "consul", "agent", "-dev", "-node", "demo", "-disable-host-node-id", *ports,
            "-bind", self.address, "-client", self.address, "-hcl", settings,
        ]  # fmt: skip

    def flags(self):
        """What a sidecar is told."""
        return ["--consul", self.url, "--consul-ttl", TIME_TO_LIVE]

    def hints(self):
        """What to try with it, beside a mesh that stays."""
        return f"""
    # what Consul knows; in a browser: {self.url}/ui
    export CONSUL_HTTP_ADDR={self.url}
    consul catalog services
    consul watch -type service -service orders -passingonly true

    # a policy for all sidecars at once, from Consul's key-value store; a file counts before it
    consul kv put weft/policies/orders 'timeouts: {{request: 1ms}}'
    ./as-visitor curl -i http://web/orders/10
    consul kv delete weft/policies/orders
"""

    def ask(self, path):
        """Its answer; none where there is none."""
        with contextlib.suppress(OSError, ValueError):
            with DIRECT.open(self.url + path, timeout=2) as answer:
                return json.load(answer)
        return None

    def is_ready(self):
        """It has a leader, and its own node is in its catalog."""
        return bool(self.ask("/v1/status/leader")) and bool(self.ask("/v1/catalog/nodes"))

    def instances(self, service):
        """Instance, address, health and identities of each registration."""
        found = []
        for entry in self.ask(f"/v1/health/service/{service}") or []:
            registered = entry["Service"]
            states = {check["Status"] for check in entry["Checks"]}
            health = next((state for state in ("critical", "warning") if state in states), "passing")
            instance = registered["ID"].removeprefix(service + "-")
            address = f"{registered['Address']}:{registered['Port']}"
            found.append((instance, address, health, registered["Meta"].get("weft-identity")))
        return sorted(found)

    def health(self, workload):
        """`passing`, `warning` or `critical`; none where it is not registered."""
        for instance, _, health, _ in self.instances(workload.service):
            if instance == workload.instance:
                return health
        return None
