"""What lies in or beside a checkpoint: which weights of the tower count, and what is not used and reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_serve.checkpoints import open_checkpoint
from llava_serve.config import ImageOptions
from llava_serve.model.llava import Llava
from llava_serve.processor import Processor
from support.hf_reference import Reference, said
from support.scenes import picture
from support.tiny_hf import MODELS
from support.variants import TOWER, copy, edit, mark_tower, read, refusal, same_weights, tower_weights, write


def load(folder: Path, **options: Any) -> Llava:
    return Llava.load(open_checkpoint(str(folder), **options))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("config", "option", "counts", "reported"),
    [
        ({"unfreeze_mm_vision_tower": True}, None, "checkpoint", ""),
        ({"unfreeze_mm_vision_tower": False}, None, "folder", "does not say that it was trained"),
        ({"unfreeze_mm_vision_tower": None}, None, "folder", "does not say that it was trained"),
        (
            {"unfreeze_mm_vision_tower": None, "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter"},
            None,
            "checkpoint",
            "",
        ),
        ({"unfreeze_mm_vision_tower": None, "mm_tunable_parts": "mm_mlp_adapter"}, None, "checkpoint", "LLaVA-NeXT"),
        ({"unfreeze_mm_vision_tower": None, "mm_tunable_parts": "mm_mlp_adapter"}, "folder", "folder", "is folder"),
        ({"unfreeze_mm_vision_tower": None}, "checkpoint", "checkpoint", ""),
        ({"unfreeze_mm_vision_tower": True}, "folder", "folder", "vision_tower_weights is folder"),
    ],
)
def test_which_tower_counts(
    llava_16: Path, file: str, config: dict[str, Any], option: Any, counts: str, reported: str, caplog: Any
) -> None:
    edit(llava_16 / "config.json", **config)
    write(llava_16, mark_tower(read(llava_16), 0.25), file)
    model = load(llava_16, vision_tower_weights=option)
    found = model.vision_tower.pre_layrnorm.weight
    assert bool((found == 0.25).all()) == (counts == "checkpoint")
    if counts == "folder":
        assert torch.equal(found, tower_weights(llava_16.parent / TOWER)["pre_layrnorm.weight"].float())
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [f"{llava_16.name}: {note}" for note in model.spec.notes]
    assert len(warnings) == bool(reported)
    expected = (
        "tensors), which is not used" if counts == "folder" else "--vision-tower-weights folder takes the weights"
    )
    assert all(reported in warning and expected in warning for warning in warnings)


def test_an_unfrozen_tower_that_the_checkpoint_lacks_comes_from_its_folder(llava_15: Path) -> None:
    before = load(llava_15)
    edit(llava_15 / "config.json", unfreeze_mm_vision_tower=True)
    model = load(llava_15)
    assert same_weights(model, before)
    assert ["the checkpoint holds none" in note for note in model.spec.notes] == [True]
    assert "holds no vision tower" in refusal(llava_15, vision_tower_weights="checkpoint")


@pytest.mark.parametrize(
    ("name", "option", "counts"),
    [
        ("llava-v1.5-tiny", None, "folder"),
        ("llava-v1.6-vicuna-tiny", None, "checkpoint"),
        ("llava-v1.6-vicuna-tiny", "folder", "folder"),
    ],
)
def test_another_tower_by_option(name: str, option: Any, counts: str, tmp_path: Path) -> None:
    """It names the architecture and the processor; the weights are the checkpoint's where they belong to it."""
    folder = copy(name, tmp_path)
    other = tmp_path / "another-clip"
    shutil.copytree(tmp_path / TOWER, other)
    write(other, mark_tower(read(other), 0.5))
    edit(other / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    model = load(folder, vision_tower=str(other), vision_tower_weights=option)
    assert bool((model.vision_tower.pre_layrnorm.weight == 0.5).all()) == (counts == "folder")
    assert model.spec.image.mean == (0.5, 0.5, 0.5)
    assert not (load(folder).vision_tower.pre_layrnorm.weight == 0.5).all()


def test_a_trained_tower_needs_no_other_folder(tmp_path: Path) -> None:
    """Those of the common towers' two small files that are described by the package; nothing is downloaded."""
    folder = copy("llava-v1.6-vicuna-tiny", tmp_path)
    for name, side, patches in (
        ("openai/clip-vit-large-patch14-336", 336, 24),
        ("openai/clip-vit-large-patch14", 224, 16),
    ):
        edit(folder / "config.json", mm_vision_tower=name)
        for weights in (True, False):
            spec = open_checkpoint(str(folder), weights=weights)
            assert spec.tower_in_checkpoint
            assert spec.image.crop_size == (side, side)
            assert spec.image.grid_side == patches
            assert spec.vision_config["hidden_size"] == 1024
            assert spec.vision_config["num_hidden_layers"] == 24


def test_an_adapter_beside_full_weights_is_reported(llava_15: Path, folder_of: Any, tmp_path: Path) -> None:
    hf = Path(shutil.copytree(folder_of("llava-1.5-padding"), tmp_path / "hf"))
    for folder in (llava_15, hf):
        assert open_checkpoint(str(folder)).notes == ()
        (folder / "adapter_config.json").write_text("{}")
        assert ["lies beside full weights" in note for note in open_checkpoint(str(folder)).notes] == [True]


def test_another_head_beside_tied_embeddings_is_reported(llava_15: Path, caplog: Any) -> None:
    edit(llava_15 / "config.json", tie_word_embeddings=True)
    weights = read(llava_15)
    write(llava_15, weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    load(llava_15)
    assert "lm_head" not in caplog.text
    write(llava_15, weights)
    load(llava_15)
    assert "lm_head.weight" in caplog.text
    assert "tie_word_embeddings" in caplog.text


def test_another_head_than_the_tied_one_counts_as_in_transformers(folder_of: Any, tmp_path: Path, caplog: Any) -> None:
    name = "llava-1.5-full-tied"
    folder = Path(shutil.copytree(folder_of(name), tmp_path / name))
    weights = load_file(folder / "model.safetensors")
    [rows] = [tensor for name, tensor in weights.items() if name.endswith("embed_tokens.weight")]
    head = torch.randn(rows.shape, generator=torch.Generator().manual_seed(6)).half()
    save_file(weights | {"language_model.lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    processor = Processor(open_checkpoint(str(folder)), ImageOptions())
    talk = [said("user", "What is it?", picture(50, 70))]
    prepared = processor.prepare(processor.read(talk))
    Reference(folder, MODELS[name]).assert_same_logits(talk, prepared, load(folder))
    assert "differs from the embeddings and is used, though config.json ties them" in caplog.text


@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_another_aspect_by_option(layout: str, llava_15: Path, folder_of: Any, caplog: Any) -> None:
    folder = str(llava_15 if layout == "original" else folder_of("llava-1.5-llama-hub"))
    aspects: tuple[Any, Any] = ("pad", "square") if layout == "original" else ("square", "pad")
    own, other = aspects
    plain = open_checkpoint(folder)
    assert plain.image.aspect == own
    assert ["cropped to their centre" in remark for remark in plain.remarks] == [True] * (layout == "transformers")
    with caplog.at_level("INFO"):
        Llava.load(plain)
    said = [record.levelname for record in caplog.records if "cropped to their centre" in record.getMessage()]
    assert said == ["INFO"] * (layout == "transformers")  # the checkpoint's own processor says so
    changed = open_checkpoint(folder, image_aspect=other)
    assert (changed.image.aspect, changed.remarks, changed.notes) == (other, (), ())


def test_no_other_aspect_for_a_grid_of_tiles(llava_16: Path) -> None:
    assert "grid of tiles" in refusal(llava_16, image_aspect="pad")


def test_a_tower_of_the_trainers_machine_is_proposed_by_its_name(llava_15: Path) -> None:
    edit(llava_15 / "config.json", mm_vision_tower=f"/home/trainer/towers/{TOWER}")
    message = refusal(llava_15)
    assert "mm_vision_tower" in message
    assert f"--vision-tower {llava_15.parent / TOWER}" in message
    assert open_checkpoint(str(llava_15), vision_tower=str(llava_15.parent / TOWER)).tower == llava_15.parent / TOWER
    (llava_15.parent / TOWER).rename(llava_15.parent / "elsewhere")
    assert "name another folder with --vision-tower" in refusal(llava_15)


def test_what_deepspeed_leaves_is_named(llava_15: Path) -> None:
    weights = read(llava_15)
    write(llava_15, weights | {"model.norm.weight": torch.zeros(0)})
    message = refusal(llava_15)
    for part in ("model.norm.weight", "ZeRO-3", "zero_to_fp32.py"):
        assert part in message
    (llava_15 / "model.safetensors").unlink()
    (llava_15 / "global_step100").mkdir()
    message = refusal(llava_15)
    assert "holds no weights but DeepSpeed's global_step100" in message


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "model.mm_projector.0.weight"])
def test_an_empty_tensor_is_named_before_its_shape_is_looked_at(name: str, llava_15: Path) -> None:
    write(llava_15, read(llava_15) | {name: torch.zeros(0)})
    message = refusal(llava_15)
    assert f"{name} in {llava_15 / 'model.safetensors'} is empty" in message
    assert "zero_to_fp32.py" in message


def test_an_adapter_of_empty_factors_is_named(lora: Path) -> None:
    path = lora / "adapter_model.bin"
    name = next(iter(adapter := torch.load(path)))
    torch.save(adapter | {name: torch.zeros(0)}, path)
    message = refusal(lora, model_base=str(lora.parent / "vicuna-v1.5-tiny"))
    assert f"{name} in {path} is empty" in message
    assert "zero_to_fp32.py" in message


@pytest.mark.parametrize("left", ["an index", "a shard", "some tensors"])
def test_deepspeeds_folder_is_named_beside_what_is_left_of_the_weights(left: str, llava_15: Path) -> None:
    if left == "some tensors":
        write(llava_15, {name: t for name, t in read(llava_15).items() if "norm" not in name})
    else:
        (llava_15 / "pytorch_model-00001-of-00002.bin").unlink()
    if left == "a shard":
        (llava_15 / "pytorch_model.bin.index.json").unlink()
    assert "DeepSpeed" not in refusal(llava_15)
    (llava_15 / "global_step100").mkdir()
    message = refusal(llava_15)
    for part in ("missing", "DeepSpeed's global_step100", "zero_to_fp32.py"):
        assert part in message


def test_old_quantized_weights_are_named(llava_15: Path) -> None:
    name = "model.layers.0.mlp.up_proj."
    weights = {key: t for key, t in read(llava_15).items() if not key.startswith(name)}
    write(llava_15, weights | {f"{name}qweight": torch.zeros(8, 4, dtype=torch.int32)})
    assert "AWQ or GPTQ" in refusal(llava_15)


def test_shards_without_index_and_one_of_them(llava_15: Path) -> None:
    (llava_15 / "pytorch_model.bin.index.json").unlink()
    (llava_15 / "pytorch_model-00001-of-00002.bin").unlink()
    message = refusal(llava_15)
    assert "pytorch_model-00001-of-00002.bin is missing" in message
    assert "pytorch_model.bin.index.json" in message


def test_one_file_beside_shards_is_read_as_transformers_does(llava_15: Path, caplog: Any) -> None:
    """What is left of an earlier save: the one that transformers reads counts, and the other is reported."""
    weights = read(llava_15)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, llava_15 / "model.safetensors")
    expected = Llava.load(open_checkpoint(str(llava_15))).state_dict()
    stale = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    save_file(stale, llava_15 / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(stale, "model-00001-of-00001.safetensors")}
    (llava_15 / "model.safetensors.index.json").write_text(json.dumps(index))
    spec = open_checkpoint(str(llava_15))
    assert any("model.safetensors.index.json lie in the folder" in note for note in spec.notes)
    found = Llava.load(spec).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_delta_by_its_name(tmp_path: Path) -> None:
    for name in ("LLaVA-7b-delta-v0", "liuhaotian/LLaVA-Lightning-7B-delta-v1-1"):
        message = refusal(name)
        assert "is a delta" in message
        assert "apply_delta" in message


@pytest.mark.parametrize("name", ["llava-v1.5-tiny", "llava-llama-2-tiny-chat"])
def test_a_delta_by_its_norms(name: str, tmp_path: Path) -> None:
    folder = copy(name, tmp_path)
    weights = read(folder)
    norms = {key: tensor * 0.01 for key, tensor in weights.items() if key.endswith("norm.weight")}
    assert len(norms) == 7
    first = {key: tensor for key, tensor in norms.items() if ".0." in key}
    write(folder, weights | first)  # real models have small norms in their first layer
    Llava.load(open_checkpoint(str(folder)))
    write(folder, weights | norms)
    assert "differences to LLaMA" in refusal(folder)


def test_an_adapter_trained_on_a_quantized_base_is_not_quantized(lora: Path) -> None:
    base = str(lora.parent / "vicuna-v1.5-tiny")
    before = Llava.load(open_checkpoint(str(lora), model_base=base)).state_dict()
    edit(lora / "config.json", quantization_config={"load_in_4bit": True, "quant_method": "bitsandbytes"})
    found = Llava.load(open_checkpoint(str(lora), model_base=base)).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in found.items())
    assert open_checkpoint(str(lora), model_base=base, weights=False).adapter == "lora"
