"""WebP, GIF, BMP, PPM, AVIF and HEIC: headers are read, metadata is left out, and the first frame is kept."""

from __future__ import annotations

import io
import re
import struct

from PIL import Image
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.WebPImagePlugin import WebPImageFile

from llava_serve.errors import InvalidImageError
from llava_serve.images.exif import exif_orientation
from llava_serve.images.opened import Opened, loaded

_WEBP_KEPT = {b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF"}
_WEBP_METADATA = 0x20 | 0x08 | 0x04  # flags: a colour profile, EXIF, XMP
_MAX_CHUNKS = 10_000
"""That are looked at before the pixels; what lies behind them is none of them."""
_MAX_BLOCKS = 200_000
"""Of 255 bytes at most each, as GIF has them: more than 20 MiB."""
_PPM_HEADER = re.compile(
    rb"P([56])(?:\s|#[^\n\r]*[\n\r])+(\d+)(?:\s|#[^\n\r]*[\n\r])+(\d+)(?:\s|#[^\n\r]*[\n\r])+(\d+)\s"
)
_BMP_COMPRESSIONS = {1: "RLE", 2: "RLE", 4: "JPEG", 5: "PNG"}


def open_webp(data: bytes) -> Opened:
    """Reads the header, without EXIF, XMP, colour profile and all frames but the first."""
    chunks: list[bytes] = []
    exif, at, frames = b"", 12, 0
    for _ in range(_MAX_CHUNKS):
        if at + 8 > len(data):
            break
        name, length = struct.unpack_from("<4sI", data, at)
        body = data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2
        frames += name == b"ANMF"
        if name == b"EXIF":
            exif = exif or body
        if name not in _WEBP_KEPT or (name == b"ANMF" and frames > 1):
            continue
        if name == b"VP8X" and body:
            body = bytes([body[0] & ~_WEBP_METADATA]) + body[1:]
        chunks.append(struct.pack("<4sI", name, len(body)) + body + b"\0" * (len(body) % 2))
    joined = b"WEBP" + b"".join(chunks)
    image = WebPImageFile(io.BytesIO(b"RIFF" + struct.pack("<I", len(joined)) + joined))
    return Opened(image.size, loaded(image), exif_orientation(exif))


def open_gif(data: bytes) -> Opened:
    """Reads the header and keeps the first frame: comments can be of any length, and frames of any number."""
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    kept = [data[:at]]
    for _ in range(_MAX_CHUNKS):
        kind = data[at]
        if kind == 0x2C:
            kept.append(data[at:])
            break
        if kind != 0x21:
            at += 1
            continue
        end = _behind_blocks(data, at + 2)
        if data[at + 1] == 0xF9:  # graphic control: transparency
            kept = [kept[0], data[at:end]]
        at = end
    image = GifImageFile(io.BytesIO(b"".join(kept)))
    return Opened(image.size, loaded(image))


def _behind_blocks(data: bytes, at: int) -> int:
    for _ in range(_MAX_BLOCKS):
        if data[at] == 0:
            return at + 1
        at += data[at] + 1
    raise ValueError("too many blocks")


def open_bmp(data: bytes) -> Opened:
    """Reads the header. An alpha band that is 0 all over is none: many programs leave it so.

    Raises:
        InvalidImageError: compressed.
    """
    length, compression = struct.unpack_from("<I12xI", data, 14)
    if length >= 40 and compression in _BMP_COMPRESSIONS:
        kind = _BMP_COMPRESSIONS[compression]
        raise InvalidImageError(f"The image is a BMP with {kind} compression; send it as PNG, or as plain BMP.")
    image = BmpImageFile(io.BytesIO(data))

    def load() -> Image.Image:
        if image.mode == "RGBA" and not image.getchannel("A").getbbox():
            return image.convert("RGB")
        image.load()
        return image

    return Opened(image.size, load)


def open_ppm(data: bytes) -> Opened:
    """Reads the header of binary grey (P5) or colour (P6) with values to 255: others are decoded number by number.

    Raises:
        InvalidImageError: another kind.
    """
    header = _PPM_HEADER.match(data[:4096])
    if header is None or int(header[4]) != 255:
        kind = data[:2].decode() + (f" with values to {int(header[4])}" if header else "")
        raise InvalidImageError(f"The image is a PPM of kind {kind}; P5 and P6 with values to 255 are read.")
    plain = b"P%s\n%s %s\n255\n" % header.groups()[:3]
    image = PpmImageFile(io.BytesIO(plain + data[header.end() :]))
    return Opened(image.size, loaded(image))


def open_avif(data: bytes) -> Opened:
    """Reads the header. The decoder tells the turns that the file asks for; EXIF does not count beside them."""
    image = AvifImageFile(io.BytesIO(_without_exif(data)))
    return Opened(image.size, loaded(image), exif_orientation(image.info.get("exif", b"")))


def open_heic(data: bytes) -> Opened:
    """Reads the header, where the extra `heic` is installed. The decoder turns the image itself.

    Raises:
        InvalidImageError: it is not.
    """
    try:
        from pillow_heif import HeifImageFile
    except ImportError as error:
        raise InvalidImageError(
            "The image is HEIC, which is read only where llava-serve[heic] is installed; convert it to JPEG."
        ) from error
    image = HeifImageFile(io.BytesIO(_without_exif(data)))
    return Opened(image.size, loaded(image))


def _without_exif(data: bytes) -> bytes:
    """An ISO media file whose EXIF item has another name, so that no decoder reads it."""
    at = 0
    for _ in range(_MAX_CHUNKS):
        if at + 8 > len(data):
            break
        length, name = struct.unpack_from(">I4s", data, at)
        if name == b"meta":
            box = data[at : at + length]
            return b"".join((data[:at], box.replace(b"Exif", b"skip"), data[at + len(box) :]))
        if length < 8:
            break
        at += length
    return data
