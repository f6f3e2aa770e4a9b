"""An HTTP server on a real socket whose answers are raw bytes, so that they can be as wrong as a stranger's."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from support.paths import BUILTIN

PICTURE = (BUILTIN / "demo.png").read_bytes()

Answer = bytes | Callable[[socket.socket, threading.Event], None]
"""What is sent; or who sends it, until the event says that the test is over."""


@dataclass
class PictureServer:
    """A server that runs.

    Attributes:
        port: on its address.
        answers: by path; 404 for any other.
        heads: of the requests that came, as they came.
        left: set when a client has closed its connection before its answer was whole.
    """

    port: int
    answers: dict[str, Answer]
    heads: list[str] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)

    def serve(self, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        while not self.over.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection, tls), daemon=True).start()

    def _answer(self, connection: socket.socket, tls: ssl.SSLContext | None) -> None:
        try:
            if tls is not None:
                connection = tls.wrap_socket(connection, server_side=True)
            head = b""
            while b"\r\n\r\n" not in head:
                block = connection.recv(4096)
                if not block:
                    return
                head += block
            self.heads.append(head.decode("latin-1"))
            path = head.split(b" ", 2)[1].decode("latin-1")
            answer = self.answers.get(path, response(b"nothing here", status="404 Not Found"))
            if isinstance(answer, bytes):
                connection.sendall(answer)
            else:
                answer(connection, self.over)
        except OSError:
            self.left.set()
        finally:
            with suppress(OSError):
                connection.close()


@contextmanager
def picture_server(
    answers: Mapping[str, Answer], address: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
) -> Iterator[PictureServer]:
    """Serves answers by path on a port of its own."""
    with socket.create_server((address, port)) as listener:
        server = PictureServer(listener.getsockname()[1], dict(answers))
        thread = threading.Thread(target=server.serve, args=(listener, tls), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            listener.shutdown(socket.SHUT_RDWR)  # wakes accept
            thread.join()


def response(body: bytes, *headers: str, status: str = "200 OK", length: int | None = None) -> bytes:
    """A whole answer, with a Content-Length that can be wrong."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def redirect(location: str, *headers: str, status: str = "302 Found") -> bytes:
    """An answer that sends its client elsewhere."""
    return response(b"", f"Location: {location}", *headers, status=status)


def silent(connection: socket.socket, over: threading.Event) -> None:
    """Says nothing until the client leaves or the test is over."""
    connection.settimeout(0.05)
    while not over.is_set():
        with suppress(TimeoutError):
            if not connection.recv(1):
                raise ConnectionResetError


def endless(first: bytes, again: bytes, pause_s: float = 0.0) -> Answer:
    """Sends something, and then something else over and over."""

    def send(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(first)
        while not over.wait(pause_s):
            connection.sendall(again)

    return send
