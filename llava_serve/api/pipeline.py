"""The way of a request behind the web app and behind Ray handles: prepare, generate, count, complete."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from llava_serve.api.backends import Backend
from llava_serve.api.completion import UsageCounter
from llava_serve.types import Chunk, Message, PreparedPrompt, Query, SamplingParams


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What is asked, and how it is to be answered.

    Attributes:
        request_id: unique in the engine; a caller's own id may not be.
        deadline: seconds since the epoch.
        priority: a smaller number is served earlier.
    """

    asked: Query | Sequence[Message]
    sampling: SamplingParams
    request_id: str
    deadline: float
    conv_mode: str | None = None
    priority: int = 0


class Generation:
    """A request whose prompt is prepared. Iterate over it once for the answer, in groups of chunks.

    Attributes:
        prepared: the prompt.
        counter: what the answer has cost so far.
    """

    def __init__(self, prepared: PreparedPrompt, choices: int, groups: AsyncGenerator[list[Chunk]]) -> None:
        self.prepared = prepared
        self.counter = UsageCounter(prepared, choices)
        self._groups = groups

    async def __aiter__(self) -> AsyncIterator[list[Chunk]]:
        async for group in self._groups:
            for chunk in group:
                self.counter.add(chunk)
            yield group
        self.counter.check_complete()


@asynccontextmanager
async def generation(backend: Backend, request: GenerationRequest) -> AsyncIterator[Generation]:
    """Prepares a request; leaving the block ends the work on its answer, which begins with the iteration.

    Raises:
        LlavaServeError: from the block's start if the input is at fault, from the iteration for all that comes later.
            `EngineDeadError` if the answer ends before it is complete.
    """
    prepared = await backend.prepare(request.asked, conv_mode=request.conv_mode, deadline=request.deadline)
    groups = backend.generate(
        prepared,
        request.sampling,
        request_id=request.request_id,
        deadline=request.deadline,
        priority=request.priority,
    )
    async with aclosing(groups):
        yield Generation(prepared, request.sampling.n, groups)
