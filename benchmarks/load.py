"""Sends the mixed load to any OpenAI-compatible server from a fixed number of clients, and reports its speed.

    python -m benchmarks.load http://127.0.0.1:8000 --clients 8 --requests 64

Each client sends its next request when the last is answered. Times are the client's own. The events are parsed after
the run: this program shares the cores with the server.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

from benchmarks.options import make_parser, parse
from benchmarks.workload import Job, make_jobs


@dataclass
class Trace:
    """One answer: its bytes with their arrival in seconds since the request; then its events.

    Attributes:
        arrivals: when each piece of the text arrived.
        tokens: of the whole answer.
        text: of the whole answer.
    """

    sent: float
    data: list[tuple[float, bytes]] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0
    text: str = ""

    def read(self) -> None:
        """Parses the events. An event arrives with the last of its bytes."""
        rest = b""
        for came, data in self.data:
            *whole, rest = (rest + data).split(b"\n\n")
            for text in whole:
                if not text.startswith(b"data: {"):
                    continue
                event = json.loads(text[6:])
                if event.get("usage"):
                    self.tokens = event["usage"]["completion_tokens"]
                if new := "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ())):
                    self.arrivals.append(came)
                    self.text += new


async def ask(session: aiohttp.ClientSession, url: str, model: str, job: Job, extra: dict[str, Any]) -> Trace:
    """One streamed request. Raises `RuntimeError` if the server refuses it."""
    content = [
        {"type": "image_url", "image_url": {"url": job.picture}},
        {"type": "text", "text": job.question},
    ]
    body = {
        "model": model, "messages": [{"role": "user", "content": content}], "max_tokens": job.max_tokens,
        "temperature": 0, "stream": True, "stream_options": {"include_usage": True}, **extra,
    }  # fmt: skip
    trace = Trace(time.perf_counter())
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {await response.text()}")
        async for data in response.content.iter_any():
            trace.data.append((time.perf_counter() - trace.sent, data))
    return trace


async def drive(url: str, model: str, jobs: list[Job], clients: int, extra: dict[str, Any]) -> dict[str, Any]:
    """Sends all jobs from this many clients."""
    queue: Iterator[Job] = iter(jobs)
    traces: list[Trace] = []

    async def client() -> None:
        for job in queue:
            traces.append(await ask(session, url, model, job, extra))

    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout, read_bufsize=1 << 20) as session:
        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        seconds = time.perf_counter() - started
    for trace in traces:
        trace.read()
    return summarise(traces, seconds, clients)


def summarise(traces: list[Trace], seconds: float, clients: int) -> dict[str, Any]:
    """Requests and tokens per second; percentiles of the time to the first token and of the gaps between tokens."""
    first = [trace.arrivals[0] for trace in traces if trace.arrivals]
    gaps = [gap for trace in traces for gap in np.diff(trace.arrivals)]
    tokens = sum(trace.tokens for trace in traces)
    return {
        "clients": clients,
        "requests": len(traces),
        "seconds": round(seconds, 3),
        "requests_per_s": round(len(traces) / seconds, 3),
        "output_tokens_per_s": round(tokens / seconds, 2),
        "ttft_ms": percentiles(first),
        "inter_token_ms": percentiles(gaps),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 in milliseconds."""
    if not seconds:
        return {}
    values = np.percentile(np.asarray(seconds) * 1e3, [50, 95, 99])
    return {name: round(float(value), 2) for name, value in zip(("p50", "p95", "p99"), values, strict=True)}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("url")
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--same-picture", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ignore-eos", action="store_true", help="our server's extension: go on to the length asked")
    args = parse(parser, clients=2, requests=4)
    jobs = make_jobs(args.requests, seed=args.seed, same_picture=args.same_picture)
    extra = {"ignore_eos": True} if args.ignore_eos else {}
    print(json.dumps(asyncio.run(drive(args.url, args.model, jobs, args.clients, extra)), indent=2))


if __name__ == "__main__":
    main()
