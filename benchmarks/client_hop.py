"""The cost of the ingress for `LlavaClient`, compared with direct calls of the two tiers: one JSON object.

    python -m benchmarks.client_hop [--rounds 40]

Both ways ask for one token about the same pictures, in turns, on one running application, so that other load on the
machine affects both equally. The pictures have random pixels; their bytes are the payload of the hop.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import statistics
import time
import uuid
from contextlib import aclosing
from pathlib import Path
from typing import Any

from PIL import Image
from ray import serve

from benchmarks.options import make_parser, parse
from benchmarks.ray_job import ray_job
from deployments.backend import HandleBackend
from deployments.client import LlavaClient
from deployments.tools.config import read_config
from deployments.tools.local_cluster import free_port, local_cluster
from llava_serve import Message, SamplingParams
from llava_serve.types import ImagePart, TextPart

CONFIG = Path(__file__).resolve().parent.parent / "serve_config.yaml"
ONE = SamplingParams(temperature=0, max_new_tokens=1)
SIDES = {"64 x 64": 64, "640 x 640": 640, "2000 x 2000": 2000}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parse(parser, rounds=1).rounds
    with local_cluster(read_config(CONFIG, port=free_port())) as running, ray_job(running.ray_address):
        print(json.dumps(asyncio.run(measure(rounds)), indent=2))


async def measure(rounds: int) -> dict[str, Any]:
    """Seconds per question, by picture and way."""
    client = LlavaClient()
    tiers = [serve.get_deployment_handle(tier, "llava") for tier in ("ImagePreprocessor", "LlavaModel")]
    backend = HandleBackend("builtin", *tiers)

    async def through_the_ingress(messages: list[Message]) -> None:
        await client.chat_async(messages, ONE)

    async def straight_to_the_tiers(messages: list[Message]) -> None:
        deadline = time.time() + 120
        prepared = await backend.prepare(messages, conv_mode=None, deadline=deadline)
        chunks = backend.generate(prepared, ONE, request_id=uuid.uuid4().hex, deadline=deadline, priority=0)
        async with aclosing(chunks):
            async for _ in chunks:
                pass

    ways = {"straight": straight_to_the_tiers, "ingress": through_the_ingress}
    result: dict[str, Any] = {"cpu_cores": os.cpu_count(), "rounds": rounds}
    for name, side in SIDES.items():
        image = picture(side)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds + 2):  # the first two warm up
            for way, ask in ways.items():
                messages = [Message("user", (ImagePart(image), TextPart(f"Question {number} {way}?")))]
                start = time.perf_counter()
                await ask(messages)
                if number >= 2:
                    seconds[way].append(time.perf_counter() - start)
        median = {way: 1000 * statistics.median(each) for way, each in seconds.items()}
        result[name] = {
            "picture_kb": len(image) // 1000,
            **{f"{way}_ms_p50": round(ms, 1) for way, ms in median.items()},
            "hop_ms_p50": round(median["ingress"] - median["straight"], 1),
        }
    return result


def picture(side: int) -> bytes:
    """A JPEG that does not compress well."""
    file = io.BytesIO()
    Image.frombytes("RGB", (side, side), os.urandom(side * side * 3)).save(file, "JPEG", quality=90)
    return file.getvalue()


if __name__ == "__main__":
    main()
