"""Sampling: which tokens, what they depend on, and what they must not depend on."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from llava_serve.engine.executor import sampler
from llava_serve.engine.executor.kernels import twins
from llava_serve.engine.executor.sampler import adjust, uniform
from llava_serve.engine.sequence import EngineRequest, RawLogprob, Sequence
from llava_serve.sampling_params import SamplingParams
from support.tiny_engine import prompt

VOCABULARY = 40


def sequence(seed: int = 0, index: int = 0, answer: tuple[int, ...] = (), **sampling: Any) -> Sequence:
    request = EngineRequest("r", prompt([1, 2, 3]), SamplingParams(**sampling), None, 0, seed, 99, frozenset())
    return Sequence(request, index, [1, 2, 3, *answer])


def logits(count: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def sample(table: torch.Tensor, sequences: list[Sequence]) -> list[RawLogprob]:
    """The tokens alone."""
    return sampler.sample(table, sequences, torch.ones(0, dtype=torch.bool)).read()[0]


def frequencies(table: torch.Tensor, count: int, **sampling: Any) -> torch.Tensor:
    """Relative frequencies of `count` samples with different seeds."""
    tokens = [
        one.token_id for one in sample(table.repeat(count, 1), [sequence(seed, **sampling) for seed in range(count)])
    ]
    return torch.bincount(torch.tensor(tokens), minlength=VOCABULARY) / count


def test_uniform_is_uniform_and_depends_on_each_of_its_words() -> None:
    words = [(seed, choice, at) for seed in range(20) for choice in range(5) for at in range(50)]
    numbers = torch.tensor([uniform(*each) for each in words], dtype=torch.float64)
    assert len(set(numbers.tolist())) == len(numbers)
    assert 0 <= numbers.min() < numbers.max() < 1
    assert torch.histc(numbers, 10, 0, 1).min() > 400


def test_greedy_takes_the_likeliest() -> None:
    table = logits(5)
    best = table.argmax(dim=-1).tolist()
    assert [one.token_id for one in sample(table, [sequence(temperature=0) for _ in range(5)])] == best


def test_samples_follow_the_distribution() -> None:
    expected = (logits()[0] / 1.3).softmax(dim=-1)
    assert (frequencies(logits(), 4000, temperature=1.3) - expected).abs().max() < 0.03


def test_top_k_and_top_p_keep_the_fewest_that_reach() -> None:
    order = logits()[0].argsort(descending=True)
    shares = logits()[0].softmax(dim=-1)[order]
    assert set(frequencies(logits(), 600, top_k=3).nonzero().flatten().tolist()) == set(order[:3].tolist())
    kept = int((shares.cumsum(dim=-1) < 0.6).sum()) + 1
    assert set(frequencies(logits(), 800, top_p=0.6).nonzero().flatten().tolist()) == set(order[:kept].tolist())


def test_top_p_counts_within_top_k() -> None:
    order = logits()[0].argsort(descending=True)
    within = logits()[0][order[:4]].softmax(dim=-1)
    kept = int((within.cumsum(dim=-1) < 0.7).sum()) + 1
    both = frequencies(logits(), 600, top_k=4, top_p=0.7)
    assert set(both.nonzero().flatten().tolist()) == set(order[:kept].tolist())


def test_top_p_over_a_flat_vocabulary_looks_past_the_best_few() -> None:
    table = torch.zeros(300, 2000)
    table[:, :5] = 0.01
    tokens = [one.token_id for one in sample(table, [sequence(seed, top_p=0.9) for seed in range(300)])]
    assert max(tokens) > 256


@pytest.mark.parametrize("sampling", [{"top_p": 0.9}, {"top_p": 0.9, "logprobs": 2}])
def test_where_too_few_are_sorted_the_answer_is_the_same_whenever_that_is_noticed(
    sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU notices before it samples, a GPU with the tokens."""
    table = torch.zeros(40, 2000)
    table[:20] = torch.linspace(0, 90, 2000)  # here the best few suffice
    sequences = [sequence(seed, **sampling) for seed in range(40)]
    expected = sample(table, sequences)
    assert max(one.token_id for one in expected[20:]) > 256
    sorts: list[bool] = []
    truncate = sampler._truncate

    def noted(*args: Any, sort_all: bool) -> Any:
        sorts.append(sort_all)
        return truncate(*args, sort_all=sort_all)

    monkeypatch.setattr(sampler, "_truncate", noted)
    monkeypatch.setattr(sampler, "_answers_at_once", lambda _: False)
    assert sample(table, sequences) == expected
    assert sorts == [False, True]


def test_a_kernel_of_its_own_samples_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever requests ask for: it gets what others have truncated, and no token that they exclude."""
    rng = random.Random(0)
    sequences = [
        sequence(
            seed,
            temperature=rng.choice((0.0, 0.4, 1.0, 2.0)),
            top_p=rng.choice((1.0, 0.9, 0.5, 1e-30)),
            top_k=rng.choice((0, 0, 1, 7)),
            min_p=rng.choice((0.0, 0.0, 0.2)),
            repetition_penalty=rng.choice((1.0, 1.2)),
        )
        for seed in range(200)
    ]
    table = logits(200).float()
    expected = [one.token_id for one in sample(table, sequences)]
    calls = []

    def kernel(*arguments: torch.Tensor) -> torch.Tensor:
        calls.append(arguments)
        return twins.sample_top_p(*arguments)

    monkeypatch.setattr(sampler, "top_p_kernel", lambda dtype, device: kernel)
    assert [one.token_id for one in sample(table, sequences)] == expected
    assert len(calls) == 1


def test_a_sequence_does_not_depend_on_the_batch() -> None:
    sequences = [
        sequence(1, temperature=0.7),
        sequence(2, top_p=0.5),
        sequence(3, temperature=0),
        sequence(4, top_k=2, logprobs=3),
        sequence(5, 1, (7, 7, 8), frequency_penalty=1.5, presence_penalty=0.5),
        sequence(6, 0, (9,), repetition_penalty=1.4),
        sequence(7, min_p=0.2),
        sequence(8, logit_bias={3: 5.0, 4: -100}),
        sequence(9, min_tokens=3, stop_token_ids=(5, 6)),
    ]
    together = sample(logits(len(sequences)), sequences)
    for at, one in enumerate(sequences):
        assert sample(logits(len(sequences))[at : at + 1], [one]) == [together[at]]


ASKING: list[dict[str, Any]] = [
    {"min_p": 0.3},
    {"logit_bias": {0: 100.0, 1: -100}, "temperature": 0},
    {"min_tokens": 9, "stop_token_ids": tuple(range(20))},
    {"min_tokens": 9, "logit_bias": {7: 3}, "min_p": 0.05, "top_p": 0.9, "frequency_penalty": 1, "logprobs": 2},
]


@pytest.mark.parametrize("seed", range(20))
def test_rows_that_ask_for_nothing_are_as_without_their_neighbours(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randrange(2, 9)
    table = logits(count, seed).float()
    free: list[dict[str, Any]] = [{"temperature": 0}, {}, {"top_k": 5}, {"top_p": 0.7}, {"repetition_penalty": 1.2}]
    rows = [rng.choice(free if at % 2 else ASKING) for at in range(count)]
    sequences = [sequence(rng.randrange(99), 0, (3,), **row) for row in rows]
    together = sample(table, sequences)
    for at in range(1, count, 2):
        assert sample(table[at : at + 1], [sequences[at]]) == [together[at]]


def test_min_p_keeps_the_tokens_with_a_share_of_the_likeliest_ones() -> None:
    shares = (logits()[0] / 1.2).softmax(dim=-1)
    kept = (shares >= 0.25 * shares.max()).nonzero().flatten().tolist()
    assert 1 < len(kept) < 10
    assert set(frequencies(logits(), 800, temperature=1.2, min_p=0.25).nonzero().flatten().tolist()) == set(kept)
    assert frequencies(logits(), 50, min_p=1)[logits()[0].argmax()] == 1


def test_a_bias_is_added_to_the_logits() -> None:
    table = logits()
    expected = (table[0] + 2 * torch.nn.functional.one_hot(torch.tensor(4), VOCABULARY)).softmax(dim=-1)
    assert (frequencies(table, 4000, logit_bias={4: 2.0}) - expected).abs().max() < 0.03
    assert frequencies(table, 100, logit_bias={4: 100})[4] == 1
    best = int(table.argmax())
    assert frequencies(table, 100, logit_bias={best: -100})[best] == 0


def test_no_token_ends_an_answer_before_its_least_length() -> None:
    table = logits()
    best = int(table.argmax())
    base = sequence(temperature=0, min_tokens=2)
    request = dataclasses.replace(base.request, stop_token_ids=frozenset({best}))
    for answer, ends in (((), False), ((5,), False), ((5, 5), True)):
        one = dataclasses.replace(base, request=request, token_ids=[1, 2, 3, *answer])
        assert (sample(table, [one])[0].token_id == best) is ends
    assert sample(table, [sequence(temperature=0, min_tokens=2, logprobs=1)])[0].top[0][0] == best


def test_noise_depends_on_seed_choice_and_position() -> None:
    flat = torch.zeros(1, VOCABULARY)
    different = [sequence(1), sequence(2), sequence(1, 1), sequence(1, 0, (5,))]
    tokens = {sample(flat.clone(), [one])[0].token_id for one in different}
    assert len(tokens) == 4


def test_logprobs_are_the_models_own() -> None:
    table = logits()
    expected = table[0].log_softmax(dim=-1)
    entry = sample(table, [sequence(temperature=0.5, seed=3, logprobs=4, repetition_penalty=2.0)])[0]
    assert entry.logprob == pytest.approx(float(expected[entry.token_id]))
    best = expected.topk(4)
    assert [token for token, _ in entry.top] == best.indices.tolist()
    assert [logprob for _, logprob in entry.top] == pytest.approx(best.values.tolist())


EXTREMES: list[dict[str, Any]] = [
    {"temperature": 1e-308},
    {"temperature": 1e-40},
    {"temperature": 1e-5},
    {"temperature": 1e-3},
    {"top_p": 5e-324},
    {"top_p": 1e-46},
    {"top_p": 1e-46, "temperature": 100},
    {"temperature": 1e-5, "top_p": 1e-46, "top_k": 10**30},
    {"top_k": 1},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 1e4, 1e30])
@pytest.mark.parametrize("sampling", EXTREMES, ids=str)
def test_the_smallest_values_take_the_likeliest(sampling: dict[str, Any], size: float, dtype: torch.dtype) -> None:
    table = logits(5).to(dtype) * size
    best = table.argmax(dim=-1).tolist()
    assert [one.token_id for one in sample(table, [sequence(seed, **sampling) for seed in range(5)])] == best


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_k_above_the_vocabulary_is_the_vocabulary(dtype: torch.dtype) -> None:
    table = logits().to(dtype)
    for top_k in (VOCABULARY, VOCABULARY + 1, 2**63, 10**19, 10**400):
        assert torch.equal(frequencies(table, 300, top_k=top_k), frequencies(table, 300))
        assert torch.equal(frequencies(table, 300, top_k=top_k, top_p=0.7), frequencies(table, 300, top_p=0.7))


@pytest.mark.parametrize("penalty", [0.01, 10])
def test_penalties_leave_finite_logits(penalty: float) -> None:
    table = torch.full((1, VOCABULARY), torch.finfo(torch.float16).max)
    table[0, ::2] *= -1
    answer = tuple(range(VOCABULARY))
    for temperature in (0, 1e-5, 1):
        (one,) = sample(table, [sequence(answer=answer, temperature=temperature, repetition_penalty=penalty)])
        assert one.token_id % 2 == 1


def test_seeds_may_be_negative() -> None:
    numbers = [uniform(seed, 0, 0) for seed in (-(2**63), -1, 0, 1, 2**63 - 1)]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 for number in numbers)


def test_sampling_does_not_change_the_logits() -> None:
    table = logits(2)
    before = table.clone()
    sample(
        table, [sequence(answer=(3, 3), repetition_penalty=2, frequency_penalty=1), sequence(temperature=0.5, top_k=3)]
    )
    assert torch.equal(table, before)


def test_penalties() -> None:
    table = torch.tensor([[0.0, 2.0, -2.0, 1.0, 1.5]])
    base = sequence(answer=(3, 3, 4), temperature=0, logprobs=0)

    def after(**changes: Any) -> list[float]:
        request = dataclasses.replace(base.request, sampling=SamplingParams(temperature=0, **changes))
        changed = table.clone()
        adjust(changed, [dataclasses.replace(base, request=request)])
        return changed[0].tolist()

    assert after(frequency_penalty=0.5) == [0.0, 2.0, -2.0, 0.0, 1.0]  # the prompt does not count
    assert after(presence_penalty=0.5) == [0.0, 2.0, -2.0, 0.5, 1.0]
    assert after(repetition_penalty=2.0) == [0.0, 1.0, -4.0, 0.5, 0.75]  # the prompt counts
