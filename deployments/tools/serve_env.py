"""Profiles: files of environment variables that choose Serve's proxy and transport. `production.env` ships.

Serve reads these variables when a process imports it, and they must be the same in every process of a cluster.
"""

from __future__ import annotations

import io
from pathlib import Path

from dotenv import dotenv_values

from .config import PROFILE, packaged
from .haproxy import write_launcher

EXTRA_PORTS = {
    "RAY_SERVE_HAPROXY_STATS_PORT": "HAProxy's statistics",
    "RAY_SERVE_HAPROXY_METRICS_PORT": "HAProxy's metrics",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": "Serve's fallback proxy",
}
"""Settings of the ports that HAProxy has beside that of HTTP, and what they are for."""


class ServeEnvError(Exception):
    """The file cannot be read, or a line is no setting of Ray; the message is for the terminal."""


def read_serve_env(path: Path) -> dict[str, str]:
    """The variables of a file of `NAME=value` lines.

    Args:
        path: of the file; `production` takes the one that ships.

    Raises:
        ServeEnvError: the file does not exist, or a line is no setting of Ray.
    """
    if path != Path("production") and not path.is_file():
        raise ServeEnvError(f"There is no profile {path}; the one that ships is called production.")
    text = packaged(PROFILE) if path == Path("production") else path.read_text(encoding="utf-8")
    profile: dict[str, str] = {}
    for name, value in dotenv_values(stream=io.StringIO(text), interpolate=False).items():
        if not name.startswith("RAY_") or not value:
            raise ServeEnvError(f"{path}: {name}: a profile holds lines RAY_...=value.")
        profile[name] = value
    return profile


def own_places(folder: Path, ports: list[int]) -> dict[str, str]:
    """HAProxy's files and extra ports, so that two applications on one machine do not share them.

    Args:
        folder: of this application alone; a short path, since it holds sockets.
        ports: free ones, as many as `EXTRA_PORTS`.
    """
    launcher, places = folder / "haproxy", dict(zip(EXTRA_PORTS, ports, strict=True))
    write_launcher(launcher, [port for name, port in places.items() if "HAPROXY" in name])
    return {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(launcher),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "a.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "m.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        **{name: str(port) for name, port in places.items()},
        # The application is drained before its end, so there is no wait for a load balancer.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "1",
    }
