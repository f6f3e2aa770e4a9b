"""Prepares prompts in threads, for servers: the `Processor` behind an event loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from llava_serve.deadline import check_deadline
from llava_serve.errors import DeadlineExceededError
from llava_serve.images.links import RequestLinks
from llava_serve.images.transport import Check
from llava_serve.priority_executor import PriorityExecutor
from llava_serve.processor import Processor
from llava_serve.tokenization import TokenizedPrompt
from llava_serve.tracing import add_stages
from llava_serve.types import Asked, PreparedPrompt

Result = TypeVar("Result")


@dataclass(slots=True)
class _Waits:
    """Seconds that a prompt waited for a thread, and for its links."""

    queue_s: float = 0.0
    fetch_s: float = 0.0


class ThreadedProcessor:
    """A `Processor` with a thread pool of its own: images that wait for a core delay nothing else. Links are
    followed first, where the options allow it.

    Args:
        processor: does the work.
        num_threads: prompts that are prepared at once; each holds one decoded image at most.
    """

    def __init__(self, processor: Processor, num_threads: int) -> None:
        self.processor = processor
        self._links = None if processor.options.links in ("off", ()) else RequestLinks(processor.options)
        self._threads = PriorityExecutor(num_threads, "prepare")

    async def prepare(
        self,
        read: Callable[[], Asked],
        *,
        conv_mode: str | None = None,
        deadline: float | None = None,
        cache_salt: str = "",
        priority: int = 0,
    ) -> PreparedPrompt:
        """One prompt as model input. If its caller is cancelled, the work ends at its next image or read of a link.

        Args:
            read: gives what `Processor.prepare` takes; called in the thread, since it may read files.
            conv_mode: overrides the checkpoint's template.
            deadline: seconds since the epoch; checked before each image, and in each step of a link.
            cache_salt: as `Processor.prepare` has it.
            priority: of those that wait for a thread, the smallest number is next.

        Raises:
            RequestError: the input is invalid; the class says how.
            CapacityError: too many links lead to one host at this time.
            DeadlineExceededError: the deadline passed before the work was done.
        """

        def prepare(asked: Asked, check: Check) -> PreparedPrompt:
            return self.processor.prepare(asked, conv_mode=conv_mode, check=check, cache_salt=cache_salt)

        waits = _Waits()
        prepared = await self._in_thread(read, prepare, deadline, priority, waits)
        stages = (("queue", waits.queue_s), ("fetch", waits.fetch_s), *prepared.stages)
        add_stages(stages)
        return replace(prepared, stages=stages)

    async def tokenize(
        self, asked: Asked, *, conv_mode: str | None = None, deadline: float | None = None, texts: bool = False
    ) -> TokenizedPrompt:
        """The tokens of a prompt, as `Processor.tokenize` has them; otherwise as `prepare`."""

        def tokenize(asked: Asked, check: Check) -> TokenizedPrompt:
            return self.processor.tokenize(asked, conv_mode=conv_mode, check=check, texts=texts)

        return await self._in_thread(lambda: asked, tokenize, deadline, 0, _Waits())

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of ids, as `Processor.detokenize` has it."""
        return await self._threads.run(0, partial(self.processor.detokenize, token_ids))

    async def _in_thread(
        self,
        read: Callable[[], Asked],
        process: Callable[[Asked, Check], Result],
        deadline: float | None,
        priority: int,
        waits: _Waits,
    ) -> Result:
        disconnected = False

        def check() -> None:
            check_deadline(deadline)
            if disconnected:
                raise DeadlineExceededError("The client has disconnected.")

        def work(read: Callable[[], Asked]) -> Result:
            check()
            return process(read(), check)

        try:
            if self._links is None:
                return await self._run(priority, waits, partial(work, read))
            asked, began = await self._run(priority, waits, read), time.perf_counter()
            async with self._links.fetched(asked, check) as fetched:
                waits.fetch_s = time.perf_counter() - began
                return await self._run(priority, waits, partial(work, lambda: fetched))
        finally:
            disconnected = True

    async def _run(self, priority: int, waits: _Waits, job: Callable[[], Result]) -> Result:
        """Runs a job in a thread, and adds the time until it begins."""
        queued = time.perf_counter()

        def begin() -> Result:
            waits.queue_s += time.perf_counter() - queued
            return job()

        return await self._threads.run(priority, begin)
