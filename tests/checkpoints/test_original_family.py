"""Descendants of the original that have its files: class names, towers and the spelling of their grids."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llava_serve.checkpoints import open_checkpoint
from llava_serve.config import ImageOptions
from llava_serve.errors import CheckpointError
from llava_serve.model.llava import Llava
from llava_serve.processor import Processor
from support.next_checkpoints import write_tower
from support.scenes import picture
from support.variants import all_logits, edit, prepare

RANGE, LIST = "(1x1),...,(6x6)", [[56 * i, 56 * j] for i in range(1, 7) for j in range(1, 7)]
SHARE_GPT4V = {"architectures": ["Share4VLlamaForCausalLM"], "model_type": "share4v"}


POOLED = {"mm_resampler_type": "spatial_pool", "mm_spatial_pool_mode": "average", "mm_spatial_pool_stride": 2}
"""LLaVA-NeXT-Video's: of the features of videos."""
SAME = {"ShareGPT4V": SHARE_GPT4V, "RLAIF-V": {"unfreeze_mm_vision_tower": True}, "LLaVA-NeXT-Video": POOLED}


@pytest.mark.parametrize("changes", SAME.values(), ids=SAME)
def test_the_same_files_under_other_names(changes: dict[str, Any], llava_15: Path) -> None:
    expected = all_logits(Llava.load(open_checkpoint(str(llava_15))), prepare(llava_15))
    edit(llava_15 / "config.json", **changes)
    assert torch.equal(all_logits(Llava.load(open_checkpoint(str(llava_15))), prepare(llava_15)), expected)


@pytest.mark.parametrize(
    ("name", "decoder"),
    [("LlavaQwenForCausalLM", "qwen2"), ("LlavaQwen3ForCausalLM", "qwen3"), ("LlavaMixtralForCausalLM", "mixtral")],
)
def test_the_class_names_the_decoder(name: str, decoder: str, llava_15: Path) -> None:
    """The model type of LLaVA-OneVision 7B is that of LLaVA on Llama."""
    edit(llava_15 / "config.json", architectures=[name], model_type="llava")
    assert open_checkpoint(str(llava_15)).text_config["model_type"] == decoder


@pytest.mark.parametrize(("kind", "decoder"), [("llava_qwen", "qwen2"), ("llava_llama", "llama")])
def test_a_class_of_ones_own_with_a_model_type_that_is_known(kind: str, decoder: str, llava_15: Path) -> None:
    edit(llava_15 / "config.json", architectures=["MyLlavaForCausalLM"], model_type=kind)
    assert open_checkpoint(str(llava_15)).text_config["model_type"] == decoder


@pytest.mark.parametrize("written", [RANGE, LIST, str([tuple(one) for one in LIST])], ids=["range", "list", "text"])
def test_canvases_in_every_spelling(written: Any, llava_16: Path) -> None:
    edit(llava_16 / "config.json", image_aspect_ratio="anyres_max_9", image_grid_pinpoints=written)
    image = open_checkpoint(str(llava_16)).image
    assert image.grid_pinpoints == tuple((width, height) for width, height in LIST)
    assert image.max_grid_tiles == 9


def test_a_tower_that_was_trained_is_in_the_checkpoint(llava_16: Path) -> None:
    parts = "mm_vision_tower,mm_mlp_adapter,mm_language_model"
    edit(llava_16 / "config.json", unfreeze_mm_vision_tower=None, mm_tunable_parts=parts)
    assert open_checkpoint(str(llava_16)).tower_in_checkpoint


@pytest.mark.parametrize(("layer", "feature"), [(-2, "patch"), (-1, "cls_patch"), (None, "patch")])
def test_of_siglip_the_original_takes_one_layer(layer: int | None, feature: str, llava_15: Path) -> None:
    """Whatever config.json selects: the layer before the last, all features."""
    tower = write_tower(llava_15.parent, "siglip")
    edit(llava_15 / "config.json", mm_vision_select_layer=layer, mm_vision_select_feature=feature)
    spec = open_checkpoint(str(llava_15), vision_tower=str(tower))
    assert (spec.select_layers, spec.select_feature, spec.image.extra_features) == ((-2,), "cls_patch", 0)


def test_siglips_processor_is_in_the_originals_code(llava_15: Path) -> None:
    """LLaVA-NeXT reads no file: SigLIP 2's asks for another filter."""
    tower = write_tower(llava_15.parent, "siglip")
    before = open_checkpoint(str(llava_15), vision_tower=str(tower)).image
    assert (before.resample, before.mean, before.std, before.resize_to) == (3, (0.5,) * 3, (0.5,) * 3, (384, 384))
    edit(tower / "preprocessor_config.json", resample=2, image_mean=[0.4, 0.5, 0.6])
    assert open_checkpoint(str(llava_15), vision_tower=str(tower)).image == before


@pytest.mark.parametrize("kind", ["onevision", "next-qwen"])
def test_the_tiles_of_an_image_can_be_limited(kind: str, folder_of: Any) -> None:
    """The model finds the canvas by the number of tiles: it knows no image options."""
    spec = open_checkpoint(str(folder_of(kind)))
    model = Llava.load(spec)
    for size in ((200, 40), (33, 310), (160, 150), (20, 20)):
        shapes = []
        for limit in (None, 3, 2):
            processor = Processor(spec, ImageOptions(max_tiles=limit))
            prepared = processor.prepare_query("What is it?", [picture(*size)])
            (start, end), (tiles,) = prepared.image_spans[0], prepared.tiles
            features = model.tower_features(torch.from_numpy(np.asarray(tiles)))
            assert len(model.image_embeddings(features, size)) == end - start
            assert len(tiles) - 1 <= (limit or spec.image.max_tiles)
            shapes.append(len(tiles))
        assert shapes == sorted(shapes, reverse=True)
    assert shapes[0] == (2 if kind == "onevision" else 3)


def test_a_limit_below_the_smallest_grid_is_refused(folder_of: Any) -> None:
    spec = open_checkpoint(str(folder_of("next-qwen")))
    with pytest.raises(CheckpointError, match=re.escape("max_tiles is 1, but the model's smallest grid has 2 tiles")):
        Processor(spec, ImageOptions(max_tiles=1))


def test_an_image_alone_and_among_others_are_cached_apart(folder_of: Any) -> None:
    processor = Processor(open_checkpoint(str(folder_of("onevision"))), ImageOptions())
    one, two = picture(120, 80), picture(30, 44)
    alone = processor.prepare_query("What is it?", [one])
    both = processor.prepare_query("What is it?", [one, two])
    assert [len(tiles) for tiles in alone.tiles + both.tiles] == [7, 1, 1]
    assert alone.digests[0] != both.digests[0]
    assert processor.prepare_query("What is it?", [one]).digests == alone.digests


def test_a_config_that_leaves_everything_out(folder_of: Any, tmp_path: Path) -> None:
    """The published files of LLaVA-1.5 have neither a vision config's sizes nor a language model's."""
    from llava_serve.checkpoints.decoders import DECODERS

    folder = tmp_path / "bare"
    folder.mkdir()
    source = folder_of("llava-1.5-llama-hub")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    (folder / "preprocessor_config.json").write_text("{}")
    token = json.loads((source / "config.json").read_text())["image_token_index"]
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", "image_token_index": token}))
    spec = open_checkpoint(str(folder), weights=False)
    assert (spec.vocab_size, spec.context_length, spec.eos_token_ids) == DECODERS["llama"][:3]
    assert spec.image.crop_size == (336, 336)
