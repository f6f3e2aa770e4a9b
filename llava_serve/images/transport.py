"""Connections whose every step is bounded: the network backend under the HTTP library that fetches pictures.

A name is resolved here, once, in the step that connects. So the addresses that were judged are those that are connected
to, and no second answer of a name server can come between.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

import httpcore2

from llava_serve.images.addresses import Address

Check = Callable[[], None]
"""Raises, once the work is no longer wanted."""
Resolver = Callable[[str, int], Sequence[Address]]
"""A host, as a name or an address in any spelling, and a port, to addresses; raises OSError if there are none."""

_POLL_S = 0.25  # how long a step waits before it looks whether it is still wanted
_MAX_TRIED = 4  # addresses of a host


class FetchError(Exception):
    """A link gave no picture; says why, in words of ours that go on after "the picture cannot be fetched:"."""


class HostError(FetchError):
    """The host is not known, or not allowed. One class, so that a server can tell a caller no difference."""

    def __init__(self, cause: str = "its host is not known") -> None:
        super().__init__(cause)


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """What fetching may take.

    Attributes:
        connect_s: seconds to resolve a name, to connect to an address, and for a TLS handshake; each.
        read_s: seconds without a byte, the first one included.
        total_s: seconds for all links of a request.
        total_bytes: of all links of a request.
    """

    connect_s: float = 5
    read_s: float = 10
    total_s: float = 30
    total_bytes: int = 64 << 20


@dataclass(slots=True)
class Budget:
    """What is left of the limits while the links of one request are fetched.

    Attributes:
        limits: as they were at the start.
        check: asked in every step; what it raises ends the work.
        bytes_left: is taken from, as pictures come.
    """

    limits: FetchLimits
    check: Check = field(default=lambda: None)
    bytes_left: int = field(init=False)
    _end: float = field(init=False)

    def __post_init__(self) -> None:
        self.bytes_left = self.limits.total_bytes
        self._end = time.monotonic() + self.limits.total_s

    def seconds(self, at_most: float) -> float:
        """Seconds that the next step may take.

        Raises:
            FetchError: none are left.
        """
        self.check()
        left = self._end - time.monotonic()
        if left <= 0:
            raise FetchError(f"it takes more than {self.limits.total_s:g} seconds")
        return min(left, at_most)


def system_addresses(host: str, port: int) -> list[Address]:
    """What the machine's own resolver says, in its order: name servers, hosts files, and odd spellings of addresses."""
    found = []
    for *_, where in socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM):
        scope = where[3] if len(where) == 4 else 0
        found.append(ip_address(f"{where[0]}%{scope}" if scope and "%" not in str(where[0]) else where[0]))
    return found


class BoundedBackend(httpcore2.NetworkBackend):
    """Connects to allowed addresses only, within a budget.

    Args:
        resolve: is asked once per connection.
        permits: judges an address. One that is refused refuses the host: a public name with a private address besides
            is a mistake or an attack, and which of the two would be connected to must not be left to chance.
    """

    def __init__(self, budget: Budget, resolve: Resolver, permits: Callable[[Address], bool]) -> None:
        self._budget = budget
        self._resolve = resolve
        self._permits = permits
        self._sockets = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        """Resolves, judges all addresses, and connects to the first that answers. The budget stands for `timeout`."""
        addresses = self._addresses(host, port)
        if not addresses or not all(self._permits(address) for address in addresses):
            raise HostError
        failure: Exception | None = None
        for address in addresses[:_MAX_TRIED]:
            try:
                seconds = self._budget.seconds(self._budget.limits.connect_s)
                stream = self._sockets.connect_tcp(str(address), port, seconds, socket_options=socket_options)
                return _BoundedStream(stream, self._budget)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        assert failure is not None
        raise failure

    def _addresses(self, host: str, port: int) -> Sequence[Address]:
        """Asks in a thread, because nothing can end a question to a name server: it is left alone when time is up."""
        answer: Future[Sequence[Address]] = Future()

        def ask() -> None:
            try:
                answer.set_result(self._resolve(host, port))
            except Exception as error:
                answer.set_exception(error)

        threading.Thread(target=ask, name="resolve", daemon=True).start()
        end = time.monotonic() + self._budget.limits.connect_s
        while not answer.done():
            if time.monotonic() >= end:
                raise HostError
            wait([answer], self._budget.seconds(_POLL_S))
        try:
            return answer.result()
        except (OSError, ValueError) as error:
            raise HostError from error


class _BoundedStream(httpcore2.NetworkStream):
    """A connection that looks at its budget at every read, in short steps."""

    def __init__(self, stream: httpcore2.NetworkStream, budget: Budget) -> None:
        self._stream = stream
        self._budget = budget

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        read_s = self._budget.limits.read_s
        end = time.monotonic() + read_s
        while (left := end - time.monotonic()) > 0:
            try:
                return self._stream.read(max_bytes, self._budget.seconds(min(left, _POLL_S)))
            except httpcore2.ReadTimeout:
                continue
        raise FetchError(f"its server sends nothing for {read_s:g} seconds")

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._budget.seconds(self._budget.limits.read_s))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        seconds = self._budget.seconds(self._budget.limits.connect_s)
        return _BoundedStream(self._stream.start_tls(ssl_context, server_hostname, seconds), self._budget)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
