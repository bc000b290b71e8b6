"""What the programs of the demo are configured with. Plain names, plaintext, loopback: nothing here is of the mesh."""

import json
import os


def write_app_files(mesh):
    write_nginx(mesh, "web", "location / { proxy_pass http://orders; proxy_http_version 1.1; }")
    write_nginx(mesh, "stock", f"root {mesh.path('stock', 'files')};")
    os.makedirs(mesh.path("stock", "files", "items"))
    things = ["a shuttle", "a reed", "a heddle", "a bobbin", "a loom"]
    for number in range(20):
        with open(mesh.path("stock", "files", "items", f"{number}.json"), "w") as file:
            json.dump({"item": things[number % len(things)], "in_stock": 3 + number * 7 % 11}, file)
    with open(mesh.path("redis.conf"), "w") as file:
        file.write(
            f'bind 127.0.0.1\nport 6379\nsave ""\nappendonly no\ndir "{mesh.path("redis")}"\ndaemonize no\n'
        )


def write_nginx(mesh, name, location):
    """A configuration that touches nothing outside our folder. Only modules that are built in may be named."""
    version = mesh.run(["nginx", "-V"], with_errors=True)
    modules = [
        name for name in ("fastcgi", "uwsgi", "scgi") if f"--without-http_{name}_module" not in version
    ]
    folders = "".join(
        f"{module}_temp_path {mesh.path(name, module)};\n" for module in ("client_body", "proxy", *modules)
    )
    # inside the namespace of an ordinary user there is no other user to change to
    user = "user root;\n" if os.geteuid() == 0 else ""
    with open(mesh.path(name + ".conf"), "w") as file:
        file.write(
            f"daemon off;\n{user}worker_processes 1;\npid {mesh.path(name, 'pid')};\nerror_log stderr notice;\n"
            f"events {{ worker_connections 256; }}\n"
            f"http {{\naccess_log off;\n{folders}server {{ listen 127.0.0.1:{mesh.app_port}; {location} }}\n}}\n"
        )
