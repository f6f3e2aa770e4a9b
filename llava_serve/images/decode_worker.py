"""The child process in which pictures are decoded; `decode_process` starts it and is the other end of its socket.

    python -P -m llava_serve.images.decode_worker SOCKET MEMORY

Both arguments are inherited file descriptors. The picture comes and the tiles go through MEMORY, an anonymous file.
SOCKET carries one message each way per picture. The worker's messages are JSON, never pickle: a decoder that a picture
has taken over must not be able to run code in the parent.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from llava_serve.checkpoints.spec import ImageProcessing
from llava_serve.config import ImageOptions
from llava_serve.errors import InvalidImageError
from llava_serve.images.decoder import Decoder, InProcessDecoder
from llava_serve.memory_limit import limit_memory

MESSAGE_BYTES = 1 << 16
"""The longest message, either way."""

_MAX_TRACEBACK = 8000
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)
_LIBC.__errno_location.restype = ctypes.POINTER(ctypes.c_int)


def main(make_decoder: Callable[[ImageOptions, ImageProcessing], Decoder] = InProcessDecoder) -> None:
    """Decodes pictures until the socket is closed, or one has passed the limit on memory."""
    channel, memory = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # If the parent died before this, the socket is at its end.
    if not (first := channel.recv(MESSAGE_BYTES)):
        return
    options, processing = pickle.loads(first)
    decoder = make_decoder(options, processing)
    Image.init()
    limit_memory(options.decode_memory_bytes)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # decoders in C print what is wrong with an image
    channel.send(b"{}")
    while request := channel.recv(MESSAGE_BYTES):
        reply = _decode(decoder, memory, *json.loads(request))
        channel.send(json.dumps(reply).encode())
        if "over_memory" in reply:
            return  # what it still holds is unknown


def _decode(
    decoder: Decoder, memory: int, length: int, room: int, pixels: int | None, num_images: int
) -> dict[str, Any]:
    """One picture, from the shared memory to its tiles in there: the message to send."""
    last_errno = _LIBC.__errno_location().contents
    last_errno.value = 0
    try:
        made = decoder.tiles_of(os.pread(memory, length, 0), room, pixels=pixels, num_images=num_images)
    except Exception as error:
        # Decoders in C give up without a word of it when an allocation fails: then the C library knows.
        if last_errno.value == errno.ENOMEM or _is_memory_error(error):
            return {"over_memory": True}
        if isinstance(error, InvalidImageError):
            return {"refused": error.args}
        return {"failed": traceback.format_exc()[-_MAX_TRACEBACK:]}
    os.pwrite(memory, np.ascontiguousarray(made.tiles).data, 0)
    shape = made.tiles.shape
    return {"size": made.size, "count": made.count, "shape": shape, "digest": made.digest, "tile_s": made.tile_s}


def _is_memory_error(error: BaseException | None) -> bool:
    """Whether this is one, or was caused by one."""
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


if __name__ == "__main__":
    main()
