"""Sampling inside the graph of a decode step. On a CPU the same function over the same buffers runs without a graph."""

from __future__ import annotations

import dataclasses
import itertools
import random
from functools import partial
from typing import Any

import pytest
import torch

from llava_serve.engine.engine import Engine
from llava_serve.engine.executor import llama_decoder, sampler
from llava_serve.engine.executor.cuda_graphs import DecodeGraphs
from llava_serve.engine.executor.graph_sampling import (
    SampleKernel,
    SamplingKind,
    next_tokens,
    sampling_kind,
    sampling_numbers,
)
from llava_serve.engine.executor.kernels import twins
from llava_serve.engine.sequence import EngineRequest, Sequence
from llava_serve.sampling_params import SamplingParams
from support.tiny_engine import CONTEXT, PROMPTS, TinyModel, engine, outcomes, prompt, run

SAMPLED, TOP_K = SamplingKind.SAMPLED, SamplingKind.TOP_K
KINDS: list[tuple[dict[str, Any], SamplingKind | None]] = [
    ({"temperature": 0}, SamplingKind.GREEDY),
    ({"temperature": 0, "top_k": 5}, SamplingKind.GREEDY),
    ({"temperature": 0.7}, SAMPLED),
    ({"top_p": 0.8}, SAMPLED),
    ({"temperature": 1.3, "min_p": 0.05}, SAMPLED),
    ({"top_k": 12}, TOP_K),
    ({"temperature": 0.9, "top_k": 256, "top_p": 0.6, "min_p": 0.01}, TOP_K),
    ({"top_k": 257}, None),
    ({"temperature": 0, "logprobs": 0}, None),
    ({"repetition_penalty": 1.2}, None),
    ({"temperature": 0, "frequency_penalty": 0.5}, None),
    ({"logit_bias": {3: 2.0}}, None),
    ({"temperature": 0, "num_beams": 2}, None),
]
"""Of requests, and how a graph samples them."""
INSIDE = [sampling for sampling, kind in KINDS if kind is not None]

torch.set_num_threads(1)


def sequence(at: int, **sampling: Any) -> Sequence:
    """With a few tokens of its answer."""
    chosen = SamplingParams(**{"seed": at, **sampling})
    request = EngineRequest("r", prompt([1, 5]), chosen, None, 0, at, 99, frozenset())
    return Sequence(request, 0, [1, 5, *range(7, 7 + at)])


class UncapturedGraphs(DecodeGraphs):
    """Computes a step at once where a graph would be replayed; counts the steps that were sampled."""

    def __init__(self, subject: Engine, sample_kernel: SampleKernel | None = twins.sample_top_p) -> None:
        runner = subject._runner
        positions = runner._memory.layers[0][0].shape[1] - 1
        most, size = subject._scheduler.max_num_seqs, runner._block_size
        kernels = (twins.decode_attention, sample_kernel)
        super().__init__(runner._decoder, runner._model.embed, runner._memory, most, CONTEXT, positions, size, *kernels)
        self.replayed: list[SamplingKind] = []
        self.sampled = 0
        for key in itertools.product(reversed(self._buckets), self._kinds):
            self._replays[key] = partial(self._replay, *key)
        with torch.inference_mode():
            self.compute(most, SamplingKind.GREEDY)
        runner._graphs = self

    def _replay(self, batch_size: int, kind: SamplingKind) -> None:
        self.replayed.append(kind)
        self.compute(batch_size, kind)

    def run(self, *given: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits, ids = super().run(*given)
        self.sampled += ids is not None
        return logits, ids


@pytest.mark.parametrize(("sampling", "kind"), KINDS, ids=str)
def test_what_a_graph_samples(sampling: dict[str, Any], kind: SamplingKind | None) -> None:
    asked = sequence(1, **sampling)
    assert sampling_kind([asked]) == kind
    with_greedy = sampling_kind([sequence(2, temperature=0), asked])
    assert with_greedy == kind
    assert sampling_kind([sequence(2, top_k=3), asked]) == (None if kind is None else TOP_K)
    asked.matcher = object()  # type: ignore[assignment]
    assert sampling_kind([asked]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocabulary", [40, 3000])
def test_it_samples_what_is_sampled_behind_a_graph(
    vocabulary: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "top_p_kernel", lambda *_: twins.sample_top_p)
    generator = torch.Generator().manual_seed(0)
    for round_ in range(5):
        sequences = [sequence(at + round_, **INSIDE[at % len(INSIDE)]) for at in range(21)]
        logits = 3 * torch.randn(21, vocabulary, generator=generator, dtype=dtype)
        if dtype == torch.float32:
            logits = logits.bfloat16().float()  # many are equal
        tokens, _ = sampler.sample(logits, sequences, torch.ones(0, dtype=torch.bool)).read()
        before = logits.clone()
        found = next_tokens(logits, sampling_numbers(sequences, 21), TOP_K, twins.sample_top_p)
        assert found.tolist() == [token.token_id for token in tokens]
        assert torch.equal(logits, before)
        greedy = next_tokens(logits, torch.zeros(5, 21), SamplingKind.GREEDY, None)
        assert greedy.tolist() == logits.argmax(-1).tolist()


def test_a_sequence_with_nan_gets_a_token_and_its_neighbour_the_right_one() -> None:
    sequences = [sequence(1, top_k=3), sequence(2, top_p=0.9)]
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    numbers = sampling_numbers(sequences, 2)
    expected = next_tokens(logits, numbers, TOP_K, twins.sample_top_p)
    logits[0, 7] = torch.nan
    found = next_tokens(logits, numbers, TOP_K, twins.sample_top_p)
    assert 0 <= found[0] < 50
    assert found[1] == expected[1]


@pytest.mark.parametrize(
    ("kind", "ahead", "cache"),
    [
        ("mistral", True, "auto"),
        *(
            pytest.param(*case, marks=pytest.mark.extended)
            for case in (("mistral", False, "fp8"), ("mpt", True, "fp8"), ("mpt", False, "auto"))
        ),
    ],
)
def test_an_engine_answers_as_one_without_graphs(
    kind: str, ahead: bool, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of all kinds together, more than there are places, that end at different times."""
    monkeypatch.setattr(llama_decoder, "DEVICES", {"cpu"})
    model = TinyModel(kind)
    options: dict[str, Any] = {"kv_cache_dtype": cache}
    samplings = [
        SamplingParams(**{"seed": at, "n": 1 + at % 2, "max_new_tokens": 3 + 2 * at, **chosen})
        for at, chosen in enumerate(INSIDE)
    ]
    requests = [(PROMPTS[at % len(PROMPTS)], sampling) for at, sampling in enumerate(samplings)]
    expected = run(engine(model, **options), *requests)
    subject = engine(model, ahead=ahead, max_num_seqs=6, blocks=200, **options)
    graphs = UncapturedGraphs(subject)
    assert run(subject, *requests) == expected
    assert graphs.sampled == len(graphs.replayed) > 10
    assert {*graphs.replayed} >= {SAMPLED, TOP_K}


@pytest.mark.parametrize("sampling", [chosen for chosen, kind in KINDS if kind is None], ids=str)
def test_the_others_are_sampled_behind_it(sampling: dict[str, Any]) -> None:
    model = TinyModel()
    requests = [(PROMPTS[0], SamplingParams(**{"seed": 3, "max_new_tokens": 5, **sampling}))]
    requests.append((PROMPTS[2], SamplingParams(seed=1, top_p=0.8, max_new_tokens=9, ignore_eos=True)))
    expected = run(engine(model), *requests)
    subject = engine(model)
    graphs = UncapturedGraphs(subject)
    assert run(subject, *requests) == expected
    assert 0 < graphs.sampled < len(graphs.replayed)


def test_without_its_kernel_greedy_sequences_only_are_sampled_inside() -> None:
    model = TinyModel()
    plain = [SamplingParams(temperature=0, max_new_tokens=5), SamplingParams(top_p=0.8, seed=1, max_new_tokens=9)]
    requests = list(zip(PROMPTS, plain, strict=False))
    subject = engine(model)
    graphs = UncapturedGraphs(subject, None)
    assert run(subject, *requests) == run(engine(model), *requests)
    assert {*graphs.replayed} == {SamplingKind.GREEDY}
    assert 0 <= graphs.sampled < len(graphs.replayed)
    assert run(subject, requests[0]) == run(engine(model), requests[0])
    assert graphs.sampled > 0


@pytest.mark.extended
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mpt"])
@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(at, marks=pytest.mark.slow) for at in range(4, 60))])
def test_random_requests(kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all kinds, some with NaN, in little memory, one step ahead."""
    monkeypatch.setattr(llama_decoder, "DEVICES", {"cpu"})
    rng = random.Random(f"{kind}{seed}")
    model = TinyModel(kind)
    if seed % 3 == 0:
        model.language_model.get_input_embeddings().weight.data[20] = torch.nan
    requests = []
    for _ in range(rng.randrange(4, 10)):
        chosen = rng.choice(INSIDE if rng.random() < 0.8 else [each for each, _ in KINDS])
        sampling = SamplingParams(**{"seed": rng.randrange(99), "max_new_tokens": rng.choice((2, 9, 20)), **chosen})
        asked = prompt(1, [rng.randrange(3, 90) for _ in range(rng.choice((1, 5, 30)))])
        requests.append((asked, dataclasses.replace(sampling, ignore_eos=rng.random() < 0.5)))
    expected = [outcomes(engine(model, prefix_caching=False), request)[0] for request in requests]
    subject = engine(model, ahead=rng.random() < 0.7, max_num_seqs=rng.choice((3, 5, 9)), blocks=rng.choice((20, 64)))
    UncapturedGraphs(subject)
    found = outcomes(subject, *requests)
    for one, other in zip(found, expected, strict=True):
        assert one == other or type(one) is type(other) is not list
