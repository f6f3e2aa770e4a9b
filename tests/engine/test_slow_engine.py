"""The real web app and engine with a step that is held: refusals, deadlines and disconnects do not wait for it."""

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
TIMEOUT_S = 60
STEP = Engine.step


class StepGate:
    """Wraps the engine's steps. While it is closed, the next step waits in it.

    Attributes:
        begun: steps so far, with one that waits.
        ended: steps so far.
    """

    def __init__(self) -> None:
        self.begun = self.ended = 0
        self._open = threading.Event()
        self._open.set()
        self._waiting = threading.Event()

    @contextmanager
    def closed(self) -> Iterator[None]:
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def wait_for_step(self) -> None:
        """Returns when a step waits."""
        assert self._waiting.wait(TIMEOUT_S)

    def step(self, engine: Engine) -> list[Output]:
        """Replaces `Engine.step`, and calls it."""
        self.begun += 1
        if not self._open.is_set():
            self._waiting.set()
            assert self._open.wait(TIMEOUT_S)
            self._waiting.clear()
        outputs = STEP(engine)
        self.ended += 1
        return outputs


class Server:
    """A server that takes one request at a time."""

    def __init__(self, url: str, llm: AsyncLLM, gate: StepGate) -> None:
        self.url = url
        self.llm = llm
        self.gate = gate
        self._numbers = itertools.count()

    def is_idle(self) -> bool:
        """Whether no step runs, and the engine is idle."""
        stats = self.llm.stats()
        return self.gate.begun == self.gate.ended == stats.steps and not stats.running + stats.waiting

    def accepts_requests(self) -> bool:
        """Whether the server is below its limit: a body is read, and refused as invalid."""
        return httpx.post(f"{self.url}{PATH}", content=b"{", timeout=TIMEOUT_S).status_code == 400

    def body(self, **fields: Any) -> dict[str, Any]:
        """A new question, with an image."""
        messages = question(f"{next(self._numbers)}. {DEMO_QUESTION}", DEMO_IMAGE.read_bytes())
        return LONG | {"messages": messages} | fields


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    gate = StepGate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "step", lambda engine: gate.step(engine))
        llm = AsyncLLM(ModelOptions(device="cpu"), EngineOptions(num_threads=1))
        backend = InProcessBackend(llm)
        with serving(create_app(backend, ApiOptions(max_in_flight=1))) as url:
            yield Server(url, llm, gate)
        llm.close()


@pytest.fixture
def idle(server: Server) -> Iterator[Server]:
    """The server without requests, before and after the test."""
    wait_until(server.is_idle, TIMEOUT_S)
    yield server
    wait_until(server.is_idle, TIMEOUT_S)
    assert server.llm.stats().free_blocks == server.llm.stats().total_blocks


async def test_a_refusal_does_not_wait_for_the_step(idle: Server) -> None:
    async with httpx.AsyncClient(base_url=idle.url, timeout=TIMEOUT_S) as client:
        with idle.gate.closed():
            first = asyncio.create_task(client.post(PATH, json=idle.body()))
            await asyncio.to_thread(idle.gate.wait_for_step)
            for _ in range(40):
                refused = await client.post(PATH, json=idle.body())
                assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        first.cancel()


@pytest.mark.parametrize("stream", [False, True])
async def test_an_exceeded_deadline_is_answered_before_the_step_ends(idle: Server, stream: bool) -> None:
    async with httpx.AsyncClient(base_url=idle.url, timeout=TIMEOUT_S) as client:
        before = idle.gate.begun
        with idle.gate.closed():
            response = await client.post(PATH, json=idle.body(timeout=0.6, stream=stream))
            assert "deadline_exceeded" in response.text
    await asyncio.to_thread(wait_until, idle.is_idle, TIMEOUT_S)
    assert idle.gate.begun - before <= 1  # the one that was held


@pytest.mark.parametrize("stream", [False, True])
async def test_a_disconnect_costs_no_step_but_the_running_one(idle: Server, stream: bool) -> None:
    async with httpx.AsyncClient(base_url=idle.url, timeout=TIMEOUT_S) as client:
        with idle.gate.closed():
            before = idle.gate.begun
            task = asyncio.create_task(client.post(PATH, json=idle.body(stream=stream)))
            await asyncio.to_thread(idle.gate.wait_for_step)
            task.cancel()
            await asyncio.to_thread(wait_until, idle.accepts_requests, TIMEOUT_S)
    await asyncio.to_thread(wait_until, idle.is_idle, TIMEOUT_S)
    assert idle.gate.begun - before == 1
