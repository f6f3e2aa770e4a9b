"""The queue of the picture tier."""

from __future__ import annotations

import asyncio
import threading
from functools import partial

import pytest

from llava_serve.priority_executor import PriorityExecutor


async def test_the_smallest_priority_is_next_and_equals_go_in_order() -> None:
    executor = PriorityExecutor(1, "test")
    entered, release = threading.Event(), threading.Event()
    done: list[str] = []

    def first() -> None:
        entered.set()
        release.wait()

    running = asyncio.create_task(executor.run(9, first))
    await asyncio.to_thread(entered.wait)
    jobs = {"batch 1": 10, "batch 2": 10, "online 1": 0, "small": 5, "online 2": 0, "gone": 0}
    waiting = {name: asyncio.create_task(executor.run(at, partial(done.append, name))) for name, at in jobs.items()}
    await asyncio.sleep(0)
    waiting.pop("gone").cancel()
    await asyncio.sleep(0)
    release.set()
    await asyncio.gather(running, *waiting.values())
    assert done == ["online 1", "online 2", "small", "batch 1", "batch 2"]


async def test_a_job_returns_or_raises() -> None:
    executor = PriorityExecutor(2, "test")
    assert await executor.run(0, lambda: 7) == 7
    with pytest.raises(ValueError, match="invalid literal"):
        await executor.run(0, partial(int, "x"))
