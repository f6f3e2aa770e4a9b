"""The time of a refusal at capacity, from the web app's first line to the first byte of its 429.

python -m benchmarks.refusals
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, MutableMapping, Sequence
from typing import Any

import numpy as np

from benchmarks.options import make_parser, parse
from llava_serve.api.app import create_app
from llava_serve.config import ApiOptions
from llava_serve.metrics.prometheus import PrometheusExporter
from llava_serve.sampling_params import SamplingParams
from llava_serve.tokenization import ModelDescription, TokenizedPrompt
from llava_serve.types import Asked, Chunk, PreparedPrompt

PATH = "/v1/chat/completions"
BODY = {"model": "busy", "messages": [{"role": "user", "content": "Hello"}]}
SCOPE = {"type": "http", "method": "POST", "path": PATH, "root_path": "", "query_string": b"", "headers": []}


class Busy:
    """A backend whose request never ends."""

    model_name = "busy"

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.exporter = PrometheusExporter(self.model_name)

    async def prepare(
        self, asked: Asked, *, conv_mode: str | None, deadline: float, cache_salt: str = "", priority: int = 0
    ) -> PreparedPrompt:
        self.entered.set()
        await asyncio.Event().wait()
        raise AssertionError("never")

    async def generate(
        self, prepared: PreparedPrompt, sampling: SamplingParams, *, request_id: str, deadline: float, priority: int
    ) -> AsyncGenerator[list[Chunk]]:
        raise AssertionError("never")
        yield

    async def describe(self) -> ModelDescription:
        raise AssertionError("never")

    async def tokenize(
        self, asked: Asked, *, conv_mode: str | None, deadline: float, texts: bool = False
    ) -> TokenizedPrompt:
        raise AssertionError("never")

    async def detokenize(self, token_ids: Sequence[int], *, deadline: float) -> str:
        raise AssertionError("never")

    async def check_health(self) -> str:
        return "ok"


async def measure(count: int) -> list[float]:
    """Seconds of `count` refusals, one after the other."""
    backend = Busy()
    app = create_app(backend, ApiOptions(max_in_flight=1))
    arriving: asyncio.Queue[MutableMapping[str, Any]] = asyncio.Queue()
    arriving.put_nowait({"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False})

    async def ignore(message: MutableMapping[str, Any]) -> None:
        return None

    first = asyncio.create_task(app(dict(SCOPE), arriving.get, ignore))
    await backend.entered.wait()
    times: list[float] = []
    for _ in range(count):
        began = time.perf_counter()

        async def send(message: MutableMapping[str, Any], began: float = began) -> None:
            if message["type"] == "http.response.start":
                assert message["status"] == 429
                times.append(time.perf_counter() - began)

        await app(dict(SCOPE), asyncio.Event().wait, send)  # type: ignore[arg-type]
    first.cancel()
    return times


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--count", type=int, default=2000, help="refusals")
    taken = np.array(asyncio.run(measure(parse(parser, count=20).count))) * 1e3
    print(json.dumps({f"p{q}_ms": round(float(np.percentile(taken, q)), 3) for q in (50, 95, 99)}))


if __name__ == "__main__":
    main()
