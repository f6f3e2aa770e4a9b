"""Mixed requests for a long time: how each kind ended, whether the answers are right, and the memory of every process.

    python -m benchmarks.soak [--minutes 20] [--clients 4] [--profile production.env] [--output ...] [--plot ...]

The application of `serve_config.yaml` with one replica per tier. Each client sends one request after another: `good`
ones with a large picture that differs from all before it, `text` with three choices and log-probabilities, `bad` ones
that must be refused, `cancelled` ones whose client disconnects, and `expired` ones with a time that cannot suffice. A
good answer is right if it is what the library gives for that picture by itself; what makes the picture differ is one
pixel. The memory is that of all processes of Ray, Serve and the replicas, with `slope` and `flat` of its second half
(`testbed.processes.memory`). The caches are small, and full by then. A health check that a replica did not answer in
time is counted: three in a row would end it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from benchmarks.options import make_parser, parse
from benchmarks.plot import write_times
from benchmarks.soak_requests import KINDS, Scene, request_of, scenes
from deployments.tools.local_cluster import LocalCluster, local_cluster
from deployments.tools.serve_env import read_serve_env
from testbed.counted import counted_config
from testbed.health_checks import unanswered_checks
from testbed.processes import Samples, memory, watch_memory

SETTLED_S = 60.0
"""Until nothing remains of the last requests."""

CACHES: dict[str, dict[str, int]] = {
    "engine": {"kv_cache_bytes": 64 << 20, "feature_cache_bytes": 16 << 20},
    "images": {"cache_bytes": 16 << 20},
}
"""Small, so that they are full after some minutes: what grows then is no cache."""


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--scenes", type=int, default=16, help="pictures that the library answers before")
    parser.add_argument("--profile", type=Path, help="a profile's file; none: Serve's defaults")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parse(parser, minutes=0.3, clients=2, scenes=2)
    known = scenes(options.scenes)
    profile = read_serve_env(options.profile) if options.profile else None
    load_before = round(os.getloadavg()[0], 1)
    config = counted_config()
    for section, sizes in CACHES.items():
        config["applications"][0]["args"][section].update(sizes)
    with local_cluster(config, profile=profile) as running:
        result, samples = asyncio.run(soak(running, known, options))
    head = {"cpu_cores": os.cpu_count(), "load_before": load_before, "load_after": round(os.getloadavg()[0], 1)}
    head |= {"minutes": options.minutes}
    result = head | {"profile": options.profile.stem if options.profile else "default"} | result
    print(json.dumps(result, indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        write_times(options.plot, "Resident memory in MiB over minutes", samples)


async def soak(
    running: LocalCluster, known: list[Scene], options: argparse.Namespace
) -> tuple[dict[str, Any], Samples]:
    """The report, and the samples of memory."""
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    seconds: list[float] = []
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        ask = partial(one_request, session, f"{running.url}/v1/chat/completions", known, outcomes, seconds)
        await asyncio.gather(*(ask(random.Random(number)) for number in range(4)))  # warms up; is counted, too
        before = await at_rest(session, running.url)
        began = time.monotonic()
        end = began + 60 * options.minutes
        watching = asyncio.create_task(asyncio.to_thread(watch_memory, running.process.pid, end))
        await asyncio.gather(*(client(ask, 100 + number, end) for number in range(options.clients)))
        samples = await watching
        after = await at_rest(session, running.url)
    figures = {name: memory(points) for name, points in sorted(samples.items())}
    return {
        "requests": sum(each.total() for each in outcomes.values()),
        "outcomes": {kind: dict(each) for kind, each in sorted(outcomes.items())},
        "not_as_expected": {kind: left for kind, each in outcomes.items() if (left := unexpected(kind, each))},
        "good_answer_s": {f"p{q}": round(float(np.percentile(seconds, q)), 2) for q in (50, 95, 99)},
        "remains": {name: after[name] - before[name] for name in ("sequences", "blocks")},
        "unanswered_health_checks": unanswered_checks(running),
        "memory_mib": figures,
        "grows": [name for name, each in figures.items() if each.get("flat") is False],
    }, samples


def unexpected(kind: str, outcomes: Counter[str]) -> dict[str, int]:
    """The outcomes that this kind of request must not have."""
    return {outcome: count for outcome, count in outcomes.items() if outcome not in KINDS[kind].expected}


async def client(ask: Callable[[random.Random], Awaitable[None]], seed: int, end: float) -> None:
    """Asks one question after another until the time is over."""
    rng = random.Random(seed)
    while time.monotonic() < end:
        await ask(rng)


async def one_request(
    session: aiohttp.ClientSession,
    url: str,
    known: list[Scene],
    outcomes: dict[str, Counter[str]],
    seconds: list[float],
    rng: random.Random,
) -> None:
    """A request of a random kind; counts how it ended."""
    kind = rng.choices(list(KINDS), [each.weight for each in KINDS.values()])[0]
    body, expected = await asyncio.to_thread(request_of, kind, known, rng)
    start = time.monotonic()
    try:
        async with asyncio.timeout(rng.uniform(0.05, 1.5) if kind == "cancelled" else None):
            async with session.post(url, json=body) as response:
                answer = await response.json()
    except TimeoutError:
        outcomes[kind]["disconnected" if kind == "cancelled" else "no answer"] += 1
        return
    except aiohttp.ClientError as error:
        outcomes[kind][type(error).__name__] += 1
        return
    if response.status != 200 or kind != "good":
        outcomes[kind][str(response.status)] += 1
        return
    seconds.append(time.monotonic() - start)
    outcomes[kind]["right" if answer["choices"][0]["message"]["content"] == expected else "wrong"] += 1


async def at_rest(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """What remains in the engine, once it works no more."""
    deadline = time.monotonic() + SETTLED_S
    while True:
        async with session.get(f"{url}/remaining") as response:
            remains: dict[str, Any] = await response.json()
        if not remains["sequences"] or time.monotonic() > deadline:
            return remains
        await asyncio.sleep(0.5)


if __name__ == "__main__":
    main()
