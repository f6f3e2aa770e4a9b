"""Our web app beside transformers' own server, or beside an older state of itself, in one run, on the mixed load.

    python -m benchmarks.compare /tmp/bench/60m --output benchmarks/results/compare-60m.json
    git worktree add /tmp/before HEAD~20
    python -m benchmarks.compare /tmp/bench/60m --before /tmp/before
    python -m benchmarks.compare /tmp/bench/60m --without-max-tokens
    python -m benchmarks.compare /tmp/bench/60m --structured
    python -m benchmarks.compare /tmp/bench/60m --vllm /opt/vllm

Each server runs alone on the machine, one after the other, several rounds, in bfloat16.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import IO, Any

import httpx

from benchmarks.make_checkpoint import given_or_tiny
from benchmarks.options import make_parser, parse
from llava_serve.bench.bar_chart import Panel, write_bars
from llava_serve.bench.client import Client
from llava_serve.bench.load import Run, closed_loop
from llava_serve.bench.report import summarise
from llava_serve.bench.workload import Workload, make_conversations

ROOT = Path(__file__).resolve().parent.parent
OURS, BEFORE, THEIRS, VLLM = "llava-serve", "llava-serve before", "transformers serve", "vllm serve"
WITHOUT = "llava-serve without max_tokens"
STRUCTURED = "llava-serve structured"
OUR_COMMAND = [sys.executable, "-m", "llava_serve.cli", "serve", "--in-process"]
ANY_TEXT = {"structured_outputs": {"regex": r"(.|\n)*"}}
"""A form that every text has: answers as without it (a random model hardly ever ends one), with a mask per token."""
STOPS = list(" etaoinsrhldcu.")
"""Most texts soon have one of them."""


def command(server: str, home: Path, model: str, device: str) -> list[str]:
    """The command that starts a server, without its port."""
    common = ["--device", device, "--dtype", "bfloat16"]
    if server == VLLM:
        return [str(home / "bin" / "vllm"), "serve", model, *common[2:]]  # its device is that of its package
    if server == THEIRS:
        return [str(Path(sys.executable).parent / "transformers"), "serve", *common, model]
    return [*OUR_COMMAND, "--compile", "--model", model, *common]


@contextmanager
def running(
    command: Sequence[str], home: Path, log: int | IO[str] = subprocess.DEVNULL, **settings: str
) -> Iterator[tuple[str, int]]:
    """A server on a free port: its URL and process id. The end of the block stops it.

    Args:
        command: without its port.
        home: the checkout of ours, or the virtual environment of vLLM.
        log: gets what it writes.
        settings: of its environment.

    Raises:
        RuntimeError: it has ended before it answers.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(home), **settings},
        cwd=home,
        stdout=log,
        stderr=log,
    )
    try:
        for _ in range(480):  # four minutes: a busy machine starts slowly
            if process.poll() is not None:
                raise RuntimeError(f"The server has ended with the status {process.returncode}: {process.args!r}")
            try:
                httpx.get(f"{url}/health", timeout=5)
                break
            except httpx.TransportError:
                time.sleep(0.5)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(60)


def peak_memory_mb(pid: int) -> float:
    """Most resident memory that a process has had."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1024, 1)


def measure(
    server: str,
    home: Path,
    model: str,
    device: str,
    clients: int,
    requests_: int,
    seed: int,
    same: bool,
    stopped: bool,
) -> dict[str, Any]:
    """One server, one number of clients, after a short warm-up. `stopped`: see `StoppedClient`."""
    name = model if server in (THEIRS, VLLM) else Path(model).name
    workload = Workload(requests=requests_, repeated_images=float(same), seed=seed)
    with running(command(server, home, model, device), home) as (url, pid):
        extra = {THEIRS: {}, STRUCTURED: ANY_TEXT}.get(server, {"ignore_eos": True})
        client = StoppedClient(url, name, server == WITHOUT, extra) if stopped else Client(url, name, extra=extra)
        report = asyncio.run(send(client, workload, clients))
        peak = peak_memory_mb(pid)
    return {"server": server, "clients": clients, "same_picture": same, **report, "peak_memory_mb": peak}


class StoppedClient(Client):
    """Asks for answers whose length does not need `max_tokens`: so many tokens, and on to the next stop string. They
    are sampled: the greedy text of a random model may be one token for ever.

    Args:
        absent: leave `max_tokens` out, too.
    """

    def __init__(self, url: str, model: str, absent: bool, extra: dict[str, Any]) -> None:
        super().__init__(url, model, extra=extra | {"temperature": 1, "seed": 1, "stop": STOPS})
        self._absent = absent

    def body(self, messages: Sequence[dict[str, Any]], max_tokens: int) -> dict[str, Any]:
        """What is sent."""
        limit = {"max_tokens": None} if self._absent else {}
        return super().body(messages, max_tokens) | {"min_tokens": max_tokens} | limit


async def send(client: Client, workload: Workload, clients: int) -> dict[str, Any]:
    """Two requests to warm the server up, then the workload. Raises `RuntimeError` if the server refuses one."""
    warm_up = Workload(requests=2, seed=workload.seed + 1)
    async with client:
        await closed_loop(Run(warm_up.requests), client, make_conversations(warm_up), clients=1)
        run = Run(workload.requests)
        await closed_loop(run, client, make_conversations(workload), clients)
    report = summarise(run)
    if report["requests"]["failed"]:
        raise RuntimeError(f"Requests have failed: {report['requests']}")
    return report


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("model", nargs="?", help="a checkpoint; --smoke makes one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--per-client", type=int, default=16, help="requests of each client")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--before", type=Path, help="an older checkout of this project, instead of transformers' server"
    )
    parser.add_argument(
        "--without-max-tokens",
        action="store_true",
        help="ours with the longest answers given beside ours without, instead of transformers' server",
    )
    parser.add_argument(
        "--structured",
        action="store_true",
        help="ours beside ours with a form for each answer, instead of transformers'",
    )
    parser.add_argument("--vllm", type=Path, help="a virtual environment with vLLM, instead of transformers' server")
    parser.add_argument("--output", type=Path)
    parser.set_defaults(same_picture=[8])
    args = parse(parser, clients=[1], per_client=1, rounds=1, same_picture=[])
    with given_or_tiny(parser, args) as model:
        compare(str(Path(model).resolve()), args)


def compare(model: str, args: argparse.Namespace) -> None:
    """Runs all rounds of all cases, and prints the ratios."""
    without = args.without_max_tokens
    other = (
        STRUCTURED
        if args.structured
        else WITHOUT
        if without
        else BEFORE
        if args.before
        else VLLM
        if args.vllm
        else THEIRS
    )
    named = args.before or args.vllm
    home = {other: named.resolve()} if named and other in (BEFORE, VLLM) else {}
    runs = []
    cases = [(clients, False) for clients in args.clients] + [(clients, True) for clients in args.same_picture]
    for round_ in range(args.rounds):
        for clients, same in cases:
            for server in (OURS, other)[:: -1 if round_ % 2 else 1]:  # the second of two is often a little quicker
                count = max(4, clients * args.per_client)
                seed = 10 * round_
                runs.append(
                    measure(server, home.get(server, ROOT), model, args.device, clients, count, seed, same, without)
                )
                print(json.dumps(runs[-1]), flush=True)
    speeds = {
        (server, clients, same): median(
            run["output_tokens_per_s"]
            for run in runs
            if (run["server"], run["clients"], run["same_picture"]) == (server, clients, same)
        )
        for server in (OURS, other)
        for clients, same in cases
    }
    ratios = {
        f"{clients} clients{', same picture' * same}": round(
            speeds[OURS, clients, same] / speeds[other, clients, same], 2
        )
        for clients, same in cases
    }
    print(json.dumps(ratios, indent=2))
    if args.output:
        machine = {"cores": os.cpu_count(), "load_before": os.getloadavg()[2], "python": platform.python_version()}
        report = {"machine": machine, "ratios": ratios, "runs": runs}
        args.output.write_text(json.dumps(report, indent=2) + "\n")
        labels = [f"{clients}{' same' * same}" for clients, same in cases]
        series = {server: [speeds[server, clients, same] for clients, same in cases] for server in (OURS, other)}
        write_bars(args.output.with_suffix(".svg"), [Panel("output tokens/s by clients", labels, series)])


if __name__ == "__main__":
    main()
