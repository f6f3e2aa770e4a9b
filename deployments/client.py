"""The application for other Ray jobs: from a driver, a task or an actor on the same cluster."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Generator, Mapping, Sequence
from contextlib import aclosing
from functools import cache
from typing import Any, TypeAlias, TypeVar

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from deployments.aborts import AbortSender
from deployments.calls import stream
from deployments.deadline import until
from llava_serve.api.admission import demand_size
from llava_serve.config import ImageOptions
from llava_serve.engine.stream import collect
from llava_serve.errors import UnknownModelError
from llava_serve.images.fetch import ImageSource
from llava_serve.openai_messages import ChatMessage, as_message
from llava_serve.types import Chunk, GenerationResult, Message, PreparedPrompt, SamplingParams

T = TypeVar("T")
Image: TypeAlias = ImageSource | ray.ObjectRef
"""A path, a URL, encoded bytes, a PIL image, uint8 [height, width, 3], or a reference to one of them."""
Messages = Sequence[ChatMessage]
"""`Message`s, or OpenAI's dicts; {"type": "image", "image": ...} holds an `Image`."""

MAX_BYTES = 60 << 20
"""Of the pictures of one request: the production profile's transport takes no more (production.env)."""


class LlavaClient:
    """Asks the running application, through its ingress: the house is the same as for HTTP, and so are its limits.

    `ask`, `chat` and `stream` are for code without an event loop, `ask_async`, `chat_async` and `stream_async` for code
    in one. All raise the library's own errors.

    Args:
        app: the application's name.
        timeout_s: a request's time, where it names none; the application's `max_timeout_s` holds all the same.
        images: what pictures are read.

    Raises:
        UnknownModelError: no such application runs on this cluster.
    """

    def __init__(self, app: str = "llava", *, timeout_s: float = 120, images: ImageOptions | None = None) -> None:
        try:
            ingress = serve.get_app_handle(app)
        except RayServeException:
            raise UnknownModelError(f"There is no application '{app}' on this Ray cluster.") from None
        self._generate = ingress.options(method_name="generate", stream=True)
        self._aborts = AbortSender(ingress)
        self._timeout_s = timeout_s
        self._images = images or ImageOptions()

    def ask(self, image: Image, question: str, sampling: SamplingParams | None = None) -> str:
        """The answer to a question about a picture; greedy where `sampling` is None.

        Raises:
            LlavaServeError: the class says what is wrong, as over HTTP the status does.
        """
        return _run(self.ask_async(image, question, sampling))

    def chat(
        self,
        messages: Messages,
        sampling: SamplingParams | None = None,
        *,
        conv_mode: str | None = None,
        timeout_s: float | None = None,
    ) -> GenerationResult:
        """The answer to a conversation.

        Raises:
            LlavaServeError: as `ask`.
        """
        return _run(self.chat_async(messages, sampling, conv_mode=conv_mode, timeout_s=timeout_s))

    def stream(
        self,
        messages: Messages,
        sampling: SamplingParams | None = None,
        *,
        conv_mode: str | None = None,
        timeout_s: float | None = None,
    ) -> Generator[Chunk]:
        """The answer to a conversation as it comes. Closing the iterator ends the work.

        Raises:
            LlavaServeError: as `ask`.
        """
        chunks = self.stream_async(messages, sampling, conv_mode=conv_mode, timeout_s=timeout_s)
        try:
            while (chunk := _run(_next(chunks))) is not None:
                yield chunk
        finally:
            _run(chunks.aclose())

    async def ask_async(self, image: Image, question: str, sampling: SamplingParams | None = None) -> str:
        """As `ask`."""
        messages = [
            {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}
        ]
        return (await self.chat_async(messages, sampling or SamplingParams(temperature=0))).text

    async def chat_async(
        self,
        messages: Messages,
        sampling: SamplingParams | None = None,
        *,
        conv_mode: str | None = None,
        timeout_s: float | None = None,
    ) -> GenerationResult:
        """As `chat`."""
        prompt, answer = await self._begin(messages, sampling, conv_mode, timeout_s)
        async with aclosing(answer) as groups:
            return collect(prompt, [chunk async for group in groups for chunk in group])

    async def stream_async(
        self,
        messages: Messages,
        sampling: SamplingParams | None = None,
        *,
        conv_mode: str | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Chunk]:
        """As `stream`. Left early, it must be closed (`contextlib.aclosing`) for the work to end."""
        _, answer = await self._begin(messages, sampling, conv_mode, timeout_s)
        async with aclosing(answer) as groups:
            async for group in groups:
                for chunk in group:
                    yield chunk

    async def _begin(
        self, messages: Messages, sampling: SamplingParams | None, conv_mode: str | None, timeout_s: float | None
    ) -> tuple[PreparedPrompt, AsyncGenerator[list[Chunk]]]:
        """The prompt, without its tiles, and the answer in groups."""
        deadline = time.time() + (timeout_s or self._timeout_s)
        async with until(deadline):
            read = [await self._read(message) for message in messages]
        demand_size(read, MAX_BYTES)
        answer = stream(
            self._generate, self._aborts, uuid.uuid4().hex, deadline, read, sampling or SamplingParams(), conv_mode
        )
        prompt: PreparedPrompt = await anext(answer)
        return prompt, answer

    async def _read(self, message: ChatMessage) -> Message:
        """Files, links and references are read here, where the caller is."""
        if isinstance(message, Message):
            return message
        content = message.get("content")
        if isinstance(content, list | tuple):
            message = {**message, "content": [await _fetched(part) for part in content]}
        return await asyncio.to_thread(as_message, message, self._images)


async def _fetched(part: Any) -> Any:
    """A part of a message with its picture in the place of a reference to it."""
    if isinstance(part, Mapping) and isinstance(part.get("image"), ray.ObjectRef):
        return {**part, "image": await part["image"]}
    return part


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop behind all calls of this process that have none of their own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="llava-client", daemon=True).start()
    return loop


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Waits for a result; whoever stops waiting ends the work."""
    future = asyncio.run_coroutine_threadsafe(work, _loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


async def _next(chunks: AsyncGenerator[Chunk]) -> Chunk | None:
    return await anext(chunks, None)
