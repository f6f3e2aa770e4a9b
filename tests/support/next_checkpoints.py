"""Tiny random checkpoints in the layout of the LLaVA-NeXT repository, with the ids, canvases and tiles of real ones.

Their tensors are those that the golden cases in `golden/next` were made from, byte for byte (`DIGESTS`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from support import tiny_tokenizers

HIDDEN, TOWER_HIDDEN, TOWER_LAYERS = 64, 32, 3
SIDES = {"siglip": 384, "clip": 336}
TOWER_FOLDERS = {"siglip": "siglip-so400m-patch14-384", "clip": "clip-vit-large-patch14-336"}
DIGESTS = {
    "llava-onevision-qwen2-7b-ov": "e5b167f1",
    "llava-onevision-qwen2-0.5b-ov": "e164a2d4",
    "llama3-llava-next-8b": "91348e9f",
    "llava-next-72b": "2f5bf9d3",
    "llava-siglip-vicuna-7b": "65069be2",
}
"""How the SHA-256 of each `model.safetensors` begins."""

_TRAINED = {"mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model"}
_ONEVISION = _TRAINED | {
    "model_type": "llava",
    "image_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)],
    "mm_patch_merge_type": "spatial_unpad",
    "mm_newline_position": "one_token",
    "mm_resampler_type": None,
    "mm_spatial_pool_mode": "bilinear",
}
_NEXT = _TRAINED | {
    "unfreeze_mm_vision_tower": True,
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "mm_patch_merge_type": "spatial_unpad",
}
_QWEN = {
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_window": 131072,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
_QWEN_ENDS = {"eos_token_id": [151645, 151643], "bos_token_id": 151643, "pad_token_id": 151643}


@dataclass(frozen=True)
class Next:
    """One checkpoint.

    Attributes:
        text_type, vocab_size, text: of the language model's config.
        architecture, config: of config.json, beside the language model's keys.
        tokenizer: makes it.
        tower: `siglip` or `clip`.
        tower_inside: the checkpoint has the tower's weights, which differ from the folder's.
        newline: it has a newline feature.
        generation: of generation_config.json.
    """

    text_type: str
    vocab_size: int
    architecture: str
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    tower: str
    text: dict[str, Any]
    config: dict[str, Any]
    tower_inside: bool = True
    newline: bool = True
    generation: dict[str, Any] = field(default_factory=dict)


CHECKPOINTS = {
    "llava-onevision-qwen2-7b-ov": Next(
        "qwen2",
        152064,
        "LlavaQwenForCausalLM",
        tiny_tokenizers.qwen,
        "siglip",
        _QWEN,
        _ONEVISION,
        generation=_QWEN_ENDS,
    ),
    "llava-onevision-qwen2-0.5b-ov": Next(
        "qwen2",
        151936,
        "LlavaQwenForCausalLM",
        tiny_tokenizers.qwen,
        "siglip",
        _QWEN | {"sliding_window": 32768, "tie_word_embeddings": True},
        _ONEVISION | {"model_type": "llava_qwen", "image_grid_pinpoints": "(1x1),...,(6x6)"},
        generation=_QWEN_ENDS,
    ),
    "llama3-llava-next-8b": Next(
        "llama",
        128256,
        "LlavaLlamaForCausalLM",
        tiny_tokenizers.llama_3,
        "clip",
        {
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
        _NEXT | {"model_type": "llava_llama"},
        generation={"eos_token_id": [128001, 128009], "bos_token_id": 128000},
    ),
    "llava-next-72b": Next(
        "qwen2",
        152064,
        "LlavaQwenForCausalLM",
        tiny_tokenizers.qwen,
        "clip",
        _QWEN,
        _NEXT | {"model_type": "llava_qwen"},
        generation=_QWEN_ENDS,
    ),
    "llava-siglip-vicuna-7b": Next(
        "llama",
        32000,
        "LlavaLlamaForCausalLM",
        tiny_tokenizers.llama,
        "siglip",
        {"max_position_embeddings": 4096},
        {"model_type": "llava_llama", "image_aspect_ratio": "pad"},
        tower_inside=False,
        newline=False,
    ),
}


def write_next(parent: Path, name: str, one: Next | None = None) -> Path:
    """Writes a checkpoint, and beside it the folder of its tower: that of this name in `CHECKPOINTS`, or another."""
    one, folder = one or CHECKPOINTS[name], parent / name
    folder.mkdir(parents=True)
    tower = write_tower(parent, one.tower)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2} | {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    text = AutoConfig.for_model(one.text_type, vocab_size=one.vocab_size, **sizes | one.text)
    weights = dict(randomized(AutoModelForCausalLM.from_config(text)).state_dict())
    if text.tie_word_embeddings:
        del weights["lm_head.weight"]
    weights |= _projector(newline=one.newline)
    if one.tower_inside:
        weights |= _trained_tower(tower, one.tower)
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    _write(folder / "config.json", _config(text.to_dict(), one, tower))
    if one.generation:
        _write(folder / "generation_config.json", one.generation)
    one.tokenizer().save_pretrained(folder)
    return folder


def write_tower(parent: Path, kind: str) -> Path:
    """Writes a tower's folder as OpenAI's and Google's are: both halves of the model, and the processor."""
    folder, side = parent / TOWER_FOLDERS[kind], SIDES[kind]
    if folder.exists():
        return folder
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision: dict[str, Any] = {
        "hidden_size": TOWER_HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": TOWER_LAYERS,
    } | {
        "num_attention_heads": 4,
        "image_size": side,
        "patch_size": 14,
    }
    processor: Any
    model: nn.Module
    torch.manual_seed(11)  # some of the first values are random, and stay
    if kind == "siglip":
        model = SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
        processor = SiglipImageProcessorPil(size={"height": side, "width": side})
    else:
        vision |= {"hidden_act": "quick_gelu", "projection_dim": 768}
        model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=32))
        processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    randomized(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def randomized(model: Any) -> Any:
    """The model in float16, its weights random and of a size at which signals live."""
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 1.5 / parameter[0].numel() ** 0.5)
        elif parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.half()


def _projector(*, newline: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    weights: dict[str, Tensor] = {}
    for layer, width in ((0, TOWER_HIDDEN), (2, HIDDEN)):
        weight = (torch.randn(HIDDEN, width, generator=generator) * 0.2).half()
        weights[f"model.mm_projector.{layer}.weight"] = weight
        weights[f"model.mm_projector.{layer}.bias"] = torch.randn(HIDDEN, generator=generator).half() * 0.1
    if newline:
        weights["model.image_newline"] = torch.randn(HIDDEN, generator=generator).half() * 0.5
    return weights


def _trained_tower(folder: Path, kind: str) -> dict[str, Tensor]:
    """The folder's weights, changed by training; of SigLIP without the last layer and the head, which the original
    deletes."""
    deleted = (".head.", f".layers.{TOWER_LAYERS - 1}.") if kind == "siglip" else ()
    return {
        f"model.vision_tower.vision_tower.{name}": (tensor * 1.25 if tensor.ndim > 1 else tensor).clone()
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name.startswith("vision_model.") and not any(part in name for part in deleted)
    }


def _config(text: dict[str, Any], one: Next, tower: Path) -> dict[str, Any]:
    """As the original writes it: positions in the older spelling, the language model's keys beside its own."""
    rope = text.pop("rope_parameters", {})
    del text["dtype"]
    return text | {
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": None,
        "architectures": [one.architecture],
        "mm_hidden_size": TOWER_HIDDEN,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"../{tower.name}",
        "use_mm_proj": True,
        "torch_dtype": "float16",
        "tokenizer_model_max_length": 32768,
        **one.config,
    }


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1))
