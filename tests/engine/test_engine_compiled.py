"""The decoder through torch.compile: the same answers, compiled once, and an error where there is no compiler."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from llava_serve.engine.executor.compiled import SMALL_STEP_TOKENS
from llava_serve.engine.executor.packed_linear import PackedLinear, pack_linears
from llava_serve.sampling_params import SamplingParams
from support.tiny_engine import TinyModel, engine, image, prompt, run

GREEDY = SamplingParams(temperature=0, max_new_tokens=12)
PROMPTS = [
    prompt(1, [5, 6, 7]),
    prompt(1, image((10, 20, 30), 2), [8, 9]),
    prompt(1, list(range(3, 3 + SMALL_STEP_TOKENS + 9))),
]
REQUESTS = [(one, GREEDY) for one in PROMPTS]


@pytest.mark.extended
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_a_compiled_decoder_answers_as_the_plain_one_and_is_compiled_once(kind: str) -> None:
    plain, subject = engine(TinyModel(kind)), engine(TinyModel(kind), compile=True)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled
    beams = SamplingParams(num_beams=3, max_new_tokens=6, temperature=0)
    for requests in ([REQUESTS[0]], REQUESTS, REQUESTS, [(PROMPTS[1], beams), *REQUESTS], REQUESTS[2:]):
        assert run(subject, *requests) == run(plain, *requests)
    assert counters["stats"]["unique_graphs"] == compiled


@pytest.mark.extended
def test_packed_layers_are_custom_operators_and_are_freed_with_their_engine() -> None:
    def packed() -> TinyModel:
        model = TinyModel(dtype=torch.float32)
        pack_linears(model.language_model)
        assert any(isinstance(module, PackedLinear) for module in model.language_model.modules())
        return model

    expected = run(engine(packed()), *REQUESTS)
    subject = engine(packed(), compile=True)
    assert run(subject, *REQUESTS) == expected
    weights = weakref.ref(subject.model.language_model.base_model.layers[0].mlp.down_proj)
    memory = weakref.ref(subject._runner._memory)
    assert weights() is not None
    del subject
    gc.collect()
    assert weights() is None
    assert memory() is None


def test_mpt_is_not_compiled() -> None:
    before = counters["stats"]["unique_graphs"]
    subject = engine(TinyModel("mpt"), compile=True)
    assert run(subject, *REQUESTS) == run(engine(TinyModel("mpt")), *REQUESTS)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.extended
def test_a_missing_compiler_is_reported_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "llava_serve.cli",
            "serve",
            "--in-process",
            "--compile",
            "--device",
            "cpu",
            "--port",
            "0",
        ],
        env={**os.environ, "CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "C++ compiler" in done.stderr
    assert len([line for line in done.stderr.splitlines() if " INFO llava_serve." not in line]) == 1
