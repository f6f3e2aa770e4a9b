"""Random checkpoints of any size in the original layout, beside the golden tower and with the golden tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from support.paths import CHECKPOINTS

TOWER_WIDTH = 48


def write_llava(
    folder: Path,
    *,
    hidden: int,
    intermediate: int,
    layers: int,
    files: Literal["safetensors", "bin"] = "safetensors",
    shards: int = 1,
    seed: int = 0,
) -> Path:
    """Writes a LLaVA 1.5 with a random float16 decoder of `layers` layers; weights are scaled so that signals live."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((CHECKPOINTS / "llava-v1.5-tiny" / "config.json").read_text())
    heads = hidden // 64
    config |= {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    config |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    config |= {"mm_vision_tower": str(CHECKPOINTS / "clip-vit-tiny-56")}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copy(CHECKPOINTS / "llava-v1.5-tiny" / name, folder / name)
    torch.manual_seed(seed)
    shapes = dict(_shapes(config))
    names = list(shapes)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = _file_name(files, i, shards)
        part = {
            name: _random(name, shapes[name])
            for name in names[i * len(names) // shards : (i + 1) * len(names) // shards]
        }
        if files == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        index = "model.safetensors.index.json" if files == "safetensors" else "pytorch_model.bin.index.json"
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _file_name(files: str, i: int, shards: int) -> str:
    stem, suffix = ("model", "safetensors") if files == "safetensors" else ("pytorch_model", "bin")
    return f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}" if shards > 1 else f"{stem}.{suffix}"


def _shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"model.layers.{layer}.self_attn.{name}.weight", (hidden, hidden)
        for name in ("gate_proj", "up_proj"):
            yield f"model.layers.{layer}.mlp.{name}.weight", (intermediate, hidden)
        yield f"model.layers.{layer}.mlp.down_proj.weight", (hidden, intermediate)
        yield f"model.layers.{layer}.input_layernorm.weight", (hidden,)
        yield f"model.layers.{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)
    for layer, width in ((0, TOWER_WIDTH), (2, hidden)):
        yield f"model.mm_projector.{layer}.weight", (hidden, width)
        yield f"model.mm_projector.{layer}.bias", (hidden,)


def _random(name: str, shape: tuple[int, ...]) -> Tensor:
    if len(shape) == 1:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.float16)
    scale = 1.0 if "embed_tokens" in name else shape[1] ** -0.5
    return torch.empty(shape).normal_(0, scale).half()
