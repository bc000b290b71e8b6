"""The programs behind the proxies, the same for each peer: nginx for HTTP/1 and HTTP/2, bench-peer for gRPC, bytes and
as the receiver of traces.
"""

import os

from machine import write
from peers import APP_PORTS, OTLP_PORT

ANSWER = "x" * 100  # bytes of a small answer
LARGE = 100 * 1024 * 1024


def start_apps(place):
    """Starts them in the server's namespace and waits until each answers."""
    folder = place.machine.path("www")
    if not os.path.isdir(folder):
        os.mkdir(folder, 0o755)
        write(os.path.join(folder, "index.html"), ANSWER)
        with open(os.path.join(folder, "large"), "wb") as file:
            file.truncate(LARGE)
    nginx = place.start("nginx", ["nginx", "-c", write_nginx(place, folder)], place.server)
    apps = [nginx]
    return apps


def write_nginx(place, folder):
    """A configuration that touches nothing outside our folder."""
    parts = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{part}_temp_path {place.path(part)};\n" for part in parts)
    return write(
        place.path("nginx.conf"),
        f"daemon off;\nuser root;\nmaster_process off;\npid {place.path('nginx.pid')};\nerror_log stderr error;\n"
        "worker_rlimit_nofile 100000;\nevents { worker_connections 50000; }\n"
        f"http {{\naccess_log off;\nkeepalive_requests 1000000000;\nkeepalive_timeout 1h;\n{temporary}"
        "client_max_body_size 0;\nhttp2_max_concurrent_streams 1000;\n"
        f"server {{ listen {APP_PORTS['http1']} backlog=16384; root {folder};\n"
        # takes a body of any size and answers with nothing
        f"location /upload {{ proxy_pass http://127.0.0.1:{APP_PORTS['http1']}/taken; proxy_request_buffering off;"
        "proxy_http_version 1.1; }\n location /taken { return 204; } }\n"
        f"server {{ listen {APP_PORTS['http2']} http2 backlog=16384; root {folder}; }}\n}}\n",
    )
