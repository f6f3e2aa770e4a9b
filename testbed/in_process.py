"""The web app of `llava-serve serve --in-process` with the model that ships, in a process of its own.

The engine has as many threads as the caller says.
"""

from __future__ import annotations

import multiprocessing
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

END_S = 20.0


@contextmanager
def in_process_server(*, num_threads: int = 1, device: str = "cpu") -> Iterator[str]:
    """Runs it on a free port; gives its URL.

    Raises:
        RuntimeError: it has ended before the block did.
    """
    spawn = multiprocessing.get_context("spawn")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = spawn.Process(target=_serve, args=(listener, num_threads, device))
        process.start()
        port = listener.getsockname()[1]
        try:
            _await_health(port, process)
            yield f"http://127.0.0.1:{port}"
            if not process.is_alive():
                raise RuntimeError(f"The server has ended; its exit status is {process.exitcode}.")
        finally:
            process.terminate()
            process.join(END_S)
            process.kill()
            process.join()


def _serve(listener: socket.socket, num_threads: int, device: str) -> None:
    from llava_serve.api.app import create_app
    from llava_serve.api.http_server import server_of
    from llava_serve.api.in_process import InProcessBackend
    from llava_serve.api.parse_process import ParseProcess
    from llava_serve.async_llm import AsyncLLM
    from llava_serve.config import ApiOptions, EngineOptions, ImageOptions

    engine = EngineOptions(num_threads=num_threads)
    llm = AsyncLLM("builtin", engine, device=device, image_options=ImageOptions().isolated)
    with ParseProcess() as parse:
        app = create_app(InProcessBackend(llm), ApiOptions(), offload=parse)
        server_of(app, graceful_timeout_s=2).run(sockets=[listener])
    llm.close()


def _await_health(port: int, process: multiprocessing.process.BaseProcess) -> None:
    """Connections wait in the listener until the server accepts them."""
    while process.is_alive():
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            if connection.recv(64).startswith(b"HTTP/1.1 200 "):
                return
        time.sleep(0.05)
    raise RuntimeError(f"The server has ended; its exit status is {process.exitcode}.")
