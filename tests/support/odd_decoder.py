"""A decoding process that takes orders, for what no picture does reliably. Run by `IsolatedDecoder(worker=...)`."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from llava_serve.images.decode_worker import main
from llava_serve.images.decoder import Check, InProcessDecoder
from llava_serve.images.tile_cache import CachedTiles
from support.demo import DEMO_IMAGE

WORKER = __name__


def once(path: Path) -> bytes:
    """Orders the first process that reads it to write its id there and to sleep; the next one decodes a picture."""
    return f"once {path}".encode()


class OddDecoder(InProcessDecoder):
    """Decodes pictures, but for `sleep SECONDS`, `ever`, `once FILE`, `die SIGNAL` and `fail`."""

    def tiles_of(
        self, data: bytes, room: int, check: Check | None = None, pixels: int | None = None, num_images: int = 1
    ) -> CachedTiles:
        order, _, argument = data.decode("latin-1").partition(" ")
        match order:
            case "sleep":
                time.sleep(float(argument))
            case "ever":
                while True:
                    super().tiles_of(DEMO_IMAGE.read_bytes(), room, check)
            case "once" if not Path(argument).exists():
                Path(argument).write_text(str(os.getpid()), encoding="ascii")
                time.sleep(60)
            case "die":
                os.kill(os.getpid(), signal.Signals[argument])
            case "fail":
                raise LookupError("a fault of ours")
            case _ if order != "once":
                return super().tiles_of(data, room, check, pixels, num_images)
        return super().tiles_of(DEMO_IMAGE.read_bytes(), room, check)


if __name__ == "__main__":
    main(OddDecoder)
