"""A thread pool whose queue is ordered by priority."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, PriorityQueue
from typing import Any, TypeVar

Result = TypeVar("Result")


class PriorityExecutor:
    """Threads that take the job of the smallest priority number next, and of equals the one that came first.

    Args:
        num_threads: jobs that run at once.
        name: begins the names of the threads.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._jobs: PriorityQueue[tuple[int, int, Callable[[], Any], Future[Any]]] = PriorityQueue()
        self._order = itertools.count()

    async def run(self, priority: int, job: Callable[[], Result]) -> Result:
        """The result of a job. One whose caller is cancelled while it waits does not run."""
        future: Future[Result] = Future()
        self._jobs.put((priority, next(self._order), job, future))
        self._threads.submit(self._run_next)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Cancels the jobs that wait. Those that run are not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with suppress(Empty):
            while True:
                *_, future = self._jobs.get_nowait()
                future.cancel()

    def _run_next(self) -> None:
        """Called once for each job, but not necessarily for the job with which it was submitted."""
        *_, job, future = self._jobs.get_nowait()
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = job()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)
