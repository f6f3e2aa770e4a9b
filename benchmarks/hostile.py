"""What a hostile request does to its neighbours: eight good streams, while each of `testbed.hostile_inputs` is sent.

    python -m benchmarks.hostile [--serve default] [--serve production.env] [--output benchmarks/results/hostile.json]

The web app in one process, and with `--serve` the application on Ray under Serve's defaults or a profile; the engine
has one thread. Eight clients ask for one answer after the other. An input is sent again and again for `--seconds`, and
once at least. `usual` is the 95th percentile of the time between the tokens of a stream in the quiet seconds before and
after it, `during` that between its first byte and the end of its last answer; a gap counts where it ends. `wrong` are
the answers of the eight that differ from the first one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from benchmarks.machine import machine
from benchmarks.options import make_parser, parse
from deployments.tools.config import read_config
from deployments.tools.local_cluster import free_port, local_cluster
from deployments.tools.serve_env import read_serve_env
from llava_serve.bench.client import Client, Trace
from testbed.hostile_inputs import HOSTILE, Hostile, error_code, picture_url, send
from testbed.in_process import in_process_server

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "llava_serve" / "builtin" / "demo.png"
QUESTION = {
    "role": "user",
    "content": [
        {"type": "image_url", "image_url": {"url": picture_url(DEMO.read_bytes())}},
        {"type": "text", "text": "What colour is the circle?"},
    ],
}
MAX_TOKENS = 100
STREAMS = 8
SETTLE_S = 0.5
"""After an input was made, which takes a core."""
TARGET = 2.0
"""`during` over `usual`."""


@dataclass(frozen=True)
class Window:
    """A time on the clock of `time.perf_counter`, in seconds."""

    begin: float
    end: float


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--serve", action="append", default=[], help="default, or a profile's file; repeatable")
    parser.add_argument("--seconds", type=float, default=2, help="per input, and between two of them")
    parser.add_argument("--only", default="", help="inputs whose name holds this text")
    parser.add_argument("--output", type=Path)
    options = parse(parser, seconds=0.3, only="1e-")
    inputs = {name: each for name, each in HOSTILE.items() if options.only in name}
    report: dict[str, Any] = {"machine": machine()}
    for profile in ["in process", *options.serve]:
        with server(profile) as url:
            report[profile] = asyncio.run(measure(url, inputs, options.seconds))
        print(json.dumps({profile: report[profile]}, indent=1), flush=True)
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def server(profile: str) -> Iterator[str]:
    """A server by its name in the report; gives its URL."""
    if profile == "in process":
        with in_process_server() as url:
            yield url
        return
    config = read_config(ROOT / "serve_config.yaml", port=free_port())
    config["applications"][0]["args"]["engine"]["num_threads"] = 1
    settings = None if profile == "default" else read_serve_env(ROOT / profile)
    with local_cluster(config, profile=settings) as running:
        yield running.url


async def measure(url: str, inputs: dict[str, Hostile], seconds: float) -> dict[str, Any]:
    """All inputs in turn, with quiet seconds around each."""
    traces: list[Trace] = []
    quiet: list[Window] = []
    sent: dict[str, tuple[Window, dict[str, Any]]] = {}

    async def good_answer() -> Trace:
        trace = await client.ask([QUESTION], MAX_TOKENS)
        if not trace.ok:
            raise RuntimeError(f"A good stream has failed: {trace.status} {trace.error}")
        return trace

    async def stream() -> None:
        while True:
            traces.append(await good_answer())

    async def rest() -> Window:
        begin = time.perf_counter()
        await asyncio.sleep(seconds)
        return Window(begin, time.perf_counter())

    async with Client(url, "builtin", timeout_s=120, extra={"ignore_eos": True}) as client:
        expected = await good_answer()
        streams = [asyncio.create_task(stream()) for _ in range(STREAMS)]
        await rest()
        quiet.append(await rest())
        for name, hostile in inputs.items():
            data = await asyncio.to_thread(hostile.make)
            await asyncio.sleep(SETTLE_S)
            begin = time.perf_counter()
            outcome = await asyncio.to_thread(send_for, url, hostile, data, seconds)
            sent[name] = Window(begin, time.perf_counter()), {"bytes": len(data)} | outcome
            quiet.append(await rest())
            for task in streams:
                if task.done():
                    task.result()  # a stream that has failed ends the run
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    return report_of([expected, *traces], quiet, sent)


def send_for(url: str, hostile: Hostile, data: bytes, seconds: float) -> dict[str, Any]:
    """Sends an input until the time is over, once at least: the first answer, and the number and mean time of all."""
    end = time.perf_counter() + seconds
    if not hostile.complete:
        address = urlsplit(url)
        with ExitStack() as connections:
            for _ in range(hostile.connections):
                made = socket.create_connection((address.hostname, address.port or 80), timeout=10)
                connections.enter_context(made).sendall(data)
            time.sleep(max(0.0, end - time.perf_counter()))
        return {"times": 1, "status": None, "code": None, "right": True}
    answers: list[tuple[int, str]] = []
    began = time.perf_counter()
    while not answers or time.perf_counter() < end:
        answers.append(send(url, data))
    taken = (time.perf_counter() - began) / len(answers)
    status, body = answers[0]
    right = all(status in hostile.statuses for status, _ in answers)
    return {"times": len(answers), "s": round(taken, 3), "status": status, "code": error_code(body), "right": right}


def report_of(
    traces: Sequence[Trace], quiet: Sequence[Window], sent: dict[str, tuple[Window, dict[str, Any]]]
) -> dict[str, Any]:
    """Percentiles by input; `quiet` has one window more than there are inputs."""
    arrivals = [trace.sent + np.asarray(trace.arrivals) for trace in traces]
    ends = np.concatenate([each[1:] for each in arrivals])
    gaps = np.concatenate([np.diff(each) for each in arrivals]) * 1e3

    def p95(*windows: Window) -> float | None:
        inside = np.any([(ends > window.begin) & (ends <= window.end) for window in windows], axis=0)
        return round(float(np.percentile(gaps[inside], 95)), 2) if inside.any() else None

    inputs = []
    for number, (name, (window, outcome)) in enumerate(sent.items()):
        usual, during = p95(quiet[number], quiet[number + 1]), p95(window)
        ratio = round(during / usual, 2) if usual and during else None
        inputs.append({"input": name} | outcome | {"usual_p95_ms": usual, "during_p95_ms": during, "ratio": ratio})
    return {
        "answers": len(traces),
        "wrong": sum(trace.text != traces[0].text for trace in traces),
        "not_right": [each["input"] for each in inputs if not each["right"]],
        "above_target": [each["input"] for each in inputs if (each["ratio"] or 0) >= TARGET],
        "inputs": inputs,
    }


if __name__ == "__main__":
    main()
