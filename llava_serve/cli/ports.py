"""Where a server listens, looked at before anything slow is begun."""

from __future__ import annotations

import errno
import os
import socket
from ipaddress import ip_address

from llava_serve.api.keys import KEYS_VARIABLE
from llava_serve.errors import RequestError

OPEN_VARIABLE = "LLAVA_SERVE_OPEN"
"""An environment variable: 1 lets a server listen for the network without keys."""


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that has the port, and does not listen yet. Port 0 takes a free one.

    Raises:
        RequestError: the port is in use, or is none.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError, ValueError) as error:
        bound.close()
        if isinstance(error, ValueError):  # of the name, before it is looked up
            raise RequestError(f"{host!r} is no address to listen on; choose another with --host.") from None
        if isinstance(error, OverflowError):
            raise RequestError(f"There is no port {port}: choose one from 0 to 65535 with --port.") from None
        if error.errno == errno.EADDRINUSE:
            raise RequestError(f"Port {port} is in use; choose another with --port.") from None
        raise RequestError(f"Cannot listen on {host}, port {port}: {error.strerror}.") from None
    return bound


def check_reachable(address: str) -> None:
    """Raises `RequestError` if nothing listens at a cluster's address: Ray would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError):
        raise RequestError(
            f"There is no Ray cluster at {address}; give its HOST:PORT, or auto on a node of it."
        ) from None


def check_open(host: str, *, has_keys: bool) -> None:
    """Raises `RequestError` if a server on this host lets in whoever reaches the machine, and nobody asked for that."""
    if not has_keys and not is_loopback(host) and os.environ.get(OPEN_VARIABLE) != "1":
        raise RequestError(
            f"On {host} anyone who reaches this machine could use the server. Require a key, by --api-key-file FILE or "
            f"{KEYS_VARIABLE}; or listen on 127.0.0.1; or set {OPEN_VARIABLE}=1 to let everyone in."
        )


def is_loopback(host: str) -> bool:
    """Only this machine reaches the host. A name other than localhost may lead anywhere."""
    if host == "localhost":
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
