"""The real web app and engine, its steps made slow: admission, deadlines and leaving do not wait for them.

pytest tests/test_slow_engine.py --log-cli-level=INFO    # tells the milliseconds
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from api_server import PATH, serving, wait_until
from conftest import DEMO_IMAGE, DEMO_QUESTION, question

from llava_serve.api.app import create_app
from llava_serve.api.in_process import InProcessBackend
from llava_serve.async_llm import AsyncLLM
from llava_serve.config import ApiOptions, EngineOptions, ModelOptions
from llava_serve.engine.engine import Engine

STEP_S = 0.15
SEATS = 2
LONG: dict[str, Any] = {"model": "builtin", "max_tokens": 1500, "ignore_eos": True}

log = logging.getLogger(__name__)


class House:
    """A server of `SEATS` seats, and what its engine does."""

    def __init__(self, url: str, llm: AsyncLLM) -> None:
        self.url = url
        self.llm = llm
        self._numbers = itertools.count()

    @property
    def steps(self) -> int:
        """Of the engine so far; the one that runs apart."""
        return self.llm.stats().steps

    @property
    def working(self) -> int:
        return self.llm.stats().running + self.llm.stats().waiting

    def body(self, **fields: Any) -> dict[str, Any]:
        """A question that has not been asked before, with a picture."""
        return (
            LONG | {"messages": question(f"{next(self._numbers)}. {DEMO_QUESTION}", DEMO_IMAGE.read_bytes())} | fields
        )


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    step = Engine.step

    def slow(engine: Engine) -> Any:
        time.sleep(STEP_S)
        return step(engine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "step", slow)
        llm = AsyncLLM(ModelOptions(device="cpu"), EngineOptions(num_threads=1))
        backend = InProcessBackend(llm)
        with serving(create_app(backend, ApiOptions(max_in_flight=SEATS))) as url:
            yield House(url, llm)
        llm.close()


@pytest.fixture
def empty(house: House) -> Iterator[House]:
    """The house when nobody is in, and that it is so again at the end."""
    wait_until(lambda: house.working == 0, timeout_s=20)
    yield house
    wait_until(lambda: house.working == 0, timeout_s=20)
    assert house.llm.stats().free_blocks == house.llm.stats().total_blocks


async def until(house: House, working: int) -> None:
    """Waits until so many are in the engine."""
    await asyncio.to_thread(wait_until, lambda: house.working == working, 20)


def tell(what: str, seconds: list[float]) -> None:
    p50, p95 = np.percentile(seconds, [50, 95]) * 1e3
    log.info("%s: p50 %.1f ms, p95 %.1f ms of %d; a step takes %.0f ms.", what, p50, p95, len(seconds), STEP_S * 1e3)


async def test_a_refusal_waits_for_no_step(empty: House) -> None:
    async with httpx.AsyncClient(base_url=empty.url, timeout=60) as client:
        guests = [asyncio.create_task(client.post(PATH, json=empty.body())) for _ in range(SEATS)]
        await until(empty, SEATS)
        steps, taken = empty.steps, []
        for _ in range(40):
            began = time.perf_counter()
            refused = await client.post(PATH, json=empty.body())
            taken.append(time.perf_counter() - began)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert empty.steps - steps < len(taken) / 4
        for guest in guests:
            guest.cancel()
    tell("refused after", taken)


@pytest.mark.parametrize("stream", [False, True])
async def test_the_time_that_is_up_is_told_before_the_step_ends(empty: House, stream: bool) -> None:
    late = []
    async with httpx.AsyncClient(base_url=empty.url, timeout=60) as client:
        for _ in range(4):
            before, began = empty.steps, time.perf_counter()
            response = await client.post(PATH, json=empty.body(timeout=0.6, stream=stream))
            late.append(time.perf_counter() - began - 0.6)
            assert "deadline_exceeded" in response.text
            await until(empty, 0)
            # those of its time, the one that ran when it was up, and the one that found it gone
            assert empty.steps - before <= 0.6 / STEP_S + 2
    tell("told late by", late)


@pytest.mark.parametrize("stream", [False, True])
async def test_who_leaves_costs_no_step_but_the_one_that_runs(empty: House, stream: bool) -> None:
    gone = []
    async with httpx.AsyncClient(base_url=empty.url, timeout=60) as client:
        for _ in range(4):
            task = asyncio.create_task(client.post(PATH, json=empty.body(stream=stream)))
            await until(empty, 1)
            task.cancel()
            left, before = time.perf_counter(), empty.steps
            await until(empty, 0)
            gone.append(time.perf_counter() - left)
            assert empty.steps - before <= 2
    tell("out of the engine after", gone)
