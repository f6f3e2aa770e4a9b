"""The model tier: a thin shim around one `AsyncLLM` per replica."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

from llava_serve.app_options import ENGINE_VARIABLE, Probe, replica_engine
from llava_serve.config import EngineOptions, ImageOptions, ModelOptions
from llava_serve.deadline import check_deadline
from llava_serve.engine.metrics import EngineMetrics
from llava_serve.errors import EngineDeadError, ModelStartingError
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import Chunk, PreparedPrompt

from .coalesce import coalesce
from .handle_calls import AbortedCalls, returns_failure, yields_failure
from .live_config import LiveConfig
from .metrics import RayExporter, export_in_thread
from .replica import begin_replica
from .router import MOST_REQUESTS, most_requests
from .work import ModelWork


class LlavaModel:
    """Answers prompts, batched by one engine.

    Args:
        model: which checkpoint, where and in which precision.
        engine: limits of this replica, unless its environment has others; `reconfigure` changes `max_waiting`.
        images: as the picture tier has them; for the probes.
        probes: asked before Serve sends requests here.
        model_name: of metrics; None takes the checkpoint's.

    Raises:
        CheckpointError: the model cannot be loaded, or the answer to a probe is wrong.
    """

    def __init__(
        self,
        model: ModelOptions,
        engine: EngineOptions,
        images: ImageOptions | None = None,
        probes: Sequence[Probe] = (),
        model_name: str | None = None,
    ) -> None:
        # Not at the top: the process that builds the application does not need torch, which takes seconds to import.
        from llava_serve.async_llm import AsyncLLM
        from llava_serve.probe import check_probes

        begin_replica()
        self._prompt_key = model.prompt_key
        engine = replica_engine(engine, os.environ.get(ENGINE_VARIABLE))
        self._llm = AsyncLLM(model, engine, image_options=images)
        check_probes(self._llm, probes)
        self._aborted = AbortedCalls()
        self._work = ModelWork()
        export_in_thread(self._llm, EngineMetrics(RayExporter(model_name or self._llm.model_name)))
        self._live = LiveConfig("LlavaModel", engine, lambda options: self._llm.set_max_waiting(options.max_waiting))

    async def reconfigure(self, user_config: Mapping[str, object] | None, rank: object) -> None:
        """Called by Serve with the deployment's `user_config`. Requests in the queue stay in it."""
        await self._live.change(user_config)

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
            ModelStartingError: the prompt is for another model, which replaces this one or is replaced by it.
            DeadlineExceededError: the deadline has passed.
            EngineDeadError: the engine's loop has ended.
        """
        check_deadline(deadline)
        if call_id in self._aborted:
            return
        # A prompt of another release has no key, or is refused by its version.
        if getattr(prepared, "prompt_key", "") not in ("", self._prompt_key):
            raise ModelStartingError("The model is being replaced; try again later.")
        self._work.arrived(prepared)
        chunks = self._llm.generate_prepared(
            prepared, sampling, deadline=deadline, request_id=call_id, priority=priority
        )
        async with aclosing(coalesce(chunks)) as groups:
            async for group in groups:
                if call_id in self._aborted:
                    return
                yield group

    async def abort(self, call_ids: Sequence[str]) -> None:
        """Ends calls whose caller has disconnected. Unknown ids are ignored."""
        self._aborted.add(call_ids)
        for call_id in call_ids:
            self._llm.abort(call_id)

    async def takes(self, prompt_key: str) -> bool:
        """Whether prompts of this key are for this model."""
        return prompt_key == self._prompt_key

    @returns_failure
    async def health(self) -> None:
        """Returns if the model can answer; raises `EngineDeadError` otherwise."""
        self.check_health()

    def check_health(self) -> None:
        """Serve's own probe: a replica that raises here is replaced."""
        if not self._llm.healthy:
            raise EngineDeadError("The model's engine has stopped; its replica is being replaced.")

    async def record_replica_metadata(self) -> dict[str, int]:
        """Called by Serve once, for the router."""
        return {MOST_REQUESTS: most_requests(self._live.options)}

    async def stats(self) -> Mapping[str, object]:
        """The engine's statistics: the fields of `EngineStats`."""
        return dataclasses.asdict(self._llm.stats())

    async def record_autoscaling_stats(self) -> Mapping[str, float]:
        """Called by Serve at intervals: `autoscaling.Figures`, in positions of prompts."""
        return dataclasses.asdict(self._work.figures(self._llm.stats()))

    async def device(self) -> str:
        """Where this replica runs, as `AsyncLLM.device`."""
        return self._llm.device

    def __del__(self) -> None:
        if hasattr(self, "_llm"):
            self._llm.close()
