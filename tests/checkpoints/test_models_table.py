"""The table of docs/models.md is what the code says of each model."""

from __future__ import annotations

import re

import pytest

from llava_serve.checkpoints.decoders import DECODERS
from support.hub_models import MODELS, HubModel
from support.models_table import DOCUMENT, document, row

TEXT = DOCUMENT.read_text("utf-8")
EVERYDAY = ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-onevision-qwen2-0.5b-si-hf", "lmms-lab/llama3-llava-next-8b")


@pytest.mark.parametrize("model", [one for one in MODELS if one.ids[0] in EVERYDAY], ids=lambda model: model.ids[0])
def test_a_row(model: HubModel) -> None:
    assert row(model) in TEXT.splitlines()


@pytest.mark.extended
def test_the_whole_table() -> None:
    assert document() == TEXT


def test_the_document_names_every_language_model() -> None:
    [listed] = re.findall(r"By `model_type`: (.+?)\. ", TEXT, re.DOTALL)
    assert re.findall(r"\w+(?= \(|,|$)", listed.replace("\n", " ").replace(" (original's layout only)", "")) == sorted(
        DECODERS
    )
