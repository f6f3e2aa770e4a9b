"""Requests that cost little to send and would cost much to serve: what `benchmarks.hostile` and the tests send."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

PATH = "/v1/chat/completions"
TURN = {"role": "user", "content": "Hi"}
INTERSECTION = "/.*a.{15}.*/ & /.*b.{15}.*/ & /.*c.{15}.*/ & ~/.*d.{15}.*/"
MP64 = 8000
"""Pixels along a side of the largest square that is accepted."""


@dataclass(frozen=True)
class Hostile:
    """One input.

    Attributes:
        make: the bytes to send, head included.
        statuses: that are right.
        connections: that send it at once.
        complete: an answer follows; else the connections stay open.
    """

    make: Callable[[], bytes]
    statuses: tuple[int, ...] = (400,)
    connections: int = 1
    complete: bool = True


def post(body: bytes, *headers: bytes) -> bytes:
    """A chat request, head and body."""
    lines = [b"POST %b HTTP/1.1" % PATH.encode(), b"Host: x", b"Connection: close", b"Content-Type: application/json"]
    return b"\r\n".join([*lines, b"Content-Length: %d" % len(body), *headers, b"", b""]) + body


def chat(**fields: Any) -> bytes:
    """A chat request with these fields."""
    return post(json.dumps({"model": "builtin", "messages": [TURN], "max_tokens": 4} | fields).encode())


def structured(form: dict[str, Any]) -> bytes:
    """A chat request for an answer of this form."""
    return chat(structured_outputs=form)


def picture_url(data: bytes) -> str:
    """A picture as it stands in a request; the server goes by its bytes, not by what it is called."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def ask_about(*urls: str, **fields: Any) -> bytes:
    """A question about pictures."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    text = {"type": "text", "text": "What colour is the circle?"}
    return chat(messages=[{"role": "user", "content": [*parts, text]}], **fields)


def raw_get(*headers: bytes, end: bytes = b"\r\n\r\n") -> bytes:
    """A request for `/health`."""
    return b"\r\n".join([b"GET /health HTTP/1.1", b"Host: x", b"Connection: close", *headers]) + end


def chunk(name: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def flat_png(width: int, height: int, depth: int = 8, colour: int = 0, *extra: bytes) -> bytes:
    """A black PNG."""
    channels = {0: 1, 2: 3, 6: 4}[colour]
    length = (1 + width * channels * depth // 8) * height
    packer = zlib.compressobj()
    packed = b"".join(packer.compress(bytes(min(length - at, 1 << 20))) for at in range(0, length, 1 << 20))
    packed += packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = (chunk(b"IHDR", header), *extra, chunk(b"IDAT", packed), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def small_picture(kind: str = "PNG", size: tuple[int, int] = (64, 48), **options: Any) -> bytes:
    """Noise, so that there is something to decode."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def jpeg_scans(side: int, scans: int) -> bytes:
    """A grey progressive JPEG whose last scan is there again and again."""
    out = io.BytesIO()
    Image.new("L", (side, side), 90).save(out, "JPEG", progressive=True)
    data = out.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (scans - data.count(b"\xff\xda")) + data[-2:]


def flat_tiff(mode: str, side: int = MP64) -> bytes:
    """A TIFF of 32 bits a pixel, deflated."""
    out = io.BytesIO()
    Image.new(mode, (side, side), 3).save(out, "TIFF", compression="tiff_adobe_deflate")
    return out.getvalue()


def gif_frames(count: int) -> bytes:
    """A small GIF with the same frame many times."""
    out = io.BytesIO()
    Image.new("L", (16, 16)).save(out, "GIF")
    data = out.getvalue()
    frame = data[data.index(b"\x2c", 13) : -1]
    return data[:-1] + frame * (count - 1) + data[-1:]


def _of_pictures() -> Iterator[tuple[str, Hostile]]:
    packed_text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000)))
    rle = b"BM" + bytes(8) + struct.pack("<IIiiHHIIiiII", 54, 40, MP64, MP64, 1, 8, 1, 0, 0, 0, 0, 0)
    made: dict[str, tuple[Callable[[], bytes], tuple[int, ...]]] = {
        "PNG of 64 MP and 16 bits": (lambda: flat_png(MP64, MP64, 16), (200,)),
        "PNG of 64 MP with alpha": (lambda: flat_png(MP64, MP64, 8, 6), (200,)),
        "PNG of 100 MP": (lambda: flat_png(10_000, 10_000), (400,)),
        "PNG of 1 x 60,000,000": (lambda: flat_png(1, 60_000_000), (400,)),
        "PNG of 60,000 x 1,000": (lambda: flat_png(60_000, 1000), (200, 400)),
        "PNG of 99,000 chunks": (lambda: flat_png(64, 64, 8, 0, chunk(b"prVt", b"") * 99_000), (200,)),
        "PNG of 1,000,000 chunks": (lambda: flat_png(64, 64, 8, 0, chunk(b"prVt", b"") * 1_000_000), (400,)),
        "PNG with 5 GB of packed text": (lambda: flat_png(64, 64, 8, 0, packed_text * 5000), (200,)),
        "float TIFF of 64 MP": (lambda: flat_tiff("F"), (200,)),
        "int32 TIFF of 64 MP": (lambda: flat_tiff("I"), (200,)),
        "JPEG of 3,000 scans": (lambda: jpeg_scans(2000, 3000), (400,)),
        "JPEG of 64 MP in 100 scans": (lambda: jpeg_scans(MP64, 100), (200, 400)),
        "GIF of 400,000 frames": (lambda: gif_frames(400_000), (200,)),
        "BMP with RLE": (lambda: rle + b"\xff\0" * 5_000_000, (400,)),
        "plain PPM of comments": (lambda: b"P1 4400 4300 " + b"#a\n0" * 4_700_000, (400,)),
        "plain PPM of numbers": (lambda: b"P3 2600 2400 255 " + b"1 " * 9_400_000, (400,)),
        "PPM of two values": (lambda: b"P6 2500 2500 2 " + b"\1" * 18_750_000, (400,)),
        "19 MB of zeros": (lambda: bytes(19_000_000), (400,)),
    }
    for name, (make, statuses) in made.items():
        yield name, Hostile(partial(_about, make), statuses)
    yield "16 PNGs of 64 MP", Hostile(lambda: ask_about(*[picture_url(flat_png(MP64, MP64))] * 16))
    yield "10,000 pictures", Hostile(lambda: ask_about(*["data:,x"] * 10_000))
    yield "30 MB of escapes", Hostile(lambda: ask_about("data:image/png," + "%41" * 10_000_000))
    yield "30 MB of spaced base64", Hostile(lambda: ask_about("data:;base64," + "QUFB " * 6_000_000))


def _about(make: Callable[[], bytes]) -> bytes:
    return ask_about(picture_url(make()))


HOSTILE: dict[str, Hostile] = {
    "top_k above 64 bits": Hostile(lambda: chat(temperature=1, top_k=10**19), (200, 400)),
    "temperature 1e-40": Hostile(lambda: chat(temperature=1e-40), (200,)),
    "top_p 1e-46": Hostile(lambda: chat(temperature=1, top_p=1e-46), (200,)),
    "repetition_penalty 1e-308": Hostile(lambda: chat(temperature=1, repetition_penalty=1e-308)),
    "16 stop strings of 1 MB": Hostile(lambda: chat(stop=["x" * 1_000_000 + str(i) for i in range(16)]), (200, 400)),
    "500,000 numbers for messages": Hostile(lambda: chat(messages=[1] * 500_000)),
    "5,000,000 numbers for messages": Hostile(lambda: chat(messages=[1] * 5_000_000)),
    "3,000,000 empty parts": Hostile(lambda: chat(messages=[{"role": "user", "content": [{}] * 3_000_000}])),
    "5,000,000 lists in a label": Hostile(lambda: chat(metadata=[[]] * 5_000_000)),
    "30,000 messages of a user": Hostile(lambda: chat(messages=[TURN] * 30_000)),
    "4,000 messages of a user": Hostile(lambda: chat(messages=[TURN] * 4000)),
    "100,000 messages": Hostile(lambda: chat(messages=[TURN] * 100_000)),
    "a text of 30 MB": Hostile(lambda: chat(messages=[{"role": "user", "content": "a" * 30_000_000}])),
    "brackets 10,000,000 deep": Hostile(lambda: post(b'{"model":' + b"[" * 10_000_000)),
    "a number of 5,000,000 digits": Hostile(lambda: post(b'{"model": "builtin", "n": ' + b"9" * 5_000_000 + b"}")),
    "a schema that compiles for hours": Hostile(
        lambda: structured({"json": {"type": "integer", "multipleOf": 999_983}})
    ),
    "a grammar that compiles for hours": Hostile(lambda: structured({"grammar": "start: A\nA: " + INTERSECTION})),
    "conv_mode of 1 MB": Hostile(lambda: chat(conv_mode="x" * 1_000_000)),
    "a field's name of 1 MB": Hostile(lambda: chat(**{"x" * 1_000_000: 1})),
    "a body of 40 MB": Hostile(lambda: post(bytes(40_000_000)), (413,)),
    "a request id that is not UTF-8": Hostile(lambda: raw_get(b"X-Request-ID: a\xffb"), (200,)),
    "10,000 headers": Hostile(lambda: raw_get(*[b"a: b"] * 10_000), (200, 400)),
    "a header of 10 MB": Hostile(lambda: raw_get(b"a: " + b"b" * 10_000_000)),
    "500 half-sent heads": Hostile(lambda: raw_get(end=b""), connections=500, complete=False),
    "100 half-sent bodies": Hostile(lambda: post(bytes(100))[:-50], connections=100, complete=False),
    **dict(_of_pictures()),
}


def send(url: str, data: bytes, timeout_s: float = 120.0) -> tuple[int, str]:
    """Sends bytes, and reads the answer to its end: the status (0 if there is none) and the body.

    Raises:
        TimeoutError: no answer in time.
    """
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port or 80), timeout=timeout_s) as connection:
        with suppress(ConnectionError):  # a refusal may come before all is sent
            connection.sendall(data)
        answer = b""
        with suppress(ConnectionError):
            while block := connection.recv(1 << 16):
                answer += block
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1]) if head.startswith(b"HTTP/") else 0
    return status, body.decode("utf-8", "replace")


def error_code(body: str) -> str | None:
    """The code of an error in OpenAI's shape."""
    with suppress(ValueError, KeyError, TypeError):
        code: str = json.loads(body)["error"]["code"]
        return code
    return None
