"""Tokens per second of the running application by number of clients, over HTTP: one JSON object on standard output.

    python -m benchmarks.serve_clients [--url http://127.0.0.1:8000] [--clients 1 8] [--tokens 128] [--rounds 3]

Without a URL it starts the application of `serve_config.yaml` on a Ray of its own. Each client sends one question after
another and gets exactly `--tokens` tokens each time (`ignore_eos`); the pictures differ, so that no cache helps.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from openai import AsyncOpenAI
from PIL import Image

from benchmarks.options import make_parser, parse
from deployments.tools.config import read_config
from deployments.tools.local_cluster import free_port, local_cluster

CONFIG = Path(__file__).resolve().parent.parent / "serve_config.yaml"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--url", help="of a running application")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128, help="per answer")
    parser.add_argument("--answers", type=int, default=4, help="per client and round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parse(parser, clients=[1, 2], tokens=4, answers=1, rounds=1)
    with application(options.url) as url:
        print(json.dumps(asyncio.run(measure(url, options)), indent=2))


@contextlib.contextmanager
def application(url: str | None) -> Iterator[str]:
    """The application at the URL, or a new one."""
    if url is not None:
        yield url
        return
    with local_cluster(read_config(CONFIG, port=free_port())) as running:
        yield running.url


async def measure(url: str, options: argparse.Namespace) -> dict[str, object]:
    """Rounds alternate between the numbers of clients, so that a slow minute of the machine affects all of them."""
    rates: dict[int, list[float]] = {clients: [] for clients in options.clients}
    first_chunks: dict[int, list[float]] = {clients: [] for clients in options.clients}
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        model = (await client.models.list()).data[0].id
        await answer(client, model, options.tokens)
        for _ in range(options.rounds):
            for clients in options.clients:
                start = time.perf_counter()
                waits = await asyncio.gather(*(one_client(client, model, options) for _ in range(clients)))
                seconds = time.perf_counter() - start
                rates[clients].append(clients * options.answers * options.tokens / seconds)
                first_chunks[clients] += [wait for each in waits for wait in each]
    return {
        "model": model,
        "cpu_cores": os.cpu_count(),
        "tokens_per_answer": options.tokens,
        "by_clients": {
            clients: {
                "tokens_per_s": round(statistics.median(rates[clients]), 1),
                "tokens_per_s_by_round": [round(rate, 1) for rate in rates[clients]],
                "first_chunk_ms_p50": round(1000 * statistics.median(first_chunks[clients]), 1),
            }
            for clients in options.clients
        },
    }


async def one_client(client: AsyncOpenAI, model: str, options: argparse.Namespace) -> list[float]:
    """Asks one question after another; returns the seconds to each first chunk."""
    return [await answer(client, model, options.tokens) for _ in range(options.answers)]


async def answer(client: AsyncOpenAI, model: str, tokens: int) -> float:
    """One streamed answer; returns the seconds to its first chunk."""
    start = time.perf_counter()
    first: float | None = None
    stream = await client.chat.completions.create(
        model=model,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": picture()}},
                    {"type": "text", "text": "Describe the picture."},
                ],
            }
        ],
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    async for chunk in stream:
        first = first or time.perf_counter() - start
        if chunk.usage is not None:
            assert chunk.usage.completion_tokens == tokens
    assert first is not None
    return first


def picture() -> str:
    """A picture that nobody has sent before."""
    file = io.BytesIO()
    Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    main()
