"""The application for other Ray jobs: from a driver, a task or an actor on the same cluster."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing
from functools import cache
from typing import Any, TypeAlias, TypeVar

import ray
from ray import serve

from deployments.backend import HandleBackend
from llava_serve.config import ImageOptions
from llava_serve.engine.stream import collect
from llava_serve.images.fetch import ImageSource, read_local_source
from llava_serve.openai_messages import as_message
from llava_serve.types import Chunk, GenerationResult, ImagePart, Message, PreparedPrompt, SamplingParams, TextPart

T = TypeVar("T")
Image: TypeAlias = ImageSource | ray.ObjectRef
"""A path, a URL, encoded bytes, a PIL image, uint8 [height, width, 3], or a reference to one of them."""
Messages = Sequence[Message | Mapping[str, Any]]
"""`Message`s, or OpenAI's dicts."""


class LlavaClient:
    """Asks the running application. It goes to the two tiers straight, not through the HTTP ingress.

    `ask`, `chat` and `stream` are for code without an event loop, `ask_async`, `chat_async` and `stream_async` for code
    in one. All raise the library's own errors.

    Args:
        app: the application's name.
        timeout_s: a request's time, where it names none.
        images: what pictures are read.
    """

    def __init__(self, app: str = "llava", *, timeout_s: float = 120, images: ImageOptions | None = None) -> None:
        preprocessor, model = (serve.get_deployment_handle(name, app) for name in ("ImagePreprocessor", "LlavaModel"))
        self._backend = HandleBackend(app, preprocessor, model)
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
    ) -> Iterator[Chunk]:
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
        source = await image if isinstance(image, ray.ObjectRef) else image
        picture = ImagePart(await asyncio.to_thread(read_local_source, source, self._images))
        message = Message("user", (picture, TextPart(question)))
        return (await self.chat_async([message], sampling or SamplingParams(temperature=0))).text

    async def chat_async(
        self,
        messages: Messages,
        sampling: SamplingParams | None = None,
        *,
        conv_mode: str | None = None,
        timeout_s: float | None = None,
    ) -> GenerationResult:
        """As `chat`."""
        prepared, answer = await self._begin(messages, sampling, conv_mode, timeout_s)
        async with aclosing(answer) as chunks:
            return collect(prepared, [chunk async for chunk in chunks])

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
        async with aclosing(answer) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _begin(
        self, messages: Messages, sampling: SamplingParams | None, conv_mode: str | None, timeout_s: float | None
    ) -> tuple[PreparedPrompt, AsyncGenerator[Chunk]]:
        deadline = time.time() + (timeout_s or self._timeout_s)
        read = [await asyncio.to_thread(self._read, message) for message in messages]
        prepared = await self._backend.prepare(read, conv_mode=conv_mode, deadline=deadline)
        sampling = sampling or SamplingParams()
        return prepared, self._backend.generate(prepared, sampling, request_id=uuid.uuid4().hex, deadline=deadline)

    def _read(self, message: Message | Mapping[str, Any]) -> Message:
        """Files and links are read here, where the caller is."""
        if isinstance(message, Message):
            return message
        return as_message(message, self._images)


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
