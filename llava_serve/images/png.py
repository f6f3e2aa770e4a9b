"""PNG: only what makes the pixels goes to the decoder.

Texts, colour profiles and other ancillary chunks can inflate to any size, and each can be broken without harm to the
pixels. Source: the PNG specification, third edition.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from llava_serve.errors import InvalidImageError
from llava_serve.images.exif import exif_orientation
from llava_serve.images.opened import Opened
from llava_serve.images.pixels import add_key, to_8_bits

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MAX_CHUNKS = 100_000
"""An image of 20 MiB has 2,560 where each holds 8 KiB, as most encoders write them."""
_GREY, _RGB, _PALETTE = 0, 2, 3


@dataclass(frozen=True, slots=True)
class _Chunks:
    """The chunks that matter.

    Attributes:
        header: size, depth, kind of colour.
        palette: colours, where the kind asks for them.
        transparency: alpha of a palette, or the colour that is transparent.
        pixels: the data of all IDAT chunks; what follows an animation's default image is none of it.
        exif: hint at the orientation.
    """

    header: bytes
    palette: bytes
    transparency: bytes
    pixels: bytes
    exif: bytes


def open_png(data: bytes) -> Opened:
    """Reads the header. A wrong checksum behind whole pixels, or an absent end, is no fault.

    Raises:
        InvalidImageError: Apple's variant, or more chunks than an image has.
        ValueError, OSError, SyntaxError: damaged.
    """
    chunks = _split(data)
    depth, colour = chunks.header[8:10]
    key = _key(chunks, depth, colour)
    width, height = struct.unpack(">II", chunks.header[:8])

    def load() -> Image.Image:
        try:
            image = _decode(chunks, chunks.pixels)
        except OSError:
            repaired = _with_right_checksum(chunks.pixels, limit=height * (width * 8 + 16))
            if repaired is None:
                raise
            image = _decode(chunks, repaired)
        return to_8_bits(image) if key is None else add_key(image, key)

    PngImageFile(io.BytesIO(_join(chunks, b"")))  # refuses a header that means nothing
    return Opened((width, height), load, exif_orientation(chunks.exif))


def _split(data: bytes) -> _Chunks:
    found: dict[bytes, bytes] = {}
    pixels: list[bytes] = []
    at = len(_SIGNATURE)
    for _ in range(_MAX_CHUNKS):
        if at + 8 > len(data):
            break
        length, name = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        if name in (b"IHDR", b"PLTE"):
            _check(name, body, data[at + 8 + length : at + 12 + length])
        if name == b"IDAT":
            pixels.append(body)
        elif name == b"CgBI":
            raise InvalidImageError("The image is a PNG in Apple's own variant for apps (CgBI); send it as usual PNG.")
        elif name == b"IEND":
            break
        elif name in (b"IHDR", b"PLTE", b"tRNS", b"eXIf"):
            found.setdefault(name, body)
        at += 12 + length
    else:
        raise InvalidImageError(f"The PNG has more than {_MAX_CHUNKS:,} chunks.")
    header = found.get(b"IHDR", b"")
    if len(header) != 13 or not pixels:
        raise ValueError("no header or no pixels")
    palette = found.get(b"PLTE", b"") if header[9] == _PALETTE else b""
    return _Chunks(header, palette, found.get(b"tRNS", b""), b"".join(pixels), found.get(b"eXIf", b""))


def _check(name: bytes, body: bytes, checksum: bytes) -> None:
    if zlib.crc32(name + body).to_bytes(4) != checksum:
        raise ValueError("a chunk that counts has another checksum")


def _join(chunks: _Chunks, pixels: bytes) -> bytes:
    written = [(b"IHDR", chunks.header)]
    if chunks.palette:
        written += [(b"PLTE", chunks.palette), (b"tRNS", chunks.transparency[: len(chunks.palette) // 3])]
    written += [(b"IDAT", pixels), (b"IEND", b"")]
    parts = [_SIGNATURE]
    for name, body in written:
        if body or name != b"tRNS":
            parts += struct.pack(">I", len(body)), name, body, zlib.crc32(body, zlib.crc32(name)).to_bytes(4)
    return b"".join(parts)


def _decode(chunks: _Chunks, pixels: bytes) -> Image.Image:
    image = PngImageFile(io.BytesIO(_join(chunks, pixels)))
    image.load()
    return image


def _key(chunks: _Chunks, depth: int, colour: int) -> tuple[int, ...] | None:
    """The colour that is transparent, in the units of the decoded image."""
    channels = {_GREY: 1, _RGB: 3}.get(colour)
    if channels is None or len(chunks.transparency) < 2 * channels:
        return None
    most = 2**depth - 1
    key = [value & most for value in struct.unpack(f">{channels}H", chunks.transparency[: 2 * channels])]
    if colour == _RGB:
        return tuple(value >> depth - 8 for value in key)  # of 16 bits the upper 8 are decoded
    return (key[0] if depth == 16 else key[0] * 255 // most,)


def _with_right_checksum(pixels: bytes, limit: int) -> bytes | None:
    """The stream of pixels with the checksum that it should have; None where it is damaged or cut before that.

    Args:
        pixels: a zlib stream.
        limit: bytes that the image may have.
    """
    inflate = zlib.decompressobj(wbits=-15)
    checksum, rest, total = 1, pixels[2:], 0
    try:
        while not inflate.eof and total <= limit:
            block = inflate.decompress(rest, 1 << 20)
            if not block and not inflate.unconsumed_tail:
                break
            checksum, total, rest = zlib.adler32(block, checksum), total + len(block), inflate.unconsumed_tail
    except zlib.error:
        return None
    if not inflate.eof:
        return None
    return pixels[: len(pixels) - len(inflate.unused_data)] + checksum.to_bytes(4)
