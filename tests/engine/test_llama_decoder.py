"""The decoder of our own for the Llama family, with the kernels' twins on a CPU: it answers as transformers does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from llava_serve.engine.executor import llama_decoder
from llava_serve.engine.executor.kernels import selection, twins
from llava_serve.engine.executor.kernels.selection import LayerShape, disagreement
from llava_serve.errors import CheckpointError
from llava_serve.sampling_params import SamplingParams
from support.tiny_engine import PROMPTS, TinyModel, engine, reference_ids, run

CPU = torch.device("cpu")
EVERYDAY = ["mistral", "qwen2"]
FUSED = [*EVERYDAY, "llama", "llama-linear", "llama-llama3", "llama-yarn", "qwen2-full"]
OTHERS = ["mpt", "qwen3", "gemma", "phi3"]
GREEDY = SamplingParams(temperature=0, max_new_tokens=20)
SHAPE = LayerShape(96, 48, 6, 2, 16, torch.float32, CPU)


@pytest.fixture(autouse=True)
def also_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_decoder, "DEVICES", {"cpu"})


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in EVERYDAY else pytest.mark.extended) for kind in FUSED]
)
def test_it_gives_what_transformers_gives(kind: str) -> None:
    some = slice(None) if kind in ("llama", "mistral") else slice(1, 3)
    expected = [reference_ids(TinyModel(kind), one, 20) for one in PROMPTS[some]]
    model = TinyModel(kind)
    subject = engine(model, max_batch_tokens=16)
    assert subject._runner._decoder.name == "llava_serve fused"
    for _ in range(2):  # computed, then from the prefix cache
        answers = run(subject, *[(one, GREEDY) for one in PROMPTS[some]])
        assert [answer[0] for answer in answers] == expected
    assert [reference_ids(model, one, 20) for one in PROMPTS[some]][:1] == expected[:1]  # the model itself goes on


@pytest.mark.parametrize("kind", OTHERS)
def test_other_decoders_are_those_of_transformers(kind: str) -> None:
    assert engine(TinyModel(kind))._runner._decoder.name != "llava_serve fused"


def test_layers_that_are_not_plain_are_left_to_transformers() -> None:
    model = TinyModel()
    assert llama_decoder.LlamaDecoder.supports(model.language_model)
    model.language_model.model.layers[1].mlp.up_proj = nn.Sequential(model.language_model.model.layers[1].mlp.up_proj)
    assert not llama_decoder.LlamaDecoder.supports(model.language_model)
    model = TinyModel()
    model.language_model.config.hidden_act = "gelu"
    assert not llama_decoder.LlamaDecoder.supports(model.language_model)


def test_weights_are_taken_once_and_shared_by_engines() -> None:
    model = TinyModel("qwen2")
    size = sum(parameter.numel() for parameter in model.language_model.parameters())
    first, second = engine(model), engine(model)
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in model.language_model.parameters()}
    assert sum(one.nbytes() for one in storages.values()) == size * model.dtype.itemsize
    layers = [one._runner._decoder._llama._layers for one in (first, second)]  # type: ignore[union-attr]
    assert layers[0] is layers[1]
    assert layers[0][0].qkv[0].untyped_storage().data_ptr() in storages


def test_a_wrong_twin_is_found_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twins, "silu_mul", lambda gate_up: gate_up.chunk(2, dim=-1)[1])
    selection.layer_kernels.cache_clear()
    with pytest.raises(CheckpointError, match="does not compute the language model"):
        engine(TinyModel())
    selection.layer_kernels.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_twins_round_as_transformers_does(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = LlamaRMSNorm(96, 1e-5).to(dtype)
    norm.weight.data.normal_()
    delta, residual = torch.randn(5, 96).to(dtype), torch.randn(5, 96).to(dtype)
    expected = residual + delta
    with torch.no_grad():
        assert torch.equal(twins.add_rmsnorm(delta, residual, norm.weight, 1e-5), norm(expected))
        assert torch.equal(residual, expected)
        assert torch.equal(twins.add_rmsnorm(None, residual, norm.weight, 1e-5), norm(expected))
    mlp = LlamaMLP(LlamaConfig(hidden_size=8, intermediate_size=48, num_attention_heads=1))
    gate_up = torch.randn(5, 96).to(dtype)
    assert torch.equal(twins.silu_mul(gate_up), mlp.act_fn(gate_up[:, :48]) * gate_up[:, 48:])
    query, key, value = (torch.randn(1, heads, 5, 16).to(dtype) for heads in (6, 2, 2))
    cos, sin = (torch.randn(5, 8).repeat(1, 2).to(dtype) for _ in range(2))
    keys, values = torch.zeros(2, 12, 16, dtype=dtype), torch.zeros(2, 12, 16, dtype=dtype)
    slots = torch.tensor([3, 11, 0, 7, 8])
    qkv = torch.cat([part[0].transpose(0, 1).flatten(1) for part in (query, key, value)], dim=1)
    found = twins.rotate_and_write(qkv, cos, sin, slots, keys, values, None)
    expected_query, expected_key = apply_rotary_pos_emb(query, key, cos[None], sin[None])
    assert torch.equal(found, expected_query[0].transpose(0, 1))
    assert torch.equal(keys[:, slots], expected_key[0])
    assert torch.equal(values[:, slots], value[0])
    untouched = [position for position in range(12) if position not in slots]
    assert not keys[:, untouched].any()


@pytest.mark.parametrize("alibi", [False, True])
def test_attention_over_pages_is_that_of_torch(alibi: bool) -> None:
    shape = LayerShape(96, 48, 6, 2, 16, torch.float64, CPU)
    for query, keys, values, table, used, size, _, window, slopes, _ in selection.decode_trials(shape, 16, alibi=alibi):
        found = twins.decode_attention(query, keys, values, table, used, size, None, window, slopes, None)
        for at, count in enumerate(used.tolist()):
            pages = table[at, : -(-count // size)].tolist()
            slots = [page * size + offset for page in pages for offset in range(size)][:count][-(window or count) :]
            bias = torch.zeros(6, 1, len(slots), dtype=torch.float64)
            if slopes is not None:
                bias += slopes[:, None, None].double() * torch.arange(1 - len(slots), 1)
            own_keys, own_values = (memory[:, slots].repeat_interleave(3, dim=0) for memory in (keys, values))
            expected = scaled_dot_product_attention(query[at, :, None], own_keys, own_values, attn_mask=bias)
            torch.testing.assert_close(found[at], expected[:, 0], rtol=0, atol=1e-6)


def test_trials_find_a_wrong_twin() -> None:
    def every_way(wrong: Callable[..., torch.Tensor], twin: Callable[..., torch.Tensor], trials: Any) -> None:
        assert disagreement(twin, twin, trials()) == ""
        assert "wrong results" in disagreement(wrong, twin, trials())

    every_way(
        lambda *given: twins.decode_attention(*(*given[:7], None, None, None)),
        twins.decode_attention,
        lambda: selection.decode_trials(SHAPE, 4, alibi=True),
    )
    every_way(
        lambda qkv, cos, sin, slots, keys, _, scales: twins.rotate_and_write(qkv, cos, sin, slots, keys, keys, scales),
        twins.rotate_and_write,
        lambda: selection.rotary_trials(SHAPE),
    )
    every_way(
        lambda logits, top_p, noise: twins.sample_top_p(logits, torch.ones_like(top_p), noise),
        twins.sample_top_p,
        lambda: selection.top_p_trials(CPU),
    )


def test_where_kernels_cannot_run_their_twins_do_and_a_warning_says_why(caplog: pytest.LogCaptureFixture) -> None:
    """Here there is no GPU, and mostly no Triton."""
    cuda = torch.device("cuda")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, on which they may run")
    with caplog.at_level(logging.WARNING):
        assert selection.top_p_kernel.__wrapped__(torch.float32, cuda) is None
    assert "The kernel sample_top_p is not used, and steps are slower, since it does not run: " in caplog.text
    caplog.clear()
    shape = LayerShape(96, 48, 6, 2, 16, torch.float64, cuda)
    assert selection.layer_kernels.__wrapped__(shape).silu_mul is twins.silu_mul
    assert caplog.text.count("since it has no float64") == 3
    caplog.clear()
    assert selection.top_p_kernel.__wrapped__(torch.float32, CPU) is None
    assert not caplog.text
