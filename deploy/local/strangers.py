"""Callers from outside the mesh, with the OpenSSL of Python: what they see of a workload, and that it answers none."""

import socket
import ssl


def tls(roots, version):
    """A TLS client that trusts the mesh's roots, speaks its protocols, and has no certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(roots)
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["weft-h2", "weft-tcp"])
    return context


def version_of(workload, roots):
    """The TLS version that OpenSSL settles on with this workload, and the name in the certificate it verified."""
    try:
        with socket.create_connection((workload.address, workload.port), timeout=5) as stream:
            with tls(roots, ssl.TLSVersion.TLSv1_3).wrap_socket(stream) as secured:
                names = [
                    name for kind, name in secured.getpeercert().get("subjectAltName", ()) if kind == "URI"
                ]
                return secured.version().replace("TLSv", ""), " ".join(names)
    except OSError as error:
        return "-", str(error)


def tls_answer(workload, roots, version):
    """What a caller without a certificate gets: nothing, if all is well."""
    try:
        with socket.create_connection((workload.address, workload.port), timeout=5) as stream:
            with tls(roots, version).wrap_socket(stream) as secured:
                secured.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
                return secured.recv(100)
    except OSError:
        return b""


def plaintext_answer(workload):
    try:
        with socket.create_connection((workload.address, workload.port), timeout=5) as stream:
            stream.sendall(
                b"PING\r\n" if workload.service == "redis" else b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
            )
            answer = stream.recv(100)
    except OSError:
        return b""
    # a refusal that says why is one, too
    return b"" if answer.startswith(b"HTTP/1.1 403") else answer
