"""Tiny models whose weights are quantized in the files, as transformers and llm-compressor save them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from support.hub_spelling import write_json
from support.tiny_hf import FAMILY, MODELS, Tiny, write_model

# bitsandbytes takes 64 weights of a row together.
PLAIN: dict[str, Tiny] = {
    name: replace(tiny, text={**tiny.text, "intermediate_size": 128}, tower_width=64)
    for name, tiny in (MODELS | FAMILY).items()
    if name in ("llava-1.5-llama", "llava-next-mistral", "onevision", "vip-llava-hub")
}

_FP8 = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["re:.*vision_tower.*", "re:.*multi_modal_projector.*", "lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "strategy": "token",
                "symmetric": True,
                "dynamic": True,
            },
        }
    },
}
_FP8_LARGEST = 448.0


def write_bitsandbytes(folder: Path, plain: Path, bits: int, dtype: torch.dtype, *, skipped: list[str] | None) -> None:
    """Writes a model as `save_pretrained` does in 4 or 8 bits.

    Args:
        folder: to write.
        plain: holds the same model without quantization.
        bits: 4 or 8.
        dtype: of what is not quantized.
        skipped: modules that are not quantized; transformers' choice by default.
    """
    settings: dict[str, Any] = {"load_in_8bit": True}
    if bits == 4:
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        settings["bnb_4bit_compute_dtype"] = dtype
    config = BitsAndBytesConfig(**settings, llm_int8_skip_modules=skipped)
    model = AutoModelForImageTextToText.from_pretrained(
        plain, quantization_config=config, dtype=dtype, device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    for path in plain.iterdir():
        if path.suffix != ".safetensors" and not (folder / path.name).exists():
            shutil.copy(path, folder)


def write_fp8(folder: Path, plain: Path) -> None:
    """Writes a model as llm-compressor does: FP8 with a scale for each output channel, in the language model's layers
    without the head. Their input is rounded to FP8 per token while they compute."""
    shutil.copytree(plain, folder)
    tensors = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if "language_model" in name and name.endswith("_proj.weight"):
            scale = weight.float().abs().amax(1, keepdim=True) / _FP8_LARGEST
            tensors[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
            tensors[name.replace("weight", "weight_scale")] = scale.half()
        else:
            tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"quantization_config": _FP8})


def quantized_folders(root: Path) -> Callable[..., Path]:
    """Writes a quantized model once, when it is first asked for by its name: of a model, and how it is quantized."""

    @cache
    def plain(name: str) -> Path:
        write_model(root / name, PLAIN[name])
        return root / name

    @cache
    def write(name: str, dtype: torch.dtype = torch.float32) -> Path:
        model, _, kind = name.removesuffix("-skip").rpartition("-")
        folder = root / str(dtype) / name
        if kind == "fp8":
            write_fp8(folder, plain(model))
        else:
            skipped = ["vision_tower", "multi_modal_projector", "lm_head"] if name.endswith("-skip") else None
            write_bitsandbytes(folder, plain(model), int(kind[0]), dtype, skipped=skipped)
        return folder

    return write
