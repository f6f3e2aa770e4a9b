"""Groups a stream: each message between replicas costs more than a token does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from llava_serve.types import Chunk

GATHER_S = 0.02
"""Between two groups of one stream: too short to be seen by a reader, and several steps of a fast model."""


async def coalesce(chunks: AsyncGenerator[Chunk], gather_s: float = GATHER_S) -> AsyncGenerator[list[Chunk]]:
    """Yields lists that are never empty. The first chunk leaves at once, and so does the end of the stream.

    Closing it closes `chunks`.
    """
    ready: list[Chunk] = []
    news = asyncio.Event()

    async def pump() -> None:
        async for chunk in chunks:
            ready.append(chunk)
            news.set()

    task = asyncio.create_task(pump())
    task.add_done_callback(lambda _: news.set())
    try:
        while ready or not task.done():
            await news.wait()
            news.clear()
            if ready:
                group = ready[:]
                ready.clear()
                yield group
                await asyncio.wait((task,), timeout=gather_s)
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await chunks.aclose()
