"""The tiers are what they claim: the picture tier is light, and nothing of a local run stays behind."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import CONFIG, DEMO_IMAGE, question, replicas

PREPARE = """
import asyncio, sys, time
from deployments.preprocessor import ImagePreprocessor
from llava_serve.config import ImageOptions, ModelOptions
from llava_serve.types import ImagePart, Message, TextPart

image = ImagePart(open(sys.argv[1], "rb").read())
messages = [Message("user", (image, TextPart("What is this?")))]
tier = ImagePreprocessor(ModelOptions(), ImageOptions())
prepared = asyncio.run(tier.prepare(messages, None, time.time() + 60))
assert prepared.num_tokens > 10 and len(prepared.tiles) == 1
print(*sorted(name for name in ("torch", "transformers") if name in sys.modules))
"""


def test_the_picture_tier_works_without_torch_and_transformers() -> None:
    command = [sys.executable, "-c", PREPARE, str(DEMO_IMAGE)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("name", "has_torch"), [("ImagePreprocessor", False), ("Ingress", False), ("LlavaModel", True)]
)
def test_only_the_model_replica_has_torch(client: Any, served: Any, name: str, has_torch: bool) -> None:
    processes = replicas(name, served)
    assert processes
    for process in processes:
        libraries = Path(f"/proc/{process.pid}/maps").read_text()
        assert ("libtorch" in libraries) == has_torch


def test_the_figures_come_to_rays_metrics(
    client: Any, ray_job: None, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    client.chat.completions.create(model="builtin", messages=question("Hello", DEMO_IMAGE.read_bytes()), max_tokens=3)
    [node] = ray.nodes()
    endpoint = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def all_there() -> bool:
        with urllib.request.urlopen(endpoint, timeout=30) as response:
            text = response.read().decode()
        names = ("generated_tokens", "answers", "first_chunk_seconds", "prompts", "images", "prepare_seconds")
        return all(f"ray_llava_{name}" in text for name in names)

    wait_until(all_there)


def test_a_port_in_use_is_one_clear_sentence(served: Any) -> None:
    port = served.url.rsplit(":", 1)[1]
    command = [sys.executable, "-m", "deployments.serve", "--config", str(CONFIG), "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip() == f"Port {port} is in use; choose another with PORT=... or --port."
