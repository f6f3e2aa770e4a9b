"""One child process that decodes, seen from its parent."""

from __future__ import annotations

import json
import logging
import os
import pickle
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

import numpy as np

from llava_serve.checkpoints.spec import ImageProcessing
from llava_serve.config import ImageOptions
from llava_serve.errors import InvalidImageError
from llava_serve.images.decode_worker import MESSAGE_BYTES
from llava_serve.images.decoder import Check
from llava_serve.images.tile_cache import CachedTiles

WORKER = "llava_serve.images.decode_worker"

_logger = logging.getLogger(__name__)
_POLL_S = 0.05
"""Between two looks whether the work is still wanted."""
_START_S = 60.0
"""A process that is not ready by then never is. It takes a third of a second on a free core."""
_GRACE_S = 0.3
"""How long unwanted work may run on: ending it costs a new process, which takes as long to start."""


class DecodeProcessEndedError(Exception):
    """The process has ended by itself, or does not start."""


class _SilentError(Exception):
    """No message has come in time. It is no `TimeoutError`: what `check` raises is one."""


class DecodeProcess:
    """Decodes one picture at a time. Started by a thread that lives as long: the process dies with that thread.

    Args:
        options: limits on pictures, on memory and on time.
        processing: of the checkpoint.
        worker: the module that runs in the process.

    Attributes:
        ready: it has started.
    """

    def __init__(self, options: ImageOptions, processing: ImageProcessing, worker: str = WORKER) -> None:
        self._options = options
        self.ready = False
        self._busy = False
        self._memory = os.fdopen(os.memfd_create("picture"), "r+b", buffering=0)
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.settimeout(_POLL_S)
        self._channel.send(pickle.dumps((options, processing)))  # it waits there for the process
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", worker, str(theirs.fileno()), str(self._memory.fileno())],
                pass_fds=(theirs.fileno(), self._memory.fileno()),
                stdin=subprocess.DEVNULL,
                # It imports what this process would, from the same places. One thread: a process is a core.
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"},
                process_group=0,  # Ctrl-C is for the parent, which may have answers to complete
            )

    @property
    def usable(self) -> bool:
        """It lives, and waits for a picture or is about to."""
        return not self._busy and self._process.poll() is None

    def decode(
        self, data: bytes, room: int, check: Check | None, pixels: int | None = None, num_images: int = 1
    ) -> CachedTiles:
        """A picture as model input, as `Decoder` says. The process may not be usable after it.

        Raises:
            InvalidImageError: not a picture, damaged, or over a limit.
            DecodeProcessEndedError: the process has ended, and not at a limit.
        """
        if not self.ready:
            self._await_ready(check)
        os.pwrite(self._memory.fileno(), data, 0)
        self._busy = True
        self._send(len(data), room, pixels, num_images)
        reply = self._await_reply(check)
        self._busy = "over_memory" in reply
        if self._busy:
            _logger.info("The decoding of a picture was ended at the limit on memory.")
            raise InvalidImageError("The picture takes too much memory to decode.")
        if "refused" in reply:
            raise InvalidImageError(*reply["refused"])
        if "failed" in reply:
            raise RuntimeError(f"Decoding has failed:\n{reply['failed']}")
        tiles = np.empty(reply["shape"], np.uint8)
        if os.preadv(self._memory.fileno(), [tiles.data], 0) != tiles.nbytes:
            raise RuntimeError("Decoding has given fewer tiles than it says.")
        width, height = reply["size"]
        return CachedTiles((width, height), reply["count"], tiles, reply["digest"], tile_s=reply["tile_s"])

    def kill(self) -> int:
        """Ends the process, whatever it does, and returns its exit status. May be called again."""
        self._process.kill()
        self._channel.close()
        self._memory.close()
        return self._process.wait()

    def _await_ready(self, check: Check | None) -> None:
        try:
            self._receive(_START_S, check)
        except _SilentError:
            raise DecodeProcessEndedError from None
        self.ready = True

    def _await_reply(self, check: Check | None) -> dict[str, Any]:
        """The reply to a picture; within the limit on time, and while it is wanted."""
        try:
            return self._receive(self._options.decode_timeout_s, check)
        except _SilentError:
            _logger.info("The decoding of a picture was ended at the limit on time.")
            raise InvalidImageError("The picture takes too long to decode.") from None
        except DecodeProcessEndedError:
            raise
        except Exception:  # what `check` raises
            with suppress(_SilentError, DecodeProcessEndedError):
                self._receive(_GRACE_S, None)
                self._busy = False
            raise

    def _send(self, *message: int | None) -> None:
        try:
            self._channel.send(json.dumps(message).encode())
        except OSError as error:
            raise DecodeProcessEndedError from error

    def _receive(self, timeout_s: float, check: Check | None) -> dict[str, Any]:
        """The next message; `_SilentError` if it does not come in time."""
        limit = time.monotonic() + timeout_s
        while True:
            try:
                message = self._channel.recv(MESSAGE_BYTES)
                break
            except TimeoutError:
                if check is not None:
                    check()
                if time.monotonic() >= limit:
                    raise _SilentError from None
            except OSError as error:
                raise DecodeProcessEndedError from error
        if not message:
            raise DecodeProcessEndedError
        reply: dict[str, Any] = json.loads(message)
        return reply
