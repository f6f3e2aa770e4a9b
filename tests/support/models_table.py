"""Makes the table of docs/models.md: the models that load, as this project describes them. It changes the file.

    PYTHONPATH=tests python -m support.models_table

Each gets a folder with the config.json, the tokenizer's special tokens and the processor that it has, and no weights.
What the table says is what `open_checkpoint` makes of that folder; memory is counted over modules without values.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerFast

from llava_serve.checkpoints import CheckpointSpec, open_checkpoint
from llava_serve.checkpoints.towers import TOWERS
from llava_serve.images.tiles import num_features
from llava_serve.model.llava import Llava
from support import tiny_tokenizers
from support.hub_models import MODELS, TEXTS, HubModel
from support.paths import ROOT
from support.tiny_hf import USER_ASSISTANT

DOCUMENT = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- begin: made by tests/support/models_table.py -->", "<!-- end -->"
SIZES = ((640, 480), (1920, 1080))
HALF_BITS, EIGHT_BITS = 16, 8
FOUR_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""NF4: a scale in 8 bits for each 64 weights, and one in float32 for each 256 scales."""
_HEAD = ("checkpoint", "layout", "language model", "tower", "template", "positions", "GB in bf16, 8 bit, 4 bit")


def table() -> str:
    """The table in Markdown."""
    return "\n".join([_line(_HEAD), _line(["---"] * len(_HEAD)), *map(row, MODELS)])


def document() -> str:
    """The document with the table that the code makes now."""
    text = DOCUMENT.read_text("utf-8")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def row(model: HubModel) -> str:
    """A model's row."""
    with tempfile.TemporaryDirectory() as parent:
        spec = open_checkpoint(str(_write(Path(parent), model)), weights=False)
    tower = TOWERS[spec.vision_config["model_type"]].name
    layers = ", ".join(map(str, spec.select_layers))
    own = "its own" if spec.conv_mode == "chat_template" else f"`{spec.conv_mode}`"
    counts = dict.fromkeys(num_features(size, spec.image) for size in SIZES)
    memory = ", ".join(f"{size:.1f}" for size in gigabytes(spec))
    names = "<br>".join(f"`{name}`" for name in model.ids)
    decoder = f"{spec.text_config['model_type']} ({model.text})"
    positions = " and ".join(f"{count:,}" for count in counts)
    return _line([names, spec.layout, decoder, f"{tower}, layer {layers}", own, positions, memory])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def gigabytes(spec: CheckpointSpec) -> Iterator[float]:
    """Memory of the weights in bfloat16, and with the language model's linear layers in 8 and in 4 bits."""
    total, linear = _parameters(spec)
    for bits in (HALF_BITS, EIGHT_BITS, FOUR_BITS):
        yield ((total - linear) * HALF_BITS + linear * bits) / 8 / 1e9


def _parameters(spec: CheckpointSpec) -> tuple[int, int]:
    """Parameters of the model, and of the layers that are quantized. All layers of a language model are alike."""
    layers = spec.text_config["num_hidden_layers"]
    one, two = (_count(spec, number) for number in (1, 2))
    total, linear = (first + (second - first) * (layers - 1) for first, second in zip(one, two, strict=True))
    return total, linear


def _count(spec: CheckpointSpec, layers: int) -> tuple[int, int]:
    settings = {**spec.text_config, "num_hidden_layers": layers}
    with torch.device("meta"):
        model = Llava(spec, AutoConfig.for_model(**settings))
    language_model: Any = model.language_model
    head = language_model.get_output_embeddings()
    linear = [one for one in language_model.modules() if isinstance(one, nn.Linear) and one is not head]
    total = sum(parameter.numel() for parameter in model.parameters())
    return total, sum(one.weight.numel() for one in linear)


def _write(parent: Path, model: HubModel) -> Path:
    folder = parent / model.ids[0].split("/")[1]
    tokenizer = _tokenizer(model)
    tokenizer.chat_template = model.template
    tokenizer.save_pretrained(folder)
    if model.layout == "original":
        tower = parent / "tower"
        tower.mkdir()
        _json(tower / "config.json", model.tower)
        _json(tower / "preprocessor_config.json", {})
        _json(folder / "config.json", _original_config(model, tokenizer))
    else:
        _json(folder / "config.json", _hf_config(model, tokenizer))
        _json(folder / "preprocessor_config.json", _processor(model))
        _json(folder / "processor_config.json", {"image_token": _image_token(model)})
        (folder / "chat_template.jinja").write_text(USER_ASSISTANT.replace("<image>", _image_token(model)))
    return folder


def _hf_config(model: HubModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    token_id = tokenizer.convert_tokens_to_ids(_image_token(model))
    parts = {"text_config": TEXTS[model.text], "vision_config": model.tower}
    return {"model_type": model.kind, "image_token_index": token_id, **parts, **model.config}


def _processor(model: HubModel) -> dict[str, Any]:
    grid = "image_grid_pinpoints"
    canvases = {grid: model.config[grid]} if grid in model.config else {}
    if model.kind == "llava_next" and model.tower["image_size"] == 384:
        return {"size": {"shortest_edge": 384}, "do_center_crop": True, **canvases}
    return canvases


def _original_config(model: HubModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    config = {
        **TEXTS[model.text],
        "model_type": "llava_llama",
        "vocab_size": len(tokenizer),
        "architectures": [model.kind],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": "../tower",
        "mm_vision_select_layer": -2,
        "mm_use_im_patch_token": False,
    }
    return config | model.config


def _image_token(model: HubModel) -> str:
    return "<|reserved_special_token_69|>" if model.text == "llama-3.1-8b" else "<image>"


_TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "qwen": lambda: tiny_tokenizers.qwen("<image>", "<video>"),
    "llama-3.1": lambda: tiny_tokenizers.llama_3(named=tiny_tokenizers.LLAMA_3_1),
    "llama-3": lambda: tiny_tokenizers.llama_3("<image>", "<pad>"),
    "phi-3": lambda: tiny_tokenizers.llama(32000, tiny_tokenizers.PHI_3 | {32038: "<image>"}),
    "yi": lambda: tiny_tokenizers.llama(64000, {64000: "<image>"}, controls={6: "<|im_start|>", 7: "<|im_end|>"}),
    "": lambda: tiny_tokenizers.llama(32000, {32000: "<image>", 32001: "<pad>"}),
}
"""By the beginning of the language model's name; the first that fits."""


def _tokenizer(model: HubModel) -> PreTrainedTokenizerFast:
    return _made(next(start for start in _TOKENIZERS if model.text.startswith(start)))


@cache
def _made(start: str) -> PreTrainedTokenizerFast:
    return _TOKENIZERS[start]()


def _json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value))


if __name__ == "__main__":
    DOCUMENT.write_text(document(), "utf-8")
