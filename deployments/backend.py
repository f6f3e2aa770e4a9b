"""The web app's `Backend` over handles to the other two deployments."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence

from ray.serve.handle import DeploymentHandle

from llava_serve.deadline import deadline_scope
from llava_serve.errors import EngineDeadError
from llava_serve.types import Chunk, Message, PreparedPrompt, Query, SamplingParams

from .handle_calls import AbortSender, result, stream

HEALTH_TIMEOUT_S = 5.0
"""A call to a deployment without replicas waits; a health probe must not wait for long."""


class HandleBackend:
    """The web app's `Backend` over two handles.

    Args:
        model_name: the name that requests use for the model.
        preprocessor: handle to `ImagePreprocessor`.
        model: handle to `LlavaModel`.
    """

    def __init__(self, model_name: str, preprocessor: DeploymentHandle, model: DeploymentHandle) -> None:
        self._model_name = model_name
        self._prepare = preprocessor.options(method_name="prepare")
        self._generate = model.options(method_name="generate", stream=True)
        self._aborts = AbortSender(model)
        self._health = model.options(method_name="health")

    @property
    def model_name(self) -> str:
        """The name that requests use for the model."""
        return self._model_name

    async def prepare(
        self, asked: Query | Sequence[Message], *, conv_mode: str | None, deadline: float, cache_salt: str = ""
    ) -> PreparedPrompt:
        """Decodes, tiles, renders and tokenizes, in the picture tier."""
        async with deadline_scope(deadline):
            prepared: PreparedPrompt = await result(self._prepare, asked, conv_mode, deadline, cache_salt)
            return prepared

    def generate(
        self, prepared: PreparedPrompt, sampling: SamplingParams, *, request_id: str, deadline: float, priority: int
    ) -> AsyncGenerator[list[Chunk]]:
        """Streams the answer from the model tier. Closing the generator ends the work there."""
        call_id = f"{request_id}-{uuid.uuid4().hex}"  # clients may choose request ids, and two the same
        return stream(self._generate, self._aborts, call_id, deadline, prepared, sampling, priority)

    async def check_health(self) -> None:
        """Returns if a model replica reports that it can answer; raises `EngineDeadError` otherwise."""
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                await result(self._health)
        except TimeoutError:
            raise EngineDeadError("No replica of the model responds.") from None
