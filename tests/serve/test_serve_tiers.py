"""Only the model tier imports torch, Ray exports the metrics, and a port in use is reported."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from support.cluster import replicas
from support.demo import DEMO_IMAGE, question
from support.paths import CONFIG

EXPORTED_AFTER_S = 12
"""Ray's processes export their metrics every ten seconds."""

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


@pytest.mark.extended
def test_ray_exports_the_metrics(client: Any, ray_job: None, wait_until: Callable[[Callable[[], bool]], None]) -> None:
    [node] = ray.nodes()
    endpoint = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def metrics() -> Counter[str]:
        """Of this application, over all replicas: sums of counters, and the counts of histograms."""
        with urllib.request.urlopen(endpoint, timeout=30) as response:
            families = text_string_to_metric_families(response.read().decode())
        found: Counter[str] = Counter()
        for sample in (sample for family in families for sample in family.samples):
            if sample.labels.get("application") == "llava" and sample.name.startswith("ray_llava_"):
                reason = sample.labels.get("finish_reason", "")
                found[f"{sample.name.removeprefix('ray_llava_')} {reason}".strip()] += int(sample.value)
        return found

    def ask(max_tokens: int) -> None:
        messages = question("Hello", DEMO_IMAGE.read_bytes(), DEMO_IMAGE.read_bytes())
        client.chat.completions.create(
            model="builtin", messages=messages, max_tokens=max_tokens, extra_body={"ignore_eos": True}
        )

    ask(1)
    time.sleep(EXPORTED_AFTER_S)  # earlier requests are exported now
    before = metrics()
    ask(3)
    ask(5)
    expected = {
        "generated_tokens_total": 8,
        "answers_total length": 2,
        "first_chunk_seconds_count": 2,
        "prompts_total": 2,
        "images_total": 4,
        "prepare_seconds_count": 2,
    }
    wait_until(lambda: all((metrics() - before)[name] >= more for name, more in expected.items()))
    now = metrics()
    assert {name: now[name] - before[name] for name in expected} == expected


def test_a_port_in_use_is_one_clear_sentence(served: Any) -> None:
    port = served.url.rsplit(":", 1)[1]
    command = [sys.executable, "-m", "deployments.tools.serve", "--config", str(CONFIG), "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip() == f"Port {port} is in use; choose another with --port."
