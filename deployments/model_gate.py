"""Holds a new replica of another tier back until a replica of its model runs.

Serve replaces the replicas of all tiers at once, and those without weights are the first to be there. Prompts that they
prepare for a new model would go to the old one, for ever if the new one cannot start or fails its probe.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from ray.serve.handle import DeploymentHandle

from .handle_calls import result

INTERVAL_S = 0.5
CALL_TIMEOUT_S = 5.0
"""A call to a deployment without replicas waits."""


async def wait_for_model(model: DeploymentHandle, prompt_key: str) -> None:
    """Returns once a replica of the model tier takes prompts of this key (`ModelOptions.prompt_key`)."""
    takes = model.options(method_name="takes")
    while True:
        with suppress(Exception):  # it is starting, it is lost, or it is one of another release
            async with asyncio.timeout(CALL_TIMEOUT_S):
                if await result(takes, prompt_key):
                    return
        await asyncio.sleep(INTERVAL_S)
