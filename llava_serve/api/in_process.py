"""The library in this process as the web app's `Backend`."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor

from llava_serve.async_llm import AsyncLLM
from llava_serve.errors import DeadlineExceededError, EngineDeadError
from llava_serve.processor import Processor
from llava_serve.types import Chunk, Message, PreparedPrompt, SamplingParams


class InProcessBackend:
    """Prepares in threads, generates on the engine's own.

    Args:
        processor: of the same checkpoint as `llm`.
        llm: closed by its owner, not here.
        model_name: the name that requests use; None takes the checkpoint's.
    """

    def __init__(self, processor: Processor, llm: AsyncLLM, model_name: str | None = None) -> None:
        self._processor = processor
        self._llm = llm
        self._model_name = model_name or llm.model_name
        # Its own pool: pictures that wait for a core must not hold up whatever else uses the loop's.
        self._threads = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="prepare")

    @property
    def model_name(self) -> str:
        """The name that requests use for the model."""
        return self._model_name

    async def prepare(self, messages: Sequence[Message], *, conv_mode: str | None, deadline: float) -> PreparedPrompt:
        """Decodes, tiles, renders and tokenizes in a thread."""

        left = False

        def check() -> None:
            if left or time.time() >= deadline:
                raise DeadlineExceededError("The request's time was up before its pictures were looked at.", "timeout")

        def work() -> PreparedPrompt:
            check()
            return self._processor.prepare(messages, conv_mode=conv_mode, check=check)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            left = True

    def generate(
        self, prepared: PreparedPrompt, sampling: SamplingParams, *, request_id: str, deadline: float
    ) -> AsyncGenerator[Chunk]:
        """Streams the answer. Closing the generator ends the work in the engine."""
        return self._llm.generate(prepared, sampling, deadline=deadline, request_id=request_id)

    async def check_health(self) -> None:
        """Raises `EngineDeadError` if the engine's loop has ended."""
        if not self._llm.healthy:
            raise EngineDeadError("The engine has stopped.")
