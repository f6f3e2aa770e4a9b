"""The kernels in Triton's interpreter, against their twins. Nothing here needs a GPU, and nothing says how fast one is.

Whatever a kernel gets and makes lies between NaN that it may neither read nor write.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from llava_serve.engine.executor import llama_decoder, sampler
from llava_serve.engine.executor.kernels import selection, twins
from llava_serve.engine.executor.kernels.selection import Arguments, LayerKernels, LayerShape, disagreement
from llava_serve.sampling_params import SamplingParams
from support.tiny_engine import TinyModel, engine, prompt, run
from support.triton_interpreter import GuardedMemory, require_interpreter

require_interpreter()

from llava_serve.engine.executor.kernels import decode_attention, layers, top_p  # noqa: E402

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPE = LayerShape(96, 1100, 4, 2, 64, torch.float32, CPU)
HEADS = [(4, 4, 128), (8, 2, 64), (7, 1, 128), (2, 2, 80), (2, 1, 256), (3, 3, 16)]
"""Heads, kv heads, and their width."""
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Norm of the difference from the twin, as a share of the result's: in half precision, one rounding of each number."""
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, of NaN


@pytest.fixture
def few_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most programs of a small model would have nothing to do, and the interpreter runs one after another."""
    monkeypatch.setattr(decode_attention, "splits_of", lambda kv_heads: 4)


def guarded(function: Callable[..., torch.Tensor], arguments: Arguments) -> list[torch.Tensor]:
    """A kernel's result, and its arguments after the call."""
    with GuardedMemory() as memory:
        own = [memory.place(part) for part in arguments]
        result = function(*own)
        memory.check()
    return [result, *(part for part in own if isinstance(part, torch.Tensor))]


def compare(kernel: Callable[..., torch.Tensor], twin: Callable[..., torch.Tensor], trials: Iterable[Arguments]) -> int:
    """Runs all trials; returns how many there are."""
    number = 0
    for number, arguments in enumerate(trials, 1):  # noqa: B007
        own = [part.clone() if isinstance(part, torch.Tensor) else part for part in arguments]
        expected = [twin(*own), *(part for part in own if isinstance(part, torch.Tensor))]
        for one, other in zip(guarded(kernel, arguments), expected, strict=True):
            found, known = one.double(), other.double()
            assert torch.equal(found.isnan(), known.isnan())
            difference, whole = (part.nan_to_num().norm() for part in (found - known, known))
            assert difference <= TOLERANCES.get(other.dtype, 0.0) * whole
    return number


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [96, 128, 1100])
def test_what_is_between_the_products_of_a_layer(dtype: torch.dtype, width: int) -> None:
    shape = dataclasses.replace(SHAPE, hidden=width, intermediate=width, dtype=dtype)
    assert compare(layers.add_rmsnorm, twins.add_rmsnorm, selection.norm_trials(shape)) == 4
    assert compare(layers.silu_mul, twins.silu_mul, selection.silu_trials(shape)) == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_rotary_embeddings_and_the_write_to_the_kv_pool(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> None:
    shape = dataclasses.replace(SHAPE, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    assert compare(layers.rotate_and_write, twins.rotate_and_write, selection.rotary_trials(shape)) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rotary_embeddings_are_rounded_where_torch_rounds(dtype: torch.dtype) -> None:
    for arguments in selection.rotary_trials(dataclasses.replace(SHAPE, dtype=dtype)):
        own = [part.clone() for part in arguments[:-1]]
        expected = [twins.rotate_and_write(*(*own, None)), *own]
        found = guarded(layers.rotate_and_write, arguments)
        assert all(map(torch.equal, found, expected))


@pytest.mark.usefixtures("few_shares")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_decode_attention(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> None:
    shape = dataclasses.replace(SHAPE, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    alibi = heads == kv_heads
    trials = selection.decode_trials(shape, 16, alibi=alibi)
    assert compare(decode_attention.decode_attention, twins.decode_attention, trials) == 2


@pytest.mark.usefixtures("few_shares")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 2, 64), (7, 1, 128), (3, 3, 80)])
def test_keys_and_values_in_8_bit_floats(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> None:
    """What is written has the twin's bits."""
    sizes: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "dtype": dtype}
    shape = dataclasses.replace(SHAPE, float8=True, **sizes)
    assert compare(layers.rotate_and_write, twins.rotate_and_write, selection.rotary_trials(shape)) == 2
    trials = selection.decode_trials(shape, 16, alibi=heads == kv_heads)
    assert compare(decode_attention.decode_attention, twins.decode_attention, trials) == 2


@pytest.mark.parametrize("number", [torch.nan, torch.inf, 449.0, 448.0, -448.0, 1e-9])
def test_what_8_bit_floats_cannot_hold_is_nan(number: float) -> None:
    qkv, cos, sin, slots, keys, values, scales = next(selection.rotary_trials(dataclasses.replace(SHAPE, float8=True)))
    scales[1] = 1.0
    qkv[0, -64:] = number
    assert compare(layers.rotate_and_write, twins.rotate_and_write, [(qkv, cos, sin, slots, keys, values, scales)]) == 1
    layers.rotate_and_write(qkv, cos, sin, slots, keys, values, scales)
    assert values[-1, 5].float().isnan().all() == (number not in (448.0, -448.0, 1e-9))


def test_keys_are_split_into_as_many_shares_as_a_gpu_wants() -> None:
    assert [decode_attention.splits_of(kv_heads) for kv_heads in (1, 2, 8, 32, 40)] == [32, 32, 16, 4, 4]
    shape = dataclasses.replace(SHAPE, heads=3, kv_heads=1)
    trials = list(selection.decode_trials(shape, 16, alibi=True))[:1]
    assert compare(decode_attention.decode_attention, twins.decode_attention, trials) == 1


@pytest.mark.usefixtures("few_shares")
@pytest.mark.parametrize("page_size", [1, 3, 64])
def test_pages_of_any_size(page_size: int) -> None:
    trials = selection.decode_trials(SHAPE, page_size, alibi=False)
    assert compare(decode_attention.decode_attention, twins.decode_attention, trials) == 2


@pytest.mark.usefixtures("few_shares")
def test_as_many_keys_as_a_tile_has_and_one_more() -> None:
    tile = decode_attention.tile_keys(64, 4)
    generator = torch.Generator().manual_seed(0)
    for used in (tile - 1, tile, tile + 1, 4 * tile, 4 * tile + 1):
        query = torch.randn(1, 4, 64, generator=generator)
        keys, values = (torch.randn(2, used, 64, generator=generator) for _ in range(2))
        table = torch.arange(used, dtype=torch.int32)[None]
        arguments = (query, keys, values, table, torch.tensor([used], dtype=torch.int32), 1, 0.3, None, None, None)
        assert compare(decode_attention.decode_attention, twins.decode_attention, [arguments]) == 1


@pytest.mark.usefixtures("few_shares")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_gets_the_same_bits_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    shape = dataclasses.replace(SHAPE, dtype=dtype)
    query, keys, values, table, used, *rest = next(selection.decode_trials(shape, 16, alibi=False))
    batch = decode_attention.decode_attention(query, keys, values, table, used, *rest)
    for at in range(len(used)):
        one = slice(at, at + 1)
        alone = decode_attention.decode_attention(query[one], keys, values, table[one], used[one], *rest)
        assert torch.equal(alone[0], batch[at])
    delta, residual, weight, eps = list(selection.norm_trials(shape))[-1]
    normed = layers.add_rmsnorm(delta, residual.clone(), weight, eps)
    for at in range(len(residual)):
        assert torch.equal(layers.add_rmsnorm(delta[at:][:1], residual[at:][:1].clone(), weight, eps)[0], normed[at])


@pytest.mark.usefixtures("few_shares")
def test_queries_need_not_be_neighbours_and_nor_need_heads() -> None:
    """As transformers' models pass them: the tokens of a head lie next to one another."""
    query, *rest = next(selection.decode_trials(SHAPE, 16, alibi=False))
    turned = query.transpose(0, 1).contiguous().transpose(0, 1)
    assert turned.stride() != query.stride()
    found = decode_attention.decode_attention(turned, *rest)
    assert torch.equal(found, decode_attention.decode_attention(query, *rest))


def test_sampling() -> None:
    assert compare(top_p.sample_top_p, twins.sample_top_p, selection.top_p_trials(CPU)) == 2


@pytest.mark.parametrize("vocabulary", [1, 4096, 4097, 32000])
def test_sampling_from_vocabularies_of_any_size(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, vocabulary, generator=generator)
    logits[-1, 1:] = float("-inf")
    share = torch.tensor([1.0, 0.95, 0.9, 0.5, 0.1, 0.9])
    noise = torch.rand(6, generator=generator, dtype=torch.float64)
    noise[2] = 1 - 2**-53
    found, *_ = guarded(top_p.sample_top_p, (logits, share, noise))
    assert torch.equal(found, twins.sample_top_p(logits, share, noise))


def test_of_equally_likely_tokens_the_first_are_kept() -> None:
    """Logits in half precision have many."""
    noise = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    few = torch.tensor([[2.0, 1.0, 1.0, 0.0]]).repeat(8, 1)  # shares of 0.53, 0.20, 0.20 and 0.07
    for share, kept in ((0.5, {0}), (0.7, {0, 1}), (0.9, {0, 1, 2})):
        assert set(top_p.sample_top_p(few, torch.full((8,), share), noise).tolist()) == kept
    coarse = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    arguments = (
        torch.cat([coarse, torch.zeros(1, 5000)]),
        torch.tensor([0.3, 0.9, 0.999, 0.4999]),
        noise[[0, 4, 6, 7]],
    )
    assert compare(top_p.sample_top_p, twins.sample_top_p, [arguments]) == 1


def test_a_step_with_nan_gets_a_token_of_the_vocabulary() -> None:
    """Its request fails, and its neighbours do not."""
    logits = torch.zeros(3, 50)
    logits[0, 7] = torch.nan
    logits[1] = float("-inf")
    found, *_ = guarded(top_p.sample_top_p, (logits, torch.full((3,), 0.9), torch.full((3,), 0.5, dtype=torch.float64)))
    assert all(0 <= token < 50 for token in found.tolist())
    assert found[2] == 22  # of the first 45


def test_an_engine_computes_and_samples_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [
        (prompt(1, [5, 6, 7]), SamplingParams(temperature=0, max_new_tokens=3)),
        (prompt(1, [8, 9]), SamplingParams(temperature=0.7, top_p=0.8, seed=3, max_new_tokens=3)),
    ]
    expected = run(engine(TinyModel("qwen2", torch.float32)), *requests)
    by_layers = LayerKernels(layers.add_rmsnorm, layers.rotate_and_write, layers.silu_mul)
    monkeypatch.setattr(llama_decoder, "DEVICES", {"cpu"})
    monkeypatch.setattr(llama_decoder, "layer_kernels", lambda shape: by_layers)
    monkeypatch.setattr(sampler, "top_p_kernel", lambda dtype, device: top_p.sample_top_p)
    assert run(engine(TinyModel("qwen2", torch.float32)), *requests) == expected


@pytest.mark.usefixtures("few_shares")
def test_trials_find_a_wrong_kernel() -> None:
    def without_window(*arguments: Any) -> torch.Tensor:
        return decode_attention.decode_attention(*(*arguments[:7], None, *arguments[8:]))

    def without_addition(delta: Any, *rest: Any) -> torch.Tensor:
        return layers.add_rmsnorm(None, *rest)

    def with_other_scales(*arguments: Any) -> torch.Tensor:
        return decode_attention.decode_attention(*(*arguments[:9], arguments[9].flip(0)))

    in_8_bits = selection.decode_trials(dataclasses.replace(SHAPE, float8=True), 16, alibi=False)
    assert disagreement(with_other_scales, twins.decode_attention, in_8_bits) == "it gives wrong results here (trial 1)"
    for wrong, twin, trials in (
        (without_window, twins.decode_attention, selection.decode_trials(SHAPE, 16, alibi=False)),
        (without_addition, twins.add_rmsnorm, selection.norm_trials(SHAPE)),
    ):
        assert disagreement(wrong, twin, trials) == "it gives wrong results here (trial 2)"
