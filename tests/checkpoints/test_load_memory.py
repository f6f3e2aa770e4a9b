"""What loading takes: the model's own memory, and little beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.hub_spelling import write_json
from support.paths import TESTS
from support.quantized_files import write_bitsandbytes, write_fp8
from support.random_llava import write_llava
from support.tiny_hf import Tiny, write_model

pytestmark = pytest.mark.extended
ALLOWANCE = 1.3
_WIDE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6}
_EXPERTS = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_local_experts": 8}
_SIGLIP: dict[str, Any] = {"tower": "siglip", "strategy": "full"}
FAMILY = {
    "onevision": Tiny("llava_onevision", "qwen2", "hub", text={**_WIDE, "tie_word_embeddings": True}, **_SIGLIP),
    "vip": Tiny("vipllava", "llama", text=_WIDE, config={"vision_feature_layer": (-2, 1, 3)}),
    "granite": Tiny("llava_next", "granite", text=_WIDE, config={"vision_feature_layer": [-3, -1]}, **_SIGLIP),
    "gemma": Tiny("llava", "gemma", text={**_WIDE, "head_dim": 256, "tie_word_embeddings": True}),
    "mixture": Tiny("llava", "mixtral", text=_EXPERTS),
    "adapter": Tiny("llava", "llama", "hub", text=_WIDE),
    "4bit": Tiny("llava", "llama", text=_WIDE, tower_width=64),
    "fp8": Tiny("llava", "llama", text=_WIDE),
}


@pytest.fixture(scope="module", params=["safetensors", "bin", *FAMILY])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """About 620 MB in float16 in the original's layout, in three shards, and 200 MB of each newer kind; an adapter, and
    its base."""
    to: Path = tmp_path_factory.mktemp("large") / request.param
    kind = FAMILY.get(request.param)
    if kind is None:
        return (write_llava(to, hidden=2048, intermediate=5632, layers=6, files=request.param, shards=3),)
    plain = to.parent / "plain"
    write_model(plain, kind)
    assert sum(file.stat().st_size for file in plain.glob("*model*")) > 150e6
    after: dict[str, Callable[[Path, Path], tuple[Path, ...]]] = {"4bit": four_bits, "fp8": fp8, "adapter": adapter}
    return after[request.param](to, plain) if request.param in after else (plain,)


def four_bits(to: Path, plain: Path) -> tuple[Path, ...]:
    write_bitsandbytes(to, plain, 4, torch.float16, skipped=None)
    return (to,)


def fp8(to: Path, plain: Path) -> tuple[Path, ...]:
    write_fp8(to, plain)
    return (to,)


def adapter(to: Path, base: Path) -> tuple[Path, ...]:
    """Factors for all layers of the language model, and its embeddings as a whole."""
    to.mkdir()
    save_file(dict(_factors(base)), to / "adapter_model.safetensors")
    write_json(to / "adapter_config.json", {"r": 8, "lora_alpha": 16, "modules_to_save": ["embed_tokens"]})
    return to, base


def _factors(base: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in base.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            module = f"base_model.model.{name.removesuffix('.weight')}"
            if "language_model" in name and name.endswith("_proj.weight"):
                yield f"{module}.lora_A.weight", torch.randn(8, tensor.shape[1]) * 0.01
                yield f"{module}.lora_B.weight", torch.randn(tensor.shape[0], 8) * 0.01
            elif name.endswith("embed_tokens.weight"):
                yield f"{module}.weight", tensor.clone()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_little_more_than_the_model(folders: tuple[Path, ...], dtype: str) -> None:
    program = TESTS / "support" / "load_memory.py"
    folder, *base = folders
    command: list[str | Path] = [sys.executable, program, folder, dtype, *base]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures = json.loads(done.stdout)
    taken = figures["peak"] - figures["before"]
    assert figures["weights"] <= taken * 1.05  # the peak includes the model
    assert taken < ALLOWANCE * figures["weights"] + figures["largest"]
