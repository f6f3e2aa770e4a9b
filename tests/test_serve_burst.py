"""Bursts of clients that leave at once, under Serve's defaults and under the production profile: nothing is left."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from conftest import ROOT
from test_serve_cancel import burst

from benchmarks.counted import counted_config
from deployments.tools.local_cluster import local_serve
from deployments.tools.serve_env import read_profile

CLIENTS = 100
WITHIN_S = 0.4


def left(url: str) -> dict[str, Any]:
    """What is still there of all requests: see `benchmarks.counted`."""
    with urllib.request.urlopen(f"{url}/left", timeout=60) as response:
        counts: dict[str, Any] = json.loads(response.read())
    return counts


async def at_rest(url: str) -> dict[str, Any]:
    """What is there where nobody asks; what is made once, at the first requests, is no leak."""
    await burst(url, 4, within_s=2)
    before: dict[str, Any] = {}
    while (now := await asyncio.to_thread(left, url)) != before or now["sequences"]:
        before = now
        await asyncio.sleep(1)
    assert now["blocks"] == 0
    return now


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("profile", ["default", "production"])
async def test_ten_bursts_of_a_hundred_leave_nothing(
    profile: str, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    settings = None if profile == "default" else read_profile(ROOT / f"{profile}.env")
    with local_serve(counted_config(), num_cpus=2, profile=settings) as running:
        rest = await at_rest(running.url)
        for _ in range(10):
            await burst(running.url, CLIENTS, WITHIN_S)
            await asyncio.to_thread(wait_until, lambda: left(running.url) == rest)
