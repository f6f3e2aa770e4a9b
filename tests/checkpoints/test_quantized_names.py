"""Quantized files with the names of modules that older releases of transformers gave them, also in their settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_serve import LLM, SamplingParams
from llava_serve.config import EngineOptions
from support.hf_reference import said
from support.hub_spelling import write_json
from support.quantized_files import quantized_folders
from support.scenes import picture

pytestmark = pytest.mark.extended
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder_for(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return quantized_folders(tmp_path_factory.mktemp("quantized"))


def answer(folder: Path) -> Any:
    llm = LLM(str(folder), device="cpu", dtype="float32", engine=EngineOptions(num_threads=1))
    return llm.chat([said("user", "What is it?", picture(97, 140))], SamplingParams(temperature=0, max_new_tokens=8))


def of_transformers_4(name: str) -> str:
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def of_the_modules(name: str) -> str:
    name = name.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head", "lm_head")
    return f"model.{name}" if name.startswith(("vision_tower", "multi_modal_projector")) else name


def written(folder: Path, to: Path, rename: Callable[[str], str], key: str) -> Path:
    """A copy with other names, those of the plain layers in its settings, too."""
    shutil.copytree(folder, to)
    tensors = {rename(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    config = json.loads((to / "config.json").read_text())
    plain = [name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.is_floating_point()]
    packed = ("weight_scale", "SCB", "weight.absmax")
    config["quantization_config"][key] = [
        name for name in plain if not any(f"{name}.{part}" in tensors for part in packed)
    ]
    write_json(to / "config.json", config)
    return to


@pytest.mark.parametrize("rename", [of_transformers_4, of_the_modules])
@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("llava-1.5-llama-fp8", "ignore"),
        ("llava-1.5-llama-4bit", "llm_int8_skip_modules"),
        ("onevision-4bit-skip", "llm_int8_skip_modules"),
        ("llava-1.5-llama-8bit", "llm_int8_skip_modules"),
    ],
)
def test_the_answer_is_the_same(
    kind: str, key: str, rename: Callable[[str], str], folder_for: Any, tmp_path: Path
) -> None:
    folder = folder_for(kind)
    assert answer(written(folder, tmp_path / "copy", rename, key)).token_ids == answer(folder).token_ids
