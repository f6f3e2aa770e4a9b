"""Tiny models whose weights are quantized in the files, as transformers, llm-compressor and GPTQModel save them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
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


_GROUP, _NIBBLES, _ZERO = 32, 8, 8
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_NOT_IN_4_BITS = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
_FOUR_BITS: dict[str, dict[str, Any]] = {
    "awq": {"zero_point": True, "version": "gemm", "modules_to_not_convert": _NOT_IN_4_BITS},
    "gptq": {
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
        "block_name_to_quantize": "model.language_model.layers",
    },
}


def write_four_bits(folder: Path, plain: Path, method: str) -> None:
    """Writes a model in AWQ's or GPTQ's files: of the language model's layers, each group of 32 inputs of a neuron has
    one scale, and eight numbers lie in one of 32 bits."""
    shutil.copytree(plain, folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if "language_model" in name and name.endswith("_proj.weight"):
            parts = _four_bits(weight.float(), method)
            tensors |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
        else:
            tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": method, "bits": 4, "group_size": _GROUP, **_FOUR_BITS[method]}
    write_json(folder / "config.json", config | {"quantization_config": settings})


def _four_bits(weight: torch.Tensor, method: str) -> dict[str, torch.Tensor]:
    groups = weight.view(len(weight), -1, _GROUP)
    scales = (groups.abs().amax(-1) / (_ZERO - 1)).clamp(min=1e-6).half()
    numbers = ((groups / scales[..., None].float()).round().clamp(-_ZERO, _ZERO - 1) + _ZERO).flatten(1).T
    zeros = torch.full(scales.T.shape, _ZERO)
    scales = scales.T.contiguous()
    if method == "awq":
        return {"qweight": _packed(numbers, 1, _AWQ_ORDER), "qzeros": _packed(zeros, 1, _AWQ_ORDER), "scales": scales}
    groups_of_inputs = torch.arange(len(numbers), dtype=torch.int32) // _GROUP
    packed = {"qweight": _packed(numbers, 0), "qzeros": _packed(zeros - 1, 1)}  # GPTQ's files hold one less
    return packed | {"scales": scales, "g_idx": groups_of_inputs}


def _packed(numbers: torch.Tensor, axis: int, order: Iterable[int] = range(_NIBBLES)) -> torch.Tensor:
    """Eight numbers of 4 bits in each int32, along an axis."""
    lines = numbers.to(torch.int64).movedim(axis, -1)
    eights = lines.reshape(len(lines), -1, _NIBBLES)[..., list(order)]
    packed: torch.Tensor = (eights << torch.arange(0, 32, 4)).sum(-1)
    return packed.to(torch.int32).movedim(-1, axis).contiguous()  # wraps around


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
        elif kind in _FOUR_BITS:
            write_four_bits(folder, plain(model), kind)
        else:
            skipped = ["vision_tower", "multi_modal_projector", "lm_head"] if name.endswith("-skip") else None
            write_bitsandbytes(folder, plain(model), int(kind[0]), dtype, skipped=skipped)
        return folder

    return write
