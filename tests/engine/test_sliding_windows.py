"""Layers with sliding windows beside others: beyond the window the engine's greedy ids are transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llava_serve.engine.executor.attention import PackedStep
from llava_serve.errors import CheckpointError
from llava_serve.sampling_params import SamplingParams
from support import tiny_engine
from support.tiny_engine import PROMPTS, TinyModel, dtype_of, engine, reference_ids, run
from support.windows import MODELS, settings

GREEDY = SamplingParams(temperature=0, max_new_tokens=8)
EVERYDAY = {"gemma3 by a pattern", "qwen2 from a layer on", "smollm3 by its positions"}
"""The others are compared in the extended tests."""
NAMES = [pytest.param(name, marks=() if name in EVERYDAY else pytest.mark.extended) for name in MODELS]


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> dict[int, set[int | None]]:
    """The windows that the engine's attention has applied, by layer."""
    windows: dict[int, set[int | None]] = {}
    attend = PackedStep.attend_stored

    def observed(self: PackedStep, layer: int, query: Any, scaling: Any, window: Any = None, slopes: Any = None) -> Any:
        windows.setdefault(layer, set()).add(window)
        return attend(self, layer, query, scaling, window, slopes)

    monkeypatch.setattr(PackedStep, "attend_stored", observed)
    return windows


@pytest.mark.parametrize("name", NAMES)
def test_beyond_the_window(name: str, applied: dict[int, set[int | None]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny_engine.CONFIGS, name, (MODELS[name].kind, settings(name)))
    prompts = PROMPTS[2:4]  # of 58 and 28 positions
    expected = [reference_ids(TinyModel(name, dtype_of(name)), one, 8) for one in prompts]
    subject = engine(TinyModel(name, dtype_of(name)), max_batch_tokens=16)
    assert [answer[0] for answer in run(subject, *[(one, GREEDY) for one in prompts])] == expected
    assert applied == {layer: {window} for layer, window in enumerate(MODELS[name].layers)}


@pytest.mark.parametrize("window", [100, 20])
def test_a_window_that_transformers_keeps_to_its_mask_is_refused(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2-MoE's attention does not pass its window on. One of 100 positions changes nothing in the check's few."""
    text = {"use_sliding_window": True, "sliding_window": window, "num_experts": 4, "num_experts_per_tok": 2}
    monkeypatch.setitem(tiny_engine.CONFIGS, "odd", ("qwen2_moe", {**text, "moe_intermediate_size": 24}))
    sentence = "does not apply the sliding window of 100" if window == 100 else "does not compute the language model"
    with pytest.raises(CheckpointError, match=sentence):
        engine(TinyModel("odd", torch.float32))
