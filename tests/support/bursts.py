"""Clients that leave, one or many at once, and what is left of their requests."""

from __future__ import annotations

import asyncio
import json
import random
import urllib.request
from typing import Any

from openai import APIConnectionError, APITimeoutError, AsyncOpenAI

from deployments.tools.config import read_config
from deployments.tools.local_cluster import free_port
from support.demo import DEMO_IMAGE, DEMO_QUESTION, question
from support.paths import CONFIG

LONG = 1500
"""Tokens of an answer that nobody waits for: one that ran on would show in the engine's count by itself."""


def long_answer(client: AsyncOpenAI, *, stream: bool, **fields: Any) -> Any:
    """Asks for more tokens than anyone waits for."""
    return client.chat.completions.create(
        model="builtin",
        messages=question(DEMO_QUESTION, DEMO_IMAGE.read_bytes()),
        max_tokens=LONG,
        stream=stream,
        extra_body={"ignore_eos": True},
        **fields,
    )


async def read_until_it_is_left(client: AsyncOpenAI, patience_s: float, *, stream: bool, **fields: Any) -> None:
    try:
        async with asyncio.timeout(patience_s):
            answer = await long_answer(client, stream=stream, **fields)
            if stream:
                async for _ in answer:
                    pass
    except (TimeoutError, APIConnectionError, APITimeoutError):
        pass


async def burst(url: str, clients: int, within_s: float) -> None:
    """All at once; each leaves at a moment of its own, half of them from a stream."""
    draw = random.Random(clients)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        patience = [draw.uniform(0, within_s) for _ in range(clients)]
        await asyncio.gather(*(read_until_it_is_left(client, s, stream=n % 2 == 0) for n, s in enumerate(patience)))


def counted_config() -> dict[str, Any]:
    """`serve_config.yaml` on a free port with the endpoints of `benchmarks.counted`, and one replica per tier."""
    config = read_config(CONFIG, port=free_port())
    (application,) = config["applications"]
    application["import_path"] = "benchmarks.counted:build_app"
    for deployment in application["deployments"]:
        deployment.pop("autoscaling_config", None)
    return config


def left(url: str) -> dict[str, Any]:
    """What is still there of all requests: see `benchmarks.counted`."""
    with urllib.request.urlopen(f"{url}/left", timeout=60) as response:
        counts: dict[str, Any] = json.loads(response.read())
    return counts


async def at_rest(url: str) -> dict[str, Any]:
    """What is there where nobody asks; what is made once, at the first requests, is no leak."""
    await burst(url, 4, within_s=2)
    before: dict[str, Any] = {}
    while (now := await asyncio.to_thread(left, url)) != before or now["sequences"]:
        before = now
        await asyncio.sleep(1)
    assert now["blocks"] == 0
    return now
