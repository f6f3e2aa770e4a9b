"""Decode steps in C++ on a CPU: against the decoder that they replace, in steps, in a trial, and in whole answers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from llava_serve import LLM
from llava_serve.config import EngineOptions
from llava_serve.engine.executor import background_compile, native_decoder
from llava_serve.engine.executor.attention import PackedStep
from llava_serve.engine.executor.decoder import MAX_SINGLE, Decoder
from llava_serve.engine.executor.kernels import native_build
from llava_serve.engine.executor.kernels.native_attention import decode_attention
from llava_serve.engine.executor.kv_pool import KVPool, PackedSequence
from llava_serve.engine.executor.model import kv_shape
from llava_serve.engine.executor.native_decoder import NativeDecoder, use_native_code
from llava_serve.engine.executor.packed_linear import PackedLinear, pack_linears
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import PreparedPrompt
from support.paths import GOLDEN
from support.tiny_engine import TinyModel

CPU = torch.device("cpu")
PAGE, ROOM = 16, 48
HIDDEN = 64
WIDE = {"hidden_size": HIDDEN, "intermediate_size": 96}
"""oneDNN has another layout for fewer outputs, and for inputs that are no multiple of 32."""
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
KINDS = ("llama", "llama-llama3", "llama-linear", "llama-yarn", "mistral", "qwen2")

pytestmark = pytest.mark.skipif(native_build.compiler() is None, reason="there is no C++ compiler")


def model_of(kind: str, dtype: torch.dtype) -> TinyModel:
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no layout for bfloat16 on this processor")
    model = TinyModel(kind, dtype, **{} if kind == "mpt" else WIDE)
    pack_linears(model.language_model)
    return model


def random(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pool_of(model: TinyModel, sequences: int) -> KVPool:
    """Random keys and values; the last page, which no sequence has, holds NaN."""
    layers, kv_heads, head_dim = kv_shape(model)
    memory = KVPool(layers, kv_heads, sequences * ROOM + PAGE, head_dim, model.dtype, CPU)
    for index, halves in enumerate(memory.layers):
        for half, stored in enumerate(halves):
            stored.copy_(random(*stored.shape, seed=2 * index + half))
            stored[:, -PAGE:] = torch.nan
    return memory


def step_of(memory: KVPool, count: int, dtype: torch.dtype, *, first: int = 0, padding: int = 0) -> PackedStep:
    """Sequences of different lengths, from one key on, in the pool from the `first` room on."""
    sequences = [PackedSequence(at, 1, (first + at) * ROOM, (first + at) * 11 % ROOM) for at in range(count)]
    return PackedStep(memory, sequences, dtype, CPU, padding, (), PAGE, decode_attention)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_the_decoder(kind: str, dtype: torch.dtype) -> None:
    """Hidden states, and the keys and values that it writes; with as many threads as have not all the same share."""
    model = model_of(kind, dtype)
    decoder = Decoder(model.language_model)
    native = NativeDecoder(model.language_model, PAGE)
    for count, workers in ((1, 1), (3, 3), (4, 2), (7, 2), (MAX_SINGLE, 5)):
        embeddings = random(count, HIDDEN, seed=count, dtype=dtype)
        own, other = pool_of(model, count), pool_of(model, count)
        with threads(workers), torch.inference_mode():
            found = native.forward(embeddings, step_of(own, count, dtype))
            expected = decoder.forward(embeddings, step_of(other, count, dtype))
        largest = float(expected.float().abs().max())
        torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=TOLERANCES[dtype] * largest)
        for found_layer, expected_layer in zip(own.layers, other.layers, strict=True):
            for mine, theirs in zip(found_layer, expected_layer, strict=True):
                torch.testing.assert_close(
                    mine.float(), theirs.float(), rtol=0, atol=5 * TOLERANCES[dtype], equal_nan=True
                )


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_sequence_is_bit_equal_alone_and_beside_others(dtype: torch.dtype) -> None:
    model = model_of("llama", dtype)
    native = NativeDecoder(model.language_model, PAGE)
    embeddings = random(6, HIDDEN, dtype=dtype)
    together = native.forward(embeddings, step_of(pool_of(model, 6), 6, dtype))
    for at in range(6):
        one = embeddings[at : at + 1]
        assert torch.equal(native.forward(one, step_of(pool_of(model, 6), 1, dtype, first=at))[0], together[at])


@torch.inference_mode()
def test_which_steps_it_computes() -> None:
    """Those of one token each, and of few sequences; what pads them is 0."""
    model = model_of("llama", torch.float32)
    decoder = Decoder(model.language_model)
    decoder.native = counted = _Counted(NativeDecoder(model.language_model, PAGE))
    memory = pool_of(model, 20)
    for count, padding, calls in ((1, 1, 1), (MAX_SINGLE, 0, 2), (MAX_SINGLE + 1, 0, 2)):
        hidden = decoder.forward(
            random(count + padding, HIDDEN), step_of(memory, count, torch.float32, padding=padding)
        )
        assert counted.calls == calls
        assert not hidden[count:].any()
    prompt = [PackedSequence(0, 1, 0, 5), PackedSequence(1, 4, ROOM, 0)]
    decoder.forward(random(5, HIDDEN), PackedStep(memory, prompt, torch.float32, CPU, 0, (), PAGE, decode_attention))
    decoder.forward(random(1, HIDDEN), PackedStep(memory, prompt[:1], torch.float32, CPU))
    assert counted.calls == 2


@pytest.mark.parametrize("name", ["llava-v1.5-tiny", "llava-v1.6-mistral-tiny"])
def test_requests_get_the_same_tokens_alone_and_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pictures, several choices, penalties and a seed; those that are sampled, too."""
    monkeypatch.setattr(background_compile, "MIN_WEIGHTS", 0)
    llm = LLM(str(GOLDEN / "checkpoints" / name), dtype="float32", engine=EngineOptions(num_threads=2))
    assert llm.engine._runner._decoder.native is not None
    pictures = [GOLDEN / "images" / each for each in ("landscape.png", "portrait.png", "square.png")]
    samplings = [
        SamplingParams(temperature=0, max_new_tokens=18),
        SamplingParams(temperature=0, max_new_tokens=9, repetition_penalty=1.3),
        SamplingParams(temperature=1, max_new_tokens=25, seed=7, n=3),
        SamplingParams(temperature=0, max_new_tokens=12, num_beams=2),
        SamplingParams(temperature=0.7, max_new_tokens=30, seed=3, top_p=0.9),
    ]
    prompts = [llm.processor.prepare_query(f"Say it in {at} words.", pictures[at % 3 : at % 3 + 1]) for at in range(10)]
    requests = [(prompt, samplings[at % len(samplings)]) for at, prompt in enumerate(prompts)]
    alone = [_answers(llm, [one])[0] for one in requests]
    assert _answers(llm, requests) == alone


def _answers(llm: LLM, requests: list[tuple[PreparedPrompt, SamplingParams]]) -> list[dict[int, list[int]]]:
    """Tokens of each request's choices, where all run at once."""
    answers: list[dict[int, list[int]]] = [{} for _ in requests]
    for at, (prompt, sampling) in enumerate(requests):
        llm.engine.add(llm.engine.validator.accept(str(at), prompt, sampling))
    while llm.engine.has_work:
        for output in llm.engine.step():
            assert output.error is None
            answers[int(output.request_id)].setdefault(output.index, []).extend(output.token_ids)
    return answers


class _Counted:
    def __init__(self, native: NativeDecoder) -> None:
        self._native = native
        self.calls = 0

    def forward(self, embeddings: torch.Tensor, step: PackedStep) -> torch.Tensor:
        self.calls += 1
        return self._native.forward(embeddings, step)


@pytest.mark.parametrize("kind", ["gemma", "mixtral", "mpt", "phi3", "qwen3"])
def test_other_models_are_left_alone(kind: str) -> None:
    model = model_of(kind, torch.float32)
    decoder = Decoder(model.language_model)
    use_native_code(model, decoder, PAGE, float8=False)
    assert decoder.native is None


def test_layers_that_are_not_packed_are_left_alone() -> None:
    assert not NativeDecoder.supports(TinyModel("llama", torch.float32).language_model)


@pytest.mark.parametrize("kind", KINDS)
def test_its_trial_passes(kind: str) -> None:
    model = model_of(kind, torch.float32)
    decoder = Decoder(model.language_model)
    use_native_code(model, decoder, PAGE, float8=False)
    assert decoder.native is not None


def test_a_trial_finds_weights_that_lie_otherwise(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a processor for which oneDNN has another layout of the same size."""
    model = model_of("llama", torch.float32)
    moved = torch.zeros(1 << 16)
    monkeypatch.setattr(PackedLinear, "address", property(lambda self: moved.data_ptr()))
    decoder = Decoder(model.language_model)
    with caplog.at_level(logging.WARNING):
        use_native_code(model, decoder, PAGE, float8=False)
    assert decoder.native is None
    assert "not computed in C++, and are slower, since the logits differ" in caplog.text


def test_a_compiler_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the C++ compiler does not compile it")

    model = model_of("llama", torch.float32)
    native_decoder._compiled.cache_clear()
    monkeypatch.setattr(native_decoder, "build", fail)
    decoder = Decoder(model.language_model)
    with caplog.at_level(logging.WARNING):
        use_native_code(model, decoder, PAGE, float8=False)
    assert decoder.native is None
    assert "since the C++ compiler does not compile it" in caplog.text
