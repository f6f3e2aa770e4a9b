"""Two model replicas on a real Ray: second questions hit the cache of the first, and a hot picture is shared."""

from __future__ import annotations

import asyncio
import io
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from openai import AsyncOpenAI
from PIL import Image
from ray import serve
from ray.serve.context import _RequestContext, _serve_request_context
from ray.serve.handle import DeploymentHandle

from deployments.ingress import Ingress
from deployments.model import LlavaModel
from llava_serve import Message, SamplingParams
from llava_serve.checkpoints import open_checkpoint
from llava_serve.config import ApiOptions, EngineOptions, ImageOptions, ModelOptions
from llava_serve.processor import Processor
from llava_serve.types import ImagePart, PreparedPrompt, TextPart
from support.demo import question
from support.paths import CONFIG

PICTURES = 12
TEMPLATE = 64
"""More tokens than what all prompts begin with, and fewer than a picture takes."""
SHORT = SamplingParams(temperature=0, max_new_tokens=2)


def model_config() -> dict[str, Any]:
    """What `serve_config.yaml` says of the model tier."""
    deployments = yaml.safe_load(CONFIG.read_text())["applications"][0]["deployments"]
    [found] = [each for each in deployments if each["name"] == "LlavaModel"]
    return dict(found)


@pytest.fixture(scope="module")
def model(served: Any, ray_job: None) -> Iterator[DeploymentHandle]:
    """An ingress and two model replicas with the shipped config's routing, beside the application's own."""
    free = {
        "ray_actor_options": {"num_cpus": 0},
        "graceful_shutdown_timeout_s": 5,
        "graceful_shutdown_wait_loop_s": 0.1,
    }
    options = ModelOptions()
    tier = serve.deployment(LlavaModel).options(
        num_replicas=2,
        max_ongoing_requests=model_config()["max_ongoing_requests"],
        request_router_config=model_config()["request_router_config"],
        **free,
    )
    graph = (
        serve.deployment(serve.ingress()(Ingress))
        .options(**free)
        .bind(
            "builtin",
            ApiOptions(),
            serve.get_deployment_handle("ImagePreprocessor", "llava"),
            tier.bind(options, EngineOptions(max_num_seqs=32, num_threads=1)),
        )
    )
    serve.run(graph, name="routing", route_prefix="/routing")
    yield serve.get_deployment_handle("LlavaModel", "routing")
    serve.delete("routing")


def picture() -> bytes:
    """One that nobody has sent before."""
    file = io.BytesIO()
    Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3)).save(file, "PNG")
    return file.getvalue()


def prepare(text: str, *pictures: bytes) -> PreparedPrompt:
    parts: tuple[TextPart | ImagePart, ...] = (*(ImagePart(each) for each in pictures), TextPart(text))
    return Processor(open_checkpoint("builtin"), ImageOptions()).prepare([Message("user", parts)])


async def ask(model: DeploymentHandle, prepared: PreparedPrompt, sampling: SamplingParams = SHORT) -> int:
    """Returns the positions of the prompt that were in a cache."""
    generate = model.options(method_name="generate", stream=True)
    call_id = os.urandom(8).hex()
    groups = [group async for group in generate.remote(prepared, sampling, 0, call_id, time.time() + 120)]
    return int(groups[-1][-1].num_cached_tokens)


async def stats(model: DeploymentHandle) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = await model.broadcast("stats").results_async(timeout_s=60)
    return found


async def test_second_questions_about_a_picture_hit_its_cache(served: Any, model: DeploymentHandle) -> None:
    pictures = [picture() for _ in range(PICTURES)]
    async with AsyncOpenAI(base_url=f"{served.url}/routing/v1", api_key="none", max_retries=0, timeout=120) as client:

        async def cached(text: str, image: bytes) -> int:
            answer = await client.chat.completions.create(
                model="builtin", messages=question(text, image), max_tokens=2, temperature=0
            )
            assert answer.usage is not None
            assert answer.usage.prompt_tokens_details is not None
            return answer.usage.prompt_tokens_details.cached_tokens or 0

        before = await stats(model)
        first = await asyncio.gather(*(cached("What is this?", each) for each in pictures[::-1]))
        second = await asyncio.gather(*(cached("Which colours are there?", each) for each in pictures))
    assert max(first) < TEMPLATE
    assert sum(tokens > TEMPLATE for tokens in second) >= 0.9 * PICTURES
    worked = [
        now["computed_tokens"] - then["computed_tokens"] for then, now in zip(before, await stats(model), strict=True)
    ]
    assert min(worked) > 0.2 * sum(worked)  # not all on one


async def test_a_conversation_without_pictures_stays_where_it_began(model: DeploymentHandle) -> None:
    for topic in ("circle", "square", "triangle", "line"):
        story = " ".join(f"The {topic} number {number} is red." for number in range(40))
        first, second = prepare(story), prepare(f"{story} And how many are there?")
        await ask(model, first)
        assert await ask(model, second) > 200


async def test_a_hot_picture_overflows_to_the_other_replica(
    model: DeploymentHandle, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    slack = model_config()["request_router_config"]["request_router_kwargs"]["slack"]
    prepared = prepare("What is this?", picture())
    await ask(model, prepared)
    long = SamplingParams(max_new_tokens=1000, ignore_eos=True)
    calls = [asyncio.create_task(ask(model, prepared, long)) for _ in range(2 * slack)]
    deadline = time.monotonic() + 60
    while sum(running := [each["running"] for each in await stats(model)]) < len(calls):
        assert time.monotonic() < deadline, running
        await asyncio.sleep(0.05)
    for task in calls:
        task.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert min(running) > 0
    assert max(running) > slack


async def test_calls_from_one_request_to_another_deployment_are_all_sent(model: DeploymentHandle) -> None:
    token = _serve_request_context.set(_RequestContext(request_id="one", _internal_request_id="one"))
    try:
        await asyncio.wait_for(asyncio.gather(*(ask(model, prepare("Hello", picture())) for _ in range(8))), 60)
    finally:
        _serve_request_context.reset(token)


async def test_calls_without_a_prompt_go_to_any_replica(model: DeploymentHandle) -> None:
    await asyncio.gather(*(model.health.remote() for _ in range(8)))
