"""An image of each kind, and ways to break one."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np

from support.odd_images import GREY, SCENE, encoded, exif_block, hidden, png_of, tiff

SMALL = SCENE.resize((80, 60))
DEEP = np.asarray(SMALL).astype(np.uint16) * 257
FILES = {
    "png": encoded(SMALL),
    "png palette": encoded(SMALL.quantize(8)),
    "png rgba": encoded(hidden().resize((80, 60))),
    "png 16": png_of(DEEP, 16, 2),
    "jpeg": encoded(SMALL, "JPEG", exif=exif_block(6)),
    "jpeg progressive": encoded(SMALL, "JPEG", progressive=True),
    "jpeg cmyk": encoded(SMALL.convert("CMYK"), "JPEG"),
    "jpeg restarts": encoded(SMALL, "JPEG", restart_marker_rows=1),
    "mpo": encoded(SMALL, "MPO", save_all=True, append_images=[SMALL]),
    "webp": encoded(SMALL, "WEBP", exif=exif_block(3)),
    "webp lossless": encoded(SMALL, "WEBP", lossless=True),
    "webp animated": encoded(SMALL, "WEBP", save_all=True, append_images=[GREY.resize((80, 60))]),
    "gif": encoded(SMALL.quantize(8), "GIF", comment=b"a" * 600),
    "bmp": encoded(SMALL, "BMP"),
    "ppm": encoded(SMALL, "PPM"),
    "avif": encoded(SMALL, "AVIF", exif=exif_block(1)),
    "tiff": encoded(SMALL, "TIFF"),
    "tiff lzw": encoded(SMALL, "TIFF", compression="tiff_lzw"),
    "tiff jpeg": encoded(SMALL, "TIFF", compression="jpeg"),
    "tiff group 4": encoded(SMALL.convert("1"), "TIFF", compression="group4"),
    "tiff deep": tiff(DEEP, planar=True, compress=True),
    "tiff float": tiff(DEEP.astype(np.float32), compress=True, predictor=3, tile=32),
    "tiff 12": tiff(DEEP[..., :1] >> 4, bits=12),
    "bigtiff": tiff(DEEP, big=True),
}


def broken(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Cut, with other bytes, with bytes less or more."""
    rng = random.Random(seed)
    for i in range(count):
        at = rng.randrange(len(data) if i % 2 else min(len(data), 400))  # half of them in the header
        match i % 5:
            case 0:
                yield data[:at]
            case 1:
                yield data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
            case 2:
                yield data[:at] + rng.randbytes(4) + data[at + 4 :]
            case 3:
                yield data[:at] + data[at + rng.randrange(1, 9) :]
            case _:
                yield data[:at] + rng.choice([b"\xff" * 4, b"\0" * 8, rng.randbytes(20)]) + data[at:]
