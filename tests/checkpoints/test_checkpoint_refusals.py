"""What a checkpoint's config.json, its tower or its base cannot be: refused at load, by name, with what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from support.variants import TOWER, edit, narrow, read, refusal, write


@pytest.mark.parametrize("text", ["", "{", "[1]", '"llava"', "\x00\xff"])
def test_config_json_is_damaged(text: str, llava_15: Path) -> None:
    (llava_15 / "config.json").write_text(text)
    message = refusal(llava_15)
    assert "config.json" in message
    assert str(llava_15) in message


def test_config_json_is_missing(llava_15: Path) -> None:
    (llava_15 / "config.json").unlink()
    assert "config.json is missing" in refusal(llava_15)


CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown projector": ({"mm_projector_type": "resampler"}, ("mm_projector_type", "'resampler'", "mlpNx_gelu")),
    "a resampler": (
        {"mm_resampler_type": "qformer"},
        ("mm_resampler_type", "'qformer'", "spatial_pool and masked_drop"),
    ),
    "a resampler of no kind": (
        {"mm_resampler_type": False},
        ("mm_resampler_type", "'False'", "spatial_pool and masked_drop"),
    ),
    "S2": ({"s2": True}, ("s2", "not supported")),
    "unknown aspect": ({"image_aspect_ratio": "highres"}, ("image_aspect_ratio", "'highres'", "anyres")),
    "unknown merge": ({"mm_patch_merge_type": "maxpool2x2"}, ("mm_patch_merge_type", "'maxpool2x2'", "spatial_unpad")),
    "unknown feature": ({"mm_vision_select_feature": "cls"}, ("mm_vision_select_feature", "'cls'", "cls_patch")),
    "no layer": ({"mm_vision_select_layer": None}, ("mm_vision_select_layer",)),
    "ViP-LLaVA": (
        {"mm_vision_select_layer": [-2, -5]},
        ("mm_vision_select_layer", "[-2, -5]", "llava-hf/vip-llava-7b-hf"),
    ),
    "a layer that the tower lacks": ({"mm_vision_select_layer": -9}, ("layer -9", "3 layers")),
    "a build of its own": (
        {"architectures": ["BunnyPhiForCausalLM"], "model_type": "bunny-phi", "mm_vision_select_layer": None},
        ("Bunny, which has code of its own", "BunnyPhiForCausalLM"),
    ),
    "no such decoder": (
        {"architectures": ["LlavaFooForCausalLM"], "model_type": "llava", "mm_vision_select_layer": None},
        ("LlavaFooForCausalLM", "LlavaLlamaForCausalLM"),
    ),
    "dynamic positions beside others": (
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        ("'dynamic'", "not supported"),
    ),
    "positions of no kind": ({"rope_scaling": {"factor": 2.0}}, ("rope_scaling", "without a type")),
    "positions that lack a factor": ({"rope_scaling": {"type": "linear"}}, ("language model", "factor")),
    "an activation that is none": ({"hidden_act": "foo"}, ("config.json", "cannot build", "'foo'")),
    "a text for a flag": ({"mm_use_im_start_end": "false"}, ("mm_use_im_start_end 'false'", "true or false")),
    "dynamic positions": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ("'dynamic'", "not supported")),
    "no tower": ({"mm_vision_tower": None}, ("mm_vision_tower", "vision_tower")),
    "a tower that is not there": ({"mm_vision_tower": "../nowhere"}, ("vision tower", "../nowhere")),
    "an identity of other widths": ({"mm_projector_type": "identity"}, ("identity", "48", "64")),
    "anyres without canvases": ({"image_aspect_ratio": "anyres"}, ("image_grid_pinpoints",)),
    "canvases that cannot be read": (
        {"image_aspect_ratio": "anyres", "image_grid_pinpoints": "[(56, 112"},
        ("image_grid_pinpoints",),
    ),
    "quantized already": ({"quantization_config": {"load_in_8bit": True}}, ("quantization_config", "original")),
    "a word for a number": ({"mm_vision_select_layer": "last"}, ("config.json", "last")),
    "a decoder that cannot be": ({"attention_dropout": "wide"}, ("config.json", "language model")),
    "a depth that the weights lack": ({"num_hidden_layers": 4}, ("missing", "model.layers.3", "config.json")),
    "image tokens without rows": (
        {"mm_use_im_start_end": True},
        ("model.embed_tokens.weight", "pytorch_model-00001-of-00002.bin", "<im_start>", "mm_use_im_start_end"),
    ),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_config_json_asks_for_what_is_not_there(what: str, llava_15: Path) -> None:
    changes, named = CONFIGS[what]
    edit(llava_15 / "config.json", **changes)
    message = refusal(llava_15)
    for part in named:
        assert part in message


def test_tiles_joined_in_space_with_the_class_token(llava_16: Path) -> None:
    edit(llava_16 / "config.json", mm_vision_select_feature="cls_patch")
    assert "mm_patch_merge_type" in refusal(llava_16)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer_config.json"])
def test_the_tokenizer_is_damaged(name: str, llava_15: Path) -> None:
    (llava_15 / name).write_bytes(b"\xff\xff no tokenizer")
    message = refusal(llava_15)
    assert name in message


def test_the_tokenizer_is_missing(llava_15: Path) -> None:
    (llava_15 / "tokenizer.model").unlink()
    assert "tokenizer.model" in refusal(llava_15)


def test_no_such_folder(tmp_path: Path) -> None:
    assert "nothing-here" in refusal(tmp_path / "nothing-here")


def test_no_such_template(llava_15: Path) -> None:
    message = refusal(llava_15, conv_mode="v7")
    assert "'v7'" in message
    assert "vicuna_v1" in message


def opened_offline(folder: Path, cache: Path) -> str:
    """The vision tower's folder, or the error, in a process of its own: whether the hub may be asked is decided when
    its client is imported."""
    program = (
        "import sys; from llava_serve import checkpoints, errors\n"
        "try: print(checkpoints.open_checkpoint(sys.argv[1]).tower)\n"
        "except errors.CheckpointError as error: print(error)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache)}
    command = [sys.executable, "-c", program, str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_a_tower_that_is_not_in_the_hub_cache(llava_15: Path, tmp_path: Path) -> None:
    edit(llava_15 / "config.json", mm_vision_tower="openai/clip-vit-large-patch14-336")
    message = opened_offline(llava_15, tmp_path / "cache")
    assert "vision tower 'openai/clip-vit-large-patch14-336'" in message
    assert "Download it first" in message


def test_a_tower_in_the_hub_cache_is_found(llava_15: Path, tmp_path: Path) -> None:
    edit(llava_15 / "config.json", mm_vision_tower="openai/clip-vit-large-patch14-336")
    repository = tmp_path / "cache" / "hub" / "models--openai--clip-vit-large-patch14-336"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(llava_15.parent / TOWER, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    assert Path(opened_offline(llava_15, tmp_path / "cache")) == snapshot


def test_a_tower_without_weights(llava_15: Path) -> None:
    tower = llava_15.parent / TOWER
    (tower / "model.safetensors").unlink()
    message = refusal(llava_15)
    assert str(tower) in message
    assert "vision_tower" in message


@pytest.mark.parametrize(
    ("file", "changes", "named"),
    [
        ("config.json", {"model_type": "mlcd_vision_model"}, "'mlcd_vision_model', which is not supported; CLIP and"),
        ("config.json", {"image_size": 70}, "tiles of 56 x 56"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize"),
        ("preprocessor_config.json", {"rescale_factor": 1.0}, "rescale_factor"),
    ],
)
def test_a_tower_that_is_not_supported(file: str, changes: dict[str, Any], named: str, llava_15: Path) -> None:
    edit(llava_15.parent / TOWER / file, **changes)
    assert named in refusal(llava_15)


def test_a_tower_without_its_processor(llava_15: Path) -> None:
    (llava_15.parent / TOWER / "preprocessor_config.json").unlink()
    assert "preprocessor_config.json is missing" in refusal(llava_15)


@pytest.mark.parametrize("kind", ["lora", "projector"])
def test_an_addition_without_its_base(kind: str, request: pytest.FixtureRequest) -> None:
    message = refusal(request.getfixturevalue(kind))
    assert "model_base" in message
    if kind == "lora":
        assert "vicuna-v1.5-tiny" in message  # as its adapter_config.json says


def test_a_base_for_a_full_checkpoint(llava_15: Path, lora: Path) -> None:
    message = refusal(llava_15, model_base=str(lora.parent / "vicuna-v1.5-tiny"))
    assert "llava-v1.5-tiny" in message
    assert "model_base" in message


def test_a_base_without_weights(lora: Path) -> None:
    base = lora.parent / "vicuna-v1.5-tiny"
    (base / "pytorch_model.bin").unlink()
    message = refusal(lora, model_base=str(base))
    assert str(base) in message
    assert "pytorch_model.bin" in message


def test_an_adapter_for_a_base_of_another_width(lora: Path) -> None:
    base = lora.parent / "vicuna-v1.5-tiny"
    write(base, {name: narrow(tensor, 64, 48) for name, tensor in read(base).items()})
    message = refusal(lora, model_base=str(base))
    for part in ("adapter_model.bin", "model.layers.0", "(48, 48)", "(64, 64)", "vicuna-v1.5-tiny", "model_base"):
        assert part in message


def test_an_adapter_for_a_base_of_fewer_layers(lora: Path) -> None:
    base = lora.parent / "vicuna-v1.5-tiny"
    write(base, {name: tensor for name, tensor in read(base).items() if "layers.2." not in name})
    message = refusal(lora, model_base=str(base))
    for part in ("adapter_model.bin", "model.layers.2", "vicuna-v1.5-tiny", "model_base"):
        assert part in message


def test_an_adapter_for_a_base_of_more_layers(lora: Path) -> None:
    base = lora.parent / "vicuna-v1.5-tiny"
    weights = read(base)
    more = {name.replace("layers.2.", "layers.3."): t.clone() for name, t in weights.items() if "layers.2." in name}
    write(base, weights | more)
    message = refusal(lora, model_base=str(base))
    for part in ("model.layers.3.input_layernorm.weight", "model.safetensors", "vicuna-v1.5-tiny", "model_base"):
        assert part in message


def test_an_adapter_without_its_other_weights(lora: Path) -> None:
    (lora / "non_lora_trainables.bin").unlink()
    message = refusal(lora, model_base=str(lora.parent / "vicuna-v1.5-tiny"))
    assert "non_lora_trainables.bin" in message
    assert "copy it there" in message


def test_an_adapter_without_its_factors(lora: Path) -> None:
    (lora / "adapter_model.bin").unlink()
    assert "adapter_model" in refusal(lora, model_base=str(lora.parent / "vicuna-v1.5-tiny"))


def test_an_adapter_with_half_a_factor(lora: Path) -> None:
    factors = torch.load(lora / "adapter_model.bin")
    del factors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    torch.save(factors, lora / "adapter_model.bin")
    message = refusal(lora, model_base=str(lora.parent / "vicuna-v1.5-tiny"))
    assert "adapter_model.bin" in message
    assert "model.layers.1.mlp.up_proj" in message


@pytest.mark.parametrize(
    ("changes", "file", "word"),
    [
        ({"r": 4}, "adapter_model.bin", "the rank is 4"),
        ({"r": None}, "adapter_config.json", "lacks r"),
        ({"lora_alpha": None}, "adapter_config.json", "lacks lora_alpha"),
        ({"use_dora": True}, "adapter_config.json", "use_dora"),
        ({"peft_type": "LOHA"}, "adapter_config.json", "LOHA"),
        ({"rank_pattern": {"q_proj": 4}}, "adapter_config.json", "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "adapter_config.json", "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "adapter_config.json", "'pissa'"),
        ({"init_lora_weights": "lora_ga"}, "adapter_config.json", "'lora_ga'"),
        ({"alora_invocation_tokens": [5, 6]}, "adapter_config.json", "alora_invocation_tokens"),
        ({"of_a_later_release": {"scale": 2}}, "adapter_config.json", "of_a_later_release"),
    ],
    ids=str,
)
def test_an_adapter_of_another_kind(changes: dict[str, Any], file: str, word: str, lora: Path) -> None:
    edit(lora / "adapter_config.json", **changes)
    message = refusal(lora, model_base=str(lora.parent / "vicuna-v1.5-tiny"))
    assert file in message
    assert word in message


def test_a_projector_that_is_cut_off(projector: Path) -> None:
    file = projector / "mm_projector.bin"
    file.write_bytes(file.read_bytes()[:500])
    message = refusal(projector, model_base=str(projector.parent / "vicuna-v1.5-tiny"))
    assert "mm_projector.bin" in message
    assert "damaged" in message


def test_a_projector_for_a_base_of_another_width(projector: Path) -> None:
    base = projector.parent / "vicuna-v1.5-tiny"
    write(base, {name: narrow(tensor, 64, 48) for name, tensor in read(base).items()})
    message = refusal(projector, model_base=str(base))
    assert "model.embed_tokens.weight" in message
    assert "(700, 48)" in message
