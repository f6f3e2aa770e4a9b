"""A failure in one request ends that request only: the others' answers are the same, and no block is lost."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llava_serve.errors import LlavaServeError
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import IMAGE_TOKEN_ID, PreparedPrompt
from support.tiny_engine import FEATURES, HIDDEN, Answer, TinyModel, engine, image, outcomes, prompt, run

GREEDY = SamplingParams(temperature=0, max_new_tokens=9)
IMAGE_PROMPT = prompt([1, 5], image((200, 90, 30)), [7, 8, 9])
OTHERS = [
    (prompt([1, 5, 6, 7]), GREEDY),
    (prompt([1, 5, 6, 8]), SamplingParams(temperature=0.8, top_p=0.9, seed=3, n=2, max_new_tokens=9)),
    (prompt([1, 9, 6]), SamplingParams(temperature=0, num_beams=3, max_new_tokens=9)),
    (IMAGE_PROMPT, SamplingParams(temperature=0, max_new_tokens=9, repetition_penalty=1.3, logprobs=2)),
]


def unchecked(**fields: Any) -> SamplingParams:
    """Values that no check has passed, as another version's replica may send them."""
    good = {name: value for name, value in fields.items() if name in ("temperature", "num_beams", "n")}
    sampling = SamplingParams(**good, seed=1, max_new_tokens=9)
    for name, value in fields.items():
        object.__setattr__(sampling, name, value)
    return sampling


def with_half_an_image() -> PreparedPrompt:
    """Twice as many positions as its image has features."""
    ids = prompt([1, 5], [IMAGE_TOKEN_ID] * (2 * FEATURES), [7, 8, 9]).token_ids
    return dataclasses.replace(IMAGE_PROMPT, token_ids=ids, image_spans=((2, 2 + 2 * FEATURES),))


class Unstable(TinyModel):
    """A model that calls `on_project` with an image's features before they are projected."""

    def __init__(self) -> None:
        super().__init__()
        self.on_project: Callable[[torch.Tensor], None] = lambda features: None

    def image_embeddings(self, features: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
        self.on_project(features)
        return super().image_embeddings(features, image_size)


FAILING = {
    "sampling": (prompt([1, 5, 6, 9]), unchecked(temperature=1, top_k="many")),
    "penalties": (prompt([1, 5, 6, 9]), unchecked(temperature=0, presence_penalty="much")),
    "logprobs": (prompt([1, 5, 6, 9]), unchecked(temperature=0, logprobs="all")),
    "one of several choices": (prompt([1, 5, 6, 9]), unchecked(temperature=1, n=3, top_p="most")),
    "a beam": (prompt([1, 5, 6, 9]), unchecked(temperature=0, num_beams=2, repetition_penalty="much")),
    "merging an image": (with_half_an_image(), GREEDY),
}


@pytest.mark.parametrize("place", FAILING)
@pytest.mark.parametrize("first", [True, False])
def test_a_failure_fails_its_request_only(place: str, first: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = TinyModel()
    expected: list[Any] = run(engine(model, max_batch_tokens=16), *OTHERS)
    subject = engine(model, max_batch_tokens=16)
    requests = [FAILING[place], *OTHERS] if first else [*OTHERS, FAILING[place]]
    answers = outcomes(subject, *requests)
    error = answers.pop(0 if first else -1)
    assert answers == expected
    assert type(error) is LlavaServeError
    assert str(error) == "The server failed on this request."
    (record,) = [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert record.exc_info
    assert outcomes(subject, *OTHERS) == expected


class FailsOnce(int):
    """A number that cannot be compared the first time."""

    failed = False

    def __gt__(self, other: int) -> bool:
        if not FailsOnce.failed:
            FailsOnce.failed = True
            raise ValueError("not now")
        return super().__gt__(other)


def test_a_failure_of_the_batch_only_fails_no_request(caplog: pytest.LogCaptureFixture) -> None:
    odd = (prompt([1, 5, 6, 9]), unchecked(temperature=1, top_k=30))
    expected = run(engine(TinyModel()), odd, *OTHERS)
    object.__setattr__(odd[1], "top_k", FailsOnce(30))
    assert run(engine(TinyModel()), odd, *OTHERS) == expected
    (record,) = [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert "one by one" in record.message


class FailsAtThree(int):
    """A number that cannot be compared with 3."""

    def __gt__(self, other: int) -> bool:
        if other == 3:
            raise ValueError("not three")
        return super().__gt__(other)


def test_a_failure_in_a_step_that_is_launched_ahead_fails_its_request_only() -> None:
    odd, other = (prompt([1, 5, 6, 9]), unchecked(temperature=0)), (prompt([1, 5, 6, 7]), GREEDY)
    whole, expected = run(engine(TinyModel()), odd, other)
    object.__setattr__(odd[1], "min_tokens", FailsAtThree())
    subject = engine(TinyModel(), ahead=True)
    for name, (asked, sampling) in {"odd": odd, "other": other}.items():
        subject.add(subject.validator.accept(name, asked, sampling))
    outputs, ahead = [], []
    while subject.has_work:
        outputs += subject.step()
        ahead.append(subject._pipeline._next is not None)
    assert ahead[:5] == [True, True, True, False, True]  # the fourth token was sampled one by one, on the CPU
    assert [token for each in outputs if each.request_id == "odd" for token in each.token_ids] == whole[0][:3]
    assert [token for each in outputs if each.request_id == "other" for token in each.token_ids] == expected[0]
    assert [(each.request_id, type(each.error)) for each in outputs if each.error] == [("odd", LlavaServeError)]


def test_a_failure_in_a_step_that_is_launched_ahead_is_nothing_to_a_request_that_takes_the_id() -> None:
    odd, other = (prompt([1, 5, 6, 9]), unchecked(temperature=0)), (prompt([1, 5, 6, 7]), GREEDY)
    (expected,) = run(engine(TinyModel()), other)
    object.__setattr__(odd[1], "min_tokens", FailsAtThree())
    subject = engine(TinyModel(), ahead=True)
    subject.add(subject.validator.accept("r", *odd))
    subject.add(subject.validator.accept("other", *other))
    for _ in range(3):
        subject.step()
    subject.abort("r")
    subject.add(subject.validator.accept("r", *other))
    outputs = []
    while subject.has_work:
        outputs += subject.step()
    assert not [each.error for each in outputs if each.error]
    assert [token for each in outputs if each.request_id == "r" for token in each.token_ids] == expected[0]


def test_no_choice_continues_when_another_has_failed() -> None:
    """The first choice gets NaN in its answer; no output follows the error."""
    model = TinyModel()
    sampling = SamplingParams(temperature=1, seed=5, n=3, max_new_tokens=30, ignore_eos=True)
    whole = run(engine(model), (prompt([1, 5, 6]), sampling))[0]
    (poison, *_) = set(whole[0][:4]) - set(whole[1]) - set(whole[2])
    model.language_model.get_input_embeddings().weight.data[poison] = torch.nan
    subject = engine(model)
    subject.add(subject.validator.accept("r", prompt([1, 5, 6]), sampling))
    got: Answer = [[], [], []]
    error = None
    while subject.has_work:
        for output in subject.step():
            assert error is None
            error = output.error
            got[output.index] += output.token_ids
    assert error is not None
    assert [answer[: len(ids)] for answer, ids in zip(whole, got, strict=True)] == got
    assert 0 < len(got[1]) < len(whole[1])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError, MemoryError])
def test_a_device_error_ends_the_engine(error: type[Exception]) -> None:
    model = Unstable()

    def fail(features: torch.Tensor) -> None:
        raise error

    model.on_project = fail
    subject = engine(model)
    subject.add(subject.validator.accept("r", IMAGE_PROMPT, GREEDY))
    with pytest.raises(error):
        subject.step()


def test_a_failing_forward_pass_ends_the_engine() -> None:
    model = TinyModel()
    subject = engine(model)
    model.language_model.get_output_embeddings().weight.data = torch.zeros(3, HIDDEN + 1)
    subject.add(subject.validator.accept("r", prompt([1, 5]), GREEDY))
    with pytest.raises(RuntimeError):
        subject.step()
