"""The application with both tiers paced, for `benchmarks.autoscaling`: each replica then brings what it says.

Ingress, handles, proxy, routing, the replicas' reports and Serve's autoscaler are the real ones. A picture replica
sleeps in place of decoding, one picture at a time; a model replica sleeps in place of its steps: one prompt is computed
at a time, and each sequence in a place generates at a fixed pace. A request's text says which of `KINDS` it is.
"""

# No `from __future__ import annotations`: Serve reads the annotation of `build_app` as it stands.

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from ray import serve
from ray.serve import Application

from deployments.app import AppArgs
from deployments.ingress import Ingress
from deployments.preprocessor import ImagePreprocessor
from deployments.router import MOST_REQUESTS, most_requests
from deployments.work import ModelWork
from llava_serve.config import EngineOptions, ImageOptions
from llava_serve.engine.online_load import OnlineLoad
from llava_serve.engine.stats import EngineStats
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import Asked, Chunk, PreparedPrompt, Query, RawPrompt, TextPart

MEGAPIXELS_PER_S, PICTURE_S = 40, 0.003
"""Of one core, and what each picture takes beside: about what a JPEG takes here."""

PLACES, PREFILL_PER_S, TOKEN_S = 32, 10_000, 0.02
"""Of a model replica: sequences at once, positions of prompts per second, and seconds between tokens."""

SENT_S = 0.2
"""Between two messages of a stream."""


@dataclass(frozen=True)
class Kind:
    """A picture: (width, height), and the positions of its prompt."""

    size: tuple[int, int]
    positions: int

    @property
    def megapixels(self) -> float:
        """Of the picture."""
        return self.size[0] * self.size[1] / 1e6


KINDS = {"thumbnail": Kind((320, 240), 620), "photograph": Kind((4000, 3000), 2900)}
"""Their prompts are those of LLaVA-1.5 with one tile and of LLaVA-1.6 with five."""


class PacedProcessor:
    """Prepares one picture at a time, in the time that its size takes."""

    def __init__(self, processor: object) -> None:
        self.processor = processor
        self._core = asyncio.Lock()

    async def prepare(self, read: Callable[[], Asked], **_: object) -> PreparedPrompt:
        """The prompt of a kind."""
        asked = read()
        assert not isinstance(asked, Query | RawPrompt)
        (name,) = (part.text for part in asked[-1].parts if isinstance(part, TextPart))
        kind = KINDS[name]
        async with self._core:
            seconds = PICTURE_S + kind.megapixels / MEGAPIXELS_PER_S
            await asyncio.sleep(seconds)
        ids = np.zeros(kind.positions, np.int32)
        return PreparedPrompt(ids, image_sizes=(kind.size,), stages=(("decode", seconds),))


class PacedPreprocessor(ImagePreprocessor):
    """The real picture tier over `PacedProcessor`."""

    def _apply(self, images: ImageOptions) -> None:
        super()._apply(images)
        paced: Any = PacedProcessor(self._processor.processor)
        self._processor = paced


class PacedEngine:
    """Stands in for `LlavaModel`, with the same methods and report."""

    def __init__(self) -> None:
        self._places, self._prefill = asyncio.Semaphore(PLACES), asyncio.Lock()
        self._waiting: dict[str, int] = {}
        self._sequences = 0
        self._prefill_s = 0.0
        self._work = ModelWork()

    async def generate(
        self, prepared: PreparedPrompt, sampling: SamplingParams, priority: int, call_id: str, deadline: float
    ) -> AsyncGenerator[list[Chunk]]:
        """Streams `max_new_tokens` tokens."""
        self._work.arrived(prepared)
        self._waiting[call_id] = prepared.num_tokens
        self._sequences += 1
        try:
            async with self._places:
                async with self._prefill:
                    seconds = prepared.num_tokens / PREFILL_PER_S
                    await asyncio.sleep(seconds)
                    self._prefill_s += seconds
                del self._waiting[call_id]
                async for chunk in _tokens(sampling.max_new_tokens):
                    yield [chunk]
        finally:
            self._waiting.pop(call_id, None)
            self._sequences -= 1

    async def record_autoscaling_stats(self) -> Mapping[str, float]:
        """As the real tier's, of what is paced here."""
        load = OnlineLoad(sum(self._waiting.values()), self._sequences, self._sequences / PLACES)
        stats = EngineStats(
            self._sequences - len(self._waiting),
            len(self._waiting),
            *(0, 0, 0, 0, 0, 0),
            prefill_tokens_per_s=PREFILL_PER_S if self._prefill_s else 0.0,
            prefill_seconds=self._prefill_s,
            online=load,
        )
        return asdict(self._work.figures(stats))

    async def record_replica_metadata(self) -> dict[str, int]:
        """As the real tier's with the shipped config."""
        return {MOST_REQUESTS: most_requests(EngineOptions(max_num_seqs=PLACES, max_waiting=4 * PLACES))}

    async def abort(self, call_ids: Sequence[str]) -> None:
        """Does nothing: calls of the stand-in end when they are cancelled."""

    async def takes(self, prompt_key: str) -> bool:
        """Any prompt."""
        return True

    async def health(self) -> None:
        """Always healthy."""

    async def device(self) -> str:
        """None that it would use."""
        return "cpu"


async def _tokens(count: int) -> AsyncGenerator[Chunk]:
    """The first token, and then all that were generated since the message before."""
    began = time.monotonic()
    sent = 0
    while sent < count:
        ready = min(count, max(sent + 1, 1 + int((time.monotonic() - began) / TOKEN_S)))
        last = "length" if ready == count else None
        yield Chunk(0, " word" * (ready - sent), tuple(range(sent, ready)), last)  # type: ignore[arg-type]
        sent = ready
        if sent < count:
            await asyncio.sleep(SENT_S)


def build_app(args: AppArgs) -> Application:
    """As `deployments.app.build_app`, with the paced parts under the real ones' names."""
    pictures = serve.deployment(PacedPreprocessor, name="ImagePreprocessor").bind(args.model_options, args.images)
    model = serve.deployment(PacedEngine, name="LlavaModel").bind()
    ingress = serve.deployment(serve.ingress()(Ingress))
    return ingress.bind(args.model_name, args.api, pictures, model)
