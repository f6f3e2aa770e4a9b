"""Modified copies of the golden checkpoints, and a plain reference computation of their logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

from llava_serve.checkpoints import open_checkpoint
from llava_serve.config import ImageOptions
from llava_serve.errors import CheckpointError
from llava_serve.model.llava import Llava
from llava_serve.processor import Processor
from llava_serve.types import PreparedPrompt
from support.paths import GOLDEN

TOWER = "clip-vit-tiny-56"
PICTURE = GOLDEN / "images" / "landscape.png"
Weights = dict[str, Tensor]


def copy(name: str, to: Path) -> Path:
    """Copies a golden checkpoint, and beside it the tower that its config.json names."""
    for each in (TOWER, name):
        shutil.copytree(GOLDEN / "checkpoints" / each, to / each, dirs_exist_ok=True)
    return to / name


def edit(path: Path, **changes: Any) -> dict[str, Any]:
    """Sets keys of a JSON file; None removes a key."""
    values = {**json.loads(path.read_text()), **changes}
    values = {key: value for key, value in values.items() if value is not None}
    path.write_text(json.dumps(values))
    return values


def read(folder: Path) -> Weights:
    """All weights of a folder."""
    weights: Weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    for file in sorted(folder.glob("pytorch_model*.bin")):
        weights |= torch.load(file)
    return weights


def write(folder: Path, weights: Weights, file: str = "model.safetensors") -> None:
    """Replaces a folder's weights by one file."""
    for old in [*folder.glob("model*.safetensors*"), *folder.glob("pytorch_model*")]:
        old.unlink()
    if file.endswith(".bin"):
        torch.save(weights, folder / file)
    else:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / file, {"format": "pt"})


def decoder_weights(weights: Weights) -> Weights:
    """Those of the language model alone."""
    ours = ("model.mm_projector", "model.vision_tower", "model.image_newline")
    return {name: tensor for name, tensor in weights.items() if not name.startswith(ours)}


def tower_weights(folder: Path) -> Weights:
    """Those of a CLIP tower, as its module in transformers names them."""
    own = "vision_model."
    return {name.removeprefix(own): tensor for name, tensor in read(folder).items() if name.startswith(own)}


def decoder(config: dict[str, Any], weights: Weights) -> Any:
    """transformers' language model with these weights, in float32."""
    kind = config["model_type"].removeprefix("llava_")
    settings = {k: v for k, v in config.items() if not k.startswith(("mm_", "image_")) and k != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float32)
    model.load_state_dict(weights)
    return model.eval()


def merged_by_peft(config: dict[str, Any], weights: Weights, adapter: Path) -> Weights:
    """A language model's weights after PEFT's own merge, adapter and all in float16 as in the original."""
    model = decoder(config, weights)
    for parameter in model.parameters():
        parameter.data = parameter.data.half()
    adapted = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False)
    return dict(adapted.merge_and_unload().state_dict())


def narrow(tensor: Tensor, width: int, to: int) -> Tensor:
    """Cuts every axis of one width to another."""
    for axis, size in enumerate(tensor.shape):
        tensor = tensor.narrow(axis, 0, to) if size == width else tensor
    return tensor.contiguous()


def refusal(folder: Path | str, **options: Any) -> str:
    """The message of the CheckpointError that loading has to raise."""
    with pytest.raises(CheckpointError) as caught:
        Llava.load(open_checkpoint(str(folder), **options))
    return caught.value.message


def prepare(folder: Path, query: str = "What is it?", image: Path = PICTURE, **options: Any) -> PreparedPrompt:
    """A prompt with one picture, its text as the folder's own tokenizer gives it."""
    return Processor(open_checkpoint(str(folder), **options), ImageOptions()).prepare_query(query, [image])


def input_embeddings(model: Llava, prepared: PreparedPrompt) -> Tensor:
    """[positions, hidden] of a prompt with its images."""
    merged = model.embed(torch.from_numpy(prepared.token_ids.astype(np.int64)).clamp(min=0)).clone()
    for (start, end), tiles, size in zip(prepared.image_spans, prepared.tiles, prepared.image_sizes, strict=True):
        merged[start:end] = model.image_embeddings(model.tower_features(torch.from_numpy(tiles)), size)
    return merged


def all_logits(model: Llava, prepared: PreparedPrompt) -> Tensor:
    """[positions, vocabulary], by this project's modules."""
    with torch.inference_mode():
        found: Tensor = model.language_model(inputs_embeds=input_embeddings(model, prepared)[None]).logits[0]
    return found


@torch.inference_mode()
def expected_logits(
    config: dict[str, Any],
    weights: Weights,
    tower: tuple[Path, Weights],
    prepared: PreparedPrompt,
    join: Callable[[Tensor], Tensor] = lambda features: features.flatten(0, 1),
) -> Tensor:
    """[positions, vocabulary], in float32, from the weights and nothing of this project's modules.

    Args:
        config: of the checkpoint.
        weights: of the decoder, the projector and `image_newline`, in the original's names.
        tower: a folder with the tower's config and its processor's, and the weights in use.
        prepared: the prompt.
        join: [tiles, features, hidden] to [positions, hidden].
    """
    model = decoder(config, decoder_weights(weights))
    # The original computes these tables in half precision.
    model.model.rotary_emb.register_forward_hook(lambda module, inputs, tables: tuple(t.half().float() for t in tables))
    clip = CLIPVisionModel(CLIPVisionConfig.from_pretrained(tower[0]))
    clip.load_state_dict(tower[1])
    processing = json.loads((tower[0] / "preprocessor_config.json").read_text())
    mean, std = torch.tensor(processing["image_mean"]), torch.tensor(processing["image_std"])
    pixels = ((torch.from_numpy(prepared.tiles[0]) / 255 - mean) / std).permute(0, 3, 1, 2)
    hidden = clip.eval()(pixels, output_hidden_states=True).hidden_states[config["mm_vision_select_layer"]]
    features = project(weights, hidden[:, config.get("mm_vision_select_feature", "patch") == "patch" :])
    embeddings = model.get_input_embeddings()(torch.from_numpy(prepared.token_ids).clamp(min=0).long())
    (start, end) = prepared.image_spans[0]
    embeddings[start:end] = join(features)
    found: Tensor = model(inputs_embeds=embeddings[None]).logits[0]
    return found


def project(weights: Weights, features: Tensor) -> Tensor:
    """The projector, by the names of its weights: one linear layer, several with GELU between, or none."""
    if "model.mm_projector.weight" in weights:
        layers = [""]
    else:
        layers = [f"{i}." for i in range(0, 20, 2) if f"model.mm_projector.{i}.weight" in weights]
    for i, layer in enumerate(layers):
        features = functional.gelu(features) if i else features
        weight, bias = (weights[f"model.mm_projector.{layer}{part}"].float() for part in ("weight", "bias"))
        features = features @ weight.T + bias
    return features


def mark_tower(weights: Weights, value: float) -> Weights:
    """Weights with another value in one tensor of the tower."""
    marked = {name: torch.full_like(t, value) for name, t in weights.items() if name.endswith("pre_layrnorm.weight")}
    assert len(marked) == 1
    return weights | marked


def same_weights(one: Llava, other: Llava) -> bool:
    """Whether two models hold the same weights, bit by bit."""
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
