"""The tiers are what they claim: the picture tier is light, and nothing of a local run stays behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import CONFIG, DEMO_IMAGE

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


def replicas(name: str, ray_dir: str) -> list[psutil.Process]:
    """The processes of a deployment, by the title that Ray gives them; other applications' on the machine left out."""
    title = f"ray::ServeReplica:llava:{name}"
    named = [each for each in psutil.process_iter(["cmdline"]) if title in " ".join(each.info["cmdline"] or ())]
    return [each for each in named if ray_dir in " ".join(each.parent().cmdline())]


@pytest.mark.parametrize(
    ("name", "has_torch"), [("ImagePreprocessor", False), ("Ingress", False), ("LlavaModel", True)]
)
def test_only_the_model_replica_has_torch(client: Any, served: Any, name: str, has_torch: bool) -> None:
    processes = replicas(name, str(served.log.parent))
    assert processes
    for process in processes:
        libraries = Path(f"/proc/{process.pid}/maps").read_text()
        assert ("libtorch" in libraries) == has_torch


def test_a_port_in_use_is_one_clear_sentence(served: Any) -> None:
    port = served.url.rsplit(":", 1)[1]
    command = [sys.executable, "-m", "deployments.serve", "--config", str(CONFIG), "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip() == f"Port {port} is in use; choose another with PORT=... or --port."
