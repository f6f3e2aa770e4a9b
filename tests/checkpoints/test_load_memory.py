"""What loading takes: the model's own memory, and little beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlavaForConditionalGeneration

from support.paths import TESTS
from support.quantized_files import write_fp8
from support.random_llava import write_llava
from support.tiny_hf import FAMILY, MODELS, Tiny, write_model

pytestmark = pytest.mark.extended
ALLOWANCE = 1.3
_WIDE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "tie_word_embeddings": True}
_EXPERTS = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_local_experts": 8}
_LARGE = {"hidden": 2048, "intermediate": 5632, "layers": 6, "shards": 3}


def wide(tiny: Tiny) -> Tiny:
    """The same kind of model with about 100 million parameters."""
    return replace(tiny, text=tiny.text | _WIDE)


PLAIN = {
    "plain": replace(deep := wide(MODELS["llava-1.5-llama"]), text=deep.text | {"num_hidden_layers": 12}),
    "onevision": wide(FAMILY["onevision-hub"]),
    "vip": wide(FAMILY["vip-llava-hub"]),
    "granite": wide(FAMILY["granite-vision"]),
    "gemma": wide(FAMILY["llava-gemma"]),
    "mixture": Tiny("llava", "mixtral", text=_EXPERTS),
}
EVERY, HALF = ("float32", "bfloat16", "float16"), ("bfloat16",)
CASES = {
    **dict.fromkeys(("safetensors", "bin", "onevision", "mixture"), EVERY),
    **dict.fromkeys(("vip", "granite", "gemma", "fp8"), HALF),
    "adapter": ("float32", "bfloat16"),
}
"""The precisions that a kind is loaded in. Not 4-bit files: bitsandbytes packs them for a CPU at the first call, and
what it frees between the packed layers stays with the process, more in some runs than in others."""


@pytest.fixture(scope="module")
def folder_of_kind(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes a model once: 620 MB in float16 in the original's layout, in three shards; else 200 or 400."""
    root = tmp_path_factory.mktemp("large")

    @cache
    def write(kind: str) -> Path:
        folder = root / kind
        if kind in PLAIN:
            write_model(folder, PLAIN[kind])
        elif kind == "adapter":
            write_adapter(folder, write("plain"))
        elif kind == "fp8":
            write_fp8(folder, write("plain"))
        else:
            write_llava(folder, files="bin" if kind == "bin" else "safetensors", **_LARGE)
        return folder

    return write


def write_adapter(folder: Path, base: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float16)
    adapted: Any = get_peft_model(model, LoraConfig(r=64, lora_alpha=16, target_modules="all-linear"))
    adapted.save_pretrained(folder)


@pytest.mark.parametrize(("kind", "dtype"), [(kind, dtype) for kind, each in CASES.items() for dtype in each])
def test_loading_takes_little_more_than_the_model(kind: str, dtype: str, folder_of_kind: Callable[[str], Path]) -> None:
    options = {"model_base": str(folder_of_kind("plain"))} if kind == "adapter" else {}
    program = TESTS / "support" / "load_memory.py"
    command = [sys.executable, str(program), str(folder_of_kind(kind)), dtype, json.dumps(options)]
    figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    taken = figures["peak"] - figures["before"]
    assert figures["weights"] > 40e6
    assert figures["weights"] <= taken * 1.05  # the peak includes the model
    assert taken < ALLOWANCE * figures["weights"] + figures["largest"]
