"""Where the server listens and how this machine reaches it: one rule for doctor, plan and serve."""

from __future__ import annotations

import ipaddress
import socket

from .settings import Get

HOST, PORT = "127.0.0.1", 30000
"""SGLang's own defaults."""
GRPC_OFFSET = 10000
"""How far above --port SGLang's older gRPC server listens."""

URL_FILE = "SGLANG_SM120_URL_FILE"
"""Variable that names a file into which `serve` writes the server's URL, for a health check beside it."""


def grpc(value: Get) -> bool:
    """Whether the flags ask for the gRPC server whose port SGLang derives from --port."""
    return (value("smg-grpc-mode") is True or value("grpc-mode") is True) and value("grpc-port") is None


def port_problem(port: int, grpc: bool = False) -> str | None:
    """What to do where the server cannot have this port; None where the number is good."""
    last = 65535 - (GRPC_OFFSET if grpc else 0)
    return None if 0 < port <= last else f"give one from 1 to {last}"


def listen_problem(host: str, port: int) -> str | None:
    """Why nothing can listen there now; None where it can. `host` is a name or an address of either family."""
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in places[:1]:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    return None


def is_open(value: Get) -> bool:
    """Whether a server with these flags answers other machines, and whoever asks there."""
    host = str(value("host") or HOST)
    try:
        return not (value("api-key") or ipaddress.ip_address(host).is_loopback)
    except ValueError:
        return host != "localhost"


def url(value: Get) -> str:
    """Where this machine reaches a server with these flags: by the loopback where it listens everywhere."""
    host = str(value("host") or HOST)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    scheme = "https" if value("ssl-certfile") else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{value('port') or PORT}"
