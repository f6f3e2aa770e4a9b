"""What is refused at load in transformers' layout, by name: other models of the family, and files that do not fit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_serve.checkpoints import open_checkpoint
from llava_serve.errors import CheckpointError
from llava_serve.model.llava import Llava


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / folder.name))


def change_json(path: Path, *inside: str, **changes: Any) -> None:
    """Sets keys of a JSON file, in an object inside it where one is named; None removes a key."""
    whole = json.loads(path.read_text())
    part = whole
    for key in inside:
        part = part[key]
    part |= changes
    for key in [key for key, value in part.items() if value is None]:
        del part[key]
    path.write_text(json.dumps(whole))


REFUSED: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "another model": ((), {"model_type": "qwen2_vl"}, "'qwen2_vl', which is not supported; of transformers' models"),
    "videos": ((), {"model_type": "video_llava"}, "Video-LLaVA, which answers questions about videos"),
    "OneVision 1.5": ((), {"model_type": "llavaonevision1_5"}, "LLaVA-OneVision-1.5, which has another tower"),
    "OneVision 2": ((), {"model_type": "llava_onevision2"}, "LLaVA-OneVision-2, which has another tower"),
    "FastVLM": ((), {"model_type": "fast_vlm"}, "FastVLM, whose tower is FastViT"),
    "Bunny": ((), {"model_type": "bunny-phi"}, "Bunny, which has code of its own"),
    "VILA": ((), {"model_type": "llava_llama", "llm_cfg": "llm"}, "VILA, which keeps its parts in folders"),
    "Pixtral": (("vision_config",), {"model_type": "pixtral"}, "Pixtral, whose tower takes images of any size"),
    "sinks": (("text_config",), {"model_type": "gpt_oss"}, "gpt_oss, which is not supported; these are: apertus, "),
    "dynamic positions": (("text_config",), {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' rotary"),
    "positions of two kinds": (
        ("text_config",),
        {"rope_parameters": {"full_attention": {"rope_type": "longrope"}, "sliding_attention": {}}},
        "'longrope' rotary",
    ),
    "another tower": (
        ("vision_config",),
        {"model_type": "mlcd_vision_model"},
        "'mlcd_vision_model', which is not supported; CLIP and SigLIP are",
    ),
    "SigLIP without its class token": (
        ("vision_config",),
        {"model_type": "siglip_vision_model"},
        "vision_feature_select_strategy is default), and the features of SigLIP have none",
    ),
    "features of another kind": (
        (),
        {"vision_feature_select_strategy": "cls"},
        "vision_feature_select_strategy to 'cls'; default and full",
    ),
    "another tokenizer": ((), {"image_token_index": 7}, "image_token_index"),
    "no such value": (("vision_config",), {"patch_size": "many"}, "config.json"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(what: str, folder_of: Any, tmp_path: Path) -> None:
    inside, changes, named = REFUSED[what]
    folder = copy(folder_of("llava-1.5-llama-hub"), tmp_path)
    change_json(folder / "config.json", *inside, **changes)
    with pytest.raises(CheckpointError, match=re.escape(named)):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("name", ["llava-next-llama", "llava-1.5-llama-hub"])
def test_refused_with_tensors_missing_and_surplus(name: str, folder_of: Any, tmp_path: Path) -> None:
    folder = copy(folder_of(name), tmp_path)
    file = min(folder.glob("*.safetensors"))
    weights = load_file(file)
    gone = next(name for name in weights if "language_model.model.layers.1" in name)
    del weights[gone]
    save_file(weights | {"multi_modal_projector.linear_3.bias": torch.zeros(1)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError) as refused:
        Llava.load(open_checkpoint(str(folder)))
    for part in (gone, f"multi_modal_projector.linear_3.bias (in {file.name})", "Download it again"):
        assert part in refused.value.message


def test_refused_with_the_class_token_in_a_grid(folder_of: Any, tmp_path: Path) -> None:
    folder = copy(folder_of("llava-next-llama"), tmp_path)
    change_json(folder / "config.json", vision_feature_select_strategy="full")
    with pytest.raises(CheckpointError, match="vision_feature_select_strategy"):
        open_checkpoint(str(folder))


def test_refused_with_another_limit_of_the_grid(folder_of: Any, tmp_path: Path) -> None:
    folder = copy(folder_of("onevision-hub"), tmp_path)
    change_json(folder / "config.json", vision_aspect_ratio="highres")
    with pytest.raises(CheckpointError, match="vision_aspect_ratio to 'highres'; anyres_max_N"):
        open_checkpoint(str(folder))


def test_refused_with_a_layer_that_the_tower_lacks(folder_of: Any, tmp_path: Path) -> None:
    folder = copy(folder_of("vip-llava-hub"), tmp_path)
    change_json(folder / "config.json", vision_feature_layer=[-2, -5])
    with pytest.raises(CheckpointError, match="layer -5 of a vision tower with 3 layers"):
        Llava.load(open_checkpoint(str(folder)))


def test_refused_where_canvases_differ(folder_of: Any, tmp_path: Path) -> None:
    folder = copy(folder_of("llava-next-llama-hub"), tmp_path)
    change_json(folder / "config.json", image_grid_pinpoints=[[42, 84]])
    with pytest.raises(CheckpointError, match="image_grid_pinpoints"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("changes", "made"),
    [
        ({"do_center_crop": False}, "tiles of any size"),
        ({"do_center_crop": False, "do_resize": False}, "tiles of any size"),
        ({"do_center_crop": False, "size": {"height": 28, "width": 56}}, "tiles of 56 x 28"),
        ({"do_center_crop": False, "do_pad": True, "size": {"shortest_edge": 56}}, "tiles of 56 x 56"),
    ],
)
def test_refused_with_a_processor_of_other_tiles(
    changes: dict[str, Any], made: str, folder_of: Any, tmp_path: Path
) -> None:
    folder = copy(folder_of("llava-1.5-llama-hub"), tmp_path)
    change_json(folder / "preprocessor_config.json", **changes)
    with pytest.raises(CheckpointError, match=f"do_center_crop.* makes {made}, but the vision tower takes 42 x 42"):
        open_checkpoint(str(folder))


def test_refused_with_other_rows_than_the_config_says(folder_of: Any, tmp_path: Path) -> None:
    folder = copy(folder_of("llava-1.5-llama-hub"), tmp_path)
    change_json(folder / "config.json", "text_config", vocab_size=512)
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight in .*448.*512"):
        Llava.load(open_checkpoint(str(folder)))
