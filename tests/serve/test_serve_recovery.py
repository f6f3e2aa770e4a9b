"""A replica that dies fails the requests in it, and is replaced for later ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import openai
import psutil
import pytest

from deployments.tools.config import read_config
from deployments.tools.local_cluster import free_port, local_cluster
from deployments.tools.serve_env import read_serve_env
from support.cluster import replicas
from support.demo import DEMO_IMAGE, DEMO_QUESTION, question
from support.paths import CONFIG, ROOT

pytestmark = pytest.mark.extended

PROFILE = ROOT / "production.env"


def ask(client: Any, **fields: Any) -> Any:
    messages = question(DEMO_QUESTION, DEMO_IMAGE.read_bytes())
    return client.chat.completions.create(model="builtin", messages=messages, temperature=0, **fields)


def test_a_model_replica_that_is_killed_is_replaced(client: Any, served: Any) -> None:
    before = ask(client, max_tokens=20).choices[0].message.content
    stream = ask(client, max_tokens=1500, stream=True, extra_body={"ignore_eos": True})
    next(stream)
    [replica] = replicas("LlavaModel", served)
    replica.kill()
    psutil.wait_procs([replica], timeout=20)
    with pytest.raises(openai.APIError, match="replica"):
        list(stream)
    # Serve queues requests until a new replica runs; the client retries nothing.
    assert ask(client, max_tokens=20, timeout=200).choices[0].message.content == before


@pytest.mark.parametrize("tier", ["Ingress", "ImagePreprocessor"])
def test_a_replica_of_another_tier_that_is_killed_is_replaced(
    tier: str, client: Any, served: Any, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    before = ask(client, max_tokens=20).choices[0].message.content
    killed = replicas(tier, served)  # autoscaling may have started a second one for the tests before
    for replica in killed:
        replica.kill()
    psutil.wait_procs(killed, timeout=20)

    def answered() -> bool:
        """Until Serve notices the death, a request may get an error; it always gets a response."""
        try:
            return bool(ask(client, max_tokens=20).choices[0].message.content == before)
        except openai.InternalServerError:
            return False

    wait_until(answered)
    successors = replicas(tier, served)
    assert successors
    assert {each.pid for each in successors}.isdisjoint(each.pid for each in killed)


def test_a_model_replica_that_hangs_is_killed_in_the_production_profile() -> None:
    """Serve's own default lets it stop gracefully, for ten minutes, in which its CPUs and its GPU are taken."""
    switch = "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS"
    profile = {switch: read_serve_env(PROFILE)[switch]}
    with local_cluster(read_config(CONFIG, port=free_port()), num_cpus=2, profile=profile) as running:
        [hung] = replicas("LlavaModel", running)
        hung.suspend()
        assert psutil.wait_procs([hung], timeout=60)[1] == []  # three health checks
        answer = httpx.post(
            f"{running.url}/v1/chat/completions",
            json={"model": "builtin", "messages": question("Hello"), "max_tokens": 2},
            timeout=120,
        )
        assert answer.status_code == 200
