"""Processor time against size, for every kind of input that a request may make large: straight lines.

    python -m benchmarks.linear [--rounds 3] [--output benchmarks/results/linear.json] [--plot .../linear.svg]

Each size is the one before it times two, up to what a request may hold or beyond. The web app with the model that ships
answers over a socket in this process, and pictures are decoded here, too: the time is that of the whole process, the
least of the rounds. Other work on the machine changes it little. `exponent` is the slope of its logarithm over the
largest three sizes: 1 is a straight line, 2 a square; where a limit ends the work it is less.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine
from benchmarks.options import make_parser, parse
from benchmarks.plot import write_lines
from llava_serve.api.app import create_app
from llava_serve.api.http_server import server_of
from llava_serve.api.in_process import InProcessBackend
from llava_serve.async_llm import AsyncLLM
from llava_serve.config import ApiOptions, EngineOptions, ImageOptions
from testbed import hostile_inputs as inputs
from testbed.hostile_inputs import TURN, ask_about, chat, chunk, flat_png, picture_url, post, raw_get

SIZES = 5
FITTED = 3


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    Attributes:
        largest: its largest size.
        make: a request of a size.
    """

    largest: int
    make: Callable[[int], bytes]


def user(content: Any) -> list[dict[str, Any]]:
    """A conversation of one turn."""
    return [{"role": "user", "content": content}]


def jpeg_with_segments(count: int) -> bytes:
    """A JPEG with this many comments."""
    data = inputs.small_picture("JPEG")
    return data[:2] + b"\xff\xfe\0\x03a" * count + data[2:]


KINDS: dict[str, Kind] = {
    "messages": Kind(4096, lambda n: chat(messages=[TURN] * n)),
    "messages above the limit": Kind(30_000, lambda n: chat(messages=[TURN] * n)),
    "parts": Kind(4096, lambda n: chat(messages=user([{"type": "text", "text": "a"}] * n))),
    "characters that are tokenized": Kind(100_000, lambda n: chat(messages=user("a " * (n // 2)))),
    "characters": Kind(30_000_000, lambda n: chat(messages=user("a" * n))),
    "pictures": Kind(16, lambda n: ask_about(*[picture_url(flat_png(1000, 1000 + i)) for i in range(n)])),
    "pictures above the limit": Kind(4000, lambda n: ask_about(*["data:,x"] * n)),
    "pixels of a PNG": Kind(64_000_000, lambda n: ask_about(picture_url(flat_png(8000, n // 8000)))),
    "pixels of a 16-bit PNG": Kind(64_000_000, lambda n: ask_about(picture_url(flat_png(8000, n // 8000, 16)))),
    "bytes in base64": Kind(20_000_000, lambda n: ask_about(picture_url(bytes(n)))),
    "escapes in a data: URL": Kind(10_000_000, lambda n: ask_about("data:," + "%41" * n)),
    "chunks of a PNG": Kind(99_000, lambda n: ask_about(picture_url(flat_png(64, 64, 8, 0, chunk(b"prVt", b"") * n)))),
    "segments of a JPEG": Kind(9000, lambda n: ask_about(picture_url(jpeg_with_segments(n)))),
    "scans of a JPEG": Kind(100, lambda n: ask_about(picture_url(inputs.jpeg_scans(2000, n)))),
    "frames of a GIF": Kind(400_000, lambda n: ask_about(picture_url(inputs.gif_frames(n)))),
    "values of JSON": Kind(100_000, lambda n: chat(metadata=[1] * (n - 20))),
    "depth of JSON": Kind(100_000, lambda n: post(b'{"model":' + b"[" * n)),
    "unknown fields": Kind(90_000, lambda n: chat(**{f"a{i}": None for i in range(n)})),
    "digits of a number": Kind(30_000_000, lambda n: post(b'{"n": ' + b"9" * n + b"}")),
    "characters of a field's name": Kind(30_000_000, lambda n: chat(**{"x" * n: 1})),
    "characters of conv_mode": Kind(30_000_000, lambda n: chat(conv_mode="x" * n)),
    "stop strings": Kind(16, lambda n: chat(stop=[f"{i:05}" for i in range(n)], max_tokens=64, ignore_eos=True)),
    "characters of a stop string": Kind(30_000_000, lambda n: chat(stop="x" * n, max_tokens=64, ignore_eos=True)),
    "headers": Kind(8000, lambda n: raw_get(*[b"a: b"] * n)),
    "bytes of a header": Kind(60_000, lambda n: raw_get(b"a: " + b"b" * n)),
    "bytes of a path": Kind(
        60_000, lambda n: b"GET /" + b"a" * n + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    ),
}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.set_defaults(shrink=1)
    options = parse(parser, rounds=1, shrink=100)
    report: dict[str, Any] = {"machine": machine()}
    report["kinds"] = measure(options.rounds, options.shrink)
    print(json.dumps(report, indent=1))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        lines = {name: [tuple(point) for point in kind["points"]] for name, kind in report["kinds"].items()}
        write_lines(options.plot, "Milliseconds of processor time against size, both logarithmic", lines)


def measure(rounds: int, shrink: int = 1) -> dict[str, Any]:
    """By kind: the points as [size, milliseconds], the status of the largest, and the exponent.

    Args:
        rounds: of which the least time counts.
        shrink: divides all sizes.
    """
    kinds: dict[str, Any] = {}
    with serving() as url:
        inputs.send(url, ask_about(picture_url(inputs.small_picture())))  # what is made once
        for name, kind in KINDS.items():
            sizes = sorted({max(1, (kind.largest // shrink) >> down) for down in range(SIZES)})
            points, status = [], 0
            for size in sizes:
                data = kind.make(size)
                times = []
                for _ in range(rounds):
                    began = time.process_time()
                    status, _ = inputs.send(url, data)
                    times.append((time.process_time() - began) * 1e3)
                points.append([size, round(min(times), 2)])
            kinds[name] = {"points": points, "status": status, "exponent": exponent(points[-FITTED:])}
    return kinds


def exponent(points: list[list[float]]) -> float:
    """The slope between logarithms, by least squares; 0 for a single point."""
    if len(points) < 2:
        return 0.0
    size, taken = np.log(np.array(points)).T
    return round(float(np.polyfit(size, taken, 1)[0]), 2)


@contextmanager
def serving() -> Iterator[str]:
    """The web app in a thread of this process; gives its URL."""
    every = ImageOptions(cache_bytes=0)  # every picture is decoded, repeated ones too
    llm = AsyncLLM("builtin", EngineOptions(num_threads=1), device="cpu", image_options=every)
    server = server_of(create_app(InProcessBackend(llm), ApiOptions()), graceful_timeout_s=2)
    server.config.port = 0
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        llm.close()


if __name__ == "__main__":
    main()
