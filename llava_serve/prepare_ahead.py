"""Prepares prompts in threads while the engine works, never more than so many ahead of it."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from llava_serve.errors import LlavaServeError
from llava_serve.images.decoder import Check

_CLOSE_S = 5.0
"""For what cannot be ended: a file that is read, a picture that is decoded in this process."""

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")


class PrepareAhead(Generic[Item, Prepared]):
    """Takes items as there is room for them, and prepares each in a thread. One thread owns it.

    Args:
        items: taken one by one in the owner's thread, so that they may be made as they are needed.
        prepare: called with an item, and a check that raises when the work is of no use any more.
        window: the most items that are taken and not finished.
        num_threads: items that are prepared at once.
    """

    def __init__(
        self, items: Iterable[Item], prepare: Callable[[Item, Check], Prepared], window: int, num_threads: int
    ) -> None:
        self._items: Iterator[tuple[int, Item]] = enumerate(items)
        self._prepare = prepare
        self._window = window
        self._num_threads = num_threads
        self._todo: SimpleQueue[tuple[int, Item] | None] = SimpleQueue()
        self._done: SimpleQueue[tuple[int, Prepared | Exception]] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._unfinished = 0
        self._closed = False
        # A thread in a tokenizer's code when the interpreter ends is unwound there, and the process aborts.
        atexit.register(self.close)

    def fill(self) -> bool:
        """Takes items up to the window. Returns whether any is not finished."""
        while self._unfinished < self._window and (item := next(self._items, None)) is not None:
            self._unfinished += 1
            if len(self._threads) < min(self._num_threads, self._unfinished):
                # A daemon: a link that takes minutes holds back no exit.
                self._threads.append(threading.Thread(target=self._work, name="prepare", daemon=True))
                self._threads[-1].start()
            self._todo.put(item)
        return self._unfinished > 0

    def ready(self, *, wait: bool) -> Iterator[tuple[int, Prepared | Exception]]:
        """The items that were prepared since the last call, by their number: each prepared, or why it is not.

        Args:
            wait: for one, if there is none.
        """
        try:
            while True:
                yield self._done.get(block=wait)
                wait = False
        except Empty:
            return

    def finish(self) -> None:
        """An item needs its place no more."""
        self._unfinished -= 1

    def close(self) -> None:
        """Ends the threads, each after what it does now. One that waits for a link is not waited for."""
        atexit.unregister(self.close)
        self._closed = True
        for _ in self._threads:
            self._todo.put(None)
        deadline = time.monotonic() + _CLOSE_S
        for thread in self._threads:
            thread.join(max(0, deadline - time.monotonic()))

    def _work(self) -> None:
        while (item := self._todo.get()) is not None and not self._closed:
            try:
                prepared: Prepared | Exception = self._prepare(item[1], self._check)
            except Exception as error:
                prepared = error
            self._done.put((item[0], prepared))

    def _check(self) -> None:
        if self._closed:
            raise LlavaServeError("The call has ended.")
