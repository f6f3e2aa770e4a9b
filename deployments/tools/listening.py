"""What of an application listens where: the TCP ports of all its processes, in lines for the terminal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress

import psutil

from llava_serve.cli.ports import is_loopback

KINDS = (
    ("haproxy", "HAProxy"),
    ("gcs_server", "Ray's control service (token)"),
    ("raylet", "Ray's node and objects (token)"),
    ("Agent", "Ray's agents (token) and metrics"),
    ("monitor.py", "Ray's metrics"),
    ("dashboard.py", "Ray's metrics"),
    ("ServeReplica", "replicas' gRPC (token), and HTTP behind HAProxy"),
    ("", "Serve's other processes (token)"),
)
"""The first whose mark is in a process's title, or in its program or script, says what listens there."""


def listening(pid: int, named: Mapping[int, str]) -> list[str]:
    """Lines that say what the processes of a tree listen on: first what other machines reach.

    Args:
        pid: of the tree's root.
        named: what the ports that the config chose are for; the processes say it of the others.
    """
    loopback: dict[str, list[str]] = defaultdict(list)
    reachable: dict[str, list[str]] = defaultdict(list)
    root = psutil.Process(pid)
    for process in (root, *root.children(recursive=True)):
        with suppress(psutil.Error):  # it has ended
            kind = _kind(process.cmdline())
            for host, port in _ports(process):
                found = loopback if is_loopback(host) else reachable
                found[named.get(port, kind)].append(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    return [
        "Listening. Other machines reach, unless a firewall is between:",
        *_lines(reachable),
        "Only this machine reaches:",
        *_lines(loopback),
        "(token): only with Ray's token.",
    ]


def _ports(process: psutil.Process) -> Iterator[tuple[str, int]]:
    for each in process.net_connections("tcp"):
        if each.status == psutil.CONN_LISTEN:
            yield each.laddr.ip.removeprefix("::ffff:"), each.laddr.port


def _kind(command: list[str]) -> str:
    """What a process is, by its title or the beginning of its command: Ray's daemons have their logs' names in it."""
    title = " ".join(command[:3])
    return next(kind for mark, kind in KINDS if mark in title)


def _lines(found: Mapping[str, list[str]]) -> list[str]:
    return [f"  {kind}: {', '.join(sorted(set(places)))}" for kind, places in sorted(found.items())] or ["  nothing"]
