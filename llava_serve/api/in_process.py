"""The library in this process as the web app's `Backend`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from llava_serve.async_llm import AsyncLLM
from llava_serve.engine.metrics import EngineMetrics
from llava_serve.errors import EngineDeadError
from llava_serve.metrics.prometheus import PrometheusExporter
from llava_serve.sampling_params import SamplingParams
from llava_serve.tokenization import ModelDescription, TokenizedPrompt
from llava_serve.types import Asked, Chunk, PreparedPrompt


class InProcessBackend:
    """Prepares in threads, generates on the engine's own.

    Attributes:
        exporter: of all metrics of this process.

    Args:
        llm: closed by its owner, not here.
        model_name: the name that requests use; None takes the checkpoint's.
    """

    def __init__(self, llm: AsyncLLM, model_name: str | None = None) -> None:
        self._llm = llm
        self._processor = llm.processor  # made now: the first request finds a process that decodes
        self._model_name = model_name or llm.model_name
        self.exporter = PrometheusExporter(self._model_name)
        self._processor.processor.metrics.export_to(self.exporter)
        engine = EngineMetrics(self.exporter)
        self.exporter.collect_by(lambda: engine.update(llm.stats()))

    @property
    def model_name(self) -> str:
        """The name that requests use for the model."""
        return self._model_name

    async def prepare(
        self, asked: Asked, *, conv_mode: str | None, deadline: float, cache_salt: str = "", priority: int = 0
    ) -> PreparedPrompt:
        """Decodes, tiles, renders and tokenizes in a thread."""
        return await self._processor.prepare(
            lambda: asked, conv_mode=conv_mode, deadline=deadline, cache_salt=cache_salt, priority=priority
        )

    async def generate(
        self, prepared: PreparedPrompt, sampling: SamplingParams, *, request_id: str, deadline: float, priority: int
    ) -> AsyncGenerator[list[Chunk]]:
        """Streams the answer, a chunk a group. Closing the generator ends the work in the engine."""
        generated = self._llm.generate_prepared(
            prepared, sampling, deadline=deadline, request_id=request_id, priority=priority
        )
        async with aclosing(generated) as chunks:
            async for chunk in chunks:
                yield [chunk]

    async def describe(self) -> ModelDescription:
        """What the model takes."""
        return self._processor.processor.description

    async def tokenize(
        self, asked: Asked, *, conv_mode: str | None, deadline: float, texts: bool = False
    ) -> TokenizedPrompt:
        """Tokenizes in a thread."""
        return await self._processor.tokenize(asked, conv_mode=conv_mode, deadline=deadline, texts=texts)

    async def detokenize(self, token_ids: Sequence[int], *, deadline: float) -> str:
        """The text of token ids, in a thread."""
        return await self._processor.detokenize(token_ids)

    async def check_health(self) -> str:
        """Raises `EngineDeadError` if the engine's loop has ended."""
        if not self._llm.healthy:
            raise EngineDeadError("The engine has stopped.")
        return "ok"
