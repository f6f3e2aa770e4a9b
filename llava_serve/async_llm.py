"""AsyncLLM: an engine on a thread of its own, with an asynchronous stream per request."""

from __future__ import annotations

import asyncio
import os
import sys
import time
import uuid
import warnings
from collections.abc import AsyncGenerator, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import cached_property, partial
from pathlib import Path
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
from llava_serve.engine.engine_loop import EngineLoop
from llava_serve.engine.executor.build import build_engine, device_name
from llava_serve.engine.grammar_trial import GrammarTrial
from llava_serve.engine.output_processor import OutputProcessor, collect
from llava_serve.engine.stats import EngineStats
from llava_serve.inputs import (
    CallOptions,
    Images,
    checked_messages,
    checked_query,
    deadline_of,
    images_and_sampling,
)
from llava_serve.openai_messages import ChatMessage
from llava_serve.options import resolve_options
from llava_serve.processor import Processor
from llava_serve.results import GenerationResult
from llava_serve.sampling_params import SamplingParams
from llava_serve.text.tokenizer import load_tokenizer
from llava_serve.threaded_processor import ThreadedProcessor
from llava_serve.tracing import add_stages
from llava_serve.types import Chunk, PreparedPrompt

_COMPILING = 4
"""Forms of structured output that are compiled, or looked up, at once; they take nothing from other work in threads."""


class AsyncLLM:
    """The engine for servers. It runs on a thread of its own, which owns its state; callers send it messages.

    Args:
        model: `builtin`, a folder, or a hub id in the local cache; or all options of a model.
        engine: limits of the engine; None takes the defaults.
        image_options: which images are accepted; None takes the defaults.
        images: the deprecated name of `image_options`.
        keywords: the other fields of `ModelOptions`.

    Raises:
        CheckpointError: the model cannot be loaded.
        RequestError: an option of the model has a wrong value.
    """

    def __init__(
        self,
        model: str | Path | ModelOptions = "builtin",
        engine: EngineOptions | None = None,
        *,
        image_options: ImageOptions | None = None,
        images: ImageOptions | None = None,
        **keywords: Unpack[ModelKeywords],
    ) -> None:
        self._image_options = resolve_image_options(image_options, images)
        options = resolve_model_options(model, **keywords)
        self._loop = EngineLoop(partial(build_engine, options, resolve_options(EngineOptions, engine, "engine")))
        self.spec: CheckpointSpec = self._loop.engine.model.spec
        self._tokenizer = load_tokenizer(self.spec.tokenizer)
        validator = self._loop.engine.validator
        self._grammar_trial = GrammarTrial(self.spec.tokenizer, validator.vocabulary)
        if sys.platform == "linux":  # as servers are
            validator.grammars.check = self._grammar_trial.check
        self._compiling = ThreadPoolExecutor(_COMPILING, thread_name_prefix="grammar")

    @cached_property
    def processor(self) -> ThreadedProcessor:
        """Prepares prompts for this model. Made at its first use: a model replica gets prepared prompts."""
        return ThreadedProcessor(Processor(self.spec, self._image_options), os.cpu_count() or 1)

    @property
    def model_name(self) -> str:
        return self.spec.name

    @property
    def healthy(self) -> bool:
        """The engine's loop is alive, and has not been in the same turn for longer than its step can take."""
        return self._loop.healthy

    @property
    def device(self) -> str:
        """Where the model runs: `cpu`, or `cuda:0` and the GPU's name."""
        return device_name(self._loop.engine.model.device)

    def stats(self) -> EngineStats:
        """The state of the engine after its last turn, and how long ago that was."""
        return self._loop.stats()

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
            query: as `LLM.generate`. A `PreparedPrompt` with its sampling is the deprecated form of
                `generate_prepared`.
            images: an image, a list of them, or None.
            options: `conv_mode`, `timeout` in seconds and `priority`.
            deadline, request_id: of the deprecated form.

        Raises:
            LlavaServeError: as `generate_prepared`; also `RequestError` if an input is not valid.
        """
        if isinstance(query, PreparedPrompt):
            warnings.warn("generate(prepared, ...) is called generate_prepared now.", DeprecationWarning, stacklevel=2)
            priority = options.get("priority", 0)
            return self.generate_prepared(
                query, sampling or images, deadline=deadline, request_id=request_id, priority=priority
            )
        return self._answer(checked_query(query), images, sampling, options)

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
        return await self._answer(checked_messages(messages), None, sampling, options)

    async def stream(
        self,
        asked: str | Sequence[ChatMessage],
        images: Images | SamplingParams = None,
        sampling: SamplingParams | None = None,
        **options: Unpack[CallOptions],
    ) -> AsyncGenerator[Chunk]:
        """Answers a query or a conversation chunk by chunk. A stream that is not read to its end must be closed
        (`contextlib.aclosing`), so that the request is aborted.

        Args:
            asked: a query, or messages.
            images: of a query; after messages the sampling may be given here.
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
        """The prepared prompt, and the stream of its answer."""
        images, sampling = images_and_sampling(images, sampling)
        deadline, priority = deadline_of(options), options.get("priority", 0)
        prepared = await self.processor.prepare(
            partial(self.processor.processor.read, asked, images),
            conv_mode=options.get("conv_mode"),
            deadline=deadline,
            priority=priority,
        )
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
        """Streams the answer to a prepared prompt. Closing or cancelling aborts the request at the engine's next turn.

        Args:
            deadline: seconds since the epoch.
            priority: a smaller number is served earlier.

        Raises:
            RequestError: the prompt is too long, or the engine does not support the request.
            CapacityError: the queue is full.
            DeadlineExceededError: the deadline passed before the answer was complete.
            NumericalError: the model computed NaN or infinity.
            EngineDeadError: the engine's loop has ended.
        """
        sampling = sampling or SamplingParams()
        accept = partial(
            self._loop.engine.validator.accept,
            request_id or uuid.uuid4().hex,
            prepared,
            sampling,
            deadline=deadline,
            priority=priority,
        )
        if sampling.structured is None:
            request = accept()
        else:
            request = await asyncio.get_running_loop().run_in_executor(self._compiling, accept)
        output_processor = OutputProcessor(self._tokenizer, request)
        consumer = self._loop.submit(request)
        first: float | None = None
        try:
            while not output_processor.done:
                output = await self._loop.next_output(consumer)
                if output is None:
                    return
                push = partial(output_processor.push, output)
                # the texts of a long prompt's tokens and their alternatives take long
                chunk = push() if output.prompt_logprobs is None else await asyncio.to_thread(push)
                if chunk is None:
                    continue
                if chunk.finish_reason is not None and output.finish_reason is None:
                    self._loop.abort(request.request_id, output.index, consumer)
                if first is None:
                    first = time.perf_counter()
                    add_stages(chunk.stages)
                yield chunk
        finally:
            if first is not None:
                add_stages((("engine_decode", time.perf_counter() - first),))
            if not output_processor.done:
                self._loop.abort(request.request_id, consumer=consumer)

    def set_max_waiting(self, max_waiting: int) -> None:
        """Changes the `max_waiting` of the engine's options. Sequences that wait stay in the queue."""
        self._loop.engine.validator.set_max_waiting(max_waiting)

    def abort(self, request_id: str) -> None:
        """Ends a request at the engine's next turn. Its stream ends without a finish reason."""
        self._loop.abort(request_id)

    def close(self) -> None:
        """Ends the engine's thread and the processes that decode. Requests in flight fail with `EngineDeadError`."""
        self._loop.close()
        self._compiling.shutdown(wait=False, cancel_futures=True)
        self._grammar_trial.close()
        if "processor" in self.__dict__:  # it was used
            self.processor.processor.close()
