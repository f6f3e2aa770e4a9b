"""NaN and infinity fail their own request, and nothing that contains them stays in a cache."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llava_serve.errors import NumericalError
from llava_serve.model.numerics import are_finite, numerical_error
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import PreparedPrompt
from support.tiny_engine import CONFIGS, TinyModel, dtype_of, engine, image, outcomes, prompt, run

POISON = 95
START = [1, *range(3, 35)]
GREEDY = SamplingParams(temperature=0, max_new_tokens=6)
SAMPLINGS = {
    "greedy": GREEDY,
    "sampled": SamplingParams(temperature=0.9, top_p=0.8, top_k=20, seed=1, n=2, max_new_tokens=6),
    "penalized": SamplingParams(temperature=0, repetition_penalty=1.3, frequency_penalty=0.4, max_new_tokens=6),
    "with logprobs": SamplingParams(temperature=0, logprobs=3, max_new_tokens=6),
    "beams": SamplingParams(temperature=0, num_beams=3, max_new_tokens=6),
}
RED, BLUE = (200, 20, 30), (10, 30, 220)


def poisoned(kind: str = "llama", dtype: torch.dtype = torch.float64) -> TinyModel:
    """A model in which one token's embedding is NaN."""
    model = TinyModel(kind, dtype)
    head = model.language_model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # where it is tied to the embeddings
    model.language_model.get_input_embeddings().weight.data[POISON] = torch.nan
    return model


class Tower(TinyModel):
    """A model whose tower gives NaN for red images, while `broken`."""

    broken = True

    def tower_features(self, tiles: torch.Tensor) -> torch.Tensor:
        features = super().tower_features(tiles)
        if self.broken:
            features[tiles[:, 0, 0, 0] == RED[0], 2] = torch.nan
        return features


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_single_nan_or_infinity_is_found(dtype: torch.dtype) -> None:
    values = torch.full((2, 3, 5), torch.finfo(dtype).max, dtype=dtype)
    values[0] = torch.finfo(dtype).min
    assert are_finite(values)
    for bad in (torch.nan, torch.inf, -torch.inf):
        values[1, 2, 4] = bad
        assert not are_finite(values)
        assert are_finite(values, -1).tolist() == [[True] * 3, [True, True, False]]


@pytest.mark.parametrize(
    ("dtype", "names"),
    [
        (torch.float16, ("float16", "bfloat16 or float32")),
        (torch.bfloat16, ("bfloat16", "dtype float32", "weights")),
        (torch.float32, ("float32", "weights")),
    ],
)
def test_the_error_names_the_dtype_to_try(dtype: torch.dtype, names: tuple[str, ...]) -> None:
    assert all(name in str(numerical_error(dtype)) for name in names)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("tokens", [16, 256])  # a prompt in chunks, of which the first are not sampled, and whole
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_requests_after_nan_are_answered_correctly(kind: str, tokens: int, sampling: SamplingParams) -> None:
    model = poisoned(kind)
    later = [(prompt([*START, 60]), GREEDY), (prompt([*START[:12], 61]), GREEDY), (prompt([*START, 60]), sampling)]
    expected = run(engine(model, prefix_caching=False), *later)
    for bad in (prompt([*START, POISON]), prompt([*START, POISON, *range(40, 70)])):
        subject = engine(model, max_batch_tokens=tokens)
        (error,) = outcomes(subject, (bad, sampling))
        assert type(error) is NumericalError
        assert "float64" in str(error)
        for _ in range(2):
            assert run(subject, *later) == expected


EVERYDAY = {"gemma3_text", "mixtral", "mpt"}
KINDS = [pytest.param(kind, marks=() if kind in EVERYDAY else pytest.mark.extended) for kind in CONFIGS]


@pytest.mark.parametrize("kind", KINDS)
def test_nan_fails_its_own_request_alone_with_every_decoder(kind: str) -> None:
    model = poisoned(kind, dtype_of(kind))
    greedy = dataclasses.replace(GREEDY, logit_bias={POISON: -100})  # some answer with it
    good = [(prompt([*START, 60]), greedy), (prompt([*START[:12], 61]), greedy)]
    expected = run(engine(model, prefix_caching=False), *good)
    for sampling in ("greedy", "sampled", "beams"):
        subject = engine(model, max_batch_tokens=24)
        bad = (prompt([*START, POISON, 40]), SAMPLINGS[sampling])
        first, error, second = outcomes(subject, good[0], bad, good[1])
        assert type(error) is NumericalError
        assert [first, second] == expected
        assert run(subject, *good) == expected


def test_nan_in_a_chunk_fails_at_once_and_earlier_chunks_stay_cached() -> None:
    subject = engine(poisoned(), max_batch_tokens=16)
    bad = prompt([*START, POISON, *range(40, 90), *range(40, 90)])
    subject.add(subject.validator.accept("bad", bad, GREEDY))
    steps, outputs = 0, []
    while subject.has_work:
        outputs += subject.step()
        steps += 1
    assert [type(output.error) for output in outputs] == [NumericalError]
    assert steps == 3  # of nine
    subject.add(subject.validator.accept("good", prompt([*START, 60]), GREEDY))
    (output,) = subject.step()
    assert output.num_cached_tokens == 32


@pytest.mark.parametrize("tokens", [16, 256])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_requests_that_wait_for_the_same_prefix_are_answered_correctly(tokens: int, sampling: SamplingParams) -> None:
    model = poisoned()
    waiting = [(prompt([*START, 60]), GREEDY), (prompt([*START, 61, 62]), sampling)]
    expected = run(engine(model, prefix_caching=False), *waiting)
    error, *answers = outcomes(engine(model, max_batch_tokens=tokens), (prompt([*START, POISON]), sampling), *waiting)
    assert type(error) is NumericalError
    assert answers == expected


def test_an_answer_fails_at_the_token_that_is_nan() -> None:
    model = TinyModel()
    asked = (prompt([*START, 60]), SamplingParams(temperature=0, max_new_tokens=40, ignore_eos=True))
    (ids,) = run(engine(model), asked)[0]
    at = next(at for at in range(12, 40) if ids[at] not in ids[:at])
    model.language_model.get_input_embeddings().weight.data[ids[at]] = torch.nan
    subject = engine(model)
    subject.add(subject.validator.accept("r", *asked))
    outputs = [output for _ in range(40) for output in subject.step()]
    assert [token for output in outputs for token in output.token_ids] == ids[: at + 1]
    assert type(outputs[-1].error) is NumericalError
    later = (prompt([*START, 60, *ids[:at], 50]), GREEDY)
    assert run(subject, later) == run(engine(model, prefix_caching=False), later)


def with_red(text: int) -> PreparedPrompt:
    return prompt([1, 5, 6], image(RED, 2), [text, 7])


@pytest.mark.parametrize("tiles", [1, 8])
def test_features_that_are_not_finite_are_not_kept(tiles: int) -> None:
    model = Tower()
    subject = engine(model, max_batch_tiles=tiles)
    good = (prompt([1, 5, 6], image(BLUE), [9]), GREEDY)
    both = (prompt([1, 8], image(BLUE), [4], image(RED, 2), [9]), GREEDY)
    *errors, answer = outcomes(subject, (with_red(8), GREEDY), (with_red(9), SAMPLINGS["beams"]), both, good)
    assert [type(error) for error in errors] == [NumericalError] * 3
    assert [answer] == run(engine(Tower()), good)
    assert RED[0] not in {int(digest.split(")")[1][:2], 16) for digest in subject._runner._encoder.features}
    model.broken = False
    healthy = Tower()
    healthy.broken = False
    later = [(with_red(8), GREEDY), both]
    assert run(subject, *later) == run(engine(healthy), *later)


def test_features_stay_for_other_requests_that_pin_the_image() -> None:
    """A request fails for its text while another with the same image is in prefill."""
    model = poisoned()
    red = image(RED, 5)
    reader = (prompt([1, 5], red, list(range(40, 60))), GREEDY)
    expected = run(engine(model, prefix_caching=False), reader)
    subject = engine(model, max_batch_tiles=1, max_batch_tokens=20)
    error, answer = outcomes(subject, (prompt([1, 6], red, [POISON]), GREEDY), reader)
    assert type(error) is NumericalError
    assert [answer] == expected


def test_half_precision_that_overflows_fails_and_full_precision_answers() -> None:
    asked = (prompt([1, 5, 6, 7]), GREEDY)
    errors = {}
    for dtype in (torch.float16, torch.float32):
        model = TinyModel(dtype=dtype)
        for layer in model.language_model.model.layers:
            layer.mlp.up_proj.weight.data *= 1e4
            layer.mlp.down_proj.weight.data /= 1e4
        (errors[dtype],) = outcomes(engine(model), asked)
    assert type(errors[torch.float16]) is NumericalError
    assert "bfloat16 or float32" in str(errors[torch.float16])
    assert errors[torch.float32] == run(engine(TinyModel(dtype=torch.float32)), asked)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [8, 64])
def test_other_requests_of_the_batch_are_not_affected_by_nan(dtype: torch.dtype, blocks: int) -> None:
    """Also where they are preempted, and recomputed in blocks that held NaN."""
    model = poisoned(dtype=dtype)
    others = [(prompt([1, *range(at, at + 9)]), SAMPLINGS["greedy"]) for at in range(3, 60, 9)]
    bad = [(prompt([1, at, POISON, *range(at, at + 20)]), GREEDY) for at in (70, 71)]
    expected = run(engine(model), *others)
    answers = outcomes(engine(model, blocks=blocks), bad[0], *others, bad[1])
    assert [type(answers[0]), type(answers[-1])] == [NumericalError] * 2
    assert answers[1:-1] == expected
