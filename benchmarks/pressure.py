"""Load above capacity, and disconnects: the outcome of each request, the time to a refusal, the time until work ends.

    python -m benchmarks.pressure [--profile production.env] [--rate 60] [--output benchmarks/results/pressure.json]

The application of `serve_config.yaml` with a lower limit of requests in flight and two more endpoints
(`testbed.counted`), under Serve's defaults and then under each profile. The load is open-loop: 200 clients at a
fixed rate, each with a picture of its own. Then clients disconnect from long answers one after the other, streamed and
not; the time is from closing the socket until the engine reports that it is empty, polled every few milliseconds.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from benchmarks.options import make_parser, parse
from deployments.tools.local_cluster import local_cluster
from deployments.tools.serve_env import read_serve_env
from llava_serve.bench.workload import make_image
from testbed.counted import counted_config

TOKENS = 64
LONG = 1500
JSON = {"Content-Type": "application/json"}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--profile", type=Path, action="append", default=[], help="repeatable; beside Serve's defaults")
    parser.add_argument("--rate", type=float, default=60, help="clients per second")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--max-in-flight", type=int, default=32)
    parser.add_argument("--disconnects", type=int, default=40, help="of each kind")
    parser.add_argument("--output", type=Path)
    options = parse(parser, clients=8, max_in_flight=2, disconnects=1)
    profiles: dict[str, dict[str, str]] = {"default": {}} | {p.stem: read_serve_env(p) for p in options.profile}
    result: dict[str, Any] = {"cpu_cores": os.cpu_count(), "clients": options.clients, "clients_per_s": options.rate}
    result["max_in_flight"] = options.max_in_flight
    for name, profile in profiles.items():
        with local_cluster(counted_config(max_in_flight=options.max_in_flight), profile=profile) as running:
            result[name] = asyncio.run(measure(running.url, options.clients, options.rate, options.disconnects))
        print(json.dumps({name: result[name]}), flush=True)
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


async def measure(url: str, clients: int, rate: float, disconnects: int) -> dict[str, Any]:
    timeout = aiohttp.ClientTimeout(total=600)
    bodies = [body(number, TOKENS, number % 2 == 0) for number in range(clients)]
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        await asyncio.gather(*(ask(session, url, one) for one in bodies[:4]))  # warms up
        began = time.perf_counter()
        answers = await asyncio.gather(*(ask_after(session, url, one, at / rate) for at, one in enumerate(bodies)))
        seconds = time.perf_counter() - began
        empty_after = {}
        for kind, stream in (("unstreamed", False), ("streamed", True)):
            empty_after[kind] = percentiles(
                [await disconnect(session, url, number, stream) for number in range(disconnects)]
            )
    outcomes = Counter(outcome for outcome, _ in answers)
    return {
        "outcomes": dict(outcomes),
        "answers_per_s": round(outcomes["answer"] / seconds, 1),
        "refused_after_ms": percentiles([taken for outcome, taken in answers if outcome == "429 with Retry-After"]),
        "empty_after_disconnect_ms": empty_after,
    }


async def ask_after(session: aiohttp.ClientSession, url: str, asked: bytes, after_s: float) -> tuple[str, float]:
    """One question, after a delay."""
    await asyncio.sleep(after_s)
    return await ask(session, url, asked)


async def ask(session: aiohttp.ClientSession, url: str, asked: bytes) -> tuple[str, float]:
    """One question: its outcome, and the seconds to the head of the response."""
    sent = time.perf_counter()
    async with session.post(f"{url}/v1/chat/completions", data=asked, headers=JSON) as response:
        taken = time.perf_counter() - sent
        text = await response.text()
    if response.status == 200 and '"finish_reason":"length"' in text.replace(" ", ""):
        return "answer", taken
    if response.status == 429 and "Retry-After" in response.headers:
        return "429 with Retry-After", taken
    return f"{response.status}: {text[:200]}", taken


async def disconnect(session: aiohttp.ClientSession, url: str, number: int, stream: bool) -> float:
    """Seconds from a disconnect during a long answer to an empty engine."""
    task = asyncio.create_task(read(session, url, number, stream))
    await wait_for_engine(session, url, working=True)
    await asyncio.sleep(random.Random(number).uniform(0, 0.3))
    assert not task.done(), "the answer ended too soon"
    task.cancel()
    disconnected = time.perf_counter()
    await wait_for_engine(session, url, working=False)
    return time.perf_counter() - disconnected


async def read(session: aiohttp.ClientSession, url: str, number: int, stream: bool) -> None:
    async with session.post(f"{url}/v1/chat/completions", data=body(number, LONG, stream), headers=JSON) as response:
        async for _ in response.content:
            pass


async def wait_for_engine(session: aiohttp.ClientSession, url: str, *, working: bool) -> None:
    """Polls the engine until it has sequences, or none."""
    while True:
        async with session.get(f"{url}/engine") as response:
            stats = await response.json()
        if bool(stats["running"] + stats["waiting"]) == working:
            return
        await asyncio.sleep(0.005)


def body(number: int, tokens: int, stream: bool) -> bytes:
    """A question with a picture of its own, and an answer of exactly this many tokens."""
    parts = [
        {"type": "image_url", "image_url": {"url": make_image(number)}},
        {"type": "text", "text": f"Question {number}: what is this?"},
    ]
    messages = [{"role": "user", "content": parts}]
    fields = {"model": "builtin", "messages": messages, "max_tokens": tokens, "stream": stream, "ignore_eos": True}
    return json.dumps(fields).encode()


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50, p95 and p99 in milliseconds."""
    if not seconds:
        return {}
    return {f"p{q}": round(float(np.percentile(seconds, q)) * 1e3, 1) for q in (50, 95, 99)}


if __name__ == "__main__":
    main()
