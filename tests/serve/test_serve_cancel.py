"""A disconnect ends the work: soon after, the engine is empty, whenever and however the client disconnects."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from openai import AsyncOpenAI
from ray import serve

from deployments.handle_calls import AbortSender
from llava_serve import Message, SamplingParams
from llava_serve.checkpoints import open_checkpoint
from llava_serve.config import ImageOptions
from llava_serve.processor import Processor
from llava_serve.types import TextPart
from support.bursts import LONG, burst, read_until_timeout

Stats = Callable[[], dict[str, Any]]


async def tokens_when_quiet(stats: Stats) -> int:
    """Waits until the engine is empty and stays so; returns the tokens that it has generated since its start."""
    deadline = time.monotonic() + 120
    before: int | None = None
    while True:
        now = await asyncio.to_thread(stats)
        empty = now["running"] == now["waiting"] == 0 and now["free_blocks"] == now["total_blocks"]
        if empty and before is not None and before == now["generated_tokens"]:
            return before
        assert time.monotonic() < deadline, f"the engine does not come to rest: {now}"
        before = now["generated_tokens"] if empty else None
        await asyncio.sleep(0.5)


HIDDEN = {"x-request-disconnect-disabled": "?1"}
"""With it a client would hide its disconnect from Serve."""


@pytest.mark.parametrize(("stream", "headers"), [(True, {}), (False, {}), (False, HIDDEN)])
async def test_a_disconnect_frees_the_engine(
    served: Any,
    engine_stats: Stats,
    wait_until: Callable[[Callable[[], bool]], None],
    stream: bool,
    headers: dict[str, str],
) -> None:
    before = await tokens_when_quiet(engine_stats)
    async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        task = asyncio.create_task(read_until_timeout(client, 60, stream=stream, extra_headers=headers))
        await asyncio.to_thread(wait_until, lambda: engine_stats()["running"] > 0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert await tokens_when_quiet(engine_stats) - before < LONG


async def test_a_burst_of_disconnects_leaves_no_work(served: Any, engine_stats: Stats) -> None:
    at_end = before = await tokens_when_quiet(engine_stats)
    while at_end == before:  # on a slow machine, no request of the first burst may have reached the engine
        await burst(served.url, 40, within_s=2)
        at_end = (await asyncio.to_thread(engine_stats))["generated_tokens"]
    # A sequence that runs on lacks more than half of its tokens yet.
    assert await tokens_when_quiet(engine_stats) - at_end < LONG / 2


async def test_an_abort_ends_a_call_whose_cancel_is_lost(served: Any, ray_job: None) -> None:
    calls = serve.get_deployment_handle("LlavaModel", "llava").options(method_name="generate", stream=True)
    prepared = Processor(open_checkpoint("builtin"), ImageOptions()).prepare([Message("user", (TextPart("Hello"),))])
    forever = SamplingParams(max_new_tokens=LONG, ignore_eos=True)
    deadline = time.time() + 120

    async def tokens_of(call_id: str, *, abort_after_first: bool) -> int:
        tokens = 0
        async for chunks in calls.remote(prepared, forever, 0, call_id, deadline):
            if not tokens and abort_after_first:
                aborts.send(call_id)
            tokens += sum(len(chunk.token_ids) for chunk in chunks)
        return tokens

    aborts = AbortSender(serve.get_deployment_handle("LlavaModel", "llava"))
    assert 0 < await tokens_of("aborted while it ran", abort_after_first=True) < LONG
    # An abort may also overtake the call that it is about.
    assert await tokens_of("aborted while it ran", abort_after_first=False) == 0
