"""Cache hits and balance of two model replicas, with our router and with Serve's own.

    python -m benchmarks.routing [--rounds 2] [--ingress 1 2] [--output benchmarks/results/routing.json]

Each round starts the application of `serve_config.yaml` anew, with two model replicas of one thread each, under each
router and with each number of ingress replicas, and drives it over HTTP with four loads: several questions about each
of many pictures, conversations without a picture, pictures that nobody has sent before, and one picture for all.

A hit has more `cached_tokens` in its usage than all prompts have in common. The imbalance is the
difference between the two replicas' requests over their sum: the mean of samples while there are many.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Awaitable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI
from ray import serve

from benchmarks.options import make_parser, parse
from benchmarks.ray_job import ray_job
from deployments.tools.config import read_config
from deployments.tools.local_cluster import free_port, local_cluster
from llava_serve.bench.workload import make_image

CONFIG = Path(__file__).resolve().parent.parent / "serve_config.yaml"
TEMPLATE = 64
"""More tokens than all prompts have in common, and fewer than a picture takes."""
CLIENTS = 16
SAMPLE_S = 0.1
Result = dict[str, float]
Messages = list[Any]
numbers = itertools.count(random.SystemRandom().randrange(10**9))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ingress", type=int, nargs="+", default=[1, 2], help="numbers of ingress replicas")
    parser.add_argument("--output", type=Path)
    parser.set_defaults(routers=("affinity", "default"), share=1.0)
    options = parse(parser, rounds=1, ingress=[1], routers=("affinity",), share=0.05)
    settings = list(itertools.product(options.ingress, options.routers))
    by_round: list[dict[str, dict[str, Result]]] = []
    for _ in range(options.rounds):
        by_round.append({})
        for ingress, router in settings:
            # In a process of its own: Serve keeps state of the first Ray cluster in a process.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                result = process.submit(drive, router, ingress, options.share).result()
            by_round[-1][f"{router}, ingress replicas: {ingress}"] = result
            text = json.dumps({"cpu_cores": os.cpu_count(), "clients": CLIENTS, "by_round": by_round}, indent=2)
            if options.output is not None:
                options.output.write_text(text + "\n")
    print(text)


def drive(router: str, ingress: int, share: float) -> dict[str, Result]:
    """All loads on the application with one router."""
    with application(router, ingress) as url:
        return asyncio.run(measure(url, share))


@contextmanager
def application(router: str, ingress: int) -> Iterator[str]:
    """The application on a Ray of its own, which this process joins."""
    config = read_config(CONFIG, port=free_port())
    app = config["applications"][0]
    app["args"].setdefault("engine", {})["num_threads"] = 1
    tiers = {each["name"]: each for each in app["deployments"]}
    tiers["Ingress"]["num_replicas"] = ingress
    tiers["LlavaModel"].pop("autoscaling_config", None)
    tiers["LlavaModel"]["num_replicas"] = 2
    if router == "default":
        del tiers["LlavaModel"]["request_router_config"]
    # The CPUs are logical: the replicas share the machine's cores.
    with local_cluster(config, num_cpus=8) as running, ray_job(running.ray_address):
        yield running.url


async def measure(url: str, share: float) -> dict[str, Result]:
    """This share of all loads, one after the other."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        load = Load(client)
        await asyncio.gather(*(load.ask(about(picture(), "Warm up.")) for _ in range(8)))
        return {
            "questions about pictures": await load.run(questions(load, round(30 * share))),
            "conversations": await load.run(conversations(load, round(24 * share))),
            "distinct pictures": await load.run(distinct(load, round(160 * share))),
            "one picture": await load.run(one_picture(load, round(160 * share))),
        }


class Load:
    """Sends requests, and watches the replicas meanwhile."""

    def __init__(self, client: AsyncOpenAI) -> None:
        self._client = client
        self._model = serve.get_deployment_handle("LlavaModel", "llava")
        self._turn = asyncio.Semaphore(CLIENTS)
        self.hits: list[bool] = []

    async def ask(self, messages: Messages, *, tokens: int = 4, again: bool = False) -> str:
        """One answer of this many tokens. `again` marks a request that a cache can help, and counts its hit."""
        async with self._turn:
            answer = await self._client.chat.completions.create(
                model="builtin", messages=messages, max_tokens=tokens, temperature=0, extra_body={"ignore_eos": True}
            )
        assert answer.usage is not None
        details = answer.usage.prompt_tokens_details
        if again:
            self.hits.append(details is not None and (details.cached_tokens or 0) > TEMPLATE)
        return answer.choices[0].message.content or ""

    async def stats(self) -> Sequence[dict[str, int]]:
        """Of each replica's engine."""
        found: Sequence[dict[str, int]] = await self._model.broadcast("stats").results_async(timeout_s=60)
        return found

    async def run(self, requests: Awaitable[object]) -> Result:
        """Runs the requests; returns their hits, their work and the balance."""
        self.hits.clear()
        imbalance: list[float] = []
        over = asyncio.Event()

        async def watch() -> None:
            while not over.is_set():
                busy = [each["running"] + each["waiting"] for each in await self.stats()]
                if sum(busy) >= CLIENTS / 2:
                    imbalance.append(abs(busy[0] - busy[1]) / sum(busy))
                await asyncio.sleep(SAMPLE_S)

        before, start = await self.stats(), time.perf_counter()
        watching = asyncio.create_task(watch())
        await requests
        seconds = time.perf_counter() - start
        over.set()
        await watching
        after = await self.stats()

        def work(name: str) -> list[int]:
            return [now[name] - then[name] for then, now in zip(before, after, strict=True)]

        generated, computed = work("generated_tokens"), work("computed_tokens")
        result = {
            "seconds": round(seconds, 1),
            "computed_prompt_tokens": sum(computed) - sum(generated),
            "larger_share_of_tokens": round(max(generated) / sum(generated), 3),
        }
        if self.hits:
            result["hit_share"] = round(statistics.mean(self.hits), 3)
        if imbalance:
            result["imbalance"] = round(statistics.mean(imbalance), 3)
        return result


async def questions(load: Load, pictures: int, each: int = 4) -> None:
    """Four questions about each picture, in random order, but each after the first about its picture."""
    known = [picture() for _ in range(pictures)]
    await asyncio.gather(*(load.ask(about(one, "Question 0: what is this?")) for one in known))
    later = [(one, number) for one in known for number in range(1, each)]
    random.Random(0).shuffle(later)
    await asyncio.gather(*(load.ask(about(one, f"Question {n}: what is this?"), again=True) for one, n in later))


async def conversations(load: Load, count: int, turns: int = 4) -> None:
    """Conversations of four turns, which begin with different texts."""

    async def one() -> None:
        messages = say([], f"{next(numbers)} is where we begin. " + "The circle is red and the square is blue. " * 20)
        for turn in range(turns):
            answer = await load.ask(messages, again=turn > 0)
            messages = say([*messages, {"role": "assistant", "content": answer}], f"And what of number {turn}?")

    await asyncio.gather(*(one() for _ in range(count)))


async def distinct(load: Load, count: int) -> None:
    """Pictures that nobody has sent before, with answers of 8 to 48 tokens."""
    rng = random.Random(0)
    lengths = [rng.randint(8, 48) for _ in range(count)]
    await asyncio.gather(*(load.ask(about(picture(), "What is this?"), tokens=length) for length in lengths))


async def one_picture(load: Load, count: int) -> None:
    """Questions about one picture, with answers of 8 to 48 tokens."""
    rng, hot = random.Random(0), picture()
    lengths = [rng.randint(8, 48) for _ in range(count)]
    await asyncio.gather(*(load.ask(about(hot, f"Question {n}?"), tokens=tokens) for n, tokens in enumerate(lengths)))


def picture() -> str:
    """One that nobody has sent before."""
    return make_image(next(numbers), (128, 96))


def about(image: str, text: str) -> Messages:
    """A question about a picture."""
    parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def say(before: Messages, text: str) -> Messages:
    """A conversation with one more turn of the user's."""
    return [*before, {"role": "user", "content": text}]


if __name__ == "__main__":
    main()
