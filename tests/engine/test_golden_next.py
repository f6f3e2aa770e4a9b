"""The golden cases of LLaVA-NeXT's own code (see tests/golden/next/README.md)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from llava_serve import LLM, SamplingParams
from llava_serve.checkpoints import open_checkpoint
from llava_serve.config import EngineOptions, ImageOptions
from llava_serve.processor import Processor
from support.next_checkpoints import CHECKPOINTS, DIGESTS, write_next
from support.paths import GOLDEN
from support.scenes import picture

SUITE: dict[str, dict[str, Any]] = json.loads((GOLDEN / "next" / "cases.json").read_text())
QUERY = "What is shown in this image?"
SIZES = {
    "landscape": [(640, 427)],
    "portrait": [(300, 500)],
    "small": [(80, 60)],
    "large": [(1700, 1300)],
    "wide": [(1500, 200)],
    "two-pictures": [(200, 300), (90, 40)],
}
EVERYDAY = {("llava-onevision-qwen2-0.5b-ov", "small"), ("llava-siglip-vicuna-7b", "wide")}
"""Whose answers are computed with the quick tests."""
PAIRS = [(name, case) for name, cases in SUITE.items() for case in cases]
ANSWERS = [
    pytest.param(name, case, marks=() if (name, case) in EVERYDAY else pytest.mark.extended) for name, case in PAIRS
]
PROMPTS = [
    pytest.param(name, marks=() if name in {name for name, _ in EVERYDAY} else pytest.mark.extended) for name in SUITE
]
ONE_THREAD = EngineOptions(num_threads=1)


@pytest.fixture(scope="module")
def folder_of_next(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    parent = tmp_path_factory.mktemp("next")
    return cache(lambda name: write_next(parent, name))


@pytest.fixture(scope="module")
def llm_of(folder_of_next: Callable[[str], Path]) -> Callable[[str, bool], LLM]:
    return cache(
        lambda name, compile: LLM(
            str(folder_of_next(name)),
            device="cpu",
            dtype="float32",
            engine=ONE_THREAD.model_copy(update={"compile": compile}),
        )
    )


def test_every_checkpoint_and_size_is_there() -> None:
    assert SUITE.keys() == CHECKPOINTS.keys() == DIGESTS.keys()
    assert all(cases.keys() == SIZES.keys() for cases in SUITE.values())


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name: str, folder_of_next: Callable[[str], Path]) -> None:
    folder = folder_of_next(name)
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest().startswith(DIGESTS[name])
    processor = Processor(open_checkpoint(str(folder)), ImageOptions())
    for case, expected in SUITE[name].items():
        prepared = processor.prepare_query(QUERY, [picture(*size) for size in SIZES[case]])
        assert prepared.input_ids == expected["ids"]
        assert prepared.num_tokens == expected["length"]


@pytest.mark.parametrize(("name", "case"), ANSWERS)
def test_answers(name: str, case: str, llm_of: Callable[[str, bool], LLM]) -> None:
    assert answer(llm_of(name, False), case) == SUITE[name][case]["tokens"]


@pytest.mark.extended
@pytest.mark.parametrize("name", SUITE)
def test_answers_of_a_compiled_decoder(name: str, llm_of: Callable[[str, bool], LLM]) -> None:
    for case in ("small", "two-pictures"):
        assert answer(llm_of(name, True), case) == SUITE[name][case]["tokens"]


def answer(llm: LLM, case: str) -> list[int]:
    sampling = SamplingParams(temperature=0, max_new_tokens=10, ignore_eos=True)
    return list(llm.generate(QUERY, images=[picture(*size) for size in SIZES[case]], sampling=sampling).token_ids)
