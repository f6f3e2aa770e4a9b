"""The model tier: a thin shim around one `AsyncLLM` per replica."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

from llava_serve.config import EngineOptions, ModelOptions
from llava_serve.deadline import check_deadline
from llava_serve.errors import EngineDeadError
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import Chunk, PreparedPrompt

from .coalesce import coalesce
from .handle_calls import AbortedCalls, returns_failure, yields_failure
from .metrics import ModelMetrics


class LlavaModel:
    """Answers prompts, batched by one engine.

    Args:
        model: which checkpoint, where and in which precision.
        engine: limits of this replica.
    """

    def __init__(self, model: ModelOptions, engine: EngineOptions) -> None:
        # Not at the top: the process that builds the application does not need torch, which takes seconds to import.
        from llava_serve.async_llm import AsyncLLM

        self._llm = AsyncLLM(model, engine)
        self._aborted = AbortedCalls()
        self._metrics = ModelMetrics()

    @yields_failure
    async def generate(
        self, prepared: PreparedPrompt, sampling: SamplingParams, priority: int, call_id: str, deadline: float
    ) -> AsyncGenerator[list[Chunk]]:
        """Streams the answer in groups of chunks: a message per token costs more than the token.

        Args:
            prepared: from `ImagePreprocessor`.
            sampling: how the answer is sampled.
            priority: a smaller number is served earlier.
            call_id: unique to this call; `abort` takes it.
            deadline: seconds since the epoch.

        Raises:
            PromptTooLongError: the prompt and `max_new_tokens` do not fit.
            CapacityError: the engine's queue is full.
            DeadlineExceededError: the deadline has passed.
            EngineDeadError: the engine's loop has ended.
        """
        check_deadline(deadline)
        if call_id in self._aborted:
            return
        start = time.perf_counter()
        chunks = self._llm.generate_prepared(
            prepared, sampling, deadline=deadline, request_id=call_id, priority=priority
        )
        first = True
        async with aclosing(coalesce(chunks)) as groups:
            async for group in groups:
                if call_id in self._aborted:
                    return
                if first:
                    self._metrics.first_chunk(time.perf_counter() - start)
                    first = False
                self._metrics.produced(group)
                yield group

    async def abort(self, call_ids: Sequence[str]) -> None:
        """Ends calls whose caller has disconnected. Unknown ids are ignored."""
        self._aborted.add(call_ids)
        for call_id in call_ids:
            self._llm.abort(call_id)

    @returns_failure
    async def health(self) -> None:
        """Returns if the model can answer; raises `EngineDeadError` otherwise."""
        self.check_health()

    def check_health(self) -> None:
        """Serve's own probe: a replica that raises here is replaced."""
        if not self._llm.healthy:
            raise EngineDeadError("The model's engine has stopped; its replica is being replaced.")

    async def stats(self) -> Mapping[str, object]:
        """The engine's statistics: the fields of `EngineStats`."""
        return dataclasses.asdict(self._llm.stats())

    async def device(self) -> str:
        """Where this replica runs, as `AsyncLLM.device`."""
        return self._llm.device

    def __del__(self) -> None:
        if hasattr(self, "_llm"):
            self._llm.close()
