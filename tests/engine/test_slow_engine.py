"""The real web app and engine, a step of which is held: refusals, deadlines and leaving do not wait for it."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from llava_serve.api.app import create_app
from llava_serve.api.in_process import InProcessBackend
from llava_serve.async_llm import AsyncLLM
from llava_serve.config import ApiOptions, EngineOptions, ModelOptions
from llava_serve.engine.engine import Engine
from llava_serve.engine.sequence import Output
from support.api_server import PATH, serving, wait_until
from support.demo import DEMO_IMAGE, DEMO_QUESTION, question

LONG: dict[str, Any] = {"model": "builtin", "max_tokens": 1500, "ignore_eos": True}
PATIENCE_S = 60
STEP = Engine.step


class Gate:
    """The engine's steps pass it. While it is closed, the first to come waits in it.

    Attributes:
        begun: steps so far, one that waits among them.
        ended: steps so far.
    """

    def __init__(self) -> None:
        self.begun = self.ended = 0
        self._open = threading.Event()
        self._open.set()
        self._holds = threading.Event()

    @contextmanager
    def closed(self) -> Iterator[None]:
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def step_waits(self) -> None:
        """Returns when a step waits."""
        assert self._holds.wait(PATIENCE_S)

    def step(self, engine: Engine) -> list[Output]:
        """Stands in the place of the engine's own, and calls it."""
        self.begun += 1
        if not self._open.is_set():
            self._holds.set()
            assert self._open.wait(PATIENCE_S)
            self._holds.clear()
        outputs = STEP(engine)
        self.ended += 1
        return outputs


class Server:
    """A server that takes one request at a time."""

    def __init__(self, url: str, llm: AsyncLLM, gate: Gate) -> None:
        self.url = url
        self.llm = llm
        self.gate = gate
        self._numbers = itertools.count()

    def at_rest(self) -> bool:
        """Whether no step runs, and after the last one nobody was in."""
        stats = self.llm.stats()
        return self.gate.begun == self.gate.ended == stats.steps and not stats.running + stats.waiting

    def has_a_place(self) -> bool:
        """Whether nobody is in, as seen from outside: a body is looked at, and found wrong."""
        return httpx.post(f"{self.url}{PATH}", content=b"{", timeout=PATIENCE_S).status_code == 400

    def body(self, **fields: Any) -> dict[str, Any]:
        """A question that has not been asked before, with a picture."""
        messages = question(f"{next(self._numbers)}. {DEMO_QUESTION}", DEMO_IMAGE.read_bytes())
        return LONG | {"messages": messages} | fields


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    gate = Gate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "step", lambda engine: gate.step(engine))
        llm = AsyncLLM(ModelOptions(device="cpu"), EngineOptions(num_threads=1))
        backend = InProcessBackend(llm)
        with serving(create_app(backend, ApiOptions(max_in_flight=1))) as url:
            yield Server(url, llm, gate)
        llm.close()


@pytest.fixture
def empty(server: Server) -> Iterator[Server]:
    """The server when nobody is in, and that it is so again at the end."""
    wait_until(server.at_rest, PATIENCE_S)
    yield server
    wait_until(server.at_rest, PATIENCE_S)
    assert server.llm.stats().free_blocks == server.llm.stats().total_blocks


async def test_a_refusal_waits_for_no_step(empty: Server) -> None:
    async with httpx.AsyncClient(base_url=empty.url, timeout=PATIENCE_S) as client:
        with empty.gate.closed():
            first = asyncio.create_task(client.post(PATH, json=empty.body()))
            await asyncio.to_thread(empty.gate.step_waits)
            for _ in range(40):
                refused = await client.post(PATH, json=empty.body())
                assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        first.cancel()


@pytest.mark.parametrize("stream", [False, True])
async def test_the_time_that_is_up_is_told_before_the_step_ends(empty: Server, stream: bool) -> None:
    async with httpx.AsyncClient(base_url=empty.url, timeout=PATIENCE_S) as client:
        before = empty.gate.begun
        with empty.gate.closed():
            response = await client.post(PATH, json=empty.body(timeout=0.6, stream=stream))
            assert "deadline_exceeded" in response.text
    await asyncio.to_thread(wait_until, empty.at_rest, PATIENCE_S)
    assert empty.gate.begun - before <= 1  # the one that was held


@pytest.mark.parametrize("stream", [False, True])
async def test_who_leaves_costs_no_step_but_the_one_that_runs(empty: Server, stream: bool) -> None:
    async with httpx.AsyncClient(base_url=empty.url, timeout=PATIENCE_S) as client:
        with empty.gate.closed():
            before = empty.gate.begun
            task = asyncio.create_task(client.post(PATH, json=empty.body(stream=stream)))
            await asyncio.to_thread(empty.gate.step_waits)
            task.cancel()
            await asyncio.to_thread(wait_until, empty.has_a_place, PATIENCE_S)
    await asyncio.to_thread(wait_until, empty.at_rest, PATIENCE_S)
    assert empty.gate.begun - before == 1
