"""What it costs to decode a picture in a child process: the same call there and in this process, in turn.

    python -m benchmarks.decode_hop [--rounds 200] [--output benchmarks/results/decode_hop.json]

Milliseconds per picture, of JPEGs as a telephone takes them; the tiles are 336 pixels wide, as the released models have
them. `hop` is the median over the rounds of the difference within a round. `start` is a new process, until it has
decoded a first, small picture.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.options import make_parser, parse
from benchmarks.pictures import photographs
from llava_serve.checkpoints import open_checkpoint
from llava_serve.config import ImageOptions
from llava_serve.images.decoder import Decoder, InProcessDecoder
from llava_serve.images.isolated import IsolatedDecoder

OPTIONS = ImageOptions()
ROOM = 10_000
SQUARE = replace(open_checkpoint("builtin").image, crop_size=(336, 336), shortest_edge=336, patch_size=14)
TILED = replace(SQUARE, aspect="anyres", merge="spatial_unpad", grid_pinpoints=((672, 672),))
PROCESSINGS = {"1 tile": SQUARE, "5 tiles": TILED}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--output", type=Path)
    parser.set_defaults(sizes=((1152, 864), (4000, 3000)))
    options = parse(parser, rounds=2, sizes=((400, 300),))
    report = {
        "cpu_cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 1),
        "start_ms": start(min(options.rounds, 10)),
        "pictures": [hop(size, tiles, options.rounds) for size in options.sizes for tiles in PROCESSINGS],
    }
    text = json.dumps(report, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


def start(rounds: int) -> float:
    """A new process, with a spare one that starts beside it."""
    (small,) = photographs((64, 48), 1)
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        decoder = IsolatedDecoder(OPTIONS, SQUARE)
        decoder.tiles_of(small, ROOM)
        times.append(time.perf_counter() - began)
        decoder.close()
    return _milliseconds(times)


def hop(size: tuple[int, int], tiles: str, rounds: int) -> dict[str, object]:
    """One size of picture; the two decoders take turns, and so does the order of their turns."""
    (photo,) = photographs(size, 1)
    here, there = InProcessDecoder(OPTIONS, PROCESSINGS[tiles]), IsolatedDecoder(OPTIONS, PROCESSINGS[tiles])
    taken: dict[Decoder, list[float]] = {here: [], there: []}
    for decoder in taken:
        decoder.tiles_of(photo, ROOM)
    time.sleep(1)  # the spare has started
    for number in range(rounds):
        for decoder in (here, there) if number % 2 else (there, here):
            began = time.perf_counter()
            decoder.tiles_of(photo, ROOM)
            taken[decoder].append(time.perf_counter() - began)
    there.close()
    return {
        "size": size,
        "bytes": len(photo),
        "tiles": tiles,
        "in_process_ms": _milliseconds(taken[here]),
        "isolated_ms": _milliseconds(taken[there]),
        "hop_ms": _milliseconds([far - near for near, far in zip(taken[here], taken[there], strict=True)]),
    }


def _milliseconds(seconds: list[float]) -> float:
    return round(1000 * statistics.median(seconds), 2)


if __name__ == "__main__":
    main()
