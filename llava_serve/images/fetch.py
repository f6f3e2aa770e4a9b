"""Sources of pictures: `data:` URLs in requests; files, links and PIL images for the library's own user."""

from __future__ import annotations

import base64
import binascii
import io
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ImageFile import ImageFile

from llava_serve.config import ImageOptions
from llava_serve.errors import InvalidImageError
from llava_serve.images.download import Downloader, is_link
from llava_serve.images.exif import exif_orientation, turn_upright
from llava_serve.images.formats import identify
from llava_serve.images.pixels import add_key, to_8_bits
from llava_serve.images.transport import Budget, FetchError, FetchLimits

_WHITE_SPACE = b" \t\n\r\f\v"
_FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")

_ESCAPED = {
    b"%2B": b"+",
    b"%2b": b"+",
    b"%2F": b"/",
    b"%2f": b"/",
    b"%3D": b"=",
    b"%3d": b"=",
    b"%0D": b"",
    b"%0A": b"",
}
"""Of base64 that was percent-encoded as a part of a URL."""

ImageSource = str | Path | bytes | Image.Image | NDArray[np.uint8]
"""A path, an `http(s):` or `data:` URL, encoded bytes, a PIL image, or uint8 [height, width, 3]."""

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_BASE64_START = re.compile(r"[/_]9j[/_]|iVBORw0KGgo|R0lGOD|UklGR|Qk[01]|SUkqA|TU0AK|AAAA\w")
"""How the first bytes of pictures look in base64: JPEG, PNG, GIF, WebP, BMP, TIFF, AVIF and HEIC."""


def read_request_source(source: str | bytes, options: ImageOptions) -> bytes:
    """The bytes of a picture in a request. A request never reads this machine's files or network;
    allowed links were followed earlier (`llava_serve.images.links`).

    Raises:
        InvalidImageError: a link, a path, or an invalid `data:` URL.
    """
    if isinstance(source, bytes):
        return source
    if source[:5].lower() == "data:":
        return _read_data_url(source, options)
    if _BASE64_START.match(source):
        raise InvalidImageError(
            "The picture looks like base64 alone: put 'data:image/png;base64,' before it, with the picture's own type.",
            "messages",
        )
    if options.links in ("off", ()):
        raise InvalidImageError(
            "A picture must be sent as a data: URL; links are not accepted by this server.", "messages"
        )
    raise InvalidImageError("A picture must be sent as a data: URL, or as an http: or https: link.", "messages")


def read_local_source(source: ImageSource, options: ImageOptions) -> bytes:
    """The bytes of a picture that the library's own user names; links and their redirects are followed.

    Raises:
        InvalidImageError: the picture cannot be read or fetched.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise InvalidImageError(f"An array must be uint8 [height, width, 3]; got {source.dtype} {source.shape}.")
        source = Image.fromarray(source)
    if isinstance(source, Image.Image):
        return _encode(source)
    if isinstance(source, bytes):
        return source
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _read_data_url(source, options)
    if is_link(source):
        return _download(str(source), options)
    if isinstance(source, str) and (scheme := _SCHEME.match(source)):
        raise InvalidImageError(f"A picture is not read by {scheme[0]}: give a path, or an http: or https: link.")
    if not isinstance(source, str | Path):
        raise InvalidImageError(
            "A picture is a path, a link, a data: URL, encoded bytes, a PIL image or an array of pixels; "
            f"got {type(source).__name__}."
        )
    try:
        return Path(source).expanduser().read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # the latter two are of names that no file can have
        cause = getattr(error, "strerror", None) or "no such file"
        raise InvalidImageError(f"The picture {source} cannot be read: {cause}.") from error


def _read_data_url(url: str, options: ImageOptions) -> bytes:
    head, comma, payload = url.partition(",")
    if not comma:
        raise InvalidImageError("The data: URL has no comma, so it has no data.", "messages")
    if len(payload) > options.max_bytes * 3:
        raise InvalidImageError(f"The picture is too large; at most {options.max_bytes:,} bytes are accepted.")
    try:
        if head.lower().endswith(";base64"):
            encoded = payload.encode("ascii")
            for escape, mark in _ESCAPED.items() if b"%" in encoded else ():
                encoded = encoded.replace(escape, mark)
            plain = encoded.translate(_FROM_URL_SAFE, _WHITE_SPACE).rstrip(b"=")
            return base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
        # Percent-encoding, but for its mark, is quoted-printable, which is decoded without an object for each escape.
        return binascii.a2b_qp(payload.encode().replace(b"=", b"=3D").replace(b"%", b"="))
    except ValueError as error:
        raise InvalidImageError("The data: URL is not valid base64, or no text.", "messages") from error


def _encode(image: Image.Image) -> bytes:
    """A PIL image as bytes that decode as its file does. One whose pixels nobody has looked at yet is its file; else
    the pixels are written without loss, turned and scaled as decoding would."""
    try:
        return _file_of(image) or _encode_pixels(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow reads the pixels only now
        raise InvalidImageError("The pixels of the PIL image cannot be read.") from error


def _encode_pixels(image: Image.Image) -> bytes:
    exif, key = image.info.get("exif"), image.info.get("transparency")
    if "transparency" in image.info and not _is_key(image.mode, key):  # it says nothing
        image = image.copy()
        del image.info["transparency"]
    elif key is not None and image.mode != "P":
        image = add_key(image, key if isinstance(key, tuple) else (key,))
    image = turn_upright(to_8_bits(image), exif_orientation(exif) if isinstance(exif, bytes) else 1)
    if image.mode == "La":  # Pillow converts it to this mode only
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode not in ("1", "L", "P", "RGB"):
        image = image.convert("RGB")
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)
    return out.getvalue()


def _is_key(mode: str, key: Any) -> bool:
    """Whether this is the transparency of an image without an alpha band: of a palette, or one colour."""
    if mode == "P" and isinstance(key, bytes):
        return len(key) <= 256
    colour = key if mode == "RGB" and isinstance(key, tuple) and len(key) == 3 else (key,)
    has_key = mode in ("L", "P") or mode.startswith("I;16") or len(colour) == 3
    most = 0xFF if mode == "P" else 0xFFFF
    return has_key and all(isinstance(each, int) and 0 <= each <= most for each in colour)


def _file_of(image: Image.Image) -> bytes | None:
    """The file of an image that was opened and not loaded; None for another frame than the first, and for formats that
    only Pillow reads."""
    file = getattr(image, "fp", None)
    if not isinstance(image, ImageFile) or not image.tile or image.tell() != 0 or file is None or file.closed:
        return None
    at = file.tell()
    file.seek(0)
    data: bytes = file.read()
    file.seek(at)
    try:
        identify(data)
    except InvalidImageError:
        return None
    return data


def _download(url: str, options: ImageOptions) -> bytes:
    limits = FetchLimits(read_s=20, total_s=300, total_bytes=options.max_bytes)  # nobody else waits for it
    try:
        return _downloader().fetch(url, options.max_bytes, Budget(limits))
    except FetchError as error:
        raise InvalidImageError(f"The picture at {url} cannot be fetched: {error}.") from error


@cache
def _downloader() -> Downloader:
    return Downloader()
