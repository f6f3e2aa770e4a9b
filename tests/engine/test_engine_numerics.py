"""Numbers that are not finite end their own request, and nothing that they touched is kept."""

from __future__ import annotations

import pytest
import torch

from llava_serve.errors import NumericalError
from llava_serve.model.numerics import are_finite, numerical_error
from llava_serve.types import PreparedPrompt, SamplingParams
from support.tiny_engine import TinyModel, engine, outcomes, picture, prompt, run

torch.set_num_threads(1)

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
    model.language_model.get_input_embeddings().weight.data[POISON] = torch.nan
    return model


class Tower(TinyModel):
    """A model whose tower gives NaN for red pictures, while `ill`."""

    ill = True

    def tower_features(self, tiles: torch.Tensor) -> torch.Tensor:
        features = super().tower_features(tiles)
        if self.ill:
            features[tiles[:, 0, 0, 0] == RED[0], 2] = torch.nan
        return features


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_number_that_is_not_finite_is_found(dtype: torch.dtype) -> None:
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
def test_the_error_names_what_to_try(dtype: torch.dtype, names: tuple[str, ...]) -> None:
    assert all(name in str(numerical_error(dtype)) for name in names)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("tokens", [16, 256])  # a prompt in pieces, of which the first draw nothing, and whole
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_who_comes_after_nan_is_answered_right(kind: str, tokens: int, sampling: SamplingParams) -> None:
    model = poisoned(kind)
    later = [(prompt([*START, 60]), GREEDY), (prompt([*START[:12], 61]), GREEDY), (prompt([*START, 60]), sampling)]
    expected = run(engine(model, prefix_caching=False), *later)
    for ill in (prompt([*START, POISON]), prompt([*START, POISON, *range(40, 70)])):
        subject = engine(model, max_batch_tokens=tokens)
        (error,) = outcomes(subject, (ill, sampling))
        assert type(error) is NumericalError
        assert "float64" in str(error)
        for _ in range(2):
            assert run(subject, *later) == expected


def test_nan_in_a_piece_of_a_prompt_is_told_at_once_and_earlier_pieces_stay() -> None:
    subject = engine(poisoned(), max_batch_tokens=16)
    ill = prompt([*START, POISON, *range(40, 90), *range(40, 90)])
    subject.add(subject.limits.accept("ill", ill, GREEDY))
    steps, outputs = 0, []
    while subject.has_work:
        outputs += subject.step()
        steps += 1
    assert [type(output.error) for output in outputs] == [NumericalError]
    assert steps == 3  # of nine
    subject.add(subject.limits.accept("good", prompt([*START, 60]), GREEDY))
    (output,) = subject.step()
    assert output.num_cached_tokens == 32


@pytest.mark.parametrize("tokens", [16, 256])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_who_waits_for_the_same_beginning_is_answered_right(tokens: int, sampling: SamplingParams) -> None:
    model = poisoned()
    waiting = [(prompt([*START, 60]), GREEDY), (prompt([*START, 61, 62]), sampling)]
    expected = run(engine(model, prefix_caching=False), *waiting)
    error, *answers = outcomes(engine(model, max_batch_tokens=tokens), (prompt([*START, POISON]), sampling), *waiting)
    assert type(error) is NumericalError
    assert answers == expected


def test_an_answer_that_becomes_nan_fails_where_it_does() -> None:
    model = TinyModel()
    asked = (prompt([*START, 60]), SamplingParams(temperature=0, max_new_tokens=40, ignore_eos=True))
    (ids,) = run(engine(model), asked)[0]
    at = next(at for at in range(12, 40) if ids[at] not in ids[:at])
    model.language_model.get_input_embeddings().weight.data[ids[at]] = torch.nan
    subject = engine(model)
    subject.add(subject.limits.accept("r", *asked))
    outputs = [output for _ in range(40) for output in subject.step()]
    assert [token for output in outputs for token in output.token_ids] == ids[: at + 1]
    assert type(outputs[-1].error) is NumericalError
    later = (prompt([*START, 60, *ids[:at], 50]), GREEDY)
    assert run(subject, later) == run(engine(model, prefix_caching=False), later)


def with_red(text: int) -> PreparedPrompt:
    return prompt([1, 5, 6], picture(RED, 2), [text, 7])


@pytest.mark.parametrize("tiles", [1, 8])
def test_features_that_are_not_finite_are_not_kept(tiles: int) -> None:
    model = Tower()
    subject = engine(model, max_batch_tiles=tiles)
    good = (prompt([1, 5, 6], picture(BLUE), [9]), GREEDY)
    both = (prompt([1, 8], picture(BLUE), [4], picture(RED, 2), [9]), GREEDY)
    *errors, answer = outcomes(subject, (with_red(8), GREEDY), (with_red(9), SAMPLINGS["beams"]), both, good)
    assert [type(error) for error in errors] == [NumericalError] * 3
    assert [answer] == run(engine(Tower()), good)
    assert RED[0] not in {int(digest.split(")")[1][:2], 16) for digest in subject._runner._features}
    model.ill = False
    healthy = Tower()
    healthy.ill = False
    later = [(with_red(8), GREEDY), both]
    assert run(subject, *later) == run(engine(healthy), *later)


def test_features_of_a_good_picture_stay_for_those_who_need_them() -> None:
    """A request fails for its text; another that has the same picture is in the middle of reading it."""
    model = poisoned()
    red = picture(RED, 5)
    reader = (prompt([1, 5], red, list(range(40, 60))), GREEDY)
    expected = run(engine(model, prefix_caching=False), reader)
    subject = engine(model, max_batch_tiles=1, max_batch_tokens=20)
    error, answer = outcomes(subject, (prompt([1, 6], red, [POISON]), GREEDY), reader)
    assert type(error) is NumericalError
    assert [answer] == expected


def test_half_precision_that_overflows_is_told_and_full_precision_answers() -> None:
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
def test_neighbours_of_nan_are_not_touched(dtype: torch.dtype, blocks: int) -> None:
    """Also where they must give way, and come back to memory that held NaN."""
    model = poisoned(dtype=dtype)
    rows = [(prompt([1, *range(at, at + 9)]), SAMPLINGS["greedy"]) for at in range(3, 60, 9)]
    ill = [(prompt([1, at, POISON, *range(at, at + 20)]), GREEDY) for at in (70, 71)]
    expected = run(engine(model), *rows)
    answers = outcomes(engine(model, blocks=blocks), ill[0], *rows, ill[1])
    assert [type(answers[0]), type(answers[-1])] == [NumericalError] * 2
    assert answers[1:-1] == expected
