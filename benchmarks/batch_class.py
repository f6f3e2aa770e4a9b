"""Online requests alone, beside a batch job, and beside the same job as online work: what the batch class is worth.

    python -m benchmarks.batch_class [--output benchmarks/results/batch_class.json]

The application of `serve_config.yaml`. Online clients send the mixed load, each its next request when the last is
answered; the job's clients do so, too, as long as the online ones are at it. The three cases take turns within one run,
and the ratios are those of the percentiles over all turns. Times are the online clients' own.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.load import Trace, ask, summarise
from benchmarks.options import make_parser, parse
from benchmarks.workload import Job, make_jobs
from deployments.tools.config import read_config
from deployments.tools.local_cluster import free_port, local_cluster

CONFIG = Path(__file__).resolve().parent.parent / "serve_config.yaml"
CASES: dict[str, dict[str, Any] | None] = {"alone": None, "beside_batch": {"priority": 1}, "beside_online": {}}
"""By name: the fields of the job's requests; None has no job."""


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--clients", type=int, default=2, help="online")
    parser.add_argument("--requests", type=int, default=24, help="online, in each turn")
    parser.add_argument("--batch-clients", type=int, default=24)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parse(parser, clients=1, requests=2, batch_clients=2, turns=1)
    with local_cluster(read_config(CONFIG, port=free_port())) as running:
        result = asyncio.run(measure(running.url, options))
    print(json.dumps(result, indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


async def measure(url: str, options: Any) -> dict[str, Any]:
    traces: dict[str, list[Trace]] = {case: [] for case in CASES}
    seconds = dict.fromkeys(CASES, 0.0)
    batch_tokens = dict.fromkeys(CASES, 0)
    timeout, connector = aiohttp.ClientTimeout(total=None), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, read_bufsize=1 << 20) as session:
        await online(session, url, make_jobs(2, seed=1000), 1)  # warms up
        for turn in range(options.turns):
            for number, (case, fields) in enumerate(CASES.items()):
                seed = 2 * (turn * len(CASES) + number)
                job = asyncio.create_task(batch(session, url, fields, options.batch_clients, seed + 1))
                if fields is not None:
                    await asyncio.sleep(3)  # the job has filled the engine
                began = time.perf_counter()
                traces[case] += await online(session, url, make_jobs(options.requests, seed=seed), options.clients)
                seconds[case] += time.perf_counter() - began
                job.cancel()
                (tokens,) = await asyncio.gather(job)
                batch_tokens[case] += tokens
                await asyncio.sleep(2)  # the engine is empty
    cases = {
        case: summarise(traces[case], seconds[case], options.clients)
        | {"job_tokens_per_s": round(batch_tokens[case] / seconds[case], 2)}
        for case in CASES
    }
    ratios = {
        f"{case}_{figure}_p95_ratio": round(cases[case][figure]["p95"] / cases["alone"][figure]["p95"], 2)
        for case in ("beside_batch", "beside_online")
        for figure in ("ttft_ms", "inter_token_ms")
    }
    return {"cpu_cores": os.cpu_count(), "batch_clients": options.batch_clients, **ratios, **cases}


async def online(session: aiohttp.ClientSession, url: str, jobs: list[Job], clients: int) -> list[Trace]:
    """The answers to all jobs, from this many clients."""
    queue: Iterator[Job] = iter(jobs)
    traces: list[Trace] = []

    async def client() -> None:
        for job in queue:
            traces.append(await ask(session, url, "builtin", job, {}))

    await asyncio.gather(*(client() for _ in range(clients)))
    for trace in traces:
        trace.read()
    return traces


async def batch(
    session: aiohttp.ClientSession, url: str, fields: dict[str, Any] | None, clients: int, seed: int
) -> int:
    """Sends jobs until it is cancelled; tokens of the answers that were complete. A refused one is sent again."""
    traces: list[Trace] = []
    jobs = make_jobs(16, seed=seed)

    async def client(at: int) -> None:
        while True:
            try:
                traces.append(
                    await ask(session, url, "builtin", jobs[at % len(jobs)], {"ignore_eos": True, **(fields or {})})
                )
            except RuntimeError as refused:
                if not str(refused).startswith("429"):
                    raise
                await asyncio.sleep(1)
            at += clients

    if fields is not None:
        with suppress(asyncio.CancelledError):  # the end of the turn
            await asyncio.gather(*(client(at) for at in range(clients)))
    for trace in traces:
        trace.read()
    return sum(trace.tokens for trace in traces)


if __name__ == "__main__":
    main()
