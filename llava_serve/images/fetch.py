"""Sources of pictures: `data:` URLs in requests; files, links and PIL images for the library's own user."""

from __future__ import annotations

import base64
import binascii
import io
import re
from functools import cache
from pathlib import Path

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

ImageSource = str | Path | bytes | Image.Image | NDArray[np.uint8]
"""A path, an `http(s):` or `data:` URL, encoded bytes, a PIL image, or uint8 [height, width, 3]."""

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
    try:
        return Path(source).expanduser().read_bytes()
    except OSError as error:
        raise InvalidImageError(f"The picture {source} cannot be read: {error.strerror or 'no such file'}.") from error


def _read_data_url(url: str, options: ImageOptions) -> bytes:
    head, comma, payload = url.partition(",")
    if not comma:
        raise InvalidImageError("The data: URL has no comma, so it has no data.", "messages")
    if len(payload) > options.max_bytes * 3:
        raise InvalidImageError(f"The picture is too large; at most {options.max_bytes:,} bytes are accepted.")
    try:
        if head.lower().endswith(";base64"):
            plain = payload.encode("ascii").translate(_FROM_URL_SAFE, _WHITE_SPACE).rstrip(b"=")
            return base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
        # Percent-encoding, but for its mark, is quoted-printable, which is decoded without an object for each escape.
        return binascii.a2b_qp(payload.encode().replace(b"=", b"=3D").replace(b"%", b"="))
    except ValueError as error:
        raise InvalidImageError("The data: URL is not valid base64, or no text.", "messages") from error


def _encode(image: Image.Image) -> bytes:
    """A PIL image as bytes that decode as its file does. One whose pixels nobody has looked at yet is its file; else
    the pixels are written without loss, turned and scaled as decoding would."""
    if (data := _file_of(image)) is not None:
        return data
    orientation, key = exif_orientation(image.info.get("exif") or b""), image.info.get("transparency")
    if isinstance(key, int | tuple) and (image.mode in ("L", "RGB") or image.mode.startswith("I;16")):
        image = add_key(image, key if isinstance(key, tuple) else (key,))
    image = turn_upright(to_8_bits(image), orientation)
    if image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode not in ("1", "L", "P", "RGB"):
        image = image.convert("RGB")
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)
    return out.getvalue()


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
