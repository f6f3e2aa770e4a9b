"""The application with a paced stand-in for the model and a clock at every stage: what `benchmarks.overhead` measures.

Ingress, picture tier, handles and proxy are the real ones. Each stage records the time when it is reached, in seconds
since the epoch; the prepared prompt and the text of the first chunk carry these stamps to the client. The question is
an order to the stand-in, as JSON: see `Order`.
"""

# No `from __future__ import annotations`: Serve reads the annotation of `build_app` as it stands.

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from deployments.app import AppArgs
from deployments.backend import HandleBackend
from deployments.coalesce import coalesce
from deployments.ingress import Ingress
from deployments.model import LlavaModel
from deployments.preprocessor import ImagePreprocessor
from llava_serve.config import ApiOptions, ImageOptions, ModelOptions
from llava_serve.errors import Failure
from llava_serve.processor import Processor
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import Asked, Chunk, PreparedPrompt, Query, RawPrompt, TextPart


@dataclass(frozen=True)
class Order:
    """How fast the stand-in answers.

    Attributes:
        first_s: until the first token.
        gap_s: between tokens; 0 generates them as fast as they are read.
        grouped: as the real model replica sends them, in groups; else every token is a message of its own.
    """

    first_s: float
    gap_s: float
    grouped: bool


def stamped(prompt: PreparedPrompt, **stamps: float) -> PreparedPrompt:
    """The prompt with more stamps in its text."""
    return dataclasses.replace(prompt, prompt=json.dumps({**json.loads(prompt.prompt), **stamps}))


def read_stamps(text: str) -> tuple[dict[str, float], str]:
    """The stamps at the beginning of an answer, and what was grouped with them."""
    stamps, end = json.JSONDecoder().raw_decode(text)
    return stamps, text[end:]


class StampedIngress(Ingress):
    """The real ingress over a backend with a clock."""

    def __init__(
        self, model_name: str, options: ApiOptions, preprocessor: DeploymentHandle, model: DeploymentHandle
    ) -> None:
        super().__init__(model_name, options, preprocessor, model)
        self._backend = StampedBackend(model_name, preprocessor, model)
        self._backend.timeout_s = options.default_timeout_s
        self._apply(options)


class StampedBackend(HandleBackend):
    """The real backend with a clock before and after each call."""

    timeout_s: float

    async def prepare(
        self, asked: Asked, *, conv_mode: str | None, deadline: float, cache_salt: str = "", priority: int = 0
    ) -> PreparedPrompt:
        called = time.time()
        prepared = await super().prepare(
            asked, conv_mode=conv_mode, deadline=deadline, cache_salt=cache_salt, priority=priority
        )
        return stamped(prepared, arrived=deadline - self.timeout_s, parsed=called, prepared=time.time())

    async def generate(
        self, prepared: PreparedPrompt, sampling: SamplingParams, *, request_id: str, deadline: float, priority: int
    ) -> AsyncGenerator[list[Chunk]]:
        answer = super().generate(prepared, sampling, request_id=request_id, deadline=deadline, priority=priority)
        async with aclosing(answer) as groups:
            first, *others = await anext(groups)
            stamps, rest = read_stamps(first.text)
            yield [dataclasses.replace(first, text=json.dumps({**stamps, "back": time.time()}) + rest), *others]
            async for group in groups:
                yield group


class StampedPreprocessor(ImagePreprocessor):
    """The real picture tier with a clock around the work."""

    def _apply(self, images: ImageOptions) -> None:
        super()._apply(images)
        self._processor.processor = StampedProcessor(self._spec, images.isolated)

    async def prepare(
        self, asked: Asked, conv_mode: str | None, deadline: float, cache_salt: str = "", priority: int = 0
    ) -> PreparedPrompt | Failure:
        reached = time.time()
        prepared = await super().prepare(asked, conv_mode, deadline, cache_salt, priority)
        return prepared if isinstance(prepared, Failure) else stamped(prepared, reached=reached)


class StampedProcessor(Processor):
    """The real processor with a clock; it passes the question on."""

    def prepare(
        self,
        asked: Asked,
        *,
        conv_mode: str | None = None,
        check: Callable[[], None] | None = None,
        cache_salt: str = "",
    ) -> PreparedPrompt:
        began = time.time()
        prepared = super().prepare(asked, conv_mode=conv_mode, check=check, cache_salt=cache_salt)
        assert not isinstance(asked, Query | RawPrompt)
        (order,) = (part.text for part in asked[-1].parts if isinstance(part, TextPart))
        return dataclasses.replace(
            prepared, prompt=json.dumps({"order": json.loads(order), "began": began, "ended": time.time()})
        )


class ModelTier(Protocol):
    """The methods of a model replica that the ingress calls: the stand-in and the real one must both have them."""

    def generate(
        self, prepared: PreparedPrompt, sampling: SamplingParams, priority: int, call_id: str, deadline: float
    ) -> AsyncGenerator[list[Chunk] | Failure]: ...

    async def abort(self, call_ids: Sequence[str]) -> None: ...

    def health(self) -> Awaitable[Failure | None]: ...

    async def device(self) -> str: ...


class PacedModel:
    """Stands in for `LlavaModel`: has the same methods, and answers at the pace of the question's order."""

    def __init__(self, model: ModelOptions) -> None:
        self._name = model.model

    async def generate(
        self, prepared: PreparedPrompt, sampling: SamplingParams, priority: int, call_id: str, deadline: float
    ) -> AsyncGenerator[list[Chunk]]:
        """Streams `max_new_tokens` tokens."""
        stamps = {**json.loads(prepared.prompt), "asked": time.time()}
        order = Order(**stamps.pop("order"))
        chunks = paced(order, stamps, sampling.max_new_tokens)
        if order.grouped:
            async for group in coalesce(chunks):
                yield group
        else:
            async for chunk in chunks:
                yield [chunk]

    async def abort(self, call_ids: Sequence[str]) -> None:
        """Does nothing: calls of the stand-in end when they are cancelled."""

    async def health(self) -> None:
        """Always healthy."""

    async def device(self) -> str:
        """None that it would use."""
        return "cpu"


async def paced(order: Order, stamps: dict[str, float], tokens: int) -> AsyncGenerator[Chunk]:
    """One chunk per token; a late one does not delay the next ones."""
    clock = asyncio.get_running_loop().time
    start = clock() + order.first_s
    for number in range(tokens):
        if (wait := start + number * order.gap_s - clock()) > 0:
            await asyncio.sleep(wait)
        text = json.dumps({**stamps, "made": time.time()}) if number == 0 else " word"
        yield Chunk(0, text, (number,), "length" if number == tokens - 1 else None)


TIERS: tuple[type[ModelTier], ...] = (LlavaModel, PacedModel)
"""Handles call by name, which no type checker checks: here it checks both classes."""


def build_app(args: AppArgs) -> Application:
    """As `deployments.app.build_app`, with the stamped parts under the real ones' names."""
    preprocessor = serve.deployment(StampedPreprocessor, name="ImagePreprocessor").bind(args.model_options, args.images)
    model = serve.deployment(PacedModel, name="LlavaModel").bind(args.model_options)
    ingress = serve.deployment(serve.ingress()(StampedIngress), name="Ingress")
    return ingress.bind(args.model_name, args.api, preprocessor, model)
