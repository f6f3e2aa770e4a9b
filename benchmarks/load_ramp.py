"""Load that rises and falls: how each request ends, how long it takes, and how many replicas each tier has meanwhile.

    python -m benchmarks.load_ramp [--clients 1 10 40 10 1 0] [--phase-s 60] [--output ...] [--plot ...]

The application of `serve_config.yaml`, with room for two replicas of the picture tier and of the model tier, and short
delays of the autoscaler. In each phase so many clients ask one question after another, three of four about a photograph
of 12 megapixels, each another one, and the fourth with a long answer. On a machine of two cores a second replica
computes no more: what is shown is that replicas come and go with the load, and that no request fails of it. There are
no retries.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import os
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
from PIL import Image

from benchmarks.options import make_parser, parse
from benchmarks.plot import write_times
from deployments.tools.config import read_config
from deployments.tools.local_cluster import LocalCluster, free_port, local_cluster
from testbed.processes import processes, title

CONFIG = Path(__file__).resolve().parent.parent / "serve_config.yaml"
TARGETS = {"ImagePreprocessor": 1, "LlavaModel": 4}
"""`target_ongoing_requests` by tier."""

SCALING = {
    "min_replicas": 1,
    "max_replicas": 2,
    "look_back_period_s": 11,  # Serve hears of the load every 10 s
    "upscale_delay_s": 2,
    "downscale_delay_s": 5,
}
LONG = 200
"""Tokens of a long answer."""


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 10, 40, 10, 1, 0], help="in each phase")
    parser.add_argument("--phase-s", type=float, default=60)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parse(parser, clients=[1, 2, 0], phase_s=3)
    with local_cluster(scaling_config(), num_cpus=2) as running:
        ramp = Ramp(running)
        asyncio.run(ramp.run(options))
    result = {"cpu_cores": os.cpu_count(), "phase_s": options.phase_s, **ramp.result()}
    print(json.dumps(result, indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        write_times(options.plot, "Clients, and replicas of each tier, over minutes", ramp.plotted)


def scaling_config() -> dict[str, Any]:
    """`serve_config.yaml` with Serve's own policy, low targets and short delays, on a free port."""
    config = read_config(CONFIG, port=free_port())
    for deployment in config["applications"][0]["deployments"]:
        if target := TARGETS.get(deployment["name"]):
            deployment["autoscaling_config"] = SCALING | {"target_ongoing_requests": target}
            deployment["ray_actor_options"]["num_cpus"] = 0.4
    return config


class Ramp:
    """Clients that come and go, and what they saw.

    Attributes:
        plotted: minutes and numbers, of the clients and of each tier's replicas.
    """

    def __init__(self, running: LocalCluster) -> None:
        self._running = running
        self._wanted = 0
        self._photo = photograph()
        self._numbers = itertools.count()
        self._outcomes: Counter[str] = Counter()
        self._phases: list[dict[str, Any]] = []
        self._seconds: list[float] = []
        self._began = time.monotonic()
        self.plotted: dict[str, list[tuple[float, float]]] = {name: [] for name in ("clients", *TARGETS)}

    async def run(self, options: argparse.Namespace) -> None:
        """All phases."""
        timeout = aiohttp.ClientTimeout(total=600)
        self._began = time.monotonic()
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session,
            asyncio.TaskGroup() as tasks,
        ):
            clients: dict[int, asyncio.Task[None]] = {}
            for self._wanted in options.clients:
                for number in range(self._wanted):
                    if number not in clients or clients[number].done():
                        clients[number] = tasks.create_task(self._client(session, number))
                self._seconds = []
                await self._watch(options.phase_s)
                self._phases.append(self._phase())

    def result(self) -> dict[str, Any]:
        """The report; `failed` are all outcomes but right answers."""
        failed = {outcome: count for outcome, count in self._outcomes.items() if outcome != "answered"}
        return {"answered": self._outcomes["answered"], "failed": failed, "phases": self._phases}

    async def _client(self, session: aiohttp.ClientSession, number: int) -> None:
        """Asks while there are to be more clients than its number."""
        turn = number
        while number < self._wanted:
            await self._ask(session, photo=turn % 4 != 0)
            turn += 1

    async def _ask(self, session: aiohttp.ClientSession, *, photo: bool) -> None:
        text = [{"type": "text", "text": "What is this?"}]
        picture = [{"type": "image_url", "image_url": {"url": url_of(self._photo, next(self._numbers))}}]
        tokens = 1 if photo else LONG
        messages = [{"role": "user", "content": picture + text if photo else text}]
        body = {"messages": messages, "max_tokens": tokens, "ignore_eos": True, "timeout": 600}
        began = time.monotonic()
        try:
            async with session.post(f"{self._running.url}/v1/chat/completions", json=body) as response:
                answer = await response.json()
        except (aiohttp.ClientError, TimeoutError) as error:
            self._outcomes[type(error).__name__] += 1
            return
        self._seconds.append(time.monotonic() - began)
        complete = response.status == 200 and answer["usage"]["completion_tokens"] == tokens
        self._outcomes["answered" if complete else str(response.status)] += 1

    async def _watch(self, seconds: float) -> None:
        """Counts replicas every second."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            now = (time.monotonic() - self._began) / 60
            self.plotted["clients"].append((now, self._wanted))
            for name, count in (await asyncio.to_thread(self._replicas)).items():
                self.plotted[name].append((now, count))
            await asyncio.sleep(1)

    def _replicas(self) -> dict[str, int]:
        """The processes of the replicas of each tier."""
        found: Counter[str] = Counter()
        for each in processes(self._running.process.pid):
            with suppress(psutil.Error):
                found[title(each)] += 1
        return {name: found[name] for name in TARGETS}

    def _phase(self) -> dict[str, Any]:
        seconds = self._seconds
        percentiles = {f"p{q}_s": round(float(np.percentile(seconds, q)), 2) for q in (50, 95)} if seconds else {}
        replicas = {name: int(self.plotted[name][-1][1]) for name in TARGETS}
        return {"clients": self._wanted, "requests": len(seconds), **percentiles, "replicas_at_end": replicas}


def photograph() -> bytes:
    """A JPEG that takes long to decode."""
    coarse = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((4000, 3000)).save(file, "JPEG")
    return file.getvalue()


def url_of(photo: bytes, number: int) -> str:
    """The `data:` URL of a JPEG with a comment of its own: it is decoded anew."""
    comment = f"{number:012}".encode()
    marked = photo[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + photo[2:]
    return "data:image/jpeg;base64," + base64.b64encode(marked).decode()


if __name__ == "__main__":
    main()
