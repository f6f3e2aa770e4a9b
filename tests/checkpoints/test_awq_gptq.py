"""Checkpoints in AWQ's and GPTQ's files answer as transformers' own classes do, where their packages are installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from llava_serve import LLM, SamplingParams
from llava_serve.config import EngineOptions
from llava_serve.errors import CheckpointError
from support.hf_reference import Reference, said
from support.quantized_files import PLAIN, quantized_folders, write_four_bits
from support.scenes import picture

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # GPTQModel leaves folders

PACKAGES = {"awq": ("gptqmodel",), "gptq": ("optimum", "gptqmodel")}
ONE_THREAD = EngineOptions(num_threads=1)
TALKS = (
    [said("user", "What is shown in this image?", picture(30, 30))],
    [said("user", "How many of them are there?")],
    [said("user", "Which one is larger?", picture(120, 80), picture(30, 44))],
)


@pytest.fixture(params=PACKAGES)
def method(request: pytest.FixtureRequest) -> str:
    """How the files are quantized. Its packages are not among those of the tests: GPTQModel imports torchvision, whose
    build on the package index is for CUDA."""
    for package in PACKAGES[request.param]:
        pytest.importorskip(package, reason=f"{package} cannot be imported", exc_type=ImportError)
    return str(request.param)


@pytest.fixture(scope="module")
def folder_for(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return quantized_folders(tmp_path_factory.mktemp("quantized"))


@pytest.mark.parametrize("model", ["llava-1.5-llama", "onevision"])
def test_greedy_tokens(method: str, model: str, folder_for: Any) -> None:
    folder = folder_for(f"{model}-{method}")
    llm = LLM(str(folder), device="cpu", dtype="float32", engine=ONE_THREAD)
    reference = Reference(folder, PLAIN[model])
    for talk in TALKS:
        inputs = reference.inputs(talk)
        prompt = inputs["input_ids"][0]
        generated = reference.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        result = llm.chat(talk, SamplingParams(temperature=0, max_new_tokens=8))
        assert list(result.token_ids) == generated[0, len(prompt) :].tolist()


@pytest.mark.parametrize("part", ["qweight", "scales", "qzeros"])
def test_a_part_that_is_missing_is_named(method: str, part: str, tmp_path: Path, folder_for: Any) -> None:
    plain = folder_for(f"llava-1.5-llama-{method}").parent.parent / "llava-1.5-llama"
    write_four_bits(tmp_path / "copy", plain, method)
    tensors = load_file(tmp_path / "copy" / "model.safetensors")
    del tensors[f"language_model.model.layers.1.mlp.up_proj.{part}"]
    save_file(tensors, tmp_path / "copy" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="missing are"):
        LLM(str(tmp_path / "copy"), device="cpu", dtype="float32", engine=ONE_THREAD)
