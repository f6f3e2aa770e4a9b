"""Asks a model its probes: questions whose answers are known, before it gets requests."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from llava_serve.app_options import Probe
from llava_serve.async_llm import AsyncLLM
from llava_serve.checkpoints.folders import BUILTIN
from llava_serve.errors import CheckpointError, LlavaServeError, shown
from llava_serve.sampling_params import SamplingParams

SHIPPED = frozenset({"demo.png"})
"""Names of images that ship with the builtin model."""

SAMPLING = SamplingParams(temperature=0, max_new_tokens=64)
TIMEOUT_S = 300.0
"""Of one answer: a large model on a CPU takes minutes."""


def check_probes(llm: AsyncLLM, probes: Sequence[Probe]) -> None:
    """Asks the probes one after another, as requests do: through the processor and the engine. Blocks until the end.

    Raises:
        CheckpointError: an answer does not contain what is expected, or there is none.
    """
    if probes:
        with ThreadPoolExecutor(1, "probe") as thread:  # the caller's thread may run an event loop
            thread.submit(asyncio.run, _ask_all(llm, probes)).result()


async def _ask_all(llm: AsyncLLM, probes: Sequence[Probe]) -> None:
    for probe in probes:
        try:
            answer = await _ask(llm, probe)
        except LlavaServeError as error:
            raise CheckpointError(f"The probe {probe.question!r} cannot be answered: {error}") from error
        if probe.expect.lower() not in answer.lower():
            raise CheckpointError(
                f"The probe {probe.question!r} is answered {shown(answer)!r}, without {probe.expect!r}: the model gets "
                "no requests."
            )


async def _ask(llm: AsyncLLM, probe: Probe) -> str:
    image = str(BUILTIN / probe.image) if probe.image in SHIPPED else probe.image
    parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": probe.question}]
    return (await llm.chat([{"role": "user", "content": parts}], SAMPLING, timeout=TIMEOUT_S)).text
