"""Both tiers scale with the load, up and down, and no request fails meanwhile.

pytest tests/serve/test_serve_autoscaling.py --log-cli-level=INFO    # logs the seconds
"""

from __future__ import annotations

import asyncio
import io
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai import AsyncOpenAI
from PIL import Image

from deployments.tools.config import read_config
from deployments.tools.local_cluster import LocalCluster, free_port, local_cluster
from support.cluster import replicas
from support.demo import data_url
from support.paths import CONFIG
from support.rollout import deploy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TIERS = ("ImagePreprocessor", "LlavaModel")
SHORT = {"look_back_period_s": 11, "upscale_delay_s": 2, "downscale_delay_s": 5}  # Serve hears of the load every 10 s
TIMEOUT_S = 600

log = logging.getLogger(__name__)


def config_that_scales_soon() -> dict[str, Any]:
    """The real one, with its policy, room for two replicas of each tier, few places in a batch and short delays."""
    config = read_config(CONFIG, port=free_port())
    config["applications"][0]["args"]["engine"] |= {"max_num_seqs": 8}
    for deployment in config["applications"][0]["deployments"]:
        if deployment["name"] in TIERS:
            deployment["autoscaling_config"] |= {"min_replicas": 1, "max_replicas": 2} | SHORT
            deployment["ray_actor_options"]["num_cpus"] = 0.4
    return config


def photograph() -> str:
    """Large, so that the picture tier has work with it."""
    coarse = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((4000, 3000)).save(file, "JPEG")
    return data_url(file.getvalue(), "jpeg")


class Clients:
    """Clients that ask one question after another.

    Attributes:
        answers: of all clients so far. `stop` raises their errors.
    """

    def __init__(self, client: AsyncOpenAI) -> None:
        self._client = client
        self._photo = photograph()
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self.answers = 0

    def start(self, *, with_photos: int, with_long_answers: int) -> None:
        """Adds this many clients."""
        self._stopping = False
        for number in range(with_photos + with_long_answers):
            self._tasks.append(asyncio.create_task(self._ask_repeatedly(number, photo=number < with_photos)))

    async def stop(self) -> None:
        """Stops all clients, each after its last answer."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def ask(self, text: str, *, photo: bool = False, max_tokens: int = 20) -> None:
        """One question, and an answer of exactly this many tokens."""
        parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if photo:
            parts.insert(0, {"type": "image_url", "image_url": {"url": self._photo}})
        answer = await self._client.chat.completions.create(
            model="builtin",
            messages=[{"role": "user", "content": parts}],  # type: ignore[list-item, misc]
            max_tokens=max_tokens,
            extra_body={"ignore_eos": True, "timeout": 600},
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == max_tokens
        self.answers += 1

    async def _ask_repeatedly(self, number: int, *, photo: bool) -> None:
        while not self._stopping:
            await self.ask(f"Client {number}: what is this?", photo=photo, max_tokens=1 if photo else 200)

    async def light_load(self) -> None:
        """A question with a photograph and one with a long answer: too little for two replicas."""
        await asyncio.gather(self.ask("One", photo=True), self.ask("Two", max_tokens=200))


async def wait_for(wanted: int, running: LocalCluster, meanwhile: Callable[[], Any]) -> dict[str, float]:
    """Seconds until each tier has this many replicas."""
    start = time.monotonic()
    reached: dict[str, float] = {}
    while len(reached) < len(TIERS):
        assert time.monotonic() < start + TIMEOUT_S, f"only {reached} came to {wanted}"
        await meanwhile()
        for name in TIERS:
            if name not in reached and len(replicas(name, running)) == wanted:
                reached[name] = round(time.monotonic() - start, 1)
    return reached


async def test_replicas_follow_the_load_up_and_down_and_no_request_fails() -> None:
    with local_cluster(config_that_scales_soon(), num_cpus=2) as running:
        async with AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=600) as client:
            clients = Clients(client)
            clients.start(with_photos=8, with_long_answers=12)
            up = await wait_for(2, running, lambda: asyncio.sleep(0.5))
            await clients.stop()
            down = await wait_for(1, running, clients.light_load)
            log.info("Two replicas after %s s, one after %s s; %d answers.", up, down, clients.answers)


async def test_the_tiers_follow_the_capacity_that_an_upgrade_gives_them(tmp_path: Path) -> None:
    """KubeRay moves a service from one cluster to another by Serve's `target_capacity`, in percent."""
    config = read_config(CONFIG, port=free_port())
    for deployment in config["applications"][0]["deployments"]:
        deployment["ray_actor_options"]["num_cpus"] = 0.25
        deployment["graceful_shutdown_timeout_s"] = 5
        if "autoscaling_config" in deployment:
            deployment["autoscaling_config"] |= {"min_replicas": 2, "max_replicas": 2}
        else:
            deployment["num_replicas"] = 2
    with local_cluster(config | {"target_capacity": 50}, num_cpus=2) as running:
        assert [len(replicas(name, running)) for name in ("Ingress", *TIERS)] == [1, 1, 1]
        for percent, wanted in ((100, 2), (0, 0), (50, 1)):
            deploy(config | {"target_capacity": percent}, running.ray_address, tmp_path / "config.yaml")
            await wait_for(wanted, running, lambda: asyncio.sleep(0.5))
        async with AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=8, timeout=600) as client:
            await Clients(client).ask("What is this?", photo=True)
