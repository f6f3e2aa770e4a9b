"""What `engine.compile: auto` costs and brings: output tokens/s before the switch, after it, and without compiling.

    python -m benchmarks.background_compile /tmp/bench/60m --clients 1 8 --output /tmp/background_compile.json

The server starts with an empty folder of torch.compile, and then again with what it has compiled. Clients ask all the
time, each about pictures of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.compare import OUR_COMMAND, ROOT, running
from benchmarks.machine import machine
from benchmarks.make_checkpoint import given_or_tiny
from benchmarks.options import make_parser, parse
from llava_serve.bench.client import Client
from llava_serve.bench.load import Run, closed_loop
from llava_serve.bench.report import summarise
from llava_serve.bench.workload import Workload, make_conversations

SWITCHED = "The compiled decoder serves from now on"
PER_CLIENT = 4
"""Requests of a client in one figure."""


def rates(model: str, url: str, clients: int) -> Iterator[float]:
    """Output tokens/s, again and again.

    Raises:
        RuntimeError: a request fails.
    """

    async def once(seed: int) -> Run:
        workload = Workload(requests=PER_CLIENT * clients, seed=seed)
        run = Run(workload.requests)
        async with Client(url, Path(model).name, extra={"ignore_eos": True}) as client:
            await closed_loop(run, client, make_conversations(workload), clients)
        return run

    for seed in range(1_000_000):
        report = summarise(asyncio.run(once(seed)))
        if report["requests"]["failed"]:
            raise RuntimeError(f"Requests have failed: {report['requests']}")
        yield report["output_tokens_per_s"]


def serve(model: str, clients: int, flags: list[str], cache: str, args: argparse.Namespace) -> dict[str, Any]:
    """One server: median rates, and how long after its start it has switched (None: not within the limit)."""
    before: list[float] = []
    after: list[float] = []
    switched = None
    command = [*OUR_COMMAND, "--model", model, "--dtype", "bfloat16", *flags]
    with (
        tempfile.TemporaryFile("w+") as log,
        running(command, ROOT, log, TORCHINDUCTOR_CACHE_DIR=cache) as (url, _),
    ):
        began = time.monotonic()
        for rate in rates(model, url, clients):
            (before if switched is None else after).append(rate)
            log.seek(0)
            seconds = time.monotonic() - began
            if switched is None and SWITCHED in log.read():
                switched = round(seconds)
                before.pop()  # partly after the switch
            if seconds > (args.limit if switched is None and not flags else (switched or 0) + args.seconds):
                break
    return {
        "before": median(before) if before else None,
        "after": median(after) if after else None,
        "switched_s": switched,
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("model", nargs="?", help="a checkpoint; --smoke makes one")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=30, help="of a measurement")
    parser.add_argument("--limit", type=float, default=400, help="seconds to wait for the switch")
    parser.add_argument("--output", type=Path)
    args = parse(parser, clients=[1], seconds=1, limit=1)
    report: dict[str, Any] = {"machine": machine()}
    with given_or_tiny(parser, args) as given:
        model = str(Path(given).resolve())
        for clients in args.clients:
            with tempfile.TemporaryDirectory() as cache:
                report[f"{clients} clients"] = {
                    "never": serve(model, clients, ["--no-compile"], cache, args)["before"],
                    "first start": serve(model, clients, [], cache, args),
                    "next start": serve(model, clients, [], cache, args),
                }
            print(json.dumps(report[f"{clients} clients"]), flush=True)
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
