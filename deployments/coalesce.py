"""Groups a stream: each message between replicas costs more than a token does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from llava_serve.engine.output_processor import join_chunks
from llava_serve.types import Chunk

GATHER_S = 0.05
"""Between two groups of one stream: twenty a second read smoothly, and cost a third less CPU than fifty."""


async def coalesce(chunks: AsyncGenerator[Chunk], gather_s: float = GATHER_S) -> AsyncGenerator[list[Chunk]]:
    """Yields what has come, one chunk per choice. The first chunk leaves at once, and so does the end of the stream.

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
                group = join_chunks(ready)
                ready.clear()
                yield group
                await asyncio.wait((task,), timeout=gather_s)
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await chunks.aclose()
