"""Where pictures come from: `data:` URLs in requests; files, links and PIL images for the library's own user."""

from __future__ import annotations

import base64
import binascii
import io
from functools import cache
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from llava_serve.config import ImageOptions
from llava_serve.errors import InvalidImageError
from llava_serve.images.download import Downloader, is_link
from llava_serve.images.transport import Budget, FetchError, FetchLimits

ImageSource = str | Path | bytes | Image.Image | NDArray[np.uint8]
"""A path, an `http(s):` or `data:` URL, encoded bytes, a PIL image, or uint8 [height, width, 3]."""


def read_request_source(source: str | bytes, options: ImageOptions) -> bytes:
    """The bytes of a picture in a request. Nothing on this machine or its network is read on a caller's word: allowed
    links have been followed before (`llava_serve.images.links`).

    Raises:
        InvalidImageError: a link, a path, or a `data:` URL that is not one.
    """
    if isinstance(source, bytes):
        return source
    if source[:5].lower() == "data:":
        return _read_data_url(source, options)
    if options.links in ("off", ()):
        raise InvalidImageError(
            "A picture must be sent as a data: URL; links are not accepted by this server.", "messages"
        )
    raise InvalidImageError("A picture must be sent as a data: URL, or as an http: or https: link.", "messages")


def read_local_source(source: ImageSource, options: ImageOptions) -> bytes:
    """The bytes of a picture that the library's own user names; links are followed as a browser would.

    Raises:
        InvalidImageError: cannot be read or fetched.
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
        raise InvalidImageError("The data: URL has no comma, hence no data.", "messages")
    if len(payload) > options.max_bytes * 3:
        raise InvalidImageError(f"The picture is too large; at most {options.max_bytes:,} bytes are accepted.")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(payload)
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidImageError("The data: URL is not valid base64.", "messages") from error


def _encode(image: Image.Image) -> bytes:
    modes = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # those that PNG keeps without loss
    out = io.BytesIO()
    (image if image.mode in modes else image.convert("RGB")).save(out, "PNG", compress_level=1)
    return out.getvalue()


def _download(url: str, options: ImageOptions) -> bytes:
    limits = FetchLimits(read_s=20, total_s=300, total_bytes=options.max_bytes)  # nobody else waits for it
    try:
        return _downloader().fetch(url, options.max_bytes, Budget(limits))
    except FetchError as error:
        raise InvalidImageError(f"The picture at {url} cannot be fetched: {error}.") from error


@cache
def _downloader() -> Downloader:
    return Downloader()
