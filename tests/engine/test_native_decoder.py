"""Small steps in C++ on a CPU: against the decoder that they replace, in steps, in a trial, and in whole answers."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from llava_serve import LLM
from llava_serve.config import EngineOptions
from llava_serve.engine.executor import background_compile, native_decoder
from llava_serve.engine.executor.attention import PackedStep
from llava_serve.engine.executor.decoder import MAX_PROMPT_KEYS, MAX_SMALL, Decoder
from llava_serve.engine.executor.kernels.native_attention import decode_attention
from llava_serve.engine.executor.kv_pool import KVPool, PackedSequence
from llava_serve.engine.executor.model import kv_shape
from llava_serve.engine.executor.native_decoder import NativeDecoder, use_native_code
from llava_serve.engine.executor.packed_linear import PackedLinear, pack_linears
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import PreparedPrompt
from support.cpp_steps import NEEDS_CPP_STEPS
from support.paths import GOLDEN, ROOT
from support.tiny_engine import TinyModel

CPU = torch.device("cpu")
PAGE, ROOM = 16, 48
HIDDEN = 64
WIDE = {"hidden_size": HIDDEN, "intermediate_size": 96}
"""oneDNN has another layout for fewer outputs, and for inputs that are no multiple of 32."""
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
KINDS = ("llama", "llama-llama3", "llama-linear", "llama-yarn", "mistral", "qwen2")

pytestmark = NEEDS_CPP_STEPS


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


def packed(lengths: Sequence[int]) -> list[PackedSequence]:
    """Sequences with so many tokens in a step, and different numbers of keys before them, from none on."""
    offsets = itertools.accumulate(lengths, initial=0)
    return [
        PackedSequence(offset, length, at * ROOM, at * 11 % (ROOM - length + 1))
        for at, (offset, length) in enumerate(zip(offsets, lengths, strict=False))
    ]


def step_of(memory: KVPool, sequences: list[PackedSequence], padding: int = 0) -> PackedStep:
    return PackedStep(memory, sequences, memory.layers[0][0].dtype, CPU, padding, (), PAGE, decode_attention)


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
    for lengths, workers in (([1], 1), ([1] * 3, 3), ([1] * 7, 2), ([1] * MAX_SMALL, 5), ([9], 2), ([1, 1, 4, 20], 3)):
        embeddings = random(sum(lengths), HIDDEN, seed=len(lengths), dtype=dtype)
        own, other = pool_of(model, len(lengths)), pool_of(model, len(lengths))
        with threads(workers), torch.inference_mode():
            found = native.forward(embeddings, step_of(own, packed(lengths)))
            expected = decoder.forward(embeddings, step_of(other, packed(lengths)))
        largest = float(expected.float().abs().max())
        torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=TOLERANCES[dtype] * largest)
        for found_layer, expected_layer in zip(own.layers, other.layers, strict=True):
            for mine, theirs in zip(found_layer, expected_layer, strict=True):
                torch.testing.assert_close(
                    mine.float(), theirs.float(), rtol=0, atol=5 * TOLERANCES[dtype], equal_nan=True
                )


@pytest.mark.parametrize("dtype", TOLERANCES)
@torch.inference_mode()
def test_a_token_is_bit_equal_in_a_step_of_its_own_and_beside_others(dtype: torch.dtype) -> None:
    model = model_of("mistral", dtype)
    native = NativeDecoder(model.language_model, PAGE)
    sequences = packed([1, 1, 5, 1, 12])
    embeddings = random(20, HIDDEN, dtype=dtype)
    together = native.forward(embeddings, step_of(pool_of(model, 5), sequences))
    memory = pool_of(model, 5)
    for one in sequences:
        for at in range(one.length):
            alone = step_of(memory, [PackedSequence(0, 1, one.base, one.start + at)])
            number = one.offset + at
            assert torch.equal(native.forward(embeddings[number : number + 1], alone)[0], together[number])


@torch.inference_mode()
def test_which_steps_it_computes() -> None:
    """Those of few tokens, and of few keys where a prompt is; what pads them is 0."""
    model = model_of("llama", torch.float32)
    decoder = Decoder(model.language_model)
    decoder.native = counted = _Counted(NativeDecoder(model.language_model, PAGE))
    memory = pool_of(model, MAX_SMALL + 1)
    most, more = [1] * MAX_SMALL, [1] * (MAX_SMALL + 1)
    for lengths, padding, calls in (([1], 1, 1), (most, 0, 2), (more, 0, 2), ([1, 30], 2, 3), ([1, 40], 0, 3)):
        count = sum(lengths)
        hidden = decoder.forward(random(count + padding, HIDDEN), step_of(memory, packed(lengths), padding))
        assert counted.calls == calls
        assert not hidden[count:].any()
    length = MAX_PROMPT_KEYS // 4
    for more_keys, calls in ((0, 4), (1, 4)):
        sequences = [PackedSequence(0, 1, 0, 5), PackedSequence(1, 4, 0, length - 4 + more_keys)]
        decoder.forward(random(5, HIDDEN), step_of(pool_of(model, length // ROOM + 1), sequences))
        assert counted.calls == calls
    decoder.forward(random(1, HIDDEN), PackedStep(memory, packed([1]), torch.float32, CPU))
    assert counted.calls == 4


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
        self.windows = native.windows
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


@pytest.mark.extended
def test_it_reads_the_layouts_of_processors_without_avx_512() -> None:
    """oneDNN has blocks of 16 outputs there for some shapes, and of 64 for others."""
    tests = "test_its_trial_passes or test_a_step_is_that_of_the_decoder"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", tests]
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout


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
