"""What loading takes: the model's own memory, and little beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import TESTS
from support.random_llava import write_llava
from support.tiny_hf import Tiny, write_model

ALLOWANCE = 1.3
_WIDE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "tie_word_embeddings": True}
_EXPERTS = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_local_experts": 8}
NEWER = {
    "onevision": Tiny("llava_onevision", "qwen2", "hub", tower="siglip", strategy="full", text=_WIDE),
    "mixture": Tiny("llava", "mixtral", text=_EXPERTS),
}


@pytest.fixture(scope="module", params=["safetensors", "bin", *NEWER])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 620 MB in float16 in the original's layout, in three shards, and 200 MB of each newer kind."""
    to: Path = tmp_path_factory.mktemp("large") / request.param
    if request.param in NEWER:
        write_model(to, NEWER[request.param])
        return to
    return write_llava(to, hidden=2048, intermediate=5632, layers=6, files=request.param, shards=3)


@pytest.mark.extended
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_loading_takes_little_more_than_the_model(folder: Path, dtype: str) -> None:
    assert sum(file.stat().st_size for file in folder.glob("*model*")) > 150e6
    program = TESTS / "support" / "load_memory.py"
    done = subprocess.run([sys.executable, program, folder, dtype], check=True, capture_output=True, text=True)
    figures = json.loads(done.stdout)
    taken = figures["peak"] - figures["before"]
    assert figures["weights"] <= taken * 1.05  # the peak includes the model
    assert taken < ALLOWANCE * figures["weights"] + figures["largest"]
