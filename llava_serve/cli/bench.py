"""`llava-serve bench`: sends load to a server that runs, and reports its speed."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llava_serve.cli import options as flags
from llava_serve.errors import RequestError

if TYPE_CHECKING:
    from llava_serve.bench.load import Run
    from llava_serve.bench.report import Report

KEY_VARIABLE = "LLAVA_API_KEY"

_count = flags.number(int, lambda value: value >= 0, "a whole number, 0 or more")
_above_zero = flags.number(float, lambda value: 0 < value < math.inf, "a number above 0")
_share = flags.number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")

_EXAMPLE = """example:
  llava-serve bench http://127.0.0.1:8000 --clients 16 --requests 200 --output before.json
  llava-serve bench --compare before.json after.json"""


def add_to(commands: flags.Commands) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "bench",
        help="measure a server that runs",
        description="Send streamed requests about generated pictures to an OpenAI-compatible server; report its speed.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url", nargs="?", metavar="URL", help="of the server, such as http://127.0.0.1:8000")
    parser.add_argument("--model", help="by default the first that the server lists")
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help=f"has the API key; else {KEY_VARIABLE} has it"
    )
    load = parser.add_argument_group("load")
    pace = load.add_mutually_exclusive_group()
    pace.add_argument("--clients", type=flags.positive, default=8, help="each sends on when it is answered; default 8")
    pace.add_argument(
        "--rate", type=_above_zero, metavar="R", help="instead of clients: R requests/s at random times (Poisson)"
    )
    load.add_argument("--requests", type=flags.positive, default=64, help="in all; default 64")
    load.add_argument("--turns", type=flags.positive, default=1, help="requests of a conversation; default 1")
    load.add_argument("--images", type=_count, default=1, help="in a conversation's first turn; default 1")
    load.add_argument("--image-size", type=_sizes, default="640x480", metavar="WxH,...", help="default 640x480")
    load.add_argument("--repeated-images", type=_share, default=0.0, metavar="SHARE", help="sent before; default 0")
    load.add_argument("--output-tokens", type=_range, default="16:96", metavar="MIN:MAX", help="default 16:96")
    load.add_argument("--ignore-eos", action="store_true", help="generate to that length (vLLM's and our extension)")
    load.add_argument("--warmup", type=_count, default=2, help="requests beforehand, not counted; default 2")
    load.add_argument("--timeout", type=_above_zero, default=600.0, metavar="S", help="longest silence; default 600")
    load.add_argument("--seed", type=int, default=0, help="same seed, same requests; default 0")
    results = parser.add_argument_group("results")
    results.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON")
    results.add_argument("--plot", type=Path, metavar="FILE", help="write the latencies as an SVG picture")
    results.add_argument("--compare", type=Path, nargs="+", metavar="FILE", help="show results of earlier runs")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measures, or compares files; the exit status is 1 if no request was answered."""
    if (options.url is None) == (options.compare is None):
        raise RequestError(
            "Give the URL of a server, as 'llava-serve bench http://127.0.0.1:8000', or --compare FILES."
        )
    if options.url is not None and not options.url.startswith(("http://", "https://")):
        raise RequestError(f"The URL of a server begins with http:// or https://; got {options.url}.")
    if options.compare and options.output:
        raise RequestError("--compare measures nothing that --output could write; leave one of them out.")
    for path in (options.output, options.plot):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            cause = "it is a folder" if path.is_dir() else "there is no such folder"
            raise RequestError(f"{path} cannot be written: {cause}.")
    from llava_serve.bench.report import differences, plot, table

    if options.compare:
        reports = {str(path): _read(path) for path in options.compare}
    else:
        reports = {"this run": asyncio.run(_measure(options))}
    print(table(reports), *differences(reports), sep="\n")
    if options.plot:
        plot(options.plot, reports)
    if options.compare:
        return 0
    report = reports["this run"]
    for status, error in report["requests"]["first_errors"].items():
        print(f"The first {status}: {error}")
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if report["requests"]["ok"] else 1


async def _measure(options: argparse.Namespace) -> Report:
    from llava_serve.bench.client import Client
    from llava_serve.bench.load import Run, closed_loop, open_loop
    from llava_serve.bench.report import each_request, summarise
    from llava_serve.bench.workload import Workload, make_conversations

    workload = Workload(
        requests=options.requests,
        turns=options.turns,
        images=options.images,
        image_sizes=options.image_size,
        repeated_images=options.repeated_images,
        output_tokens=options.output_tokens,
        seed=options.seed,
    )
    extra = {"ignore_eos": True} if options.ignore_eos else {}
    key, timeout = _api_key(options.api_key_file), options.timeout
    async with Client(options.url, options.model, api_key=key, timeout_s=timeout, extra=extra) as client:
        await client.find_model()
        warm_up = replace(workload, requests=options.warmup, seed=workload.seed + 1)
        await closed_loop(Run(warm_up.requests), client, make_conversations(warm_up), clients=1)
        conversations = make_conversations(workload)
        measured = Run(workload.requests)
        async with _progress(measured):
            if options.rate:
                await open_loop(measured, client, conversations, options.rate, workload.seed)
            else:
                await closed_loop(measured, client, conversations, options.clients)
    pace = {"requests_per_s": options.rate} if options.rate else {"clients": options.clients}
    settings = {"model": client.model, **pace, **asdict(workload), "ignore_eos": options.ignore_eos}
    return {"url": client.url, "settings": settings, **summarise(measured), "each": each_request(measured)}


@asynccontextmanager
async def _progress(measured: Run) -> AsyncIterator[None]:
    """On a terminal, a line on standard error that changes twice a second."""
    if not sys.stderr.isatty():
        yield
        return

    async def show() -> None:
        while True:
            print(f"\r{measured.progress()}\033[K", end="", file=sys.stderr, flush=True)
            await asyncio.sleep(0.5)

    task = asyncio.create_task(show())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _api_key(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get(KEY_VARIABLE)
    try:
        key = file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise RequestError(f"The API key cannot be read from {file}.") from None
    if not key or len(key.split()) != 1:
        raise RequestError(f"{file} must hold one API key, and nothing else.")
    return key


def _read(path: Path) -> Report:
    try:
        report: Report = json.loads(path.read_text("utf-8"))
        report["settings"], report["ttft_ms"]
    except (OSError, ValueError, LookupError, TypeError):
        raise RequestError(f"{path} is no result of 'llava-serve bench --output'.") from None
    return report


def _sizes(text: str) -> list[tuple[int, int]]:
    sizes = [re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", part) for part in text.split(",")]
    if not all(sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sizes such as 640x480,1280x960")
    return [(int(size[1]), int(size[2])) for size in sizes if size]


def _range(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens, or a range such as 16:96")
    return first, last
