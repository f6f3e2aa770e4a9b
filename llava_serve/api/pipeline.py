"""The steps of a request over HTTP and over Ray handles: prepare, generate, count, complete."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from llava_serve.api.backends import Backend
from llava_serve.api.record import RequestRecord
from llava_serve.api.usage import UsageCounter
from llava_serve.sampling_params import SamplingParams
from llava_serve.tracing import add_stages, span
from llava_serve.types import Asked, Chunk, PreparedPrompt


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A question, and how to answer it.

    Attributes:
        request_id: unique in the engine; a caller's own id may not be.
        deadline: seconds since the epoch.
        priority: a smaller number is served earlier.
        cache_salt: requests of different ones share nothing that is cached.
        record: gets what happens to it.
        return_timings: the answer has its times.
    """

    asked: Asked
    sampling: SamplingParams
    request_id: str
    deadline: float
    record: RequestRecord
    conv_mode: str | None = None
    priority: int = 0
    cache_salt: str = ""
    return_timings: bool = False


class Generation:
    """A request whose prompt is prepared. Iterate over it once for the answer, in groups of chunks.

    Attributes:
        prepared: the prompt.
        counter: the usage so far.
        record: of the request.
    """

    def __init__(
        self, prepared: PreparedPrompt, choices: int, groups: AsyncGenerator[list[Chunk]], record: RequestRecord
    ) -> None:
        self.prepared = prepared
        self.counter = UsageCounter(prepared, choices)
        self.record = record
        self._groups = groups

    async def __aiter__(self) -> AsyncIterator[list[Chunk]]:
        with span("first_chunk"):
            group = await anext(self._groups, None)
        while group is not None:
            self._record(group)
            for chunk in group:
                self.counter.add(chunk)
            yield group
            group = await anext(self._groups, None)
        self.counter.check_complete()
        self.record.answered()

    def _record(self, group: list[Chunk]) -> None:
        count = sum(len(chunk.token_ids) for chunk in group)
        if self.record.first_token_s is None:
            self.record.first_tokens(count, group[0].stages)
        elif count:
            self.record.more_tokens(count)
        for chunk in group:
            if chunk.finish_reason is not None:
                self.record.choice_finished(chunk.finish_reason)


@asynccontextmanager
async def generation(backend: Backend, request: GenerationRequest) -> AsyncIterator[Generation]:
    """Prepares a request. Generation starts with the iteration, and the end of the block ends it.

    Raises:
        LlavaServeError: at the block's start if the input is invalid, in the iteration for later errors:
            `EngineDeadError` if the answer ends before it is complete.
    """
    record = request.record
    record.model = backend.model_name
    record.stage("body")
    add_stages(record.stages[-1:])
    with span("hop"):
        prepared = await backend.prepare(
            request.asked,
            conv_mode=request.conv_mode,
            deadline=request.deadline,
            cache_salt=request.cache_salt,
            priority=request.priority,
        )
    record.prompt_tokens = prepared.num_tokens
    record.stage("hop", prepared.stages)
    groups = backend.generate(
        prepared,
        request.sampling,
        request_id=request.request_id,
        deadline=request.deadline,
        priority=request.priority,
    )
    async with aclosing(groups):
        yield Generation(prepared, request.sampling.n, groups, record)
