"""Each trap of the code makes a comparison with transformers or the original fail: the code is changed while it runs.

`test_family_traps` does so for what a description of a checkpoint says.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llava_serve import LLM, SamplingParams
from llava_serve.checkpoints import ImageProcessing, chat_templates, hf, open_checkpoint
from llava_serve.config import EngineOptions, ImageOptions
from llava_serve.engine import engine
from llava_serve.engine.encoder_cache import EncoderCacheManager
from llava_serve.errors import CheckpointError
from llava_serve.images import tiles
from llava_serve.model import llava
from llava_serve.model.llava import Llava
from llava_serve.processor import Processor
from llava_serve.prompts import chat_template
from llava_serve.prompts.chat_template import ChatTemplate
from llava_serve.prompts.conversation import Control, Text
from support.hf_reference import TOLERANCE, Reference, Talk, said
from support.paths import GOLDEN
from support.scenes import picture
from support.tiny_hf import FAMILY, MODELS
from support.variants import all_logits

pytestmark = pytest.mark.extended

ONE = [said("user", "What is it?", picture(160, 150))]
SEVERAL = [said("user", "Which one is larger?", picture(120, 80), picture(30, 44))]
TURNS = [*ONE, said("assistant", "A red one."), said("user", "And now?")]


Check = Callable[[Callable[[str], Path]], None]
"""Takes what writes a model; its assertions hold unless the code is changed."""


@cache
def reference(kind: str, folder: Path) -> Reference:
    return Reference(folder, (MODELS | FAMILY)[kind])


def transformers(kind: str, talk: Talk) -> Check:
    return partial(compare, kind, talk)


def compare(kind: str, talk: Talk, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of(kind)
    spec = open_checkpoint(str(folder))
    processor = Processor(spec, ImageOptions())
    prepared = processor.prepare(processor.read(talk))
    theirs = reference(kind, folder)
    theirs.assert_same_ids(talk, prepared)
    theirs.assert_same_logits(talk, prepared, Llava.load(spec))


def original(name: str) -> Check:
    """The golden case with two images."""
    [case] = [one for one in GOLDEN_CASES[name]["cases"] if one["id"] == "two-images"]
    return partial(compare_golden, name, case)


GOLDEN_CASES: dict[str, Any] = json.loads((GOLDEN / "cases.json").read_text())


def compare_golden(name: str, case: dict[str, Any], folder_of: Callable[[str], Path]) -> None:
    spec = open_checkpoint(str(GOLDEN / "checkpoints" / name))
    processor = Processor(spec, ImageOptions(transparency="drop"))
    images = [GOLDEN / "images" / image for image in case["images"]]
    prepared = processor.prepare_query(case["query"], images, conv_mode=case["conv_mode"])
    assert (prepared.input_ids, prepared.num_tokens) == (case["input_ids"], case["prompt_len"])
    found = all_logits(Llava.load(spec), prepared)[-1]
    expected = dict(case["last_logits_top8"])
    np.testing.assert_allclose(found[[*expected]], [*expected.values()], atol=TOLERANCE)


def budget(folder_of: Callable[[str], Path]) -> None:
    """The features that are kept for later requests take no more than they may: here each has three layers. Beside them
    are those of the last image, which the next step may drop."""
    options = EngineOptions(num_threads=1, feature_cache_bytes=40_000)
    llm = LLM(str(folder_of("granite-vision")), device="cpu", dtype="float32", engine=options)
    for width in range(40, 48):
        llm.generate("What is it?", images=[picture(width, 40)], sampling=SamplingParams(max_new_tokens=1))
    kept = [each.nbytes for each in llm.engine._runner._encoder.features.values()]
    assert len(kept) > 1
    assert sum(kept) <= options.feature_cache_bytes + max(kept)


def features(change: Callable[[Llava, Tensor], Tensor]) -> tuple[Any, str, Any]:
    right = Llava.tower_features
    return Llava, "tower_features", torch.inference_mode()(lambda self, tiles: change(self, right(self, tiles)))


def loaded(change: Callable[[Llava], Any]) -> tuple[Any, str, Any]:
    right = Llava._loaded

    def load(self: Llava, *where: Any) -> Llava:
        change(self)
        return right(self, *where)

    return Llava, "_loaded", load


def rendered(change: Callable[[list[Any]], list[Any]]) -> tuple[Any, str, Any]:
    right = ChatTemplate.render
    return ChatTemplate, "render", lambda self, asked: change(right(self, asked))


def newline_of_zeros(model: Llava) -> None:
    assert model.image_newline is not None
    model.image_newline.data.zero_()


def unnormed(model: Llava) -> None:
    model.projector_norm = None


def other_activation(model: Llava) -> None:
    model.projector[1] = nn.ReLU()


def nearest(grid: Tensor, size: tuple[int, int]) -> Tensor:
    return nn.functional.interpolate(grid.permute(2, 0, 1)[None], size, mode="nearest")[0].permute(1, 2, 0)


def several_as(**changes: Any) -> tuple[Any, str, Any]:
    """Each of several images is processed otherwise than one alone."""
    return ImageProcessing, "for_images", lambda self, count: replace(self, **changes) if count > 1 else self


def embedded(change: Callable[[Llava, Tensor], Tensor]) -> tuple[Any, str, Any]:
    right = Llava.embed
    return Llava, "embed", torch.inference_mode()(lambda self, ids: change(self, right(self, ids)))


def joined(change: Callable[[Llava, Tensor], Tensor]) -> tuple[Any, str, Any]:
    right = Llava.image_embeddings
    return Llava, "image_embeddings", torch.inference_mode()(lambda self, *of: change(self, right(self, *of)))


def gemmas_scale(model: Llava) -> float:
    return float(model.language_model.config.hidden_size**0.5)


def padded_in_black() -> tuple[Any, str, Any]:
    right = tiles._pad_to_square
    return tiles, "_pad_to_square", lambda image, settings: right(image, replace(settings, mean=(0.0, 0.0, 0.0)))


def first_state(spec: Any) -> tuple[int, ...]:
    return (1,) * len(spec.select_layers)


MUTATIONS: dict[str, tuple[Check, tuple[Any, str, Any]]] = {
    "SigLIP's state after its norm": (
        transformers("onevision", ONE),
        features(lambda m, f: m.vision_tower.post_layernorm(f)),
    ),
    "CLIP's state after a norm": (
        transformers("llava-1.5-llama", ONE),
        features(lambda m, f: m.vision_tower.post_layernorm(f)),
    ),
    "another layer": (transformers("llava-1.5-llama", ONE), (llava, "selected_layers", first_state)),
    "another layer of SigLIP": (transformers("joycaption", ONE), (llava, "selected_layers", first_state)),
    "features one place further": (transformers("llava-1.5-llama", ONE), features(lambda _, f: f.roll(1, 1))),
    "features in columns": (
        transformers("onevision", ONE),
        features(lambda _, f: f.unflatten(1, (3, 3)).transpose(1, 2).flatten(1, 2)),  # type: ignore[no-untyped-call]
    ),
    "layers joined in another order": (transformers("vip-llava-hub", ONE), features(lambda _, f: f.roll(32, -1))),
    "no norm before the projector": (transformers("vip-llava-hub", ONE), loaded(unnormed)),
    "another activation": (transformers("next-qwen", ONE), loaded(other_activation)),
    "no newline": (transformers("next-qwen", ONE), loaded(newline_of_zeros)),
    "no newline behind one of several": (transformers("onevision", SEVERAL), loaded(newline_of_zeros)),
    "each of several as a grid": (
        transformers("onevision", SEVERAL),
        (ImageProcessing, "for_images", lambda self, _: self),
    ),
    "the nearest of the grid": (transformers("onevision", ONE), (llava, "_resized", nearest)),
    "tiles in columns": (
        transformers("next-qwen", [said("user", "What is it?", picture(200, 40))]),
        (llava, "tile_grid", lambda size, image: (1, 3)),
    ),
    "another BOS": (transformers("llava-next-mistral", ONE), rendered(lambda spans: [Control("<s>"), *spans])),
    "no BOS": (transformers("llava-next-mistral", ONE), rendered(lambda spans: spans[1:])),
    "no line break after an image": (
        transformers("llava-1.5-llama-hub", ONE),
        rendered(lambda spans: [Text(s.text.lstrip("\n")) if isinstance(s, Text) else s for s in spans]),
    ),
    "control tokens as text": (
        transformers("llava-next-mistral-0.3", TURNS),
        (chat_template, "Control", lambda token: Text(token)),
    ),
    "the features of images scaled as tokens": (
        transformers("llava-gemma", ONE),
        joined(lambda m, f: f * gemmas_scale(m)),
    ),
    "tokens not scaled": (transformers("llava-gemma", ONE), embedded(lambda m, e: e / gemmas_scale(m))),
    "an image token of another name": (
        transformers("llava-1.5-named-image-token-hub", ONE),
        (
            chat_templates,
            "ChatTemplate",
            lambda text, **settings: ChatTemplate(text, **settings | {"image_token": "<image>"}),
        ),
    ),
    "the default of anyres_max_N": (
        transformers("onevision", ONE),
        (hf, "_max_grid_tiles", lambda config, family: family.max_grid_tiles),
    ),
    "the width of one layer in the budget": (
        budget,
        (engine, "EncoderCacheManager", lambda tiles: EncoderCacheManager(3 * tiles)),
    ),
    "several images cropped": (original("llava-v1.5-tiny"), several_as(aspect="square")),
    "several images padded in black": (original("llava-v1.5-tiny"), padded_in_black()),
    "one padded tile of each of several": (
        original("llava-v1.6-vicuna-tiny"),
        several_as(aspect="pad", grid_pinpoints=(), newline=True),
    ),
}


@pytest.mark.parametrize("what", MUTATIONS)
def test_the_comparison_fails(what: str, folder_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check, mutation = MUTATIONS[what]
    check(folder_of)
    monkeypatch.setattr(*mutation)
    with pytest.raises((AssertionError, CheckpointError)):  # some are refused before there is an answer
        check(folder_of)
