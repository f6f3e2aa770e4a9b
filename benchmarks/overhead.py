"""The time that HTTP, ingress and hops add to the first token, and the token chunks per second of one ingress replica.

    python -m benchmarks.overhead [--profile production.env] [--rounds 2] [--output benchmarks/results/overhead.json]

The application is the real one, except that `benchmarks.paced` stands in for the model. Each round starts it anew under
Serve's defaults and then under each profile. Added time is the client's time to the first token, without the picture
tier's work (its queue included) and without the stand-in's configured time. Client and application share the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil

from benchmarks.options import make_parser, parse
from benchmarks.paced import Order, read_stamps
from deployments.tools.config import read_config
from deployments.tools.local_cluster import free_port, local_cluster
from deployments.tools.serve_env import read_serve_env
from llava_serve.bench.workload import make_image

CONFIG = Path(__file__).resolve().parent.parent / "serve_config.yaml"
STAGES = {
    "proxy_in": ("sent", "arrived"),
    "ingress": ("arrived", "parsed"),
    "to_picture_tier": ("parsed", "reached"),
    "from_picture_tier": ("ended", "prepared"),
    "to_model": ("prepared", "asked"),
    "from_model": ("made", "back"),
    "proxy_out": ("back", "received"),
}
"""The stages that add time, each between two stamps."""
WORK = {"picture_queue": ("reached", "began"), "picture_work": ("began", "ended"), "model": ("asked", "made")}
"""The stages that are the tiers' own."""
FIRST_TOKEN = Order(first_s=0.05, gap_s=0.02, grouped=True)
PRIORITY = {"RAY_worker_niceness": "0"}
"""Ray's own is 15, which gives all other processes precedence over the application, the client among them."""
TOKENS = 32
STREAM_TOKENS = 400

PARTS = {
    "ServeReplica:llava:Ingress": "ingress",
    "ServeReplica:llava:ImagePreprocessor": "picture tier",
    "ServeReplica:llava:LlavaModel": "stand-in",
    "ProxyActor": "proxy",
    "HAProxyManager": "proxy",
    "haproxy -": "proxy",
}
"""Processes by a text in their titles."""

Stamps = dict[str, float]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--profile", type=Path, action="append", default=[], help="repeatable; beside Serve's defaults")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--requests", type=int, default=160, help="per round at 16 clients; a quarter of it at one")
    parser.add_argument("--streams", type=int, nargs=2, default=[200, 16], help="at once: grouped, and one by one")
    parser.add_argument("--output", type=Path)
    options = parse(parser, rounds=1, requests=8, streams=[4, 2])
    profiles: dict[str, dict[str, str]] = {"default": {}} | {p.stem: read_serve_env(p) for p in options.profile}
    rounds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for _ in range(options.rounds):
        for name, profile in profiles.items():
            with local_cluster(paced_config(), profile=profile | PRIORITY) as running:
                rounds[name].append(asyncio.run(measure(running.url, options.requests, *options.streams)))
            print(json.dumps({name: summary(rounds[name][-1:])}), file=sys.stderr, flush=True)
    result = {
        "cpu_cores": os.cpu_count(),
        "load_average_at_end": [round(load, 2) for load in os.getloadavg()],
        "settings": profiles,
        "profiles": {name: summary(each) for name, each in rounds.items()},
    }
    print(text := json.dumps(result, indent=1))
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")


def paced_config() -> dict[str, Any]:
    """`serve_config.yaml` with the stand-in, on a free port; its limits are high enough that no request is refused."""
    config = read_config(CONFIG, port=free_port())
    config["applications"][0]["import_path"] = "benchmarks.paced:build_app"
    return config


async def measure(url: str, requests: int, grouped: int, one_by_one: int) -> dict[str, Any]:
    """One round under one profile."""
    pictures = [make_image(seed) for seed in range(16)]
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as session:
        ask = Asker(session, url, pictures)
        await ask.by_clients(4, min(32, requests), FIRST_TOKEN, TOKENS)  # warms up
        return {
            "1": await ask.by_clients(1, requests // 4, FIRST_TOKEN, TOKENS),
            "16": await ask.by_clients(16, requests, FIRST_TOKEN, TOKENS),
            "grouped": await ask.throughput(grouped, Order(0.5, 0.02, grouped=True)),
            "one by one": await ask.throughput(one_by_one, Order(0.5, 0, grouped=False)),
        }


class Asker:
    """Sends questions with pictures, and parses as little of the answers as possible: the client shares the cores."""

    def __init__(self, session: aiohttp.ClientSession, url: str, pictures: Sequence[str]) -> None:
        self._session = session
        self._url = f"{url}/v1/chat/completions"
        self._pictures = itertools.cycle(pictures)
        self.events = 0

    async def by_clients(self, clients: int, requests: int, order: Order, tokens: int) -> dict[str, Any]:
        """This many clients, each of which asks again when it is answered; their starts spread over a second."""
        numbers = iter(range(requests))
        stamps: list[Stamps] = []

        async def client(number: int) -> None:
            await asyncio.sleep(number / clients)
            for _ in numbers:
                stamps.append(await self.one(order, tokens, next(self._pictures)))

        before = processor_seconds()
        await asyncio.gather(*(client(number) for number in range(clients)))
        return {"stamps": stamps, "processor_ms": used(before, requests, 1e3)}

    async def throughput(self, streams: int, order: Order) -> dict[str, Any]:
        """This many streams at once, without pictures."""
        self.events = 0
        before = processor_seconds()
        stamps = await asyncio.gather(*(self.one(order, STREAM_TOKENS, None) for _ in range(streams)))
        first, end = min(each["received"] for each in stamps), max(each["over"] for each in stamps)
        tokens = streams * STREAM_TOKENS
        return {
            "streams": streams,
            "tokens_per_s": tokens / (end - first),
            "events_per_s": self.events / (end - first),
            "tokens_ordered_per_s": streams / order.gap_s if order.gap_s else None,
            "processor_us_per_token": used(before, tokens, 1e6),
        }

    async def one(self, order: Order, tokens: int, picture: str | None) -> Stamps:
        """One streamed answer; returns the stamps of all stages."""
        content: list[dict[str, Any]] = [{"type": "text", "text": json.dumps(asdict(order))}]
        if picture is not None:
            content.insert(0, {"type": "image_url", "image_url": {"url": picture}})
        messages = [{"role": "user", "content": content}]
        body = json.dumps({"model": "builtin", "messages": messages, "max_tokens": tokens, "stream": True}).encode()
        headers = {"Content-Type": "application/json"}
        stamps: Stamps = {}
        sent, received = time.time(), 0.0
        async with self._session.post(self._url, data=body, headers=headers) as response:
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    self.events += 1
                    if not received:
                        received = time.time()
                        stamps, _ = read_stamps(json.loads(line[6:])["choices"][0]["delta"]["content"])
        return {**stamps, "sent": sent, "received": received, "over": time.time()}


def processor_seconds() -> dict[str, float]:
    """The processor time of each part of the application so far, and of this process."""
    seconds: dict[str, float] = defaultdict(float)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            title, times = " ".join(process.cmdline()), process.cpu_times()
            part = next((part for mark, part in PARTS.items() if mark in title), "ray")
            seconds[part] += times.user + times.system
    seconds["client"] = time.process_time()
    return seconds


def used(before: Mapping[str, float], among: int, unit: float) -> dict[str, float]:
    """The processor time since `before` of each part, per item."""
    now = processor_seconds()
    return {part: (now[part] - before.get(part, 0)) / among * unit for part in sorted(now)}


def summary(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Added time over all rounds of a profile; throughput and processor time of the median round."""
    return {
        "added_ms": {
            clients: {
                **added([stamps for one in rounds for stamps in one[clients]["stamps"]]),
                "processor_ms_per_request": middle([one[clients]["processor_ms"] for one in rounds]),
            }
            for clients in ("1", "16")
        },
        "throughput": {kind: middle([one[kind] for one in rounds]) for kind in ("grouped", "one by one")},
    }


def middle(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of each number, whatever its depth."""
    return {
        name: middle([one[name] for one in rounds])
        if isinstance(value, dict)
        else None
        if value is None
        else round(statistics.median(one[name] for one in rounds), 2)
        for name, value in rounds[0].items()
    }


def added(stamps: Sequence[Stamps]) -> dict[str, Any]:
    """Percentiles of the time that is added, and of each stage, in milliseconds."""
    stages = {
        name: np.array([each[end] - each[start] for each in stamps]) for name, (start, end) in (STAGES | WORK).items()
    }
    return {
        "requests": len(stamps),
        "total": percentiles(sum(stages[name] for name in STAGES)),
        "stages": {name: percentiles(stages[name]) for name in STAGES},
        "not counted": {name: percentiles(stages[name]) for name in WORK},
    }


def percentiles(seconds: Any) -> dict[str, float]:
    """p50 and p95 in milliseconds."""
    return {f"p{q}": round(float(np.percentile(seconds, q)) * 1e3, 2) for q in (50, 95)}


if __name__ == "__main__":
    main()
