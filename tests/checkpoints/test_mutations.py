"""Each trap of the model's code makes the comparison with transformers fail: the code is changed while it runs.

`test_family_traps` does so for what a description of a checkpoint says.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llava_serve.checkpoints import ImageProcessing, open_checkpoint
from llava_serve.config import ImageOptions
from llava_serve.model import llava
from llava_serve.model.llava import Llava
from llava_serve.processor import Processor
from llava_serve.prompts import chat_template
from llava_serve.prompts.chat_template import ChatTemplate
from llava_serve.prompts.conversation import Control, Text
from support.hf_reference import Reference, Talk, said
from support.scenes import picture
from support.tiny_hf import FAMILY, MODELS

pytestmark = pytest.mark.extended

ONE = [said("user", "What is it?", picture(160, 150))]
SEVERAL = [said("user", "Which one is larger?", picture(120, 80), picture(30, 44))]
TURNS = [*ONE, said("assistant", "A red one."), said("user", "And now?")]


@cache
def reference(kind: str, folder: Path) -> Reference:
    return Reference(folder, (MODELS | FAMILY)[kind])


def compare(kind: str, folder: Path, talk: Talk) -> None:
    spec = open_checkpoint(str(folder))
    processor = Processor(spec, ImageOptions())
    prepared = processor.prepare(processor.read(talk))
    theirs = reference(kind, folder)
    theirs.assert_same_ids(talk, prepared)
    theirs.assert_same_logits(talk, prepared, Llava.load(spec))


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


def first_state(spec: Any) -> tuple[int, ...]:
    return (1,) * len(spec.select_layers)


MUTATIONS: dict[str, tuple[str, Talk, tuple[Any, str, Any]]] = {
    "SigLIP's state after its norm": ("onevision", ONE, features(lambda m, f: m.vision_tower.post_layernorm(f))),
    "CLIP's state after a norm": ("llava-1.5-llama", ONE, features(lambda m, f: m.vision_tower.post_layernorm(f))),
    "another layer": ("llava-1.5-llama", ONE, (llava, "selected_layers", first_state)),
    "another layer of SigLIP": ("joycaption", ONE, (llava, "selected_layers", first_state)),
    "features one place further": ("llava-1.5-llama", ONE, features(lambda _, f: f.roll(1, 1))),
    "features in columns": (
        "onevision",
        ONE,
        features(lambda _, f: f.unflatten(1, (3, 3)).transpose(1, 2).flatten(1, 2)),  # type: ignore[no-untyped-call]
    ),
    "layers joined in another order": ("vip-llava-hub", ONE, features(lambda _, f: f.roll(32, -1))),
    "no norm before the projector": ("vip-llava-hub", ONE, loaded(unnormed)),
    "another activation": ("next-qwen", ONE, loaded(other_activation)),
    "no newline": ("next-qwen", ONE, loaded(newline_of_zeros)),
    "no newline behind one of several": ("onevision", SEVERAL, loaded(newline_of_zeros)),
    "each of several as a grid": ("onevision", SEVERAL, (ImageProcessing, "for_images", lambda self, _: self)),
    "the nearest of the grid": ("onevision", ONE, (llava, "_resized", nearest)),
    "tiles in columns": (
        "next-qwen",
        [said("user", "What is it?", picture(200, 40))],
        (llava, "tile_grid", lambda size, image: (1, 3)),
    ),
    "another BOS": ("llava-next-mistral", ONE, rendered(lambda spans: [Control("<s>"), *spans])),
    "no BOS": ("llava-next-mistral", ONE, rendered(lambda spans: spans[1:])),
    "no line break after an image": (
        "llava-1.5-llama-hub",
        ONE,
        rendered(lambda spans: [Text(s.text.lstrip("\n")) if isinstance(s, Text) else s for s in spans]),
    ),
    "control tokens as text": (
        "llava-next-mistral-0.3",
        TURNS,
        (chat_template, "Control", lambda token: Text(token)),
    ),
}


@pytest.mark.parametrize("what", MUTATIONS)
def test_the_comparison_fails(what: str, folder_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, talk, mutation = MUTATIONS[what]
    compare(kind, folder_of(kind), talk)
    monkeypatch.setattr(*mutation)
    with pytest.raises(AssertionError):
        compare(kind, folder_of(kind), talk)
