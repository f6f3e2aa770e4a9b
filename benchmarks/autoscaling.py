"""Autoscaling by work beside Serve's own by requests: the time to the first token, and the replicas that it took.

    python -m benchmarks.autoscaling [--phase-s 45] [--output benchmarks/results/autoscaling.json]

The application of `serve_config.yaml` with both tiers paced (`benchmarks.paced_tiers`): decoding and steps sleep, since
on these cores a second replica would bring no more compute, and what is compared is the policy. The load is open-loop,
the same for both: thumbnails and photographs of 12 megapixels in four phases. Both policies have the same bounds and
delays, which are short, and replicas report every second in place of every ten.

Replica-seconds are those of replicas that run or start, sampled from Serve. A plot of the run lies beside the output.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from ray import serve

from benchmarks.options import make_parser, parse
from benchmarks.paced_tiers import KINDS
from benchmarks.plot import write_times
from benchmarks.ray_job import ray_job
from deployments.tools.config import read_config
from deployments.tools.local_cluster import free_port, local_cluster

CONFIG = Path(__file__).resolve().parent.parent / "serve_config.yaml"
TIERS = {"ImagePreprocessor": 2, "LlavaModel": 22}
"""With what `serve_config.yaml` had as `target_ongoing_requests` before it scaled by work: for the model, 0.7 of the
places of a batch."""
BOUNDS = {"min_replicas": 1, "max_replicas": 4, "look_back_period_s": 5, "upscale_delay_s": 2, "downscale_delay_s": 10}
SERVE_ENV = {f"RAY_SERVE_{name}_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1" for name in ("HANDLE", "REPLICA")}
POLICIES = ("by requests", "by work")
BYTES_PER_MEGAPIXEL = 10_000
"""Of what is sent; nobody decodes it."""
SAMPLE_S = 0.5


@dataclass(frozen=True)
class Phase:
    """Requests per second of each kind, and the tokens of an answer."""

    name: str
    rates: dict[str, float]
    tokens: int


PHASES = (
    Phase("thumbnails", {"thumbnail": 6}, 60),
    Phase("photographs", {"thumbnail": 4, "photograph": 4}, 60),
    Phase("thumbnails again", {"thumbnail": 6}, 60),
    Phase("long answers", {"thumbnail": 6}, 200),
)


@dataclass(frozen=True)
class Answered:
    """A request: when it was sent, in seconds from the start, and how long its first token took; None failed."""

    phase: str
    sent_s: float
    first_s: float | None


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--phase-s", type=float, default=45, help="of each phase")
    parser.add_argument("--output", type=Path)
    parser.set_defaults(policies=POLICIES)
    options = parse(parser, phase_s=2, policies=POLICIES[1:])
    result: dict[str, Any] = {"cpu_cores": os.cpu_count(), "paced": True, "phase_s": options.phase_s, "bounds": BOUNDS}
    plots: dict[str, list[tuple[float, float]]] = {}
    for policy in options.policies:
        # In a process of its own: Serve keeps state of the first Ray cluster in a process.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            answers, replicas = process.submit(drive, policy, options.phase_s).result()
        result[policy] = summary(answers, replicas)
        print(json.dumps({policy: result[policy]}), flush=True)
        plots |= {f"{name}, {policy}": samples for name, samples in replicas.items()}
        plots[f"First token (ms), {policy}"] = [(each.sent_s, 1e3 * each.first_s) for each in answers if each.first_s]
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        title = f"Replicas and time to first token over {len(PHASES) * options.phase_s:.0f} s: " + ", ".join(
            phase.name for phase in PHASES
        )
        write_times(options.output.with_suffix(".svg"), title, plots)


def drive(policy: str, phase_s: float) -> tuple[list[Answered], dict[str, list[tuple[float, float]]]]:
    """The whole load under one policy: its answers, and the number of each tier's replicas over time."""
    with (
        local_cluster(config_of(policy), num_cpus=16, profile=SERVE_ENV) as running,  # the CPUs are logical
        ray_job(running.ray_address),
    ):
        return asyncio.run(measure(running.url, phase_s))


def config_of(policy: str) -> dict[str, Any]:
    """The shipped config with paced tiers and one of the policies."""
    config = read_config(CONFIG, port=free_port())
    [application] = config["applications"]
    application["import_path"] = "benchmarks.paced_tiers:build_app"
    application["args"].pop("probe", None)
    for deployment in application["deployments"]:
        if deployment["name"] in TIERS:
            ours = deployment["autoscaling_config"]["policy"]
            by_requests = {"target_ongoing_requests": TIERS[deployment["name"]]}
            deployment["autoscaling_config"] = BOUNDS | ({"policy": ours} if policy == "by work" else by_requests)
            deployment["graceful_shutdown_timeout_s"] = 30
    return config


async def measure(url: str, phase_s: float) -> tuple[list[Answered], dict[str, list[tuple[float, float]]]]:
    """Sends the load, and samples the replicas until the last answer."""
    replicas: dict[str, list[tuple[float, float]]] = {name: [] for name in TIERS}
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        await asyncio.gather(*(ask(session, url, kind, 2) for kind in KINDS))  # warms up, and is measured by the tiers
        began = time.monotonic()

        async def watch() -> None:
            while True:
                status = await asyncio.to_thread(serve.status)
                at = time.monotonic() - began
                for name, samples in replicas.items():
                    states = status.applications["llava"].deployments[name].replica_states
                    samples.append((at, states.get("RUNNING", 0) + states.get("STARTING", 0)))
                await asyncio.sleep(SAMPLE_S)

        async def one(phase: Phase, kind: str, at: float) -> Answered:
            await asyncio.sleep(began + at - time.monotonic())
            return Answered(phase.name, at, await ask(session, url, kind, phase.tokens))

        watching = asyncio.create_task(watch())
        answers = await asyncio.gather(*(one(*each) for each in arrivals(phase_s)))
        watching.cancel()
    return answers, replicas


def arrivals(phase_s: float) -> list[tuple[Phase, str, float]]:
    """When each request of each phase arrives: at random, but the same for every run."""
    rng = random.Random(0)
    found = []
    for number, phase in enumerate(PHASES):
        for kind, rate in phase.rates.items():
            at = rng.expovariate(rate)
            while at < phase_s:
                found.append((phase, kind, number * phase_s + at))
                at += rng.expovariate(rate)
    return sorted(found, key=lambda each: each[2])


async def ask(session: aiohttp.ClientSession, url: str, kind: str, tokens: int) -> float | None:
    """Seconds to the first token of an answer that is read to its end; None if it failed."""
    data = base64.b64encode(bytes(int(KINDS[kind].megapixels * BYTES_PER_MEGAPIXEL))).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}},
        {"type": "text", "text": kind},
    ]
    fields = {"model": "builtin", "messages": [{"role": "user", "content": parts}], "max_tokens": tokens}
    sent = time.perf_counter()
    first, ended = None, False
    async with session.post(f"{url}/v1/chat/completions", json=fields | {"stream": True}) as response:
        async for line in response.content:
            if first is None and b'"content":" word' in line:
                first = time.perf_counter() - sent
            ended = ended or line.startswith(b"data: [DONE]")
    return first if ended else None


def summary(answers: list[Answered], replicas: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Milliseconds to the first token in all and by phase, failures, and replica-seconds."""
    by_phase = {phase.name: [each for each in answers if each.phase == phase.name] for phase in PHASES}
    return {
        "first_token_ms": percentiles(answers),
        "by_phase": {name: percentiles(of) for name, of in by_phase.items()},
        "requests": len(answers),
        "failed": sum(each.first_s is None for each in answers),
        "replica_seconds": {name: round(integral(samples)) for name, samples in replicas.items()},
    }


def percentiles(answers: list[Answered]) -> dict[str, float]:
    """p50 and p95 in milliseconds."""
    seconds = [each.first_s for each in answers if each.first_s is not None]
    return {f"p{q}": round(float(np.percentile(seconds, q)) * 1e3) for q in (50, 95)} if seconds else {}


def integral(samples: list[tuple[float, float]]) -> float:
    """Of a value over its time: each sample holds until the next."""
    return sum(value * (later - at) for (at, value), (later, _) in pairwise(samples))


if __name__ == "__main__":
    main()
