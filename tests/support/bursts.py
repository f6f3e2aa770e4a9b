"""Clients that disconnect, one or many at once, and what remains of their requests."""

from __future__ import annotations

import asyncio
import json
import random
import urllib.request
from typing import Any

from openai import APIConnectionError, APITimeoutError, AsyncOpenAI

from support.demo import DEMO_IMAGE, DEMO_QUESTION, question

LONG = 1500
"""Tokens of an answer that no client waits for: one that ran on would show in the engine's count by itself."""


def long_answer(client: AsyncOpenAI, *, stream: bool, **fields: Any) -> Any:
    """Asks for more tokens than the client waits for."""
    return client.chat.completions.create(
        model="builtin",
        messages=question(DEMO_QUESTION, DEMO_IMAGE.read_bytes()),
        max_tokens=LONG,
        stream=stream,
        extra_body={"ignore_eos": True},
        **fields,
    )


async def read_until_timeout(client: AsyncOpenAI, timeout_s: float, *, stream: bool, **fields: Any) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            answer = await long_answer(client, stream=stream, **fields)
            if stream:
                async for _ in answer:
                    pass
    except (TimeoutError, APIConnectionError, APITimeoutError):
        pass


async def burst(url: str, clients: int, within_s: float) -> None:
    """All clients ask at once; each disconnects at a random time, half of them from a stream."""
    rng = random.Random(clients)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        timeouts = [rng.uniform(0, within_s) for _ in range(clients)]
        await asyncio.gather(*(read_until_timeout(client, s, stream=n % 2 == 0) for n, s in enumerate(timeouts)))


def remaining(url: str) -> dict[str, Any]:
    """What remains of all requests: see `testbed.counted`."""
    with urllib.request.urlopen(f"{url}/remaining", timeout=60) as response:
        counts: dict[str, Any] = json.loads(response.read())
    return counts


async def at_rest(url: str) -> dict[str, Any]:
    """What remains without requests; what the first requests create once is no leak."""
    await burst(url, 4, within_s=2)
    before: dict[str, Any] = {}
    while (now := await asyncio.to_thread(remaining, url)) != before or now["sequences"]:
        before = now
        await asyncio.sleep(1)
    assert now["blocks"] == 0
    return now
