"""Files that do not hold the tensors of their config.json are refused at load: the file, the tensor, what to do."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_serve.checkpoints import open_checkpoint
from llava_serve.errors import CheckpointError
from llava_serve.model.llava import Llava
from support.variants import TOWER, Weights, read, refusal, write

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def without(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: tensor for key, tensor in weights.items() if key != name}


def with_(name: str, *shape: int) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: torch.zeros(shape, dtype=torch.float16)}


def spoiled(name: str, number: float) -> Callable[[Weights], Weights]:
    """One number of a tensor is another."""

    def change(weights: Weights) -> Weights:
        tensor = weights[name].float()
        tensor.view(-1)[-1] = number
        return weights | {name: tensor}

    return change


TENSORS: dict[str, tuple[Callable[[Weights], Weights], tuple[str, ...]]] = {
    "missing in the decoder": (without(Q_PROJ), ("missing", Q_PROJ, "Download it again")),
    "missing in the projector": (
        without("model.mm_projector.2.bias"),
        ("missing", "model.mm_projector.2.bias", "Download it again"),
    ),
    "missing head": (without("lm_head.weight"), ("missing", "lm_head.weight")),
    "surplus": (with_("model.layers.9.mlp.up_proj.weight", 128, 64), ("model.layers.9.mlp.up_proj.weight", "{file}")),
    "not of this model": (with_("fc.bias", 3), ("fc.bias (in {file})", "config.json")),
    "wrong shape": (with_(Q_PROJ, 64, 32), (Q_PROJ, "{file}", "(64, 32)", "(64, 64)", "config.json")),
    "wrong shape in the projector": (
        with_("model.mm_projector.0.weight", 64, 47),
        ("model.mm_projector.0.weight", "{file}", "(64, 47)", "(64, 48)"),
    ),
    "fewer rows in the head": (with_("lm_head.weight", 600, 64), ("lm_head.weight", "{file}", "(600, 64)")),
    "more rows in the head": (with_("lm_head.weight", 720, 64), ("lm_head.weight", "{file}", "(720, 64)", "700 rows")),
    "fewer rows than the config says": (
        with_("model.embed_tokens.weight", 600, 64),
        ("model.embed_tokens.weight", "{file}", "(600, 64)", "vocab_size", "700 rows"),
    ),
    "the same tensor twice": (with_("model.mm_projector.linear.weight", 1), ("model.mm_projector.linear.weight",)),
    "NaN in the decoder": (spoiled(Q_PROJ, torch.nan), (Q_PROJ, "{file}", "NaN or infinity", "download it again")),
    "infinity in the projector": (
        spoiled("model.mm_projector.2.bias", -torch.inf),
        ("model.mm_projector.2.bias", "{file}", "NaN or infinity"),
    ),
    "NaN in the head": (spoiled("lm_head.weight", torch.nan), ("lm_head.weight", "{file}", "NaN or infinity")),
    "quantized already": (
        lambda weights: weights | {Q_PROJ: torch.zeros(64, 64, dtype=torch.int8)},
        (Q_PROJ, "{file}", "int8", "original"),
    ),
}


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_do_not_fit(what: str, file: str, llava_15: Path) -> None:
    change, named = TENSORS[what]
    write(llava_15, change(read(llava_15)), file)
    message = refusal(llava_15)
    for part in named:
        assert part.format(file=file) in message


def test_nan_in_the_tower(llava_15: Path) -> None:
    tower = llava_15.parent / TOWER
    write(tower, spoiled("vision_model.pre_layrnorm.bias", torch.nan)(read(tower)))
    message = refusal(llava_15)
    assert "vision_model.pre_layrnorm.bias" in message
    assert str(tower) in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_number_too_large_for_half_precision(dtype: torch.dtype, llava_15: Path) -> None:
    write(llava_15, spoiled(Q_PROJ, 1e5)(read(llava_15)))
    spec = open_checkpoint(str(llava_15))
    if dtype == torch.bfloat16:
        Llava.load(spec, dtype=dtype)
        return
    with pytest.raises(CheckpointError, match="too large for float16: choose bfloat16 or float32") as caught:
        Llava.load(spec, dtype=dtype)
    assert Q_PROJ in caught.value.message


def test_nan_in_an_adapter(lora: Path) -> None:
    file = lora / "adapter_model.bin"
    weights = torch.load(file)
    name = next(name for name in sorted(weights) if "q_proj.lora_B" in name)
    torch.save(spoiled(name, torch.nan)(weights), file)
    message = refusal(lora, model_base=str(lora.parent / "vicuna-v1.5-tiny"))
    assert "q_proj" in message
    assert "with the adapter's addition holds NaN or infinity" in message


def test_all_missing_tensors_are_counted(llava_15: Path) -> None:
    write(llava_15, {name: t for name, t in read(llava_15).items() if "layers.2" not in name})
    message = refusal(llava_15)
    assert "model.layers.2.input_layernorm.weight" in message
    assert "and 1 more" in message


def test_the_newline_of_tiled_pictures_is_missing(llava_16: Path) -> None:
    write(llava_16, without("model.image_newline")(read(llava_16)))
    assert "model.image_newline" in refusal(llava_16)


def test_a_tower_tensor_is_missing_in_its_folder(llava_15: Path) -> None:
    tower = llava_15.parent / TOWER
    write(tower, without("vision_model.pre_layrnorm.bias")(read(tower)))
    assert "vision_model.pre_layrnorm.bias" in refusal(llava_15)


def test_a_tensor_lies_in_two_files(llava_15: Path) -> None:
    shard = next(llava_15.glob("pytorch_model-00001*"))
    weights = torch.load(shard)
    torch.save(weights | {"lm_head.weight": torch.zeros(700, 64)}, shard)
    message = refusal(llava_15)
    assert "lm_head.weight" in message
    assert "pytorch_model-00001-of-00002.bin" in message
    assert "pytorch_model-00002-of-00002.bin" in message


@pytest.mark.parametrize("kept", [0, 3, 1000, -100])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_is_cut_off(file: str, kept: int, llava_15: Path) -> None:
    write(llava_15, read(llava_15), file)
    data = (llava_15 / file).read_bytes()
    (llava_15 / file).write_bytes(data[:kept])
    message = refusal(llava_15)
    assert file in message
    assert "damaged" in message


def test_an_old_bin_file_is_cut_off(llava_15: Path) -> None:
    file = llava_15 / "pytorch_model.bin"
    write(llava_15, read(llava_15), file.name)
    torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes()[:-100])
    assert file.name in refusal(llava_15)


def test_the_index_names_a_shard_that_is_not_there(llava_15: Path) -> None:
    (llava_15 / "pytorch_model-00002-of-00002.bin").unlink()
    message = refusal(llava_15)
    assert "pytorch_model-00002-of-00002.bin" in message
    assert "pytorch_model.bin.index.json" in message
    assert "copy it there" in message


@pytest.mark.parametrize("text", ["", "{", '{"metadata": {}}', '{"weight_map": {}}'])
def test_the_index_is_damaged(text: str, llava_15: Path) -> None:
    (llava_15 / "pytorch_model.bin.index.json").write_text(text)
    assert "pytorch_model.bin.index.json" in refusal(llava_15)


def test_no_weights_at_all(llava_15: Path) -> None:
    write(llava_15, {})
    (llava_15 / "model.safetensors").unlink()
    message = refusal(llava_15)
    assert "model.safetensors" in message
    assert "adapter_config.json" in message


PICKLES = ("pytorch_model", "non_lora_trainables", "adapter_model", "mm_projector")


class Booby:
    """Its pickle makes a folder when it is read without care."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.sentinel),)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "non_lora_trainables.bin", "adapter_model.bin", "mm_projector.bin"]
)
@pytest.mark.parametrize("plain", [False, True])
def test_code_in_a_pickle_does_not_run(name: str, plain: bool, lora: Path, projector: Path, tmp_path: Path) -> None:
    folder = projector if name == "mm_projector.bin" else lora
    base = tmp_path / "vicuna-v1.5-tiny"
    file = (base if name == "pytorch_model.bin" else folder) / name
    content = {**torch.load(file), "model.norm.weight": Booby(tmp_path / "sentinel")}
    if plain:
        file.write_bytes(pickle.dumps({"model.norm.weight": Booby(tmp_path / "sentinel")}))
    else:
        torch.save(content, file)
    message = refusal(folder, model_base=str(base))
    assert name in message
    assert "nothing in it was run" in message
    assert not (tmp_path / "sentinel").exists()
    with file.open("rb") as stream:  # the trap is a real one
        torch.load(stream, weights_only=False) if not plain else pickle.load(stream)
    assert (tmp_path / "sentinel").exists()


def test_a_bin_file_of_something_else(llava_15: Path) -> None:
    write(llava_15, {}, "pytorch_model.bin")
    torch.save([1, 2], llava_15 / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(llava_15)


def test_tensors_of_another_shard_layout_are_found(llava_16: Path) -> None:
    """The control: what these tests cut and rename loads when it is whole."""
    weights = load_file(llava_16 / "model.safetensors")
    save_file(weights, llava_16 / "model-00001-of-00001.safetensors", {"format": "pt"})
    (llava_16 / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (llava_16 / "model.safetensors.index.json").write_text(json.dumps(index))
    assert Llava.load(open_checkpoint(str(llava_16))).spec.name == "llava-v1.6-vicuna-tiny"
