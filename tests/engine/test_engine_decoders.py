"""The engine against transformers itself: the same greedy ids as a full forward pass per token."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaModel

from llava_serve.checkpoints.decoders import DECODERS, ROTARY_TYPES, rotary_types
from llava_serve.checkpoints.original import token_ids
from llava_serve.engine.executor.packed_linear import PackedLinear, pack_linears, padded
from llava_serve.errors import DeadlineExceededError
from llava_serve.sampling_params import SamplingParams
from support.tiny_engine import CONFIGS, PROMPTS, TinyModel, dtype_of, engine, image, prompt, reference_ids, run

GREEDY = SamplingParams(temperature=0, max_new_tokens=20)


EVERYDAY = {"llama", "llama-yarn", "qwen3", "phi3", "gemma2-bounded-head", "mixtral", "cohere"}
"""One of each sort: rotary scaling, normed heads, merged weights, a bounded head, experts, another norm.
The others are compared in the extended tests, and by `check_decoder` wherever one is loaded."""


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "mpt"])
@pytest.mark.parametrize("tokens", [16, pytest.param(2048, marks=pytest.mark.extended)])
def test_the_engine_gives_what_transformers_gives(kind: str, tokens: int) -> None:
    expected = [reference_ids(TinyModel(kind), one, 20) for one in PROMPTS]
    subject = engine(TinyModel(kind), max_batch_tokens=tokens)
    for _ in range(2):  # computed, then from the prefix cache
        answers = run(subject, *[(one, GREEDY) for one in PROMPTS])
        assert [answer[0] for answer in answers] == expected
    assert subject.stats.cached_tokens > 0


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in EVERYDAY else pytest.mark.extended) for kind in CONFIGS]
)
def test_every_decoder_gives_what_transformers_gives(kind: str) -> None:
    expected = [reference_ids(TinyModel(kind, dtype_of(kind)), one, 8) for one in PROMPTS[1:3]]
    subject = engine(TinyModel(kind, dtype_of(kind)), max_batch_tokens=16)
    requests = [(one, SamplingParams(temperature=0, max_new_tokens=8)) for one in PROMPTS[1:3]]
    assert [answer[0] for answer in run(subject, *requests)] == expected


def test_the_decoders_that_are_supported_are_those_that_are_compared() -> None:
    assert CONFIGS.keys() >= EVERYDAY
    assert {kind for kind, _ in CONFIGS.values()} - {"gemma2"} == DECODERS.keys()
    rotary = {one for _, settings in CONFIGS.values() for one in rotary_types(settings)}
    assert rotary == ROTARY_TYPES


def test_the_sliding_window_is_applied() -> None:
    """Without it the answer differs."""
    narrow, wide = TinyModel("mistral"), TinyModel("mistral")
    wide.language_model.config.sliding_window = None
    first, second = (run(engine(one), (PROMPTS[2], GREEDY))[0] for one in (narrow, wide))
    assert first != second


def test_a_cached_image_is_not_encoded_again() -> None:
    model = TinyModel()
    subject = engine(model, prefix_caching=False)
    model.encoded_tiles = 0
    for question in ([4], [5], [6]):
        run(subject, (prompt(1, image((9, 9, 9), 2), question), GREEDY))
    assert model.encoded_tiles == 2
    cacheless = engine(model, feature_cache_bytes=0, prefix_caching=False)
    model.encoded_tiles = 0
    for question in ([4], [5]):
        run(cacheless, (prompt(1, image((9, 9, 9), 2), question), GREEDY))
    assert model.encoded_tiles == 4


def test_a_second_question_about_an_image_computes_only_the_question() -> None:
    model = TinyModel()
    subject = engine(model)
    model.encoded_tiles = 0
    run(subject, (prompt(1, image((9, 9, 9), 4), [4, 5, 6]), SamplingParams(temperature=0, max_new_tokens=1)))
    before = subject.stats.computed_tokens
    run(subject, (prompt(1, image((9, 9, 9), 4), [7, 8, 6]), SamplingParams(temperature=0, max_new_tokens=1)))
    assert subject.stats.computed_tokens - before == 28 - 24  # three full blocks of eight were cached
    assert model.encoded_tiles == 4  # the features of the last block came from the encoder cache


def test_an_expired_request_is_ended_and_its_blocks_are_freed() -> None:
    subject = engine(TinyModel())
    subject.add(subject.validator.accept("late", PROMPTS[0], GREEDY, deadline=time.time() - 1))
    subject.add(subject.validator.accept("timely", PROMPTS[0], GREEDY, deadline=time.time() + 1000))
    first = subject.step()
    assert isinstance(first[0].error, DeadlineExceededError)
    assert first[0].request_id == "late"
    assert not subject.has("late")
    assert subject.stats.running == 1


def test_packed_layers_equal_plain_ones() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 8, bias=False))
    inputs = torch.randn(1, 5, 24)
    with torch.inference_mode():
        expected = plain(inputs)
        pack_linears(plain)
        assert isinstance(plain[0], PackedLinear)
        torch.testing.assert_close(plain(inputs), expected)


def test_merged_projections_may_be_called_in_any_order() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, attention_bias=True,
    )  # fmt: skip
    model = LlamaModel(config).eval()
    with torch.inference_mode():
        inputs = torch.randn(1, 5, 32)
        expected = model(inputs_embeds=inputs).last_hidden_state
        before = model.layers[0].self_attn
        plain = {
            name: (getattr(before, name).weight, getattr(before, name).bias) for name in ("q_proj", "k_proj", "v_proj")
        }
        pack_linears(model)
        torch.testing.assert_close(model(inputs_embeds=inputs).last_hidden_state, expected)
        attention = model.layers[0].self_attn
        assert attention.q_proj._merged is attention.v_proj._merged
        names = ("v_proj", "q_proj", "k_proj")
        other = torch.randn(1, 5, 32)
        for order in (names, names[::-1], names[:1], names):  # a call may be left out
            for given in (inputs, other):
                for name in order:
                    product = nn.functional.linear(given, *plain[name])
                    torch.testing.assert_close(getattr(attention, name)(given), product)


def test_double_precision_is_not_packed() -> None:
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.float64))
    pack_linears(model)
    assert isinstance(model[0], nn.Linear)


def test_steps_are_padded_to_few_sizes() -> None:
    sizes = range(1, 4097)
    assert len({padded(size) for size in sizes}) < 80
    assert all(size <= padded(size) <= max(size + 15, size * 9 / 8) for size in sizes)


@pytest.mark.parametrize("kind", ["llama", "mistral", "mpt"])
def test_padding_changes_no_answer_and_no_cache(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the padding, the answers and the caches are those of a step without any."""
    expected = run(engine(TinyModel(kind)), *[(one, GREEDY) for one in PROMPTS])
    monkeypatch.setattr("llava_serve.engine.executor.model_runner.padded", lambda size: size + 5)
    subject = engine(TinyModel(kind))
    for _ in range(2):
        assert run(subject, *[(one, GREEDY) for one in PROMPTS]) == expected


@pytest.mark.parametrize("kind", DECODERS)
def test_defaults_are_those_of_transformers(kind: str) -> None:
    config = AutoConfig.for_model(kind)
    length = config.max_seq_len if kind == "mpt" else config.max_position_embeddings
    ends, tied = token_ids(config.eos_token_id), config.tie_word_embeddings
    assert DECODERS[kind] == (config.vocab_size, length, ends, tied)
