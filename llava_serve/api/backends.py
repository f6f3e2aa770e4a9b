"""What the web app needs behind it: the library in this process, or handles to a Serve application."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from llava_serve.metrics.prometheus import PrometheusExporter
from llava_serve.sampling_params import SamplingParams
from llava_serve.tokenization import ModelDescription, TokenizedPrompt
from llava_serve.types import Asked, Chunk, PreparedPrompt


class Backend(Protocol):
    """The two steps behind every answer, and what the picture tier answers alone.

    Deadlines are seconds since the epoch (`time.time()`): they cross machines.
    """

    @property
    def model_name(self) -> str:
        """The name that requests use for the model."""
        ...

    @property
    def exporter(self) -> PrometheusExporter:
        """Where the web app's metrics go, beside its own."""
        ...

    async def prepare(
        self, asked: Asked, *, conv_mode: str | None, deadline: float, cache_salt: str = "", priority: int = 0
    ) -> PreparedPrompt:
        """Decodes, tiles, renders and tokenizes, the smallest priority number first. Requests of different salts share
        nothing that is cached.

        Raises:
            RequestError: the input is invalid; the class says how.
        """
        ...

    def generate(
        self, prepared: PreparedPrompt, sampling: SamplingParams, *, request_id: str, deadline: float, priority: int
    ) -> AsyncGenerator[list[Chunk]]:
        """Streams the answer in groups of chunks. Closing the generator ends the work in the engine."""
        ...

    async def describe(self) -> ModelDescription:
        """What the model takes."""
        ...

    async def tokenize(
        self, asked: Asked, *, conv_mode: str | None, deadline: float, texts: bool = False
    ) -> TokenizedPrompt:
        """The tokens of a prompt; their texts, too, if asked for.

        Raises:
            RequestError: the input is invalid; the class says how.
        """
        ...

    async def detokenize(self, token_ids: Sequence[int], *, deadline: float) -> str:
        """The text of token ids.

        Raises:
            RequestError: the vocabulary has no such id.
        """
        ...

    async def check_health(self) -> str:
        """The model's state: `ok`; or, where a request starts it, `sleeping` or `starting`.

        Raises:
            EngineDeadError: the model cannot answer.
        """
        ...
