"""Keys and values in 8-bit floats: how they are rounded and moved, their scales, their memory, and who is refused."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch

from llava_serve.config import EngineOptions
from llava_serve.engine.executor import cache_scales, llama_decoder, varlen
from llava_serve.engine.executor.attention import PackedStep
from llava_serve.engine.executor.cache_scales import find_scales
from llava_serve.engine.executor.decoder import Decoder
from llava_serve.engine.executor.float8_cache import FLOAT8, LARGEST, from_float8, to_float8
from llava_serve.engine.executor.kernels import twins
from llava_serve.engine.executor.kv_memory import num_blocks
from llava_serve.engine.executor.kv_pool import KVPool, KVWrite, PackedSequence
from llava_serve.engine.sequence import Copy
from llava_serve.errors import CheckpointError, NumericalError
from llava_serve.sampling_params import SamplingParams
from support.tiny_engine import PROMPTS, TinyModel, engine, outcomes, prompt, run

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True)
SCALES = torch.tensor([[[0.5, 8.0], [2.0, 0.25]], [[1.0, 1.0], [4.0, 0.125]]])
"""Of two layers with two heads."""

torch.set_num_threads(1)


def random(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def pool(positions: int = 24) -> KVPool:
    """Of random content."""
    made = KVPool(2, 2, positions, 8, torch.float64, CPU, SCALES)
    for layer, _ in enumerate(made.layers):
        content = random(2, 2, positions, 8)
        made.write(layer, [KVWrite(0, positions)], content[0], content[1])
    return made


def content(one: KVPool) -> torch.Tensor:
    """Its numbers, [layers, 2, kv_heads, positions, head_dim]."""
    return one._memory.double() * SCALES[..., None, None]


def test_a_number_becomes_the_nearest_of_all_that_there_are() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FLOAT8).double()
    known = codes[codes.isfinite()]
    values = random(2, 50, 8) * torch.logspace(-3, 1, 50, dtype=torch.float64)[:, None]
    scale = torch.tensor([0.5, 4.0])
    stored = to_float8(values, scale)
    assert stored.dtype == FLOAT8
    wanted = values / scale[:, None, None]
    distance = (known - wanted[..., None]).abs().amin(-1)
    assert torch.allclose((stored.double() - wanted).abs(), distance, rtol=1e-5, atol=0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):  # nothing more is lost
        assert torch.equal(from_float8(stored, scale, dtype).double(), stored.double() * scale[:, None, None])


def test_what_is_too_large_is_nan_and_not_cut_off() -> None:
    largest = torch.tensor([[[LARGEST, -LARGEST, LARGEST * 1.01, torch.inf, -torch.inf, torch.nan]]])
    stored = to_float8(2 * largest, torch.tensor([2.0]))
    assert stored.float()[0, 0, :2].tolist() == [LARGEST, -LARGEST]
    assert stored.float()[0, 0, 2:].isnan().all()


def test_a_pool_moves_what_it_stores() -> None:
    one = pool()
    before = content(one)
    assert before.isfinite().all()
    one.copy([Copy(2, 10, 5), Copy(0, 3, 6)])  # the second one overlaps
    expected = before.clone()
    expected[..., 10:15, :] = before[..., 2:7, :]
    expected[..., 3:9, :] = before[..., 0:6, :]
    assert torch.equal(content(one), expected)
    new = random(2, 2, 3, 8)
    one.write(1, [KVWrite(0, 2, targets=torch.tensor([20, 7])), KVWrite(2, 1, start=12)], new[0], new[1])
    rounded = torch.stack([from_float8(to_float8(new[at], SCALES[1, at]), SCALES[1, at], new.dtype) for at in (0, 1)])
    expected[1, :, :, [20, 7, 12]] = rounded
    assert torch.equal(content(one), expected)
    slots = torch.tensor([12, 0, 20])
    assert torch.equal(torch.stack(one.gather(1, slots, torch.float64)), expected[1][:, :, slots])


@pytest.mark.parametrize("number", [torch.nan, -torch.nan, torch.inf, 1e9])
def test_what_is_not_finite_is_found(number: float) -> None:
    one = pool()
    assert one.finite(0, 24).tolist() == [True]
    new = torch.zeros(2, 1, 8)
    one.write(0, [KVWrite(0, 1, start=5)], new, new.index_fill(2, torch.tensor([3]), number))
    assert [one.finite(start, 4).item() for start in (0, 4, 8)] == [True, False, True]


def test_the_same_memory_holds_twice_the_blocks_of_a_half_precision() -> None:
    plain, small = EngineOptions(kv_cache_bytes=1 << 20), EngineOptions(kv_cache_bytes=1 << 20, kv_cache_dtype="fp8")
    for dtype, times in ((torch.bfloat16, 2), (torch.float32, 4)):
        model = TinyModel("llama", dtype)
        assert num_blocks(model, small) == times * num_blocks(model, plain)
    sizes = [engine(model, kv_cache_dtype=kind)._runner._memory._memory.nbytes for kind in ("auto", "fp8")]
    assert sizes[0] == 4 * sizes[1]


@pytest.mark.parametrize("kind", ["qwen2", "mpt"])
def test_scales_are_powers_of_two_and_follow_each_head(kind: str) -> None:
    model = TinyModel(kind, torch.float32)
    plain = find_scales(model, Decoder(model.language_model))
    config = model.language_model.config
    assert plain.shape == (2, 2, getattr(config, "num_key_value_heads", 4))
    assert torch.equal(plain.log2(), plain.log2().round())
    if kind == "qwen2":
        attention = model.language_model.model.layers[1].self_attn
        for layer, times in ((attention.k_proj, 64), (attention.v_proj, 2**-7)):
            for parameter in layer.parameters():
                parameter.data[:8] *= times  # the first head
        assert torch.equal(
            find_scales(model, Decoder(model.language_model)) / plain,
            torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[64.0, 1.0], [2.0**-7, 1.0]]]),
        )


def test_tokens_that_are_nan_do_not_spoil_the_scales() -> None:
    model = TinyModel("llama", torch.float32)
    model.language_model.get_input_embeddings().weight.data[7] = torch.nan
    scales = find_scales(model, Decoder(model.language_model))
    assert scales.isfinite().all()
    assert scales.min() > 0


@pytest.mark.parametrize("kind", [pytest.param("llama", marks=pytest.mark.extended), "mistral"])
def test_the_fused_decoder_answers_as_that_of_transformers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    for device in ("cuda", "cpu"):
        monkeypatch.setattr(llama_decoder, "DEVICES", {device})
        subject = engine(TinyModel(kind), kv_cache_dtype="fp8", max_batch_tokens=16)
        assert subject._runner._decoder.name.endswith("fused") == (device == "cpu")
        answers.append(run(subject, *[(one, GREEDY) for one in PROMPTS[:3]]))
    assert answers[0] == answers[1]


def plain_operation(query: Any, keys: Any, values: Any, cum_q: Any, cum_k: Any, *_: Any, **given: Any) -> Any:
    """What FlashAttention over extents computes, for grouped heads and a window."""
    outputs = []
    for at, used in enumerate(given["seqused_k"].tolist()):
        own, base = query[cum_q[at] : cum_q[at + 1]].transpose(0, 1), int(cum_k[at])
        groups = own.shape[0] // keys.shape[1]
        own_keys, own_values = (
            part[base : base + used].transpose(0, 1).repeat_interleave(groups, 0) for part in (keys, values)
        )
        distances = torch.arange(used) - torch.arange(used - own.shape[1], used)[:, None]
        left = given["window_size_left"]
        hidden = (distances > 0) | ((distances < -left) if left >= 0 else torch.tensor(False))
        bias = torch.zeros(hidden.shape, dtype=own.dtype).masked_fill(hidden, -torch.inf)
        attended = torch.nn.functional.scaled_dot_product_attention(
            own, own_keys, own_values, attn_mask=bias, scale=given["scale"]
        )
        outputs.append(attended.transpose(0, 1))
    return (torch.cat(outputs),)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kernel", [twins.decode_attention, None], ids=["kernel", "without"])
@pytest.mark.parametrize("lengths", [[1, 1, 6, 1], [1, 1], [4, 9]], ids=str)
def test_a_mixed_step_on_a_gpu_is_one_on_a_cpu(
    lengths: list[int], kernel: Any, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With twins of its two kernels."""
    sequences, offset = [], 0
    for length, base, start in zip(lengths, (8, 40, 0, 24), (9, 3, 1, 12), strict=False):
        sequences.append(PackedSequence(offset, length, base, start))
        offset += length
    generator = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(1, heads, offset, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)
    )
    found = []
    for fast in (False, True):
        monkeypatch.setattr(varlen, "available", lambda *_, fast=fast, **__: fast)
        monkeypatch.setattr(varlen, "_OPERATION", plain_operation)
        step = PackedStep(pool(64), sequences, torch.float64, CPU, page_size=4, kernel=kernel)
        found.append(step.attend(1, query, key, value, 0.4, window))
        assert (step._float8 is not None) == fast
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-9)


def test_keys_beyond_what_can_be_stored_fail_their_request_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scales were found without a token whose keys are far larger than all others."""
    model = TinyModel("llama", torch.float32)
    find = cache_scales.find_scales
    monkeypatch.setattr("llava_serve.engine.executor.model_runner.find_scales", lambda *given: find(*given) / 8)
    subject = engine(model, kv_cache_dtype="fp8")
    table = model.language_model.get_input_embeddings().weight.data
    expected = run(subject, (prompt([1, 5, 6]), GREEDY))
    model.language_model.model.layers[0].input_layernorm.weight.data[0] = 50.0
    table[:, 0] = 0
    table[9] = 0
    table[9, 0] = 1.0
    failed, other = outcomes(subject, (prompt([1, 9, 6]), GREEDY), (prompt([1, 5, 6]), GREEDY))
    assert isinstance(failed, NumericalError)
    assert "float32 on this request; with kv_cache_dtype auto they may be" in str(failed)
    assert isinstance(other, list)
    assert len(other[0]) == len(expected[0][0])


def test_a_model_that_it_changes_is_refused_by_name() -> None:
    """Large biases of keys, as Qwen2's have, leave few bits for what differs between tokens."""
    model = TinyModel("qwen2", torch.float32)
    for layer in model.language_model.model.layers:
        layer.self_attn.k_proj.bias.data[::2] = 3000.0
    engine(model)
    with pytest.raises(CheckpointError, match=r"kv_cache_dtype fp8 .* answers otherwise: .* differ by .* Choose auto"):
        engine(model, kv_cache_dtype="fp8")


def test_an_old_gpu_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    model = TinyModel("llama", torch.bfloat16)
    decoder = Decoder(model.language_model)
    model.device = torch.device("cuda", 0)
    with pytest.raises(CheckpointError, match=r"NVIDIA A100 has no 8-bit floats: .* 8\.9 .* Choose auto"):
        find_scales(model, decoder)


@pytest.mark.extended
def test_every_decoder_answers_with_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for kind, dtype in itertools.product(("phi3", "gemma"), (torch.float64, torch.bfloat16)):
            answers = run(engine(TinyModel(kind, dtype), kv_cache_dtype="fp8"), (PROMPTS[1], GREEDY))
            assert len(answers[0][0]) == GREEDY.max_new_tokens
    assert not caplog.text
