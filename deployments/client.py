"""The client for other Ray jobs: for drivers, tasks and actors on the same cluster."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Generator, Mapping, Sequence
from contextlib import aclosing
from functools import cache
from typing import Any, TypeAlias, TypeVar, Unpack

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from llava_serve.api.middleware import check_image_bytes
from llava_serve.config import ImageOptions, resolve_image_options
from llava_serve.deadline import deadline_scope
from llava_serve.engine.output_processor import collect
from llava_serve.errors import UnknownModelError
from llava_serve.images.fetch import ImageSource, read_local_source
from llava_serve.inputs import CallOptions, checked_messages, checked_query, deadline_of, images_and_sampling
from llava_serve.openai_messages import ChatMessage, read_asked
from llava_serve.results import GenerationResult
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import Chunk, Message, PreparedPrompt

from .handle_calls import AbortSender, stream

T = TypeVar("T")
Image: TypeAlias = ImageSource | ray.ObjectRef
"""A path, a URL, encoded bytes, a PIL image, uint8 [height, width, 3], or a reference to one of them."""
Images: TypeAlias = Image | Sequence[Image] | None
Messages: TypeAlias = Sequence[ChatMessage]
"""`Message`s, or OpenAI's dicts; {"type": "image", "image": ...} holds an `Image`."""

MAX_BYTES = 60 << 20
"""Of the images of one request: the production profile's transport has this limit (production.env)."""


class LlavaClient:
    """Asks the running application, through its ingress: admission, limits and draining are those of HTTP requests.

    `generate`, `chat` and `stream` work as on `LLM`; `ask` is the short form. They are for code without an event loop;
    the forms in `_async` are for code in one. All raise the library's own errors.

    Args:
        app: the application's name.
        timeout: seconds that a request may take, unless it sets its own; `max_timeout_s` of the application applies.
        image_options: limits of the pictures.
        images: the deprecated name of `image_options`.

    Raises:
        UnknownModelError: no such application runs on this cluster.
    """

    def __init__(
        self,
        app: str = "llava",
        *,
        timeout: float = 120,
        image_options: ImageOptions | None = None,
        images: ImageOptions | None = None,
    ) -> None:
        try:
            ingress = serve.get_app_handle(app)
        except RayServeException:
            raise UnknownModelError(f"There is no application '{app}' on this Ray cluster.") from None
        self._generate = ingress.options(method_name="generate", stream=True)
        self._aborts = AbortSender(ingress)
        self._timeout = timeout
        self._image_options = resolve_image_options(image_options, images)

    def ask(self, image: Image, question: str, sampling: SamplingParams | None = None) -> str:
        """The answer to a question about a picture; greedy where `sampling` is None.

        Raises:
            LlavaServeError: its class says what is wrong, as the status does over HTTP.
        """
        return _run(self.ask_async(image, question, sampling))

    def generate(
        self,
        query: str,
        images: Images = None,
        sampling: SamplingParams | None = None,
        **options: Unpack[CallOptions],
    ) -> GenerationResult:
        """The answer to a query.

        Args:
            query: `<image-placeholder>` marks where an image goes; without it, each image stands before the text.
            images: a picture, a list of them, or None.
            options: `conv_mode`, `timeout` in seconds and `priority`.

        Raises:
            LlavaServeError: as `ask`.
        """
        return _run(self.generate_async(query, images, sampling, **options))

    def chat(
        self, messages: Messages, sampling: SamplingParams | None = None, **options: Unpack[CallOptions]
    ) -> GenerationResult:
        """The answer to a conversation.

        Raises:
            LlavaServeError: as `ask`.
        """
        return _run(self.chat_async(messages, sampling, **options))

    def stream(
        self,
        asked: str | Messages,
        images: Images | SamplingParams = None,
        sampling: SamplingParams | None = None,
        **options: Unpack[CallOptions],
    ) -> Generator[Chunk]:
        """Streams the answer to a query or a conversation. Closing the iterator ends the work.

        Args:
            images: of a query; after messages, this argument may be the sampling.

        Raises:
            LlavaServeError: as `ask`.
        """
        chunks = self.stream_async(asked, images, sampling, **options)
        try:
            while (chunk := _run(_next(chunks))) is not None:
                yield chunk
        finally:
            _run(chunks.aclose())

    async def ask_async(self, image: Image, question: str, sampling: SamplingParams | None = None) -> str:
        """As `ask`."""
        return (await self.generate_async(question, image, sampling or SamplingParams(temperature=0))).text

    async def generate_async(
        self,
        query: str,
        images: Images = None,
        sampling: SamplingParams | None = None,
        **options: Unpack[CallOptions],
    ) -> GenerationResult:
        """As `generate`."""
        return await self._collect(checked_query(query), images, sampling, options)

    async def chat_async(
        self, messages: Messages, sampling: SamplingParams | None = None, **options: Unpack[CallOptions]
    ) -> GenerationResult:
        """As `chat`."""
        return await self._collect(checked_messages(messages), None, sampling, options)

    async def stream_async(
        self,
        asked: str | Messages,
        images: Images | SamplingParams = None,
        sampling: SamplingParams | None = None,
        **options: Unpack[CallOptions],
    ) -> AsyncGenerator[Chunk]:
        """As `stream`. Close it (`contextlib.aclosing`) to end the work early."""
        _, answer = await self._begin(asked, images, sampling, options)
        async with aclosing(answer) as groups:
            async for group in groups:
                for chunk in group:
                    yield chunk

    async def _collect(
        self, asked: str | Messages, images: Images, sampling: SamplingParams | None, options: CallOptions
    ) -> GenerationResult:
        prompt, answer = await self._begin(asked, images, sampling, options)
        async with aclosing(answer) as groups:
            return collect(prompt, [chunk async for group in groups for chunk in group])

    async def _begin(
        self, asked: str | Messages, images: Any, sampling: SamplingParams | None, options: CallOptions
    ) -> tuple[PreparedPrompt, AsyncGenerator[list[Chunk]]]:
        """The prompt, without its tiles, and the answer in groups. Files, links and references are read here, in the
        caller's process."""
        images, sampling = images_and_sampling(images, sampling)
        deadline = deadline_of(options) or time.time() + self._timeout
        async with deadline_scope(deadline):
            fetched = asked if isinstance(asked, str) else [await _fetched(message) for message in asked]
            values = [await _value(image) for image in images]
            read = await asyncio.to_thread(read_asked, fetched, values, self._read_source)
        check_image_bytes(read, MAX_BYTES)
        arguments = (read, sampling or SamplingParams(), options.get("conv_mode"), options.get("priority", 0))
        answer = stream(self._generate, self._aborts, uuid.uuid4().hex, deadline, *arguments)
        prompt: PreparedPrompt = await anext(answer)
        return prompt, answer

    def _read_source(self, source: Any) -> bytes:
        return read_local_source(source, self._image_options)


async def _fetched(message: ChatMessage) -> ChatMessage:
    """A message with images instead of Ray references to them."""
    if isinstance(message, Message) or not isinstance(message.get("content"), list | tuple):
        return message
    parts = [
        {**part, "image": await _value(part["image"])} if isinstance(part, Mapping) and "image" in part else part
        for part in message["content"]
    ]
    return {**message, "content": parts}


async def _value(image: Any) -> Any:
    return await image if isinstance(image, ray.ObjectRef) else image


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop for all calls from code without one."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="llava-client", daemon=True).start()
    return loop


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Waits for a result; an interrupted wait cancels the work."""
    future = asyncio.run_coroutine_threadsafe(work, _loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


async def _next(chunks: AsyncGenerator[Chunk]) -> Chunk | None:
    return await anext(chunks, None)
