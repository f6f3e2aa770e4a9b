"""The port to listen on, looked at before anything slow is begun."""

from __future__ import annotations

import errno
import socket

from llava_serve.errors import RequestError


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that has the port, and does not listen yet. Port 0 takes a free one.

    Raises:
        RequestError: the port is in use, or is none.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        if isinstance(error, OverflowError):
            raise RequestError(f"There is no port {port}: choose one from 0 to 65535 with --port.") from None
        if error.errno == errno.EADDRINUSE:
            raise RequestError(f"Port {port} is in use; choose another with --port.") from None
        raise RequestError(f"Cannot listen on {host}, port {port}: {error.strerror}.") from None
    return bound
