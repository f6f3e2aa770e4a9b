"""The model tier on a real Ray: a new replica takes a share of the burst that called for it, and a tier without
replicas says so, and starts at a request."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import pytest
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from deployments.ingress import Ingress
from deployments.model import LlavaModel
from deployments.preprocessor import ImagePreprocessor
from deployments.router import most_requests
from llava_serve import SamplingParams
from llava_serve.app_options import ENGINE_VARIABLE
from llava_serve.config import ApiOptions, EngineOptions, ImageOptions, ModelOptions
from llava_serve.types import PreparedPrompt
from support.demo import question

pytestmark = [pytest.mark.extended, pytest.mark.timeout(900)]

FREE = {"ray_actor_options": {"num_cpus": 0}, "graceful_shutdown_timeout_s": 5}
PLACES, WAITING, MOST = 2, 20, 13
ENGINE = EngineOptions(num_threads=1, kv_cache_bytes=64 << 20)
FEW_PLACES = {"env_vars": {ENGINE_VARIABLE: json.dumps({"max_num_seqs": PLACES, "max_waiting": WAITING})}}
SOON = {"look_back_period_s": 11, "upscale_delay_s": 0}  # Serve hears of the load every 10 s
ROUTER = {
    "request_router_class": "deployments.router:AffinityRouter",
    "request_router_kwargs": {"slack": 1},
}


def scaled(**bounds: float) -> dict[str, Any]:
    """A model tier that scales by its work."""
    policy = {"policy_function": "deployments.autoscaling:WorkPolicy", "policy_kwargs": {"target_wait_s": 1}}
    return {"autoscaling_config": {"policy": policy} | SOON | bounds, "max_ongoing_requests": 64} | FREE


@contextmanager
def running(app: Application, name: str, route: str | None) -> Iterator[DeploymentHandle]:
    """Runs it beside the session's application; gives the handle to its model tier."""
    serve.run(app, name=name, route_prefix=route)
    try:
        yield serve.get_deployment_handle("LlavaModel", name)
    finally:
        serve.delete(name)


async def test_a_new_replica_takes_a_share_of_the_burst_that_came_before(served: Any, ray_job: None) -> None:
    options = scaled(min_replicas=1, max_replicas=2, downscale_delay_s=600)
    options["ray_actor_options"] = options["ray_actor_options"] | {"runtime_env": FEW_PLACES}
    tier = serve.deployment(LlavaModel).options(request_router_config=ROUTER, **options)
    with running(tier.bind(ModelOptions(device="cpu"), ENGINE), "burst", None) as model:
        generate = model.options(method_name="generate", stream=True)
        long = SamplingParams(max_new_tokens=1500, ignore_eos=True)

        async def ask(number: int) -> None:
            prompt = PreparedPrompt(np.arange(10 + number, 90 + number, dtype=np.int32))
            for turn in itertools.count():  # the burst lasts until it is cancelled
                async for _ in generate.remote(prompt, long, 0, f"{number}-{turn}", time.time() + 600):
                    pass

        async def stats() -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = await model.broadcast("stats").results_async(timeout_s=120)
            return found

        burst = [asyncio.create_task(ask(number)) for number in range(40)]
        taken: list[int] = []
        deadline = time.monotonic() + 400
        while len(now := await stats()) < 2 or min(each["generated_tokens"] for each in now) == 0:
            assert time.monotonic() < deadline, now
            if len(now) == 1:
                taken.append(now[0]["running"] + now[0]["waiting"])
            await asyncio.sleep(0.5)
        for task in burst:
            task.cancel()
        await asyncio.gather(*burst, return_exceptions=True)
        # The others waited here, where the second replica took them: by what its environment says, not the arguments.
        # Serve routes two calls at once, of which neither counts the other.
        assert PLACES < max(taken) <= MOST + 1
        assert most_requests(EngineOptions(max_num_seqs=PLACES, max_waiting=WAITING)) == MOST


def test_a_sleeping_tier_says_so_and_a_request_wakes_it(served: Any, ray_job: None) -> None:
    options = ModelOptions(device="cpu")
    tier = serve.deployment(LlavaModel).options(**scaled(min_replicas=0, downscale_to_zero_delay_s=1))
    model = tier.bind(options, ENGINE)
    pictures = serve.deployment(ImagePreprocessor).options(**FREE).bind(options, ImageOptions())
    ingress = serve.deployment(serve.ingress()(Ingress)).options(**FREE)
    app = ingress.bind("builtin", ApiOptions(), pictures, model, options.prompt_key)
    with (
        running(app, "sleeping", "/sleeping"),
        httpx.Client(base_url=f"{served.url}/sleeping", timeout=300) as web,
    ):

        def health() -> tuple[int, str]:
            answer = web.get("/health")
            return answer.status_code, answer.json().get("status", "")

        def wait_for(state: str) -> None:
            deadline = time.monotonic() + 240
            while (now := health()) != (200, state):
                assert now[0] == 200, "it can serve all the time: a request wakes it"
                assert time.monotonic() < deadline, now
                time.sleep(0.2)

        def ask(timeout: float) -> httpx.Response:
            body = {"model": "builtin", "messages": question("Hello"), "max_tokens": 2, "timeout": timeout}
            return web.post("/v1/chat/completions", json=body)

        assert ask(200).status_code == 200
        wait_for("sleeping")
        refused = ask(2.5)  # no model starts so soon
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        seconds = refused.headers["retry-after"]
        assert refused.json()["error"]["message"] == f"The model is starting, about {seconds} s; try again then."
        wait_for("ok")  # the request that was refused has woken it
        wait_for("sleeping")
        assert ask(200).status_code == 200  # it waits
