"""Online requests alone, beside a batch job, and beside the same job as online work: what the batch class is worth.

    python -m benchmarks.batch_class [--output benchmarks/results/batch_class.json]

The application of `serve_config.yaml`. Online clients send the mixed load, each its next request when the last is
answered; the job's clients do so, too, as long as the online ones are at it. The three cases take turns within one run,
and the ratios are those of the percentiles over all turns. Times are the online clients' own.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.options import make_parser, parse
from deployments.tools.config import read_config
from deployments.tools.local_cluster import free_port, local_cluster
from llava_serve.bench.client import Client
from llava_serve.bench.load import Run, closed_loop
from llava_serve.bench.report import summarise
from llava_serve.bench.workload import Workload, make_conversations

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
    runs = {case: Run(0) for case in CASES}
    job_tokens = dict.fromkeys(CASES, 0)
    async with Client(url, "builtin", extra={"ignore_eos": True}) as client:
        await closed_loop(Run(2), client, make_conversations(Workload(2, seed=1000)), 1)  # warms up
        for turn in range(options.turns):
            for number, (case, fields) in enumerate(CASES.items()):
                seed = 2 * (turn * len(CASES) + number)
                job = asyncio.create_task(run_job(url, fields, options.batch_clients, seed + 1))
                if fields is not None:
                    await asyncio.sleep(3)  # the job has filled the engine
                run = Run(options.requests)
                await closed_loop(
                    run, client, make_conversations(Workload(options.requests, seed=seed)), options.clients
                )
                job.cancel()
                job_tokens[case] += await job
                runs[case].total += run.total
                runs[case].traces += run.traces
                runs[case].seconds += run.seconds
                await asyncio.sleep(2)  # the engine is empty
    cases = {
        case: summarise(run) | {"job_tokens_per_s": round(job_tokens[case] / run.seconds, 2)}
        for case, run in runs.items()
    }
    ratios = {
        f"{case}_{figure}_p95_ratio": round(cases[case][figure]["p95"] / cases["alone"][figure]["p95"], 2)
        for case in ("beside_batch", "beside_online")
        for figure in ("ttft_ms", "inter_token_ms")
    }
    return {"cpu_cores": os.cpu_count(), "batch_clients": options.batch_clients, **ratios, **cases}


async def run_job(url: str, fields: dict[str, Any] | None, clients: int, seed: int) -> int:
    """Sends requests until it is cancelled; tokens of the answers that were complete. A refused one is sent again."""
    run = Run(0)
    if fields is None:
        return 0
    conversations = itertools.cycle(make_conversations(Workload(16, seed=seed)))
    async with Client(url, "builtin", extra={"ignore_eos": True, **fields}) as client:

        async def one() -> None:
            while True:
                await run.converse(client, next(conversations))
                if run.traces[-1].status == "429":
                    await asyncio.sleep(1)

        with suppress(asyncio.CancelledError):  # the end of the turn
            await asyncio.gather(*(one() for _ in range(clients)))
    return sum(trace.output_tokens for trace in run.traces if trace.ok)


if __name__ == "__main__":
    main()
