"""What is easily mistaken in a newer kind changes the logits; `test_hf_layout` compares them with transformers'."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from llava_serve.checkpoints import CheckpointSpec, open_checkpoint
from llava_serve.checkpoints.towers import TOWERS
from llava_serve.config import ImageOptions
from llava_serve.errors import CheckpointError
from llava_serve.model.llava import Llava
from llava_serve.processor import Processor
from support.hf_reference import Reference, said
from support.scenes import picture
from support.tiny_hf import FAMILY, MODELS
from support.variants import all_logits, edit

ONE = [(200, 40)]
LARGE = [(160, 150)]
SEVERAL = [(120, 80), (30, 44)]
Change = Callable[[CheckpointSpec], CheckpointSpec]


def spec_with(**changes: Any) -> Change:
    return lambda spec: dataclasses.replace(spec, **changes)


def image_with(**changes: Any) -> Change:
    return lambda spec: dataclasses.replace(spec, image=dataclasses.replace(spec.image, **changes))


def each_of_several_with(**changes: Any) -> Change:
    def change(spec: CheckpointSpec) -> CheckpointSpec:
        assert spec.image.of_several is not None
        return image_with(of_several=dataclasses.replace(spec.image.of_several, **changes))(spec)

    return change


def text_without(*keys: str) -> Change:
    return lambda spec: dataclasses.replace(
        spec, text_config={key: value for key, value in spec.text_config.items() if key not in keys}
    )


def with_class_token(spec: CheckpointSpec) -> CheckpointSpec:
    return image_with(extra_features=1)(dataclasses.replace(spec, select_feature="cls_patch"))


def turned(spec: CheckpointSpec) -> CheckpointSpec:
    wide = tuple(canvas for canvas in spec.image.grid_pinpoints if canvas[0] >= canvas[1])
    return image_with(grid_pinpoints=tuple((height, width) for width, height in wide))(spec)


TRAPS: dict[str, tuple[str, list[tuple[int, int]], Change]] = {
    "another layer": ("joycaption", ONE, spec_with(select_layers=(-1,))),
    "layers in another order": ("vip-llava-hub", ONE, spec_with(select_layers=(1, -2, 3))),
    "another layer of several": ("granite-vision", ONE, spec_with(select_layers=(-4, -2, -1))),
    "another epsilon of the norm": ("vip-llava-hub", ONE, spec_with(projector_norm=10.0)),
    "the class token kept": ("llava-gemma", ONE, with_class_token),
    "grid of features not interpolated": ("onevision", LARGE, image_with(max_grid_tiles=None)),
    "interpolated to more": ("onevision", LARGE, image_with(max_grid_tiles=5)),
    "each of several as a grid": ("onevision", SEVERAL, image_with(of_several=None)),
    "no newline behind a single tile": ("onevision", SEVERAL, each_of_several_with(newline=False)),
    "a single tile cropped": ("onevision", SEVERAL, each_of_several_with(aspect="square")),
    "canvases turned": ("granite-vision", ONE, turned),
    "cropped, not squashed": (
        "interleave-hub",
        ONE,
        image_with(resize_to=None, shortest_edge=42, do_center_crop=True),
    ),
    "padded, not squashed": ("interleave-hub", ONE, image_with(aspect="pad")),
    "another filter": ("qwen3-siglip", ONE, image_with(resample=3)),
    "another mean": ("joycaption", ONE, image_with(mean=(0.48, 0.46, 0.41))),
    "positions not scaled": ("joycaption", ONE, text_without("rope_parameters")),
    "attention not scaled": ("granite-vision", ONE, text_without("attention_multiplier")),
    "no window": ("llava-phi-3", ONE, text_without("sliding_window")),
}


def last_logits(spec: CheckpointSpec, sizes: list[tuple[int, int]]) -> torch.Tensor:
    prepared = Processor(spec, ImageOptions()).prepare_query("What is it?", [picture(*size) for size in sizes])
    return all_logits(Llava.load(spec), prepared)[-1]


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_changes_the_answer(trap: str, folder_of: Any) -> None:
    kind, sizes, change = TRAPS[trap]
    spec = open_checkpoint(str(folder_of(kind)))
    right, wrong = last_logits(spec, sizes), last_logits(change(spec), sizes)
    assert (right - wrong).abs().max() > 0.02


@pytest.mark.parametrize("kind", ["onevision", "interleave-hub"])
def test_siglips_features_come_before_its_last_norm(kind: str, folder_of: Any) -> None:
    model = Llava.load(open_checkpoint(str(folder_of(kind))))
    tiles = torch.randint(256, (1, 42, 42, 3), dtype=torch.uint8)
    with torch.inference_mode():
        pixels = (tiles.float() / 255 - 0.5) / 0.5
        after = model.vision_tower(pixels.permute(0, 3, 1, 2)).last_hidden_state
        features = model.tower_features(tiles)
        torch.testing.assert_close(model.vision_tower.post_layernorm(features), after)
    assert (features - after).abs().max() > 0.1


@pytest.mark.parametrize(
    ("kind", "processor"),
    [("clip_vision_model", CLIPImageProcessorPil), ("siglip_vision_model", SiglipImageProcessorPil)],
)
def test_what_a_processors_file_leaves_out_is_its_classs_default(kind: str, processor: Any) -> None:
    made, tower = processor(), TOWERS[kind]
    assert (tower.mean, tower.std) == (tuple(made.image_mean), tuple(made.image_std))
    assert tower.crops == bool(made.do_center_crop)


@pytest.mark.parametrize("name", ["llava-1.5-full-tied", "llava-gemma"])
def test_the_inner_config_alone_may_tie_the_head(name: str, folder_of: Any, tmp_path: Path) -> None:
    """Gemma's does by default, so older files do not say it."""
    folder = Path(shutil.copytree(folder_of(name), tmp_path / name))
    text = json.loads((folder / "config.json").read_text())["text_config"]
    if name == "llava-gemma":
        del text["tie_word_embeddings"]
    edit(folder / "config.json", tie_word_embeddings=None, text_config=text)
    Reference(folder, (MODELS | FAMILY)[name])  # transformers misses no head
    tied = Llava.load(open_checkpoint(str(folder))).language_model
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight


@pytest.mark.parametrize("outer", [None, False])
def test_files_without_a_head_are_those_of_a_tied_one(outer: bool | None, folder_of: Any, tmp_path: Path) -> None:
    """Older releases looked at the inner config of LLaVA-NeXT, and wrote the outer one without a word or as false."""
    name = "llava-next-llama-tied"
    talk = [said("user", "What is it?", picture(50, 70))]
    folder = Path(shutil.copytree(folder_of(name), tmp_path / name))
    reference = Reference(folder, MODELS[name])
    edit(folder / "config.json", tie_word_embeddings=outer)
    spec = open_checkpoint(str(folder))
    processor = Processor(spec, ImageOptions())
    reference.assert_same_logits(talk, processor.prepare(processor.read(talk)), Llava.load(spec))


def test_a_head_is_not_tied_where_no_config_says_so(folder_of: Any, tmp_path: Path) -> None:
    name = "onevision-hub"
    assert not open_checkpoint(str(folder_of(name))).text_config["tie_word_embeddings"]
    folder = Path(shutil.copytree(folder_of(name), tmp_path / name))
    for shard in folder.glob("*.safetensors"):
        tensors = {name: t for name, t in load_file(shard).items() if "lm_head" not in name}
        save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing are language_model\.lm_head\.weight\..* tie_word_embeddings"):
        Llava.load(open_checkpoint(str(folder)))
