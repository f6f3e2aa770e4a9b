"""One plain scene, and odd ways to write it: chunks, segments and directories by hand, where no library would."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 240, 180


def draw_scene() -> Image.Image:
    """White, a red circle in the upper left, a blue square in the lower right; no two turns of it are alike."""
    scene = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(scene)
    draw.ellipse((20, 20, 110, 110), fill=(220, 30, 40))
    draw.rectangle((140, 100, 220, 160), fill=(30, 60, 200))
    return scene


SCENE = draw_scene()
GREY = SCENE.convert("L")
MARKED = np.asarray(SCENE.convert("L")) < 250
"""Where the shapes are."""


def difference(image: Image.Image, expected: Image.Image) -> float:
    """Mean over all pixels and channels; infinite where the sizes differ."""
    if image.size != expected.size:
        return float("inf")
    values = [np.asarray(each.convert("RGB")).astype(float) for each in (image, expected)]
    return float(np.abs(values[0] - values[1]).mean())


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def hidden(colour: str = "noise") -> Image.Image:
    """The scene as RGBA, transparent where it is white; there the hidden colour is noise."""
    pixels = np.dstack([np.asarray(SCENE), MARKED.astype(np.uint8) * 255])
    noise = np.random.default_rng(0).integers(0, 256, pixels.shape, dtype=np.uint8)
    pixels[..., :3][~MARKED] = noise[..., :3][~MARKED] if colour == "noise" else 0
    return Image.fromarray(pixels)


# PNG


def chunk(name: bytes, body: bytes, checksum: int | None = None) -> bytes:
    crc = zlib.crc32(name + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc)


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 8
    while at < len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        found.append((name, data[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def png_with(data: bytes, *inserted: bytes, before: bytes = b"IDAT") -> bytes:
    """A PNG with raw chunks before the first one of a name."""
    out, done = data[:8], False
    for name, body in png_chunks(data):
        if name == before and not done:
            out, done = out + b"".join(inserted), True
        out += chunk(name, body)
    return out


def png_of(samples: NDArray[Any], depth: int, colour: int, *extra: bytes) -> bytes:
    """A PNG of [height, width] or [height, width, channels] samples of 16, 8, 4, 2 or 1 bits."""
    height, width = samples.shape[:2]
    flat = samples.reshape(height, -1)
    if depth == 16:
        rows = flat.astype(">u2").view(np.uint8).reshape(height, -1)
    elif depth == 8:
        rows = flat.astype(np.uint8)
    else:
        bits = np.unpackbits(flat.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
        rows = np.packbits(bits.reshape(height, -1), axis=1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = (chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(raw)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


# EXIF and JPEG


def exif_block(orientation: int, *, order: str = "<", kind: int = 3, extra: bytes = b"") -> bytes:
    """A directory with an orientation, and raw further entries of 12 bytes."""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    value = struct.pack(order + ("H2x" if kind == 3 else "I"), orientation)
    entry = struct.pack(order + "HHI", 0x0112, kind, 1) + value
    count = 1 + len(extra) // 12
    return b"Exif\0\0" + mark + struct.pack(order + "IH", 8, count) + entry + extra + bytes(4)


def jpeg_with(data: bytes, *segments: tuple[int, bytes]) -> bytes:
    """A JPEG with segments (marker, body) behind its first one, the JFIF header."""
    length = int.from_bytes(data[4:6])
    inserted = b"".join(b"\xff" + bytes([marker]) + (len(body) + 2).to_bytes(2) + body for marker, body in segments)
    return data[: 4 + length] + inserted + data[4 + length :]


# TIFF


def tiff(
    samples: NDArray[Any],
    *,
    bits: int | None = None,
    order: Literal["<", ">"] = "<",
    photometric: int | None = None,
    planar: bool = False,
    compress: bool = False,
    predictor: int = 1,
    tile: int = 0,
    big: bool = False,
    extra: dict[int, tuple[int, tuple[float, ...]]] | None = None,
) -> bytes:
    """A TIFF of [height, width, channels] samples, as TIFF 6.0 says.

    Args:
        samples: unsigned, signed, or float.
        bits: of a sample, packed; None takes all of them.
        order: of bytes.
        photometric: 0 is white for the least value; None is RGB for 3 channels or more.
        planar: each channel by itself.
        compress: by deflate.
        predictor: 2 or 3.
        tile: side of the tiles; 0 writes strips of 50 rows.
        big: BigTIFF.
        extra: further tags: (type, values).
    """
    height, width, channels = samples.shape
    kind, depth = samples.dtype.kind, bits or samples.dtype.itemsize * 8
    planes = [samples[..., i : i + 1] for i in range(channels)] if planar else [samples]
    blocks = []
    for plane in planes:
        if tile:
            padded = np.pad(plane, ((0, -height % tile), (0, -width % tile), (0, 0)))
            corners = [(y, x) for y in range(0, height, tile) for x in range(0, width, tile)]
            blocks += [_pack(padded[y : y + tile, x : x + tile], depth, order, predictor) for y, x in corners]
        else:
            blocks += [_pack(plane[y : y + 50], depth, order, predictor) for y in range(0, height, 50)]
    if compress:
        blocks = [zlib.compress(block) for block in blocks]
    start = 16 if big else 8
    offsets = [start + sum(len(block) for block in blocks[:i]) for i in range(len(blocks))]
    tags: dict[int, tuple[int, tuple[float, ...]]] = {
        256: (4, (width,)),
        257: (4, (height,)),
        258: (3, (depth,) * channels),
        259: (3, (8 if compress else 1,)),
        262: (3, ((2 if channels >= 3 else 1) if photometric is None else photometric,)),
        277: (3, (channels,)),
        284: (3, (2 if planar else 1,)),
        339: (3, ({"u": 1, "i": 2, "f": 3, "c": 6}[kind],) * channels),
    }
    if predictor > 1:
        tags[317] = (3, (predictor,))
    sizes = tuple(len(block) for block in blocks)
    if tile:
        tags |= {322: (3, (tile,)), 323: (3, (tile,)), 324: (4, tuple(offsets)), 325: (4, sizes)}
    else:
        tags |= {273: (4, tuple(offsets)), 278: (3, (50,)), 279: (4, sizes)}
    if channels in (2, 4):
        tags[338] = (3, (2,))
    return _file(b"".join(blocks), tags | (extra or {}), order, big)


def _pack(block: NDArray[Any], depth: int, order: Literal["<", ">"], predictor: int) -> bytes:
    rows, channels = len(block), block.shape[2]
    size = block.dtype.itemsize
    if depth % 8:
        bits = np.unpackbits(block.astype(">u2").view(np.uint8).reshape(rows, -1, 2), axis=-1)[..., 16 - depth :]
        return np.packbits(bits.reshape(rows, -1), axis=1).tobytes()
    if predictor == 2:
        whole = block.view(f"u{size}").copy()
        whole[:, 1:] -= whole[:, :-1].copy()
        block = whole
    elif predictor == 3:
        upper_first = block.astype(block.dtype.newbyteorder(">")).reshape(rows, -1).view(np.uint8)
        planes = upper_first.reshape(rows, -1, size).swapaxes(1, 2).reshape(rows, -1, channels)
        steps = planes.copy()
        steps[:, 1:] -= planes[:, :-1]
        return steps.tobytes()
    return block.astype(block.dtype.newbyteorder(order)).tobytes()


def _file(pixels: bytes, tags: dict[int, tuple[int, tuple[float, ...]]], order: str, big: bool) -> bytes:
    codes = {1: "B", 3: "H", 4: "I", 11: "f", 12: "d"}
    mark = b"II" if order == "<" else b"MM"
    start = (16 if big else 8) + len(pixels)
    word, inline = ("Q", 8) if big else ("I", 4)
    head = mark + (struct.pack(order + "HHHQ", 43, 8, 0, start) if big else struct.pack(order + "HI", 42, start))
    entries, values = b"", b""
    values_at = start + (8 if big else 2) + len(tags) * (12 + inline - 4 + (4 if big else 0)) + inline
    for tag, (kind, numbers) in sorted(tags.items()):
        value = struct.pack(order + f"{len(numbers)}{codes[kind]}", *numbers)
        entries += struct.pack(order + "HH" + word, tag, kind, len(numbers))
        if len(value) > inline:
            entries += struct.pack(order + word, values_at + len(values))
            values += value
        else:
            entries += value.ljust(inline, b"\0")
    count = struct.pack(order + ("Q" if big else "H"), len(tags))
    return head + pixels + count + entries + bytes(inline) + values
