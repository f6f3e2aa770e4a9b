"""Some hundred requests that are wrong, made by code: the bytes to send, by what is wrong with them."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any

from llava_serve.api.protocol import ChatRequest
from support.broken_images import FILES, broken
from support.odd_images import chunk
from testbed.hostile_inputs import PATH, TURN, ask_about, chat, flat_png, jpeg_scans, picture_url, post, raw_get

HUGE = 10**400
VALUES: dict[str, Any] = {
    "true": True,
    "a number": 7,
    "minus one": -1,
    "2**63": 2**63,
    "2**64": 2**64,
    "400 digits": HUGE,
    "a text": "x",
    "no text": "",
    "a list": ["x", [], {}],
    "an object": {"a": {"b": None}},
}
"""Each stands in each field, where it is right in a few."""
LITERALS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-0.0",
    "1e-400",
    "0x10",
    "01",
    "1.",
    ".5",
    "'x'",
    '"\\ud800"',
    "tru",
)


def _fields() -> Iterator[tuple[str, bytes]]:
    for field in ChatRequest.model_fields:
        for name, value in VALUES.items():
            yield f"{field} is {name}", chat(**{field: value})
    for field in ("temperature", "n", "stop", "model"):
        for literal in LITERALS:
            body = json.dumps({"model": "builtin", "messages": [TURN], field: "@"}).replace('"@"', literal)
            yield f"{field} is {literal}", post(body.encode())


def _messages() -> Iterator[tuple[str, bytes]]:
    text, picture = {"type": "text", "text": "Hi"}, {"type": "image_url", "image_url": {"url": "data:,"}}
    wrong: dict[str, Any] = {
        "none": [],
        "null": [None],
        "a list": [[]],
        "no role": [{"content": "Hi"}],
        "no content": [{"role": "user"}],
        "an unknown role": [{"role": "tool", "content": "Hi"}],
        "a system message last": [TURN, {"role": "system", "content": "Hi"}],
        "an answer last": [TURN, {"role": "assistant", "content": "Hi"}],
        "an answer first": [{"role": "assistant", "content": "Hi"}, TURN],
        "only a system message": [{"role": "system", "content": "Hi"}],
        "an empty text": [{"role": "user", "content": ""}],
        "no parts": [{"role": "user", "content": []}],
        "a null part": [{"role": "user", "content": [None]}],
        "a part without a type": [{"role": "user", "content": [{"text": "Hi"}]}],
        "a part of an unknown type": [{"role": "user", "content": [{"type": "video_url"}]}],
        "a part of two types": [{"role": "user", "content": [text | picture]}],
        "a text that is a number": [{"role": "user", "content": [{"type": "text", "text": 5}]}],
        "a picture in an answer": [TURN, {"role": "assistant", "content": [picture]}, TURN],
        "a picture in the system message": [{"role": "system", "content": [picture]}, TURN],
        "a picture without a URL": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        "a picture that is a list": [{"role": "user", "content": [{"type": "image", "image": [1, 2]}]}],
        "a picture that is null": [{"role": "user", "content": [{"type": "image", "image": None}, text]}],
        "4,097 messages": [TURN] * 4097,
        "a text above the context": [{"role": "user", "content": "word " * 3000}],
        "an unknown field": [TURN | {"speaker": "me"}],
    }
    for name, messages in wrong.items():
        yield f"messages: {name}", chat(messages=messages)


def _bodies() -> Iterator[tuple[str, bytes]]:
    good = json.dumps({"model": "builtin", "messages": [TURN], "max_tokens": 2})
    wrong = {
        "empty": b"",
        "a bracket": b"{",
        "cut": good.encode()[:-9],
        "followed by more": good.encode() + b"{}",
        "a list": b"[]",
        "null": b"null",
        "a number": b"1",
        "bytes": bytes(range(256)),
        "UTF-16": good.encode("utf-16"),
        "UTF-32": good.encode("utf-32"),
        "UTF-8 with a mark": b"\xef\xbb\xbf" + good.encode(),
        "Latin-1": good.replace("Hi", "H\xef").encode("latin-1"),
        "with NUL": good.encode().replace(b"Hi", b"H\0i"),
        "with a comment": good.encode() + b"// the end",
        "with a final comma": good.encode()[:-1] + b",}",
        "with quotes of another kind": good.encode().replace(b'"', b"'"),
        "with a half of a pair": good.encode().replace(b"Hi", b"\\ud83d"),
        "nested lists": b"[" * 90_000 + b"]" * 90_000,
        "nested objects": b'{"a":' * 90_000,
        "a form": b"model=builtin&messages=Hi",
        "XML": b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b SYSTEM 'file:///'>]><a>&b;</a>",
    }
    for name, body in wrong.items():
        yield f"a body that is {name}", post(body)
    for name in ("tools", "functions", "logit_bias", "store", "response_format", "audio", "__class__", "a" * 5000):
        yield f"the field {name[:20]}", chat(**{name: [{"a": 1}]})


def _types() -> Iterator[tuple[str, bytes]]:
    body = json.dumps({"model": "builtin", "messages": [TURN]}).encode()
    types = [b"", b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=x", b"*/*"]
    types += [b"application/jsonp", b"application/xml", b"json", b"application/json\xff", b"image/png", b"a" * 5000]
    for given in types:
        sent = post(body).replace(b"Content-Type: application/json", b"Content-Type: " + given)
        yield f"the type {given[:30]!r}", sent
    for coding in (b"gzip", b"deflate", b"br", b"zstd", b"gzip, gzip", b"x" * 3000):
        yield f"the coding {coding[:20]!r}", post(body, b"Content-Encoding: " + coding)


def _urls() -> Iterator[tuple[str, bytes]]:
    urls = "http://127.0.0.1/a.png https://[::1]/ http://localhost:8000/health http://169.254.169.254/latest/ ftp://a/b"
    urls += (
        " file:///etc/passwd file://localhost/etc/hosts /etc/passwd ../../etc/passwd C:\\boot.ini \\\\host\\share\\a"
    )
    urls += " gopher://a/ javascript:alert(1) blob:abc about:blank unix:/run/a.sock s3://a/b gs://a/b hf://a/b //a/b a"
    urls += " data: data:, data:;base64, data:image/png;base64 data:image/png;base64,@@@@ data:image/png;base64,A"
    urls += " data:image/png;base64,iVBORw0KGgo= data:text/html,<h1>x</h1> data:image/svg+xml,<svg/> data:,%zz"
    urls += (
        " data:image/png;base64,aGVsbG8= DATA:;BASE64,%41 data:image/png;base64;base64,AAAA http:// https:// http:///"
    )
    for url in [
        *urls.split(),
        "",
        " ",
        "\0",
        "\u202e",
        "a" * 100_000,
        "http://" + "a" * 100_000,
        "data:" + "," * 100_000,
    ]:
        yield f"the picture {url[:40]!r}", ask_about(url)


def _bombs() -> Iterator[tuple[str, bytes]]:
    zeros = zlib.compress(bytes(5_000_000))
    endless = struct.pack("<HI", 42, 8) + struct.pack("<H", 0) + struct.pack("<I", 8)
    bombs = {
        "PNG: 2**31 x 2**31": chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 6, 0, 0, 0)),
        "PNG: no pixels": chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 0, 8, 2, 0, 0, 0)),
        "PNG: no header": chunk(b"IDAT", zeros) + chunk(b"IEND", b""),
        "PNG: a chunk of 2**32": chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 2, 0, 0, 0)) + b"\xff" * 8,
    }
    for name, body in bombs.items():
        yield name, ask_about(picture_url(b"\x89PNG\r\n\x1a\n" + body))
    others = {
        "PNG of 100 MP": flat_png(10_000, 10_000),
        "PNG of 1 x 60,000,000": flat_png(1, 60_000_000),
        "JPEG of 200 scans": jpeg_scans(64, 200),
        "TIFF: a directory that names itself": b"II" + endless,
        "TIFF: 65,535 tags": b"II*\0\x08\0\0\0\xff\xff" + bytes(100),
        "GIF of 65,535 x 65,535": b"GIF89a" + b"\xff" * 4 + bytes(3) + b"," + bytes(4) + b"\xff" * 4 + b"\0\2\0;",
        "WebP: a chunk of 4 GB": b"RIFF\xff\xff\xff\xffWEBPVP8L\xff\xff\xff\xff" + bytes(50),
        "BMP of 2**31 x 2**31": b"BM"
        + bytes(12)
        + struct.pack("<IiiHHI", 40, 2**31 - 1, 2**31 - 1, 1, 24, 0)
        + bytes(90),
        "BMP with RLE": b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 9, 9, 1, 8, 1) + bytes(90),
        "PPM of 10**9 x 10**9": b"P6 1000000000 1000000000 255 ",
        "PPM P1": b"P1 10 10 " + b"0 " * 100,
        "PPM of comments": b"P6 " + b"#a\n" * 100_000,
        "AVIF: a box in itself": struct.pack(">I", 0) + b"ftypavif" + struct.pack(">I4s", 1, b"meta") * 100,
        "a ZIP archive": b"PK\3\4" + zeros,
        "a gzip archive": b"\x1f\x8b\x08" + zeros,
    }
    for name, data in others.items():
        yield name, ask_about(picture_url(data))
    for name, data in FILES.items():
        for number, bad in enumerate(broken(data, 5, seed=7)):
            yield f"{name}, broken in way {number}", ask_about(picture_url(bad))
        yield f"{name}, half of it", ask_about(picture_url(data[: len(data) // 3]))


def _heads() -> Iterator[tuple[str, bytes]]:
    body = json.dumps({"model": "builtin", "messages": [TURN], "max_tokens": 2}).encode()
    head = b"POST %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n" % PATH.encode()
    length = b"Content-Length: %d\r\n" % len(body)
    chunked = b"Transfer-Encoding: chunked\r\n"
    yield from {
        "no HTTP": b"hello\r\n\r\n",
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200) + b"\r\n\r\n",
        "HTTP/2": b"PRI * HTTP/2.0\r\nConnection: close\r\n\r\nSM\r\n\r\n" + bytes(9),
        "HTTP/9.9": b"GET /health HTTP/9.9\r\nHost: x\r\nConnection: close\r\n\r\n",
        "no version": b"GET /health\r\n\r\n",
        "a bare CR": b"GET /health HTTP/1.1\rHost: x\r\r\r\n\r\n",
        "NUL in the line": b"GET /hea\0lth HTTP/1.1\r\nHost: x\r\n\r\n",
        "NUL in a header": raw_get(b"a: b\0c"),
        "a header without a colon": raw_get(b"abc"),
        "a header without a name": raw_get(b": abc"),
        "a space in a header's name": raw_get(b"a b: c"),
        "a folded first header": b"GET /health HTTP/1.1\r\n a: b\r\nHost: x\r\n\r\n",
        "two hosts": raw_get(b"Host: y"),
        "no host": b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n",
        "100 KB of headers": raw_get(b"a: " + b"b" * 100_000),
        "20,000 headers": raw_get(*[b"a: b"] * 20_000),
        "a path of 100 KB": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        "a path of 10 KB": b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        "two lengths": head + length + b"Content-Length: 5\r\n\r\n" + body,
        "a length below zero": head + b"Content-Length: -5\r\n\r\n" + body,
        "a length in words": head + b"Content-Length: five\r\n\r\n" + body,
        "a length of 10**30": head + b"Content-Length: 1%b\r\n\r\n" % (b"0" * 30) + body,
        "a length of 40 MB": head + b"Content-Length: 40000000\r\n\r\n" + body,
        "a length with a sign": head + b"Content-Length: +%d\r\n\r\n" % len(body) + body,
        "a length and chunks": head + length + chunked + b"\r\n" + body + b"\r\n",
        "chunks of no size": head + chunked + b"\r\nzz\r\n" + body,
        "chunks of a size below zero": head + chunked + b"\r\n-5\r\n" + body,
        "chunks of 2**200": head + chunked + b"\r\n%x\r\n" % 2**200 + body,
        "chunks twice": head + chunked + chunked + b"\r\n0\r\n\r\n",
        "an unknown coding": head + b"Transfer-Encoding: gzip\r\n\r\n" + body,
        "no length": head + b"\r\n" + body,
    }.items()
    methods = b"PUT DELETE PATCH TRACE OPTIONS CONNECT PROPFIND get POST\xff G@T".split()
    for method in methods:
        yield f"the method {method!r}", b"%b /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % method
    paths = (
        b"//v1/models /v1/../etc/passwd /%2e%2e/%2e%2e/etc/passwd /v1/models/%00 /v1/models/%ff /.env /docs /metrics"
    )
    paths += b" /v1/models/../../x /v1/completions /v1/embeddings * http://other/v1/x /\xff /v1/chat/completions/ /?a=%"
    for path in paths.split():
        yield f"the path {path!r}", b"GET %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % path


def bad_requests() -> dict[str, bytes]:
    """All of them."""
    found: dict[str, bytes] = {}
    for made in (_fields(), _messages(), _bodies(), _types(), _urls(), _bombs(), _heads()):
        for name, data in made:
            assert name not in found, name
            found[name] = data
    return found
