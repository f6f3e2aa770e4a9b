"""Groups a stream by what is ready."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from llava_serve.types import Chunk


async def coalesce(chunks: AsyncGenerator[Chunk]) -> AsyncGenerator[list[Chunk]]:
    """Yields lists that are never empty: all that came since the last one was taken, at once if anything is there.

    Nothing is held back: the first chunk leaves alone, and groups grow only while the receiver is busy.
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
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await chunks.aclose()
