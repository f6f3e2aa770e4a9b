"""Bursts of disconnects, under Serve's defaults and under the production profile: no work remains."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from deployments.tools.local_cluster import local_cluster
from deployments.tools.serve_env import read_serve_env
from support.bursts import at_rest, burst, remaining
from support.paths import ROOT
from testbed.counted import counted_config

CLIENTS = 100
WITHIN_S = 0.4


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("profile", ["default", "production"])
async def test_ten_bursts_of_a_hundred_disconnects_leave_no_work(
    profile: str, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    settings = None if profile == "default" else read_serve_env(ROOT / f"{profile}.env")
    with local_cluster(counted_config(), num_cpus=2, profile=settings) as running:
        rest = await at_rest(running.url)
        for _ in range(10):
            await burst(running.url, CLIENTS, WITHIN_S)
            await asyncio.to_thread(wait_until, lambda: remaining(running.url) == rest)
