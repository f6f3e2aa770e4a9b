"""Prepares prompts in threads, for servers: the one way from an event loop to the `Processor`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from llava_serve.deadline import check_deadline
from llava_serve.errors import DeadlineExceededError
from llava_serve.images.links import RequestLinks
from llava_serve.processor import Processor
from llava_serve.types import Message, PreparedPrompt, Query


class ThreadedProcessor:
    """A `Processor` with a thread pool of its own: pictures that wait for a core hold up nothing else. Links are
    followed before, where the options say so.

    Args:
        processor: does the work.
        num_threads: prompts that are prepared at once; each holds one decoded picture at most.
        observe: is told each prompt that was prepared, and the seconds that it took.
    """

    def __init__(
        self, processor: Processor, num_threads: int, observe: Callable[[PreparedPrompt, float], None] | None = None
    ) -> None:
        self.processor = processor
        self._observe = observe
        self._links = None if processor.options.links in ("off", ()) else RequestLinks(processor.options)
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="prepare")

    async def prepare(
        self,
        read: Callable[[], Query | Sequence[Message]],
        *,
        conv_mode: str | None = None,
        deadline: float | None = None,
    ) -> PreparedPrompt:
        """One prompt as model input. The work ends before its next picture once its caller has left, or at the next
        read of a link.

        Args:
            read: gives what `Processor.prepare` takes; called in the thread, since it may read files.
            conv_mode: overrides the checkpoint's template.
            deadline: seconds since the epoch; looked at before each picture, and in each step of a link.

        Raises:
            RequestError: the input is at fault; the class says how.
            CapacityError: too many links lead to one host at this time.
            DeadlineExceededError: the time was up before the work was done.
        """
        disconnected = False

        def check() -> None:
            check_deadline(deadline)
            if disconnected:
                raise DeadlineExceededError("The client has disconnected.")

        def work(read: Callable[[], Query | Sequence[Message]]) -> PreparedPrompt:
            check()
            began = time.perf_counter()
            prepared = self.processor.prepare(read(), conv_mode=conv_mode, check=check)
            if self._observe is not None:
                self._observe(prepared, time.perf_counter() - began)
            return prepared

        try:
            run = asyncio.get_running_loop().run_in_executor
            if self._links is None:
                return await run(self._threads, work, read)
            async with self._links.fetched(await run(self._threads, read), check) as fetched:
                return await run(self._threads, work, lambda: fetched)
        finally:
            disconnected = True
