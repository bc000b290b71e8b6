"""The programs behind the proxies, the same for each peer: nginx for HTTP/1 and HTTP/2, bench-peer for gRPC, bytes, the
bodies of uploads, and as the receiver of traces.
"""

import os

from machine import wait, write
from peers import APP_PORTS, OTLP_PORT

ANSWER = "x" * 100  # bytes of a small answer
LARGE = 100 * 1024 * 1024
BODIES = "127.0.0.1:9000"  # behind nginx: takes uploads, or leaves them lying


def start_apps(place):
    """Starts them in the server's namespace and waits until each answers."""
    folder = place.machine.path("www")
    if not os.path.isdir(folder):
        os.mkdir(folder, 0o755)
        write(os.path.join(folder, "index.html"), ANSWER)
        with open(os.path.join(folder, "large"), "wb") as file:
            file.truncate(LARGE)
    nginx = place.start("nginx", ["nginx", "-c", write_nginx(place, folder)], place.server)
    addresses = [f"0.0.0.0:{APP_PORTS['grpc']}", f"0.0.0.0:{APP_PORTS['tcp']}", BODIES, f"0.0.0.0:{OTLP_PORT}"]
    rest = place.start("apps", [place.tools["bench-peer"], "serve", *addresses], place.server)

    def answers():
        nginx.check()
        rest.check()
        with open(rest.log) as log:
            serving = "serving" in log.read()
        return serving and place.server.get(APP_PORTS["http1"], "/")

    wait("the apps answer", answers)
    return [nginx, rest]


def spans(place):
    """How many spans the receiver of traces got."""
    answer = place.server.get(OTLP_PORT, "/")
    return int(answer[1]) if answer else 0


def write_nginx(place, folder):
    """A configuration that touches nothing outside our folder."""
    parts = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{part}_temp_path {place.path(part)};\n" for part in parts)
    files = place.machine.files
    return write(
        place.path("nginx.conf"),
        f"daemon off;\nuser root;\nmaster_process off;\npid {place.path('nginx.pid')};\nerror_log stderr error;\n"
        f"events {{ worker_connections {files - 100}; }}\n"
        f"http {{\naccess_log off;\nkeepalive_requests 1000000000;\nkeepalive_timeout 1h;\n{temporary}"
        "client_max_body_size 0;\nhttp2_max_concurrent_streams 1000;\n"
        f"server {{ listen {APP_PORTS['http1']} backlog=16384; root {folder};\n"
        f"location /bodies/ {{ proxy_pass http://{BODIES}/; proxy_request_buffering off; proxy_http_version 1.1; }} }}\n"
        f"server {{ listen {APP_PORTS['http2']} http2 backlog=16384; root {folder}; }}\n}}\n",
    )
