"""Decoding that can be ended: in child processes, which are used again and replaced when a picture passes a limit."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from llava_serve.checkpoints.spec import ImageProcessing
from llava_serve.config import ImageOptions
from llava_serve.errors import InvalidImageError
from llava_serve.images.decode_process import WORKER, DecodeProcess, DecodeProcessEndedError
from llava_serve.images.decoder import Check
from llava_serve.images.tile_cache import CachedTiles

_logger = logging.getLogger(__name__)
_ATTEMPTS = 2
"""A process can end for reasons that are not the picture's: the system's memory, somebody's kill."""


class IsolatedDecoder:
    """Decodes in child processes: as many as there are callers at once, and a spare that is warm.

    A process dies with this one, leaves nothing behind, and takes no request with it but the one it works on.

    Args:
        options: limits on pictures, on memory and on time.
        processing: of the checkpoint.
        worker: the module that runs in the processes.
        count_ended: called for each process that ended, or was ended, while it decoded.
    """

    def __init__(
        self,
        options: ImageOptions,
        processing: ImageProcessing,
        worker: str = WORKER,
        count_ended: Callable[[], None] | None = None,
    ) -> None:
        self._arguments = options, processing, worker
        self._count_ended = count_ended
        self._lock = threading.Lock()
        self._idle: list[DecodeProcess] = []
        self._processes: set[DecodeProcess] = set()
        # The kernel ends a process with the thread that has started it: so one thread starts all, and lives as long.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="start-decoder")
        self._spare = self._start()
        self._ended = weakref.finalize(self, _kill_all, self._starter, self._processes)

    def tiles_of(
        self, data: bytes, room: int, check: Check | None = None, pixels: int | None = None, num_images: int = 1
    ) -> CachedTiles:
        """As `Decoder` says. What `check` raises ends the work, and the process if that does not end soon.

        Raises:
            InvalidImageError: also a picture that takes too long or too much memory, or that ends its process twice.
        """
        for _ in range(_ATTEMPTS):
            process = self._take()
            try:
                return process.decode(data, room, check, pixels, num_images)
            except DecodeProcessEndedError:
                _logger.warning("A decoding process has ended; its exit status is %s.", process.kill())
            finally:
                self._give_back(process)
        if not process.ready:
            raise RuntimeError("No decoding process starts.")
        raise InvalidImageError("The picture cannot be decoded.")

    def close(self) -> None:
        """Ends all processes."""
        self._ended()

    def _start(self) -> Future[DecodeProcess]:
        return self._starter.submit(_start, self._processes, *self._arguments)

    def _take(self) -> DecodeProcess:
        """A process for one picture: the one used last, which is warm, else the spare."""
        while True:
            with self._lock:
                process = self._idle.pop() if self._idle else None
                if process is None:
                    spare, self._spare = self._spare, self._start()
            process = process or spare.result()
            if process.usable:
                return process
            self._discard(process)

    def _give_back(self, process: DecodeProcess) -> None:
        if process.usable:
            with self._lock:
                self._idle.append(process)
            return
        self._discard(process)
        if self._count_ended is not None:
            self._count_ended()

    def _discard(self, process: DecodeProcess) -> None:
        process.kill()
        self._processes.discard(process)


def _start(
    processes: set[DecodeProcess], options: ImageOptions, processing: ImageProcessing, worker: str
) -> DecodeProcess:
    process = DecodeProcess(options, processing, worker)
    processes.add(process)
    return process


def _kill_all(starter: ThreadPoolExecutor, processes: set[DecodeProcess]) -> None:
    starter.shutdown()
    for process in tuple(processes):
        process.kill()
