"""How it is sent: from a fixed number of clients, or at random times of a given rate."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_serve.bench.client import Client, Trace
from llava_serve.bench.workload import Conversation


@dataclass
class Run:
    """The traces of a run, while it goes on and afterwards.

    Attributes:
        total: requests that are to be sent.
        begun: when it began, on the clock of `time.perf_counter`.
        traces: of the requests that are answered or have failed.
        in_flight: requests that are neither.
        seconds: the whole run took, when it is over.
    """

    total: int
    begun: float = 0.0
    traces: list[Trace] = field(default_factory=list)
    in_flight: int = 0
    seconds: float = 0.0

    def progress(self) -> str:
        """One line, while the run goes on."""
        seconds = time.perf_counter() - self.begun if self.begun else 0.0
        done, failed = len(self.traces), sum(not trace.ok for trace in self.traces)
        tokens = sum(trace.output_tokens for trace in self.traces)
        return (
            f"{done} of {self.total} requests ({failed} failed), {self.in_flight} in flight, {seconds:.0f} s: "
            f"{done / (seconds or 1):.1f} requests/s, {tokens / (seconds or 1):.0f} tokens/s"
        )

    async def converse(self, client: Client, conversation: Conversation, due: float | None = None) -> None:
        """Sends the turns of a conversation, each after the answer to the last. A failed turn ends it."""
        messages: list[dict[str, Any]] = []
        for number, turn in enumerate(conversation.turns):
            content: list[dict[str, Any]] = [{"type": "text", "text": turn.question}]
            if number == 0:
                content = [{"type": "image_url", "image_url": {"url": url}} for url in conversation.images] + content
            messages.append({"role": "user", "content": content})
            self.in_flight += 1
            try:
                trace = await client.ask(messages, turn.max_tokens, due=due)
            finally:
                self.in_flight -= 1
            self.traces.append(trace)
            if not trace.ok:
                return
            messages.append({"role": "assistant", "content": trace.text})
            due = None


async def closed_loop(run: Run, client: Client, conversations: Sequence[Conversation], clients: int) -> None:
    """So many clients at once; each begins its next conversation when its last has ended."""
    queue = iter(conversations)
    run.begun = time.perf_counter()

    async def one() -> None:
        for conversation in queue:
            await run.converse(client, conversation)

    await asyncio.gather(*(one() for _ in range(clients)))
    run.seconds = time.perf_counter() - run.begun


async def open_loop(run: Run, client: Client, conversations: Sequence[Conversation], rate: float, seed: int) -> None:
    """Conversations begin at random times, whether or not earlier ones have ended (a Poisson process). Their requests
    are `rate` a second in the mean."""
    rng = random.Random(seed)
    due = run.begun = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for conversation in conversations:
            await asyncio.sleep(due - time.perf_counter())
            tasks.create_task(run.converse(client, conversation, due))
            due += rng.expovariate(rate / len(conversation.turns))
    run.seconds = time.perf_counter() - run.begun
