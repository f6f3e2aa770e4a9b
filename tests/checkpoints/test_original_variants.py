"""Checkpoints in the original layout that differ from the golden ones load, and compute what their files say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from llava_serve.checkpoints import open_checkpoint
from llava_serve.model.llava import Llava
from support.paths import GOLDEN
from support.variants import (
    TOWER,
    Weights,
    all_logits,
    copy,
    decoder_weights,
    edit,
    expected_logits,
    merged_by_peft,
    narrow,
    prepare,
    read,
    same_weights,
    tower_weights,
    write,
)

TOLERANCE = 2e-4
SIDE = 4
"""Features along one side of a tile."""


def load(folder: Path, **options: Any) -> Llava:
    return Llava.load(open_checkpoint(str(folder), **options))


@pytest.fixture
def llava_15(tmp_path: Path) -> Path:
    return copy("llava-v1.5-tiny", tmp_path)


@pytest.fixture
def llava_16(tmp_path: Path) -> Path:
    return copy("llava-v1.6-vicuna-tiny", tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_one_file_of_either_format(llava_15: Path, file: str) -> None:
    before = load(llava_15)
    write(llava_15, read(llava_15), file)
    assert same_weights(load(llava_15), before)


def test_shards_without_their_index(llava_15: Path) -> None:
    before = load(llava_15)
    (llava_15 / "pytorch_model.bin.index.json").unlink()
    assert same_weights(load(llava_15), before)


@pytest.mark.parametrize(
    "wrapped",
    [
        "module.{0}.{1}",
        "_orig_mod.{0}.{1}",
        "base_model.model.{0}.{1}",
        "module._orig_mod.{0}.{1}",
        "{0}._orig_mod.{1}",
        "_forward_module._fsdp_wrapped_module.{0}._checkpoint_wrapped_module.{1}",
    ],
)
def test_names_of_wrapped_modules(llava_15: Path, wrapped: str) -> None:
    before = load(llava_15)
    weights = read(llava_15)
    write(llava_15, {wrapped.format(*name.split(".", 1)): tensor for name, tensor in weights.items()})
    assert same_weights(load(llava_15), before)


def test_a_byte_order_mark_does_not_matter(llava_15: Path, folder_of: Any, tmp_path: Path) -> None:
    hf = Path(shutil.copytree(folder_of("llava-1.5-llama-hub"), tmp_path / "hf"))
    for folder in (llava_15, hf):
        before = open_checkpoint(str(folder))
        for file in [*folder.glob("*.json"), *folder.glob("*.jinja")]:
            file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
        assert open_checkpoint(str(folder)) == before
        load(folder)


def test_a_bin_file_of_before_torch_1_6(llava_15: Path) -> None:
    before = load(llava_15)
    weights = read(llava_15)
    write(llava_15, weights, "pytorch_model.bin")
    torch.save(weights, llava_15 / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert same_weights(load(llava_15), before)


def test_a_projector_beside_full_weights_is_ignored(llava_15: Path) -> None:
    before = load(llava_15)
    torch.save({"model.mm_projector.0.weight": torch.zeros(64, 48)}, llava_15 / "mm_projector.bin")
    assert same_weights(load(llava_15), before)


def test_rows_behind_the_tokenizer_are_cut_off(llava_15: Path) -> None:
    before = load(llava_15)
    weights = read(llava_15)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.ones(4, 64, dtype=torch.float16)])
    write(llava_15, weights)
    edit(llava_15 / "config.json", vocab_size=704)
    assert same_weights(load(llava_15), before)


def test_a_padding_token_behind_the_rows_does_not_matter(llava_15: Path) -> None:
    """Rows without a token are cut off, and config.json may pad with one of them."""
    before = load(llava_15)
    edit(llava_15 / "config.json", pad_token_id=700, _attn_implementation="flash_attention_2")
    assert same_weights(load(llava_15), before)


def test_an_end_token_that_the_vocabulary_lacks_is_reported_and_not_used(llava_15: Path) -> None:
    edit(llava_15 / "generation_config.json", eos_token_id=[2, -1, 700])
    spec = open_checkpoint(str(llava_15))
    assert spec.eos_token_ids == (2,)
    assert any("ends an answer at the tokens -1, 700" in note for note in spec.notes)


def test_an_image_newline_is_ignored_where_images_are_not_tiled(llava_15: Path) -> None:
    before = load(llava_15)
    write(llava_15, read(llava_15) | {"model.image_newline": torch.ones(64).half()})
    edit(llava_15 / "config.json", mm_patch_merge_type="spatial_unpad")
    assert same_weights(load(llava_15), before)


def test_in_llava_next_the_newline_follows_a_single_tile(llava_15: Path) -> None:
    """Its training and its demonstrations give the model a list of images, the original a stack."""
    newline = torch.linspace(-1, 1, 64).half()
    weights = read(llava_15) | {"model.image_newline": newline}
    write(llava_15, weights)
    changes = {"mm_patch_merge_type": "spatial_unpad", "mm_tunable_parts": "mm_mlp_adapter,mm_language_model"}
    config = edit(llava_15 / "config.json", **changes)

    def with_newline(features: torch.Tensor) -> torch.Tensor:
        return torch.cat([features.flatten(0, 1), newline.float()[None]])

    check(llava_15, config, weights, None, with_newline)


PROJECTORS = {"linear": ("",), "mlp1x_gelu": ("0.",), "mlp3x_gelu": ("0.", "2.", "4.")}


@pytest.mark.parametrize("kind", PROJECTORS)
def test_projectors_of_other_depths(llava_15: Path, kind: str) -> None:
    weights = {name: t for name, t in read(llava_15).items() if "mm_projector" not in name}
    generator = torch.Generator().manual_seed(3)
    for i, layer in enumerate(PROJECTORS[kind]):
        shape = (64, 64 if i else 48)
        weights[f"model.mm_projector.{layer}weight"] = torch.randn(shape, generator=generator).half() * 0.2
        weights[f"model.mm_projector.{layer}bias"] = torch.randn(64, generator=generator).half()
    write(llava_15, weights)
    config = edit(llava_15 / "config.json", mm_projector_type=kind)
    check(llava_15, config, weights)


def test_an_identity_projector(llava_15: Path) -> None:
    """Needs a decoder as wide as the tower: the first 48 of the golden one's 64 dimensions."""
    weights = {name: t for name, t in read(llava_15).items() if "mm_projector" not in name}
    weights = {name: narrow(tensor, 64, 48) for name, tensor in weights.items()}
    write(llava_15, weights)
    config = edit(llava_15 / "config.json", mm_projector_type="identity", hidden_size=48)
    check(llava_15, config, weights)


@pytest.mark.parametrize(("feature", "layer"), [("cls_patch", -2), ("patch", -1), ("cls_patch", 1)])
def test_other_features_of_the_tower(llava_15: Path, feature: str, layer: int) -> None:
    config = edit(llava_15 / "config.json", mm_vision_select_feature=feature, mm_vision_select_layer=layer)
    prepared = prepare(llava_15)
    (start, end) = prepared.image_spans[0]
    assert end - start == SIDE * SIDE + (feature == "cls_patch")
    check(llava_15, config, read(llava_15))


def by_rows(features: torch.Tensor) -> torch.Tensor:
    """`spatial`: the overview, then all tiles as one picture, row by row; the golden landscape takes two in a row."""
    overview, *tiles = features
    rows = [tile[row * SIDE : (row + 1) * SIDE] for row in range(SIDE) for tile in tiles]
    return torch.cat([overview, *rows])


@pytest.mark.parametrize(("merge", "feature"), [("spatial", "patch"), ("flat", "patch"), ("flat", "cls_patch")])
def test_other_ways_to_join_tiles(llava_16: Path, merge: str, feature: str) -> None:
    weights = {name: t for name, t in read(llava_16).items() if name != "model.image_newline"}
    write(llava_16, weights)
    config = edit(
        llava_16 / "config.json",
        mm_patch_merge_type=merge,
        mm_vision_select_feature=feature,
        image_grid_pinpoints=[[112, 56]],
    )
    prefix = "model.vision_tower.vision_tower.vision_model."
    tower = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
    check(llava_16, config, weights, tower, *([by_rows] if merge == "spatial" else []))


def check(folder: Path, config: dict[str, Any], weights: Weights, tower: Weights | None = None, *join: Any) -> None:
    prepared = prepare(folder)
    counting = tower_weights(folder.parent / TOWER) if tower is None else tower
    expected = expected_logits(config, weights, (folder.parent / TOWER, counting), prepared, *join)
    torch.testing.assert_close(all_logits(load(folder), prepared), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_tower_inside_a_whole_clip(llava_15: Path, file: str) -> None:
    """As openai/clip-vit-large-patch14-336 is published: both halves, and tables that older releases stored."""
    before = load(llava_15)
    folder = llava_15.parent / TOWER
    vision = json.loads((folder / "config.json").read_text())
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=32)
    whole = CLIPModel(config).half().state_dict() | read(folder)
    assert any(name.startswith("text_model.") for name in whole)
    whole["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    write(folder, whole, file)
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
    assert same_weights(load(llava_15), before)


def write_adapter(folder: Path, decoder: Weights, dtype: torch.dtype, **settings: Any) -> None:
    """Random factors for every linear layer of a decoder, as PEFT saves them."""
    generator = torch.Generator().manual_seed(11)
    factors: Weights = {}
    for name, tensor in decoder.items():
        if name.endswith("_proj.weight"):
            start = f"base_model.model.{name.removesuffix('.weight')}"
            for side, shape in (("A", (8, tensor.shape[1])), ("B", (tensor.shape[0], 8))):
                factors[f"{start}.lora_{side}.weight"] = (torch.randn(shape, generator=generator) * 0.1).to(dtype)
    for old in folder.glob("adapter_model.*"):
        old.unlink()
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    edit(folder / "adapter_config.json", **settings)


def projector_of(weights: Weights) -> Weights:
    return {f"base_model.model.{name}": t for name, t in weights.items() if "mm_projector" in name or "newline" in name}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_lora_is_merged_as_peft_merges(tmp_path: Path, rslora: bool, dtype: torch.dtype | None) -> None:
    """The golden adapter, and random ones in other precisions than the base's, in safetensors."""
    adapter, base = copy("llava-v1.5-tiny-lora", tmp_path), copy("vicuna-v1.5-tiny", tmp_path)
    weights = read(base)
    edit(adapter / "adapter_config.json", use_rslora=rslora)
    if dtype is not None:
        write_adapter(adapter, weights, dtype, lora_alpha=24)
    expected = merged_by_peft(json.loads((base / "config.json").read_text()), weights, adapter)
    assert_decoder(load(adapter, model_base=str(base)), expected, differs_from=weights)


def test_a_projector_over_a_llava_with_a_deeper_one(tmp_path: Path) -> None:
    base, projector = copy("llava-v1.5-tiny", tmp_path), copy("llava-v1-tiny-pretrain-projector", tmp_path)
    model = load(projector, model_base=str(base))
    stored = torch.load(projector / "mm_projector.bin")
    assert torch.equal(model.projector.state_dict()["0.weight"], stored["model.mm_projector.weight"].float())
    assert len(model.projector) == 1
    assert torch.equal(model.language_model.lm_head.weight, read(base)["lm_head.weight"].float())


def test_lora_on_a_mistral(tmp_path: Path) -> None:
    """The base is a LLaVA itself, as for a further fine-tuning; the decoder has grouped keys and values."""
    base = copy("llava-v1.6-mistral-tiny", tmp_path)
    adapter = tmp_path / "llava-v1.6-mistral-tiny-lora"
    adapter.mkdir()
    config = json.loads((base / "config.json").read_text())
    (adapter / "config.json").write_text(json.dumps(config))
    shutil.copy(GOLDEN / "checkpoints" / "llava-v1.5-tiny-lora" / "adapter_config.json", adapter)
    weights = read(base)
    write_adapter(adapter, decoder_weights(weights), torch.float16)
    trained = {name: t * 0.5 for name, t in projector_of(weights).items()}
    torch.save(trained, adapter / "non_lora_trainables.bin")
    merged = merged_by_peft(config, decoder_weights(weights), adapter)
    model = load(adapter, model_base=str(base))
    assert_decoder(model, merged, differs_from=weights)
    assert model.language_model.config.model_type == "mistral"
    assert model.image_newline is not None
    assert torch.equal(model.image_newline, weights["model.image_newline"].float() * 0.5)


def assert_decoder(model: Llava, expected: Weights, differs_from: Weights) -> None:
    found = model.language_model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor.float(), atol=0, rtol=0)
    changed = [name for name, tensor in expected.items() if not torch.equal(tensor, differs_from[name])]
    assert len(changed) == 7 * model.language_model.config.num_hidden_layers
