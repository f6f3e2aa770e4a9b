"""The kernels in C++ for attention on a CPU: against their twins, in a step, and in whole answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llava_serve import LLM
from llava_serve.config import EngineOptions
from llava_serve.engine.executor.attention import PackedStep
from llava_serve.engine.executor.cascade_attention import SharedPrefix
from llava_serve.engine.executor.kernels import native_attention, native_build, native_prefill, twins
from llava_serve.engine.executor.kernels.selection import (
    DecodeKernel,
    LayerShape,
    decode_trials,
    disagreement,
    native_decode_kernel,
    prefill_trials,
    tower_trials,
)
from llava_serve.engine.executor.kv_pool import KVPool, PackedSequence
from llava_serve.sampling_params import SamplingParams

CPU = torch.device("cpu")
PAGE = 16

pytestmark = pytest.mark.skipif(native_build.compiler() is None, reason="there is no C++ compiler")


def pool(heads: int, dtype: torch.dtype) -> KVPool:
    memory = KVPool(1, heads, 12 * PAGE, 32, dtype, CPU)
    for half in memory.layers[0]:
        half.copy_(torch.randn(half.shape, generator=torch.Generator().manual_seed(1)))
    return memory


def selected() -> DecodeKernel | None:
    """What a new trial selects."""
    native_decode_kernel.cache_clear()
    try:
        return native_decode_kernel(LayerShape(0, 0, 2, 2, 32, torch.float32, CPU), PAGE, alibi=False)
    finally:
        native_decode_kernel.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 64), (7, 1, 80)])
@pytest.mark.parametrize("float8", [False, True])
def test_it_agrees_with_its_twin(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, float8: bool) -> None:
    """With NaN in what no sequence owns, with windows, and with ALiBi."""
    shape = LayerShape(0, 0, heads, kv_heads, head_dim, dtype, CPU, float8)
    for alibi in (False, True):
        trials = decode_trials(shape, PAGE, alibi=alibi)
        assert disagreement(native_attention.decode_attention, twins.decode_attention, trials) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "float8"), [(4, 4, 64, False), (7, 1, 80, True), (4, 2, 128, False)]
)
def test_prompts_agree_with_their_twin(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, float8: bool
) -> None:
    """Whole prompts and pieces, with windows, and with ALiBi; tiles, which see all their keys."""
    shape = LayerShape(0, 0, heads, kv_heads, head_dim, dtype, CPU, float8)
    for alibi in (False, True):
        trials = prefill_trials(shape, alibi=alibi)
        assert disagreement(native_prefill.prefill_attention, twins.prefill_attention, trials) == ""
    assert disagreement(native_prefill.prefill_attention, twins.prefill_attention, tower_trials(shape)) == ""


@pytest.mark.parametrize("threads", [1, 3, 7])
def test_threads_share_the_tokens_of_few_heads(threads: int) -> None:
    """Behind a piece's keys, and between those of two heads, there is NaN."""
    pool = torch.full((2, 1, 200, 32), torch.nan)
    pool[:, :, :131] = torch.randn(2, 1, 131, 32, generator=torch.Generator().manual_seed(0))
    query = torch.randn(3, 60, 32, generator=torch.Generator().manual_seed(1))
    arguments = (query, pool[0][:, :131], pool[1][:, :131], 0.3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = native_prefill.prefill_attention(*arguments)
    torch.set_num_threads(before)
    torch.testing.assert_close(found, twins.prefill_attention(*arguments), rtol=1e-5, atol=1e-5)


def test_a_trial_finds_a_prompt_that_sees_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    def prefill_attention(*arguments: Any) -> torch.Tensor:
        return right(*arguments[:7], False)

    right: Callable[..., torch.Tensor] = native_prefill.prefill_attention
    monkeypatch.setattr(native_prefill, "prefill_attention", prefill_attention)
    assert selected() is None


def test_a_trial_finds_a_kernel_that_leaves_a_key_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, used: torch.Tensor,
              *rest: Any) -> torch.Tensor:  # fmt: skip
        return right(query, keys, values, table, (used - 1).clamp(min=1), *rest)

    right = native_attention.decode_attention
    monkeypatch.setattr(native_attention, "decode_attention", wrong)
    wrong.__name__ = "decode_attention"
    assert selected() is None


@pytest.mark.parametrize("prefixes", [(), (SharedPrefix((0, 1, 2), 2 * PAGE),)])
def test_a_step_is_one_without_it(prefixes: tuple[SharedPrefix, ...]) -> None:
    """Three sequences with one token, two of which read the first one's prefix, a piece of a prompt, and padding."""
    steps, memories = [], []
    for kernel in (None, native_attention.decode_attention):
        memory = pool(2, torch.float32)
        for half in memory.layers[0]:
            for copy in (4, 8):
                half[:, copy * PAGE : (copy + 2) * PAGE] = half[:, : 2 * PAGE]
        sequences = [
            PackedSequence(0, 1, 0, 35),
            PackedSequence(1, 1, 4 * PAGE, 40),
            PackedSequence(2, 1, 8 * PAGE, 2 * PAGE),
            PackedSequence(3, 5, 11 * PAGE, 3),
        ]
        step = PackedStep(memory, sequences, torch.float32, CPU, 2, prefixes if kernel else (), PAGE, kernel)
        generator = torch.Generator().manual_seed(2)
        query, key, value = (torch.randn(1, heads, 10, 32, generator=generator) for heads in (4, 2, 2))
        steps.append(step.attend(0, query, key, value, None))
        memories.append(memory)
    torch.testing.assert_close(*steps, rtol=1e-5, atol=1e-5)
    for halves in zip(*(memory.layers[0] for memory in memories), strict=True):
        assert torch.equal(*halves)


def test_a_sequence_is_bit_equal_alone_and_beside_others() -> None:
    memory = pool(2, torch.bfloat16)
    query = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
    table = torch.tensor([[0, 1, 2], [5, 4, 3], [8, 9, 7]], dtype=torch.int32)
    used = torch.tensor([40, 1, 33], dtype=torch.int32)
    layer = memory.layers[0]
    together = native_attention.decode_attention(query, *layer, table, used, PAGE, None, None, None, None)
    for at in range(3):
        one = slice(at, at + 1)
        alone = native_attention.decode_attention(
            query[one], *layer, table[one], used[one], PAGE, None, None, None, None
        )
        assert torch.equal(alone[0], together[at])


def test_answers_are_those_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that ships, in float32, with the kernel as for a large model, and nothing else in C++."""
    queries = ["What shape is it?", "What colour is it?", "Describe the picture."]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8))
    calls = []

    def counted(*arguments: Any) -> None:
        calls.append(1)
        launch(*arguments)

    launch = native_attention.launch
    monkeypatch.setattr("llava_serve.engine.executor.cpu_attention.launch", counted)
    monkeypatch.setattr("llava_serve.engine.executor.model_runner.use_native_code", lambda *_, **__: None)
    answers = []
    for least in (1 << 60, 0):
        monkeypatch.setattr("llava_serve.engine.executor.background_compile.MIN_WEIGHTS", least)
        llm = LLM("builtin", dtype="float32", engine=EngineOptions(compile="auto"))
        answers.append([each.text for each in llm.generate(queries, [picture] * 3, SamplingParams(temperature=0))])
        assert bool(calls) == (least == 0)
    assert answers[0] == answers[1]
