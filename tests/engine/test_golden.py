"""The golden cases: what the original's own code computed on tiny checkpoints (see tests/golden/README.md)."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from llava_serve import LLM, SamplingParams
from llava_serve.config import EngineOptions, ImageOptions
from llava_serve.engine.executor import background_compile, build, llama_decoder
from llava_serve.model.llava import Llava
from llava_serve.results import GenerationResult
from llava_serve.types import ImagePart, Message, PreparedPrompt, TextPart
from support.cpp_steps import NEEDS_CPP_STEPS
from support.paths import GOLDEN

SUITE: dict[str, Any] = json.loads((GOLDEN / "cases.json").read_text())
PAIRS = [(name, case) for name, one in SUITE.items() for case in one["cases"]]
CASES = [pytest.param(name, case, id=f"{name}-{case['id']}") for name, case in PAIRS]
BEAMS = [param for param, (_, case) in zip(CASES, PAIRS, strict=True) if case.get("beam3_max8_ids")]
TOLERANCE = 2e-3
PREPARED: dict[tuple[str, str], PreparedPrompt] = {}


@cache
def load(name: str) -> LLM:
    base = SUITE[name]["model_base"]
    one_thread = EngineOptions(num_threads=1)  # a second one costs more than models of this size take
    return LLM(
        str(GOLDEN / "checkpoints" / name),
        model_base=base,
        device="cpu",
        dtype="float32",
        engine=one_thread,
        image_options=ImageOptions(transparency="drop"),  # the original's pixels
    )


def prepare(name: str, case: dict[str, Any]) -> PreparedPrompt:
    key = (name, case["id"])
    if key not in PREPARED:
        PREPARED[key] = _prepare(name, case)
    return PREPARED[key]


def _prepare(name: str, case: dict[str, Any]) -> PreparedPrompt:
    processor = load(name).processor
    images = [GOLDEN / "images" / image for image in case["images"]]
    if not case.get("turns"):
        return processor.prepare_query(case["query"], images, conv_mode=case["conv_mode"])
    messages: list[Message] = []
    for i, (question, answer) in enumerate(case["turns"]):
        parts = [ImagePart(image.read_bytes()) for image in images] if i == 0 else []
        messages.append(Message("user", (*parts, TextPart(question))))
        messages += [Message("assistant", (TextPart(answer),))] if answer else []
    return processor.prepare(messages, conv_mode=case["conv_mode"])


def last_logits(model: Llava, prepared: PreparedPrompt) -> torch.Tensor:
    embeddings = model.embed(torch.from_numpy(prepared.token_ids.astype(np.int64)).clamp(min=0)).clone()
    images = zip(prepared.image_spans, prepared.tiles, prepared.image_sizes, strict=True)
    for (start, end), tiles, size in images:
        embeddings[start:end] = model.image_embeddings(model.tower_features(torch.from_numpy(tiles)), size)
    with torch.inference_mode():
        logits: torch.Tensor = model.language_model(inputs_embeds=embeddings[None]).logits[0, -1]
    return logits


def assert_equal_until_tie(case: dict[str, Any], result: GenerationResult) -> None:
    """The original's tokens and text. They may part where both tokens are nearly as likely, and nowhere else."""
    if list(result.token_ids) == case["greedy_ids"]:
        assert result.text == case["greedy_text"]
        return
    assert result.logprobs is not None
    pairs = zip(result.logprobs, case["greedy_ids"], strict=False)  # behind a tie one of them may end first
    entry, expected = next((entry, token) for entry, token in pairs if entry.token_id != token)
    logprobs = {token: logprob for token, _, logprob in entry.top}
    assert expected in logprobs, case["id"]
    assert entry.logprob - logprobs[expected] < TOLERANCE, case["id"]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_prompt_and_ids(name: str, case: dict[str, Any]) -> None:
    prepared = prepare(name, case)
    assert prepared.prompt == case["prompt"]
    assert prepared.input_ids == case["input_ids"]
    assert prepared.num_tokens == case["prompt_len"]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_pixels(name: str, case: dict[str, Any]) -> None:
    prepared = prepare(name, case)
    image = load(name).spec.image
    for tiles, expected in zip(prepared.tiles, case["pixel_values"], strict=True):
        pixels = (tiles.astype(np.float32) / 255 - np.array(image.mean, np.float32)) / np.array(image.std, np.float32)
        pixels = pixels.transpose(0, 3, 1, 2).reshape(expected["shape"])
        assert pixels.mean() == pytest.approx(expected["mean"], abs=1e-4)
        assert pixels.std() == pytest.approx(expected["std"], abs=1e-4)
        np.testing.assert_allclose(pixels.ravel()[:4], expected["first"], atol=1e-4)
        np.testing.assert_allclose(pixels.ravel()[-4:], expected["last"], atol=1e-4)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_last_logits(name: str, case: dict[str, Any]) -> None:
    base = SUITE[name]["model_base"]
    logits = last_logits(plain_model(name, base), prepare(name, case))
    ids = [token_id for token_id, _ in case["last_logits_top8"]]
    np.testing.assert_allclose(logits[ids], [logit for _, logit in case["last_logits_top8"]], atol=TOLERANCE)
    assert logits.topk(8).indices.tolist() == ids


@cache
def plain_model(name: str, base: str | None) -> Llava:
    """A model of its own: an engine replaces the attention of the model that it runs."""
    return Llava.load(load(name).spec)


@pytest.mark.parametrize("name", SUITE)
def test_greedy_tokens_and_text(name: str) -> None:
    sampling = SamplingParams(temperature=0, max_new_tokens=20, logprobs=2)
    for case in SUITE[name]["cases"]:
        assert_equal_until_tie(case, load(name).run([prepare(name, case)], sampling)[0])


@pytest.mark.extended
@pytest.mark.parametrize("name", SUITE)
def test_greedy_tokens_and_text_of_the_decoder_for_cuda(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_decoder, "DEVICES", {"cpu"})
    monkeypatch.setattr(build, "pack_linears", lambda model: None)  # it computes plain layers only
    llm = load.__wrapped__(name)
    assert ("fused" in llm.engine._runner._decoder.name) == ("mpt" not in name)
    sampling = SamplingParams(temperature=0, max_new_tokens=20, logprobs=2)
    for case in SUITE[name]["cases"]:
        assert_equal_until_tie(case, llm.run([prepare(name, case)], sampling)[0])


@pytest.mark.extended
@NEEDS_CPP_STEPS
@pytest.mark.parametrize("name", SUITE)
def test_greedy_tokens_and_text_of_what_large_models_compute_in_cpp(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_compile, "MIN_WEIGHTS", 0)
    llm = load.__wrapped__(name)
    assert (llm.engine._runner._decoder.native is not None) == ("mpt" not in name)
    sampling = SamplingParams(temperature=0, max_new_tokens=20, logprobs=2)
    cases = SUITE[name]["cases"]
    for case in cases:
        assert_equal_until_tie(case, llm.run([prepare(name, case)], sampling)[0])
    for case, result in zip(cases, llm.run([prepare(name, case) for case in cases], sampling), strict=True):
        assert_equal_until_tie(case, result)


def test_a_difference_before_a_tie_is_found() -> None:
    name, case = PAIRS[0]
    result = load(name).run([prepare(name, case)], SamplingParams(temperature=0, max_new_tokens=20, logprobs=2))[0]
    assert_equal_until_tie(case, result)
    with pytest.raises(AssertionError):
        assert_equal_until_tie(case | {"greedy_ids": [*case["greedy_ids"][:-1], 0]}, result)


@pytest.mark.parametrize(("name", "case"), BEAMS)
def test_beam_search(name: str, case: dict[str, Any]) -> None:
    sampling = SamplingParams(temperature=0, num_beams=3, max_new_tokens=8)
    result = load(name).run([prepare(name, case)], sampling)[0]
    assert list(result.token_ids) == case["beam3_max8_ids"]
    assert result.text == case["beam3_max8_text"]
