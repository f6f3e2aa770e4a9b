"""Only the model tier imports torch, Ray exports the metrics, and a port in use is reported."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from support.cluster import replicas
from support.dashboard import dashboard_series
from support.demo import DEMO_IMAGE, question
from support.paths import CONFIG

EXPORTED_AFTER_S = 12
"""Ray's processes export their metrics every ten seconds."""

RARE = {
    f"ray_llava_{name}_total"
    for name in (
        "admission_refusals",
        "decode_processes_ended",
        "feature_cache_hits",
        "preemptions",
        "requests_aborted",
        "requests_expired",
    )
}
"""Ray exports a series with its first value, and these requests give none."""

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
def test_ray_exports_the_metrics(
    client: Any, served: Any, ray_job: None, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    [node] = ray.nodes()
    endpoint = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def metrics() -> Counter[str]:
        """Of this application, over all replicas: sums of counters, and the counts of histograms."""
        with urllib.request.urlopen(endpoint, timeout=30) as response:
            families = list(text_string_to_metric_families(response.read().decode()))
        exported.update(family.name for family in families)
        found: Counter[str] = Counter()
        for sample in (sample for family in families for sample in family.samples):
            if sample.labels.get("application") == "llava" and sample.name.startswith(("ray_llava_", "ray_vllm_")):
                tags = [sample.labels[tag] for tag in ("finish_reason", "finished_reason") if tag in sample.labels]
                found[" ".join([sample.name.removeprefix("ray_"), *tags])] += int(sample.value)
                if sample.name.startswith("ray_vllm_"):
                    assert sample.labels["model_name"] == "builtin"
        return found

    def ask(max_tokens: int) -> None:
        messages = question("Hello", DEMO_IMAGE.read_bytes(), DEMO_IMAGE.read_bytes())
        client.chat.completions.create(
            model="builtin", messages=messages, max_tokens=max_tokens, extra_body={"ignore_eos": True}
        )

    exported: set[str] = set()
    expected = {
        "llava_output_tokens_total": 8,
        "vllm_generation_tokens_total": 8,
        "llava_choices_total length": 2,
        "vllm_request_success_total length": 2,
        "llava_time_to_first_token_seconds_count": 2,
        "vllm_time_to_first_token_seconds_count": 2,
        "llava_prompts_prepared_total": 2,
        "llava_images_prepared_total": 4,
        "llava_tile_cache_queries_total": 4,
        "llava_prepare_seconds_count": 2,
    }

    def counts() -> dict[str, int]:
        now = metrics()
        return {name: now[name] for name in expected}

    ask(1)
    before, earlier = counts(), None
    while before != earlier:  # until earlier requests are exported
        time.sleep(EXPORTED_AFTER_S)
        before, earlier = counts(), before
    ask(3)
    ask(5)
    wait_until(lambda: all(now >= before[name] + expected[name] for name, now in counts().items()))
    assert {name: now - before[name] for name, now in counts().items()} == expected
    missing = {name for name in dashboard_series() if re.sub("_(total|bucket|sum|count)$", "", name) not in exported}
    assert missing <= RARE
    page = httpx.get(f"{served.url}/metrics", timeout=30).text
    assert "llava_time_to_first_token_seconds_count" in page
    assert 'vllm:request_success_total{finished_reason="length",model_name="builtin"}' in page


def test_a_port_in_use_is_one_clear_sentence(served: Any) -> None:
    port = served.url.rsplit(":", 1)[1]
    command = [sys.executable, "-m", "deployments.tools.serve", "--config", str(CONFIG), "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip() == f"Port {port} is in use; choose another with --port."
