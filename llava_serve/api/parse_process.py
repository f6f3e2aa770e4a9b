"""Parses large bodies in a child process, so that the engine in this one goes on: parsing holds the interpreter."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Protocol, Self, TypeVar

from llava_serve.errors import LlavaServeError, RequestError
from llava_serve.priority_executor import PriorityExecutor

T = TypeVar("T")

PARSE_TIMEOUT_S = 10.0
"""A body within the limits takes less than a second."""
_START_S = 60.0
"""For the child to be ready. It takes a second on a free core."""

_logger = logging.getLogger(__name__)


class Offload(Protocol):
    """Runs work on `size` bytes off the event loop: `in_thread` is one, and `ParseProcess` another."""

    async def __call__(self, work: Callable[[], T], size: int) -> T: ...


async def in_thread(work: Callable[[], T], size: int) -> T:
    """Runs work in a thread, of whatever size."""
    return await asyncio.to_thread(work)


class ParseProcess:
    """One child, which takes one body after the other, the smallest first: those that are slow to parse wait, and not
    those of other clients. It is replaced when it ends, or takes too long.

    Work and results are pickled: functions of a module with plain values. `close` ends the child, and so does the end
    of this process.
    """

    _ready: bool
    _closed = False

    def __init__(self, timeout_s: float = PARSE_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._waiting = PriorityExecutor(1, "parse")
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __call__(self, work: Callable[[], T], size: int) -> T:
        """The result of work on a body of `size` bytes.

        Raises:
            RequestError: it takes too long, or has ended the process. An error of the work itself is raised as it is.
        """
        return await self._waiting.run(size, partial(self._run, work))

    def close(self) -> None:
        """Ends the child. Work that waits for it is cancelled, and work in it fails."""
        self._closed = True
        self._waiting.close()
        self._end()

    def _run(self, work: Callable[[], T]) -> T:
        sent = pickle.dumps(work)
        for _ in range(2):  # the process may have ended while it was idle
            try:
                if not self._ready:
                    self._await(_START_S)
                    self._ready = True
                self._pipe.send_bytes(sent)
                received = self._await(self._timeout_s)
            except (EOFError, OSError) as error:
                if self._closed:
                    raise
                _logger.warning("The process that parses bodies has ended (%s); a new one starts.", error)
                self._end()
                self._start()
                if isinstance(error, TimeoutError):
                    break
                continue
            failed, result = pickle.loads(received)
            if failed:
                raise result
            parsed: T = result
            return parsed
        raise RequestError("The request's body could not be parsed with the time and memory that there are for it.")

    def _await(self, timeout_s: float) -> bytes:
        """The child's next message. Raises `TimeoutError`."""
        if not self._pipe.poll(timeout_s):
            raise TimeoutError("it takes too long")
        return self._pipe.recv_bytes()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, childs = context.Pipe()
        self._process = context.Process(target=_serve, args=(childs,), name="parse", daemon=True)
        self._process.start()
        childs.close()
        self._ready = False

    def _end(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Connection) -> None:
    """Runs in the child, until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C in a terminal; the parent drains, and then ends this
    from llava_serve.api import validation  # noqa: F401 (takes a while; a request would wait for it)

    pipe.send_bytes(b"ready")
    while True:
        try:
            received = pipe.recv_bytes()
        except (EOFError, ConnectionError):
            return
        try:
            answer = pickle.dumps((False, pickle.loads(received)()))
        except Exception as error:
            if not isinstance(error, LlavaServeError):
                error.add_note(traceback.format_exc())  # which is not pickled with it
            answer = pickle.dumps((True, error))
        pipe.send_bytes(answer)
