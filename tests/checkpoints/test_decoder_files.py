"""Every language model that is supported loads from files: some hold more or other tensors than its modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from llava_serve.checkpoints import open_checkpoint
from llava_serve.checkpoints.decoders import DECODERS
from llava_serve.checkpoints.families import ORIGINAL_CLASSES
from llava_serve.config import ImageOptions
from llava_serve.errors import CheckpointError
from llava_serve.model.llava import Llava
from llava_serve.processor import Processor
from support.hf_reference import Reference, said
from support.scenes import picture
from support.tiny_engine import CONFIGS
from support.tiny_hf import Tiny, write_model
from support.variants import TOWER, all_logits, edit, expected_logits, prepare, read, refusal, tower_weights, write

ODD = {"apertus", "mixtral", "phi", "qwen2_moe", "qwen3_moe"}
"""Constants among the weights; experts one by one; a head whose bias transformers' LLaVA leaves out."""
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
KINDS = [
    pytest.param(kind, marks=() if kind in ODD else pytest.mark.extended) for kind in sorted(DECODERS) if kind != "mpt"
]


@pytest.mark.parametrize("kind", KINDS)
def test_in_transformers_layout(kind: str, tmp_path: Path) -> None:
    text = CONFIGS[kind][1]
    tiny = Tiny("llava", kind, text={**text, "head_dim": 16} if "head_dim" in text else text)
    write_model(tmp_path, tiny)
    spec = open_checkpoint(str(tmp_path))
    processor = Processor(spec, ImageOptions())
    talk = [said("user", "What is it?", picture(50, 70))]
    got = all_logits(Llava.load(spec), processor.prepare(processor.read(talk)))
    reference = Reference(tmp_path, tiny)
    with torch.inference_mode():
        expected = reference.model(**reference.inputs(talk)).logits[0]
    scale = (
        got * expected
    ).sum() / expected.square().sum()  # some scale behind the head, which transformers leaves out
    torch.testing.assert_close(got, expected * scale, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", sorted(set(ORIGINAL_CLASSES.values()) - {"mpt"}))
def test_in_the_originals_layout(kind: str, llava_15: Path) -> None:
    config, weights = as_original(llava_15, kind)
    tower = llava_15.parent / TOWER
    prepared = prepare(llava_15)
    got = all_logits(Llava.load(open_checkpoint(str(llava_15))), prepared)
    expected = expected_logits(config, weights, (tower, tower_weights(tower)), prepared)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)


def as_original(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Puts another language model into a checkpoint; returns the config, and the weights as its modules hold them."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 700}
    settings = {**sizes, **ends, "num_key_value_heads": 2, "max_position_embeddings": 2048, **CONFIGS[kind][1]}
    torch.manual_seed(21)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float16)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder / "text")
    rest = {name: tensor for name, tensor in read(folder).items() if "mm_projector" in name}
    write(folder, rest | load_file(folder / "text" / "model.safetensors"))
    name = next(name for name, decoder in ORIGINAL_CLASSES.items() if decoder == kind)
    own = {key: value for key, value in json.loads((folder / "config.json").read_text()).items() if "mm_" in key}
    text = {**model.config.to_dict(), "architectures": [name], "model_type": "llava_of_ones_own"}
    text.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(text | own | {"image_aspect_ratio": "pad"}))
    return text | own | {"model_type": kind}, dict(model.state_dict()) | rest


@pytest.mark.parametrize("kind", MIXTURES)
def test_an_expert_that_is_missing_or_of_another_shape_is_named(kind: str, tmp_path: Path) -> None:
    write_model(tmp_path, Tiny("llava", kind, text=CONFIGS[kind][1]))
    weights = load_file(tmp_path / "model.safetensors")
    [gone] = [
        name
        for name in weights
        if name.endswith(("layers.1.mlp.experts.2.up_proj.weight", "1.block_sparse_moe.experts.2.w3.weight"))
    ]
    save_file({name: t for name, t in weights.items() if name != gone}, tmp_path / "model.safetensors")
    assert "of expert 2 in language_model.model.layers.1.mlp.experts is missing" in refusal(tmp_path)
    save_file(weights | {gone: weights[gone][:-1].clone()}, tmp_path / "model.safetensors")
    assert gone in refusal(tmp_path)


def test_a_window_of_no_positions_is_refused_where_it_is_used(folder_of: Any, llava_15: Path) -> None:
    edit(llava_15 / "config.json", architectures=["LlavaMistralForCausalLM"], sliding_window=0)
    with pytest.raises(CheckpointError, match="sliding_window 0, with which no position sees another"):
        open_checkpoint(str(llava_15))
