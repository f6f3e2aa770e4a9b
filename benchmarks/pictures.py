"""The picture tier on 12-megapixel JPEGs: pictures per second, time to one more replica, and what a hop costs.

    python -m benchmarks.pictures [--rounds 5] [--pictures 40] [--output benchmarks/results/pictures.json]

The application of `serve_config.yaml` runs on a Ray cluster of its own, and its health is polled over HTTP meanwhile.
Beside it stand three more picture tiers, which get the same pictures through handles, in turn: of one replica, of two,
and of one that decodes in its own process and not in a child of it.
`hops` is a call between two replicas by each of Serve's two transports: by reference (Ray's object store) or by value
(gRPC).
"""

from __future__ import annotations

import io
import json
import os
import statistics
import threading
import time
import urllib.request
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image
from ray import serve
from ray.serve.handle import DeploymentHandle

from benchmarks.machine import machine
from benchmarks.options import make_parser, parse
from benchmarks.ray_job import ray_job
from deployments.preprocessor import ImagePreprocessor
from deployments.tools.config import read_config
from deployments.tools.local_cluster import free_port, local_cluster
from llava_serve.config import ImageOptions, ModelOptions
from llava_serve.processor import Processor
from llava_serve.types import ImagePart, Message, PreparedPrompt, TextPart

CONFIG = Path(__file__).resolve().parent.parent / "serve_config.yaml"
FREE = {"num_cpus": 0.01}  # of Ray's logical CPUs: the application itself takes all of a machine of two cores


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=40, help="per round")
    parser.add_argument("--output", type=Path)
    parser.set_defaults(size=(4000, 3000), hops=100)
    options = parse(parser, rounds=1, pictures=4, size=(400, 300), hops=2)
    with local_cluster(read_config(CONFIG, port=free_port())) as running, ray_job(running.ray_address):
        report = {
            "machine": machine(),
            "rate": rate(running.url, options.rounds, options.pictures, options.size),
            "one_more_replica": one_more_replica(options.rounds),
            "hops": hops(options.hops),
        }
    text = json.dumps(report, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


def photographs(size: tuple[int, int], count: int = 4) -> list[bytes]:
    """JPEGs as a telephone takes them: at 12 megapixels about 3 MB."""
    width, height = size
    rng = np.random.default_rng(0)
    photos = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (75, 100, 3), dtype=np.uint8))
        soft = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
        grain = rng.normal(0, 4, (height, width, 1)).astype(np.float32)
        file = io.BytesIO()
        Image.fromarray(np.clip(soft + grain, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        photos.append(file.getvalue())
    return photos


class InProcessPreprocessor(ImagePreprocessor):
    """The picture tier as it would be without child processes."""

    def __init__(self, model: ModelOptions, images: ImageOptions) -> None:
        super().__init__(model, images)
        self._processor.processor = Processor(self._processor.processor.spec, images)


TIERS: dict[str, tuple[type[ImagePreprocessor], int]] = {
    "1": (ImagePreprocessor, 1),
    "2": (ImagePreprocessor, 2),
    "1 in process": (InProcessPreprocessor, 1),
}
"""By the number of replicas."""


def tier(name: str, replicas: int, kind: type[ImagePreprocessor] = ImagePreprocessor) -> DeploymentHandle:
    """Runs a picture tier of its own, and returns when all its replicas do."""
    deployment = serve.deployment(kind, name="ImagePreprocessor").options(
        num_replicas=replicas, max_ongoing_requests=64, ray_actor_options=FREE
    )
    every = ImageOptions(cache_bytes=0)  # every picture is decoded, repeated ones too
    return serve.run(deployment.bind(ModelOptions(), every), name=name, route_prefix=None)


def processes(name: str) -> list[psutil.Process]:
    """The replicas of a tier, by the title that Ray gives them, and their children; only those of our own Ray."""
    title = f"ray::ServeReplica:{name}:ImagePreprocessor"
    replicas = [each for each in psutil.Process().children(recursive=True) if title in " ".join(each.cmdline())]
    return replicas + [child for replica in replicas for child in replica.children()]


def rate(url: str, rounds: int, pictures: int, size: tuple[int, int]) -> dict[str, Any]:
    """Pictures per second of the tiers; rounds alternate, so that a slow minute hits all."""
    photos = photographs(size)
    prompts = [[Message("user", (ImagePart(photo), TextPart("What is this?")))] for photo in photos]
    handles = {name: tier(name, replicas, kind) for name, (kind, replicas) in TIERS.items()}
    rates: dict[str, list[float]] = {name: [] for name in TIERS}
    spent: dict[str, list[float]] = {name: [] for name in TIERS}
    for handle in handles.values():
        _prepare(handle, prompts, 8)
    with polled(f"{url}/health") as idle:
        time.sleep(5)
    with polled(f"{url}/health") as busy:
        for _ in range(rounds):
            for name, handle in handles.items():
                before, start = _processor_time(name), time.perf_counter()
                _prepare(handle, prompts, pictures)
                rates[name].append(pictures / (time.perf_counter() - start))
                spent[name].append((_processor_time(name) - before) / pictures)
    for name in handles:
        serve.delete(name)
    ratios = {name: [other / one for one, other in zip(rates["1"], rates[name], strict=True)] for name in TIERS}
    return {
        "picture_bytes": [len(photo) for photo in photos],
        "pictures_per_s": {name: _rounded(each, 2) for name, each in rates.items()},
        "two_over_one_by_round": _rounded(ratios["2"], 2),
        "two_over_one": round(statistics.median(ratios["2"]), 2),
        "in_process_over_one_by_round": _rounded(ratios["1 in process"], 2),
        "processor_ms_per_picture": {name: _rounded(each, 1, 1000) for name, each in spent.items()},
        "health_ms": {"idle": _percentiles(idle), "meanwhile": _percentiles(busy)},
    }


def _prepare(handle: DeploymentHandle, prompts: Sequence[list[Message]], count: int) -> None:
    """Sends this many pictures, eight at once."""

    def one(number: int) -> None:
        prompt = prompts[number % len(prompts)]
        prepared = handle.prepare.remote(prompt, None, time.time() + 600).result(timeout_s=600)
        assert len(prepared.tiles) == 1

    with ThreadPoolExecutor(8) as callers:
        list(callers.map(one, range(count)))


def _processor_time(name: str) -> float:
    times = [each.cpu_times() for each in processes(name)]
    return float(sum(each.user + each.system for each in times))


@contextmanager
def polled(url: str, every_s: float = 0.2) -> Iterator[list[float]]:
    """Seconds of each answer of a URL while the block runs, asked for again and again."""
    times: list[float] = []
    stop = threading.Event()

    def poll() -> None:
        while True:
            start = time.perf_counter()
            with urllib.request.urlopen(url, timeout=60) as response:
                assert response.status == 200
                response.read()
            times.append(time.perf_counter() - start)
            if stop.wait(every_s):
                return

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield times
    finally:
        stop.set()
        thread.join()


def one_more_replica(rounds: int) -> dict[str, Any]:
    """Seconds from asking for a replica to its being ready, and what it and its child have spent by then."""
    ready, processor, memory = [], [], []
    for round_ in range(rounds):
        name = f"new{round_}"
        start = time.perf_counter()
        tier(name, 1)
        ready.append(time.perf_counter() - start)
        processor.append(_processor_time(name))
        memory.append(sum(each.memory_info().rss for each in processes(name)) / 2**20)
        serve.delete(name)
    return {
        "ready_s": _rounded(ready, 2),
        "processor_s": _rounded(processor, 2),
        "resident_mb": _rounded(memory, 0),
    }


class Far:
    """Stands in for the picture tier and the model, and does nothing."""

    async def take(self, messages: Sequence[Message]) -> int:
        """Receives a picture."""
        return len(messages)

    async def give(self, tiles: int) -> PreparedPrompt:
        """Returns tiles."""
        return PreparedPrompt(np.zeros(600, np.int32), tiles=(np.ones((tiles, 336, 336, 3), np.uint8),))

    async def answer(self, prepared: PreparedPrompt) -> AsyncGenerator[int]:
        """Receives tiles, and starts a stream."""
        yield len(prepared.token_ids)

    async def spent(self) -> float:
        """Processor seconds of this process."""
        return time.process_time()


class Near:
    """Stands in for the ingress."""

    def __init__(self, far: DeploymentHandle) -> None:
        self._far = far

    async def measure(self, what: str, by_reference: bool, count: int) -> tuple[list[float], float]:
        """Seconds of each call, and the processor seconds of both ends per call."""
        far = self._far.options(_by_reference=by_reference)
        picture = [Message("user", (ImagePart(os.urandom(3_100_000)), TextPart("What is this?")))]
        prepared = {tiles: await Far().give(tiles) for tiles in (1, 5)}
        calls: dict[str, Callable[[], Any]] = {
            "picture in": lambda: far.take.remote(picture),
            "1 tile out": lambda: far.give.remote(1),
            "5 tiles out": lambda: far.give.remote(5),
            "1 tile in": lambda: anext(far.answer.options(stream=True).remote(prepared[1])),
            "5 tiles in": lambda: anext(far.answer.options(stream=True).remote(prepared[5])),
        }
        for _ in range(5):
            await calls[what]()
        times = []
        spent = time.process_time() + await far.spent.remote()
        for _ in range(count):
            start = time.perf_counter()
            await calls[what]()
            times.append(time.perf_counter() - start)
        return times, (time.process_time() + await far.spent.remote() - spent) / count


def hops(count: int) -> dict[str, Any]:
    """A call between replicas by each transport, one after the other."""
    limit = {"env_vars": {"RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(64 << 20)}}
    place = {"ray_actor_options": FREE | {"runtime_env": limit}}
    far = serve.deployment(Far).options(**place).bind()
    near = serve.run(serve.deployment(Near).options(**place).bind(far), name="hops", route_prefix=None)
    found: dict[str, Any] = {}
    for what in ("picture in", "1 tile out", "5 tiles out", "1 tile in", "5 tiles in"):
        found[what] = {}
        for name, by_reference in (("by reference", True), ("by value", False)):
            times, spent = near.measure.remote(what, by_reference, count).result(timeout_s=600)
            found[what][name] = _percentiles(times) | {"processor_ms": round(1000 * spent, 2)}
    return found


def _rounded(values: Sequence[float], digits: int, factor: float = 1) -> list[float]:
    return [round(factor * value, digits) for value in values]


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{q}": round(1000 * float(np.percentile(seconds, q)), 2) for q in (50, 95, 99)}


if __name__ == "__main__":
    main()
