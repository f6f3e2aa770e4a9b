"""The web app's `Backend` over handles to the other two deployments."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import nullcontext
from typing import Any

from ray.serve.handle import DeploymentHandle

from llava_serve.config import is_batch
from llava_serve.deadline import deadline_scope
from llava_serve.errors import EngineDeadError
from llava_serve.metrics.prometheus import PrometheusExporter
from llava_serve.sampling_params import SamplingParams
from llava_serve.tokenization import ModelDescription, TokenizedPrompt
from llava_serve.types import Asked, Chunk, PreparedPrompt

from .handle_calls import AbortSender, result, stream
from .metrics import RayExporter
from .model_tier import ModelTier

PROBE_TIMEOUT_S = 5.0
"""A call to a deployment without replicas waits; a probe must not wait for long."""

DESCRIPTION_S = 10.0
"""A description is asked for again after this time: the limits of images may have changed."""

MAX_BATCH_CALLS = 4
"""Of batch work to the picture tier, at once from this process: half of what one replica there takes. More wait here,
so that online requests find no queue of them."""


class HandleBackend:
    """The web app's `Backend` over two handles.

    Attributes:
        exporter: of this replica's own metrics; Ray has those of all.
        model_tier: whether there are model replicas.

    Args:
        model_name: the name that requests use for the model.
        preprocessor: handle to `ImagePreprocessor`.
        model: handle to `LlavaModel`.
    """

    def __init__(self, model_name: str, preprocessor: DeploymentHandle, model: DeploymentHandle) -> None:
        self._model_name = model_name
        self.exporter = PrometheusExporter(model_name, RayExporter(model_name))
        self._prepare = preprocessor.options(method_name="prepare")
        self._batch_calls = asyncio.Semaphore(MAX_BATCH_CALLS)
        self._tokenize = preprocessor.options(method_name="tokenize")
        self._detokenize = preprocessor.options(method_name="detokenize")
        self._describe = preprocessor.options(method_name="describe")
        self._description: ModelDescription | None = None
        self._described = 0.0
        self._generate = model.options(method_name="generate", stream=True)
        self._aborts = AbortSender(model)
        self._health = model.options(method_name="health")
        self.model_tier = ModelTier(model)

    @property
    def model_name(self) -> str:
        """The name that requests use for the model."""
        return self._model_name

    async def prepare(
        self, asked: Asked, *, conv_mode: str | None, deadline: float, cache_salt: str = "", priority: int = 0
    ) -> PreparedPrompt:
        """Decodes, tiles, renders and tokenizes, in the picture tier."""
        async with deadline_scope(deadline):
            async with self._batch_calls if is_batch(priority) else nullcontext():
                prepared: PreparedPrompt = await result(self._prepare, asked, conv_mode, deadline, cache_salt, priority)
            return prepared

    def generate(
        self, prepared: PreparedPrompt, sampling: SamplingParams, *, request_id: str, deadline: float, priority: int
    ) -> AsyncGenerator[list[Chunk]]:
        """Streams the answer from the model tier. Closing the generator ends the work there."""
        call_id = f"{request_id}-{uuid.uuid4().hex}"  # clients may choose request ids, and two the same
        chunks = stream(self._generate, self._aborts, call_id, deadline, prepared, sampling, priority)
        return self.model_tier.answer(chunks, deadline)

    async def describe(self) -> ModelDescription:
        """What the model takes. The picture tier says so: the ingress needs no files of the model.

        Raises:
            EngineDeadError: no replica responds.
        """
        if self._description is None or time.monotonic() - self._described > DESCRIPTION_S:
            self._description = await _within(PROBE_TIMEOUT_S, result(self._describe), "of the picture tier")
            self._described = time.monotonic()
        return self._description

    async def tokenize(
        self, asked: Asked, *, conv_mode: str | None, deadline: float, texts: bool = False
    ) -> TokenizedPrompt:
        """Tokenizes in the picture tier."""
        async with deadline_scope(deadline):
            tokenized: TokenizedPrompt = await result(self._tokenize, asked, conv_mode, deadline, texts)
            return tokenized

    async def detokenize(self, token_ids: Sequence[int], *, deadline: float) -> str:
        """The text of token ids, from the picture tier."""
        async with deadline_scope(deadline):
            text: str = await result(self._detokenize, token_ids)
            return text

    async def check_health(self) -> str:
        """`ok` if a model replica reports that it can answer, or why there is none while requests can wake one."""
        if (state := await self.model_tier.state()) is not None:  # not a call: it would wait for a replica, and wake it
            return state
        await _within(PROBE_TIMEOUT_S, result(self._health), "of the model")
        return "ok"


async def _within(seconds: float, call: Awaitable[Any], tier: str) -> Any:
    try:
        async with asyncio.timeout(seconds):
            return await call
    except TimeoutError:
        raise EngineDeadError(f"No replica {tier} responds.") from None
