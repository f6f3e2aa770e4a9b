"""Prepares prompts in threads, for servers: the `Processor` behind an event loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from llava_serve.deadline import check_deadline
from llava_serve.errors import DeadlineExceededError
from llava_serve.images.links import RequestLinks
from llava_serve.images.transport import Check
from llava_serve.priority_executor import PriorityExecutor
from llava_serve.processor import Processor
from llava_serve.tokenization import TokenizedPrompt
from llava_serve.types import Asked, PreparedPrompt

Result = TypeVar("Result")


class ThreadedProcessor:
    """A `Processor` with a thread pool of its own: images that wait for a core delay nothing else. Links are
    followed first, where the options allow it.

    Args:
        processor: does the work.
        num_threads: prompts that are prepared at once; each holds one decoded image at most.
        observe: called with each prepared prompt, and the seconds that it took.
    """

    def __init__(
        self, processor: Processor, num_threads: int, observe: Callable[[PreparedPrompt, float], None] | None = None
    ) -> None:
        self.processor = processor
        self._observe = observe
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
            began = time.perf_counter()
            prepared = self.processor.prepare(asked, conv_mode=conv_mode, check=check, cache_salt=cache_salt)
            if self._observe is not None:
                self._observe(prepared, time.perf_counter() - began)
            return prepared

        return await self._in_thread(read, prepare, deadline, priority)

    async def tokenize(
        self, asked: Asked, *, conv_mode: str | None = None, deadline: float | None = None, texts: bool = False
    ) -> TokenizedPrompt:
        """The tokens of a prompt, as `Processor.tokenize` has them; otherwise as `prepare`."""

        def tokenize(asked: Asked, check: Check) -> TokenizedPrompt:
            return self.processor.tokenize(asked, conv_mode=conv_mode, check=check, texts=texts)

        return await self._in_thread(lambda: asked, tokenize, deadline)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of ids, as `Processor.detokenize` has it."""
        return await self._threads.run(0, partial(self.processor.detokenize, token_ids))

    async def _in_thread(
        self,
        read: Callable[[], Asked],
        process: Callable[[Asked, Check], Result],
        deadline: float | None,
        priority: int = 0,
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
            run = partial(self._threads.run, priority)
            if self._links is None:
                return await run(partial(work, read))
            async with self._links.fetched(await run(read), check) as fetched:
                return await run(partial(work, lambda: fetched))
        finally:
            disconnected = True
