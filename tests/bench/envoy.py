"""Envoy as a mesh configures it: redirected connections on 15001 and 15006, mutual TLS 1.3 with SPIFFE names between
the two, static clusters, retries, statistics, tracing of a share of the requests to an OTLP receiver, and an access
log of failures. One difference favours Envoy: it is told what each port speaks and detects nothing.
"""

import os

from machine import run, write

ADMIN_PORT = 15000
OUTBOUND_PORT, INBOUND_PORT = 15001, 15006
TYPE = "type.googleapis.com/envoy.extensions."
MANY = 4_000_000_000  # Envoy's own bounds of 1024 would refuse 2,000 connections; meshes lift them


def make_certificates(folder, identity):
    """A root, and a key with a certificate for each side: ECDSA P-256 as Weft's own."""
    at = lambda name: os.path.join(folder, name)  # noqa: E731
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    usage = ["-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign"]
    root = ["-keyout", at("root.key"), "-out", at("root.pem"), "-days", "2", "-subj", "/O=bench", *usage]
    run(["openssl", "req", "-x509", *key, *root])
    made = {}
    for name in ("client", "server"):
        request = ["-keyout", at(name + ".key"), "-out", at(name + ".csr"), "-subj", "/O=bench"]
        run(["openssl", "req", "-new", *key, *request])
        names = f"subjectAltName=critical,URI:{identity(name)}\n"
        extensions = write(at(name + ".ext"), names + "extendedKeyUsage=serverAuth,clientAuth\n")
        sign = ["-CA", at("root.pem"), "-CAkey", at("root.key"), "-CAcreateserial", "-extfile", extensions]
        run(["openssl", "x509", "-req", "-in", at(name + ".csr"), "-out", at(name + ".pem"), "-days", "2", *sign])
        os.chmod(at(name + ".key"), 0o644)
        other = {"client": "server", "server": "client"}[name]
        made[name] = {"root": at("root.pem"), "chain": at(name + ".pem"), "key": at(name + ".key")}
        made[name]["peer"] = identity(other)
    return made


def configuration(side, place, certificate, between, ports, otlp_port, sampled):
    """The whole configuration of one Envoy, as JSON."""
    build = outbound if side == "client" else inbound
    listeners, clusters = build(place, certificate, between, ports, sampled)
    clusters.append(cluster("otlp", f"{place.server.address}:{otlp_port}"))
    return {
        "admin": {"address": socket_address("127.0.0.1", ADMIN_PORT)},
        "static_resources": {"listeners": listeners, "clusters": clusters},
        "overload_manager": {
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": {
                        "@type": TYPE + "resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                        "max_active_downstream_connections": 100_000,
                    },
                }
            ]
        },
    }


def outbound(place, certificate, between, ports, sampled):
    """A redirected connection goes to the listener of the port that was dialled."""
    passed = tcp_proxy("passthrough")
    listeners = [
        {
            "name": "outbound",
            "address": socket_address("0.0.0.0", OUTBOUND_PORT),
            "use_original_dst": True,
            "listener_filters": [original_destination()],
            "filter_chains": [{"filters": [passed]}],
        }
    ]
    clusters = [
        {"name": "passthrough", "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED", "connect_timeout": "1s"}
    ]
    for app, port in ports.items():
        filters = [tcp_proxy(app) if app == "tcp" else http(app, "EGRESS", sampled)]
        listeners.append(
            {
                "name": app,
                "address": socket_address("0.0.0.0", port),
                "bind_to_port": False,
                "filter_chains": [{"filters": filters}],
            }
        )
        # gRPC needs HTTP/2 all the way
        version = "tcp" if app == "tcp" else "http2" if app in ("grpc", "http2") else between
        clusters.append(cluster(app, f"{place.server.address}:{port}", version, client_tls(certificate, version)))
    return listeners, clusters


def inbound(place, certificate, _between, ports, sampled):
    """One listener; the port that was dialled decides, mutual TLS is demanded on each."""
    chains, clusters = [], []
    for app, port in ports.items():
        filters = [tcp_proxy(app) if app == "tcp" else http(app, "INGRESS", sampled)]
        chains.append(
            {
                "filter_chain_match": {"destination_port": port},
                "transport_socket": server_tls(certificate, app),
                "filters": filters,
            }
        )
        version = {"tcp": "tcp", "http1": "http1"}.get(app, "http2")
        clusters.append(cluster(app, f"{place.server.address}:{port}", version))
    listener = {
        "name": "inbound",
        "address": socket_address("0.0.0.0", INBOUND_PORT),
        "listener_filters": [original_destination()],
        "filter_chains": chains,
    }
    return [listener], clusters


def http(app, direction, sampled):
    retries = {"retry_on": "connect-failure,refused-stream,unavailable,cancelled", "num_retries": 2}
    route = {"cluster": app, "timeout": "0s", "retry_policy": retries}
    tracer = {
        "name": "envoy.tracers.opentelemetry",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig",
            "service_name": app,
            "http_service": {
                "http_uri": {"uri": "http://otlp/v1/traces", "cluster": "otlp", "timeout": "1s"},
            },
        },
    }
    return {
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": {
            "@type": TYPE + "filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": f"{direction.lower()}_{app}",
            "codec_type": "AUTO",
            "route_config": {
                "name": app,
                "virtual_hosts": [
                    {"name": app, "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": route}]}
                ],
            },
            "tracing": {"provider": tracer, "random_sampling": {"value": sampled * 100}},
            "access_log": [failures_log()],
            "http_filters": [
                {
                    "name": "envoy.filters.http.router",
                    "typed_config": {"@type": TYPE + "filters.http.router.v3.Router"},
                }
            ],
        },
    }


def failures_log():
    return {
        "name": "envoy.access_loggers.stdout",
        "filter": {"response_flag_filter": {}},
        "typed_config": {"@type": TYPE + "access_loggers.stream.v3.StdoutAccessLog"},
    }


def tcp_proxy(name):
    return {
        "name": "envoy.filters.network.tcp_proxy",
        "typed_config": {
            "@type": TYPE + "filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": name,
            "cluster": name,
        },
    }


def original_destination():
    return {
        "name": "envoy.filters.listener.original_dst",
        "typed_config": {"@type": TYPE + "filters.listener.original_dst.v3.OriginalDst"},
    }


def cluster(name, address, version="http1", transport=None):
    host, port = address.split(":")
    made = {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "circuit_breakers": {
            "thresholds": [
                {"max_connections": MANY, "max_pending_requests": MANY, "max_requests": MANY, "max_retries": MANY}
            ]
        },
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": socket_address(host, int(port))}}]}],
        },
    }
    if version == "http2":
        made["typed_extension_protocol_options"] = {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": TYPE + "upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        }
    if transport:
        made["transport_socket"] = transport
    return made


def common_tls(certificate, protocols):
    return {
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [
            {
                "certificate_chain": {"filename": certificate["chain"]},
                "private_key": {"filename": certificate["key"]},
            }
        ],
        "validation_context": {
            "trusted_ca": {"filename": certificate["root"]},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": certificate["peer"]}}],
        },
        "alpn_protocols": protocols,
    }


def client_tls(certificate, version):
    protocols = {"http1": ["http/1.1"], "http2": ["h2"], "tcp": []}[version]
    context = {
        "@type": TYPE + "transport_sockets.tls.v3.UpstreamTlsContext",
        "common_tls_context": common_tls(certificate, protocols),
    }
    return {"name": "envoy.transport_sockets.tls", "typed_config": context}


def server_tls(certificate, app):
    context = {
        "@type": TYPE + "transport_sockets.tls.v3.DownstreamTlsContext",
        "common_tls_context": common_tls(certificate, [] if app == "tcp" else ["h2", "http/1.1"]),
        "require_client_certificate": True,
    }
    return {"name": "envoy.transport_sockets.tls", "typed_config": context}


def socket_address(host, port):
    return {"socket_address": {"address": host, "port_value": port}}
