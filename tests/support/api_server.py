"""The web app on a real socket, and a backend whose pace and failures a test sets. It imports no torch."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from openai import OpenAI
from starlette.types import ASGIApp

from llava_serve.api.app import create_app
from llava_serve.api.http_server import server_of
from llava_serve.config import ApiOptions
from llava_serve.metrics.prometheus import PrometheusExporter
from llava_serve.sampling_params import SamplingParams
from llava_serve.tokenization import ModelDescription, TokenizedPrompt
from llava_serve.types import Asked, Chunk, Message, PreparedPrompt, Query, RawPrompt

MESSAGES: list[Any] = [{"role": "user", "content": "What is it?"}]
BODY: dict[str, Any] = {"model": "paced", "messages": MESSAGES}
PATH = "/v1/chat/completions"

DESCRIPTION = ModelDescription(max_model_len=64, max_images=3, max_image_bytes=1000, max_image_pixels=2000)
QUESTION = {"role": "user", "content": "What is it?"}
PICTURE: dict[str, Any] = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


@contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """Runs an app under uvicorn on a free port; gives its URL."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = server_of(app, graceful_timeout_s=2)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Returns as soon as the condition holds. Only a fault reaches the time limit."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the condition did not hold in time"
        time.sleep(0.005)


@dataclass
class PacedBackend:
    """Generates `words`, one chunk each, `pace_s` apart.

    Attributes:
        prepare_s: how long a prompt takes.
        fail_at: raise `failure` instead of the chunk with this number; -1 raises it while preparing.
        cut_short: end without a finish reason, as an aborted request does.
        description: of the model.
        working: requests that are being prepared or generated.
        asked: the messages and `conv_mode` of each request that was prepared.
        samplings, deadlines, priorities: of the requests, in order.
        exporter: of the web app's metrics.
    """

    words: Sequence[str] = ("A ", "red ", "circle.")
    pace_s: float = 0.0
    prepare_s: float = 0.0
    fail_at: int | None = None
    failure: Exception | None = None
    cut_short: bool = False
    model_name: str = "paced"
    description: ModelDescription = DESCRIPTION
    working: int = 0
    asked: list[tuple[Sequence[Message], str | None]] = field(default_factory=list)
    samplings: list[SamplingParams] = field(default_factory=list)
    deadlines: list[float] = field(default_factory=list)
    priorities: list[int] = field(default_factory=list)
    exporter: PrometheusExporter = field(default_factory=lambda: PrometheusExporter("paced"))

    async def prepare(
        self, asked: Asked, *, conv_mode: str | None, deadline: float, cache_salt: str = "", priority: int = 0
    ) -> PreparedPrompt:
        self.working += 1
        try:
            assert not isinstance(asked, Query)
            if not isinstance(asked, RawPrompt):
                self.asked.append((asked, conv_mode))
            self.deadlines.append(deadline)
            await asyncio.sleep(self.prepare_s)
            self._fail(-1)
            return PreparedPrompt(np.arange(7, dtype=np.int32), image_spans=((1, 4),))
        finally:
            self.working -= 1

    async def generate(
        self, prepared: PreparedPrompt, sampling: SamplingParams, *, request_id: str, deadline: float, priority: int
    ) -> AsyncGenerator[list[Chunk]]:
        self.working += 1
        try:
            self.samplings.append(sampling)
            self.priorities.append(priority)
            for number, word in enumerate(self.words):
                await asyncio.sleep(self.pace_s)
                self._fail(number)
                last = number == len(self.words) - 1 and not self.cut_short
                for index in range(sampling.n):
                    yield [Chunk(index, word, (number,), "stop" if last else None, num_prompt_tokens=7)]
        finally:
            self.working -= 1

    async def describe(self) -> ModelDescription:
        return self.description

    async def tokenize(
        self, asked: Asked, *, conv_mode: str | None, deadline: float, texts: bool = False
    ) -> TokenizedPrompt:
        return TokenizedPrompt(tuple(range(7)), None, (), 64)

    async def detokenize(self, token_ids: Sequence[int], *, deadline: float) -> str:
        return " ".join(map(str, token_ids))

    async def check_health(self) -> str:
        self._fail(-1)
        return "ok"

    def _fail(self, now: int) -> None:
        if self.failure is not None and self.fail_at == now:
            raise self.failure


@contextmanager
def app_over(backend: PacedBackend, **options: Any) -> Iterator[httpx.Client]:
    """A client of the web app over a backend; the options are those of `ApiOptions`."""
    with serving(create_app(backend, ApiOptions(**options))) as url, httpx.Client(base_url=url, timeout=60) as web:
        yield web


def ask_paced(web: httpx.Client, **fields: Any) -> httpx.Response:
    """The answer of `PacedBackend` to a question with these fields."""
    body = {"model": "paced", "messages": [QUESTION]} | fields
    return web.post("/v1/chat/completions", json=body)


def official(web: httpx.Client, retries: int = 0) -> OpenAI:
    """The official client of the same server."""
    return OpenAI(base_url=f"{web.base_url}/v1", api_key="any", max_retries=retries)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error in a response, which must have OpenAI's exact shape."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = body["error"]
    return error
