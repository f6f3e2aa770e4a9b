"""AsyncLLM: one engine on a thread of its own, one asynchronous stream per request."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import queue
import threading
import time
import uuid
import warnings
from collections import defaultdict
from collections.abc import AsyncGenerator, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Unpack, overload

from llava_serve.checkpoints.spec import CheckpointSpec
from llava_serve.config import (
    EngineOptions,
    ImageOptions,
    ModelKeywords,
    ModelOptions,
    resolve_image_options,
    resolve_model_options,
)
from llava_serve.deadline import deadline_in
from llava_serve.engine.engine import Engine
from llava_serve.engine.executor.build import build_engine
from llava_serve.engine.failures import request_failure
from llava_serve.engine.output_processor import OutputProcessor, collect
from llava_serve.engine.sequence import EngineRequest, Output
from llava_serve.engine.stats import EngineStats
from llava_serve.errors import CapacityError, EngineDeadError
from llava_serve.inputs import CallOptions, Images, images_and_sampling
from llava_serve.openai_messages import ChatMessage
from llava_serve.processor import Processor
from llava_serve.text.tokenizer import load_tokenizer
from llava_serve.threaded_processor import ThreadedProcessor
from llava_serve.types import Chunk, GenerationResult, PreparedPrompt, SamplingParams

_logger = logging.getLogger(__name__)
_HEARTBEAT_S = 1.0
_STUCK_S = 300.0
"""A turn that takes longer never ends: a kernel that hangs. The longest step of a large model on a CPU is a minute."""
_DEAD = "The engine has stopped."


@dataclass(frozen=True, slots=True, eq=False)
class _Consumer:
    """Where a request's outputs go. The queue belongs to the loop and is filled only there."""

    loop: asyncio.AbstractEventLoop
    outputs: asyncio.Queue[Output | None]  # None: ended by `abort`


@dataclass(frozen=True, slots=True)
class _Add:
    request: EngineRequest
    consumer: _Consumer


@dataclass(frozen=True, slots=True)
class _Abort:
    """Of a whole request, or of one choice; only if it is still this consumer's, where one is named."""

    request_id: str
    index: int | None = None
    consumer: _Consumer | None = None


@dataclass(frozen=True, slots=True)
class _Close:
    pass


class AsyncLLM:
    """The engine for servers. The engine's thread owns all its state; callers send it messages.

    Args:
        model: `builtin`, a folder, or a hub id in the local cache; or all options of a model.
        engine: limits of the engine; None takes the defaults.
        image_options: what pictures are accepted; None takes the defaults.
        images: the old name of `image_options`.
        keywords: the other fields of `ModelOptions`.

    Raises:
        CheckpointError: the model cannot be loaded.
    """

    def __init__(
        self,
        model: str | ModelOptions = "builtin",
        engine: EngineOptions | None = None,
        *,
        image_options: ImageOptions | None = None,
        images: ImageOptions | None = None,
        **keywords: Unpack[ModelKeywords],
    ) -> None:
        self._image_options = resolve_image_options(image_options, images)
        self._inbox: queue.SimpleQueue[_Add | _Abort | _Close] = queue.SimpleQueue()
        self._consumers: dict[str, _Consumer] = {}
        self._sent = self._taken = 0  # requests put into the inbox, by the callers, and out of it, by the engine
        self._beat = time.monotonic()
        self._dead = False
        built: Future[Engine] = Future()
        arguments = (built, resolve_model_options(model, **keywords), engine or EngineOptions())
        self._thread = threading.Thread(target=self._run, args=arguments, name="engine", daemon=True)
        self._thread.start()
        self._engine = built.result()
        self._stats = self._engine.stats
        self.spec: CheckpointSpec = self._engine.model.spec
        self._tokenizer = load_tokenizer(self.spec.tokenizer)

    @cached_property
    def processor(self) -> ThreadedProcessor:
        """Prepares prompts for this model. Made when it is first needed: a model replica gets prompts that are."""
        return ThreadedProcessor(Processor(self.spec, self._image_options), os.cpu_count() or 1)

    @property
    def model_name(self) -> str:
        return self.spec.name

    @property
    def healthy(self) -> bool:
        """The engine's loop is alive, and has not been stuck in a turn for minutes."""
        return not self._dead and self._thread.is_alive() and time.monotonic() - self._beat < _STUCK_S

    def stats(self) -> EngineStats:
        """Where the engine stood after its last turn, and how long ago that was."""
        return dataclasses.replace(self._stats, heartbeat_age_s=time.monotonic() - self._beat)

    @overload
    def generate(
        self,
        query: str,
        images: Images = None,
        sampling: SamplingParams | None = None,
        **options: Unpack[CallOptions],
    ) -> Coroutine[Any, Any, GenerationResult]: ...

    @overload
    def generate(
        self,
        query: PreparedPrompt,
        images: SamplingParams | None = None,
        sampling: SamplingParams | None = None,
        *,
        deadline: float | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[Chunk]: ...

    def generate(
        self,
        query: str | PreparedPrompt,
        images: Any = None,
        sampling: SamplingParams | None = None,
        *,
        deadline: float | None = None,
        request_id: str | None = None,
        **options: Unpack[CallOptions],
    ) -> Coroutine[Any, Any, GenerationResult] | AsyncGenerator[Chunk]:
        """Answers one query; to be awaited.

        Args:
            query: as `LLM.generate`. A `PreparedPrompt` with its sampling is the old form of `generate_prepared`.
            images: a picture, a list of them, or None.
            options: `conv_mode`, `timeout` in seconds and `priority`.
            deadline, request_id: of the old form.

        Raises:
            LlavaServeError: as `generate_prepared`; `RequestError` too where an input is not acceptable.
        """
        if isinstance(query, PreparedPrompt):
            warnings.warn("generate(prepared, ...) is called generate_prepared now.", DeprecationWarning, stacklevel=2)
            priority = options.get("priority", 0)
            return self.generate_prepared(
                query, sampling or images, deadline=deadline, request_id=request_id, priority=priority
            )
        return self._answer(query, images, sampling, options)

    async def chat(
        self,
        messages: Sequence[ChatMessage],
        sampling: SamplingParams | None = None,
        **options: Unpack[CallOptions],
    ) -> GenerationResult:
        """Answers a conversation.

        Args:
            messages: OpenAI's form, or `Message`s.
            options: as `generate`.

        Raises:
            LlavaServeError: as `generate`.
        """
        return await self._answer(messages, None, sampling, options)

    async def stream(
        self,
        asked: str | Sequence[ChatMessage],
        images: Images | SamplingParams = None,
        sampling: SamplingParams | None = None,
        **options: Unpack[CallOptions],
    ) -> AsyncGenerator[Chunk]:
        """Answers a query or a conversation chunk by chunk. Left early, it must be closed (`contextlib.aclosing`) for
        the work to end.

        Args:
            asked: a query, or messages.
            images: of a query; behind messages the sampling may stand here.
            options: as `generate`.

        Raises:
            LlavaServeError: as `generate`.
        """
        _, chunks = await self._begin(asked, images, sampling, options)
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk

    async def _answer(
        self, asked: str | Sequence[ChatMessage], images: Any, sampling: SamplingParams | None, options: CallOptions
    ) -> GenerationResult:
        prepared, chunks = await self._begin(asked, images, sampling, options)
        async with aclosing(chunks):
            return collect(prepared, [chunk async for chunk in chunks])

    async def _begin(
        self, asked: str | Sequence[ChatMessage], images: Any, sampling: SamplingParams | None, options: CallOptions
    ) -> tuple[PreparedPrompt, AsyncGenerator[Chunk]]:
        """The prompt, and the answer that has not begun."""
        images, sampling = images_and_sampling(images, sampling)
        deadline = deadline_in(options.get("timeout"))
        prepared = await self.processor.prepare(
            partial(self.processor.processor.read, asked, images),
            conv_mode=options.get("conv_mode"),
            deadline=deadline,
        )
        priority = options.get("priority", 0)
        return prepared, self.generate_prepared(prepared, sampling, deadline=deadline, priority=priority)

    async def generate_prepared(
        self,
        prepared: PreparedPrompt,
        sampling: SamplingParams | None = None,
        *,
        deadline: float | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[Chunk]:
        """Streams the answer to a prepared prompt. Closing or cancelling ends the work at the engine's next turn.

        Args:
            deadline: seconds since the epoch.
            priority: a smaller number is served earlier.

        Raises:
            RequestError: the prompt is too long, or the engine cannot do what is asked.
            CapacityError: the queue is full.
            DeadlineExceededError: the time was up before the answer was complete.
            NumericalError: the model's numbers did not stay finite.
            EngineDeadError: the engine's loop has ended.
        """
        request = self._engine.validator.accept(
            request_id or uuid.uuid4().hex, prepared, sampling or SamplingParams(), deadline=deadline, priority=priority
        )
        if self._engine.num_requests + self._sent - self._taken >= self._engine.validator.max_sequences:
            raise CapacityError("The server is busy; try again later.")
        consumer = _Consumer(asyncio.get_running_loop(), asyncio.Queue())
        chunks = OutputProcessor(self._tokenizer, request)
        self._sent += 1
        self._inbox.put(_Add(request, consumer))
        try:
            while not chunks.done:
                if self._dead and consumer.outputs.empty():
                    raise EngineDeadError(_DEAD)
                output = await consumer.outputs.get()
                if output is None:
                    return
                chunk = chunks.push(output)
                if chunk is None:
                    continue
                if chunk.finish_reason is not None and output.finish_reason is None:
                    self._inbox.put(_Abort(request.request_id, output.index, consumer))
                yield chunk
        finally:
            if not chunks.done:
                self._inbox.put(_Abort(request.request_id, consumer=consumer))

    def abort(self, request_id: str) -> None:
        """Ends a request at the engine's next turn. Its stream, if someone still reads it, ends where it is."""
        self._inbox.put(_Abort(request_id))

    def close(self) -> None:
        """Ends the engine's thread. Requests that are still open fail with `EngineDeadError`."""
        self._inbox.put(_Close())
        if self.healthy:
            self._thread.join()

    def _run(self, built: Future[Engine], options: ModelOptions, engine: EngineOptions) -> None:
        """The engine's thread.

        The model is loaded here, too: each thread that computes with torch has OpenMP workers of its own, and once
        there are more of them than cores, libgomp lets all of them sleep between two loops: a step takes twice as long.
        """
        try:
            self._engine = build_engine(options, engine)
        except BaseException as error:
            built.set_exception(error)
            return
        self._beat = time.monotonic()
        built.set_result(self._engine)
        try:
            while self._drain():
                outputs = self._engine.step() if self._engine.has_work else []
                self._stats = self._engine.stats
                self._beat = time.monotonic()
                self._deliver(outputs)
        except Exception:
            _logger.exception("The engine's loop has ended.")
        finally:
            self._dead = True
            self._fail_all()

    def _drain(self) -> bool:
        """Handles all messages; waits for one while there is nothing to do. False once it is told to close."""
        wait = not self._engine.has_work
        while True:
            try:
                message = self._inbox.get(block=wait, timeout=_HEARTBEAT_S)
            except queue.Empty:
                return True
            wait = False
            match message:
                case _Add(request, consumer):
                    self._add(request, consumer)
                case _Abort():
                    self._abort(message)
                case _Close():
                    return False

    def _add(self, request: EngineRequest, consumer: _Consumer) -> None:
        self._taken += 1
        try:
            self._engine.add(request)
        except Exception as error:
            failure = request_failure(request.request_id, error)
            self._post({consumer.loop: [(consumer, Output(request.request_id, 0, error=failure))]})
        else:
            self._consumers[request.request_id] = consumer

    def _abort(self, message: _Abort) -> None:
        consumer = self._consumers.get(message.request_id)
        if consumer is None or message.consumer not in (None, consumer):
            return
        self._engine.abort(message.request_id, message.index)
        if not self._engine.has(message.request_id):
            del self._consumers[message.request_id]
            self._post({consumer.loop: [(consumer, None)]})

    def _deliver(self, outputs: list[Output]) -> None:
        """Hands out what a step gave, with one wake-up per event loop."""
        batches: _Batches = defaultdict(list)
        for output in outputs:
            consumer = self._consumers.get(output.request_id)
            if consumer is not None:
                batches[consumer.loop].append((consumer, output))
        for request_id in {output.request_id for output in outputs if output.error or output.finish_reason}:
            if not self._engine.has(request_id):
                self._consumers.pop(request_id, None)
        self._post(batches)

    def _post(self, batches: _Batches) -> None:
        for loop, batch in batches.items():
            try:
                loop.call_soon_threadsafe(_fill, batch)
            except RuntimeError:  # the loop is closed: nobody is left to answer
                for _, output in batch:
                    if output is not None:
                        self._engine.abort(output.request_id)
                        self._consumers.pop(output.request_id, None)

    def _fail_all(self) -> None:
        """Tells everyone who waits, or comes too late, that the loop has ended."""
        batches: _Batches = defaultdict(list)
        for request_id, consumer in self._consumers.items():
            batches[consumer.loop].append((consumer, Output(request_id, 0, error=EngineDeadError(_DEAD))))
        with contextlib.suppress(queue.Empty):
            while True:
                message = self._inbox.get_nowait()
                if isinstance(message, _Add):
                    failed = Output(message.request.request_id, 0, error=EngineDeadError(_DEAD))
                    batches[message.consumer.loop].append((message.consumer, failed))
        self._post(batches)


_Batches = dict[asyncio.AbstractEventLoop, list[tuple[_Consumer, Output | None]]]


def _fill(batch: list[tuple[_Consumer, Output | None]]) -> None:
    for consumer, output in batch:
        consumer.outputs.put_nowait(output)
