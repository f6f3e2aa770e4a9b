"""A picture on which the vision tower fails takes only the requests that need it with it, and is not kept."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llava_serve.errors import LlavaServeError, NumericalError
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import PreparedPrompt
from support.tiny_engine import TinyModel, engine, image, outcomes, prompt, run

RED, BLUE, GREEN = (200, 20, 30), (10, 30, 220), (20, 210, 40)
GREEDY = SamplingParams(temperature=0, max_new_tokens=6)
OTHERS = [
    (prompt([1, 5, 6], image(BLUE), [9]), GREEDY),
    (prompt([1, 5, 7]), SamplingParams(temperature=0.8, seed=3, n=2, max_new_tokens=6)),
    (prompt([1, 8], image(GREEN, 3), [4]), SamplingParams(temperature=0, num_beams=3, max_new_tokens=6)),
]
SAMPLINGS = {
    "greedy": GREEDY,
    "choices": SamplingParams(temperature=1, seed=1, n=3, max_new_tokens=6),
    "beams": SamplingParams(temperature=0, num_beams=3, max_new_tokens=6),
}


class Tower(TinyModel):
    """A model whose tower calls `on_tiles` with its tiles before it computes, and with its features afterwards."""

    def __init__(self, on_tiles: Callable[[torch.Tensor], None] = lambda tiles: None) -> None:
        super().__init__()
        self.on_tiles = on_tiles
        self.on_features: Callable[[torch.Tensor, torch.Tensor], None] = lambda tiles, features: None

    def tower_features(self, tiles: torch.Tensor) -> torch.Tensor:
        self.on_tiles(tiles)
        features = super().tower_features(tiles)
        self.on_features(tiles, features)
        return features


def refuse(colour: int) -> Callable[[torch.Tensor], None]:
    """Raises for a tile whose red is `colour`."""

    def check(tiles: torch.Tensor) -> None:
        if (tiles[:, 0, 0, 0] == colour).any():
            raise ValueError("no such tile")

    return check


def with_red(tiles: int = 2) -> PreparedPrompt:
    return prompt([1, 5, 6], image(RED, tiles), [7])


def kept(subject: Any) -> set[int]:
    """The red of each image whose features are kept."""
    return {int(digest.split(")")[1][:2], 16) for digest in subject._runner._encoder.features}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("colour", [RED[0], RED[0] + 1])  # the first tile of the image, and the second
@pytest.mark.parametrize("tiles", [1, 8])  # the image in two steps, and with others in one
@pytest.mark.parametrize("first", [True, False])
def test_an_image_fails_the_requests_that_need_it(
    sampling: SamplingParams, colour: int, tiles: int, first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run(engine(TinyModel(), max_batch_tiles=tiles), *OTHERS)
    model = Tower(refuse(colour))
    subject = engine(model, max_batch_tiles=tiles)
    bad = [(with_red(), sampling), (with_red(), GREEDY)]
    answers = outcomes(subject, *(bad + OTHERS if first else OTHERS + bad))
    errors = answers[:2] if first else answers[-2:]
    assert (answers[2:] if first else answers[:-2]) == expected
    assert [(type(error), str(error)) for error in errors] == [
        (LlavaServeError, "The server failed on this request.")
    ] * 2
    assert "no such tile" in caplog.text
    run(subject, OTHERS[0])  # the step that drops what was discarded
    assert RED[0] not in kept(subject)
    assert BLUE[0] in kept(subject)
    model.on_tiles = lambda tiles: None
    assert run(subject, bad[0]) == run(engine(TinyModel(), max_batch_tiles=tiles), bad[0])


def test_a_failure_of_the_batch_only_fails_no_request(caplog: pytest.LogCaptureFixture) -> None:
    def one_at_a_time(tiles: torch.Tensor) -> None:
        if len(tiles) > 3:
            raise RuntimeError("too many")

    assert run(engine(Tower(one_at_a_time)), *OTHERS) == run(engine(TinyModel()), *OTHERS)
    (record,) = [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert "one by one" in record.message


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("tiles", [1, 8])
@pytest.mark.parametrize("alone", [True, False])
def test_features_that_are_not_finite_fail_at_once(sampling: SamplingParams, tiles: int, alone: bool) -> None:
    """Before the tower has seen the whole image, and where no token depends on the value: 0 times it is NaN."""
    model = Tower(refuse(GREEN[0] + 9) if alone else lambda tiles: None)

    def spoil(tiles: torch.Tensor, features: torch.Tensor) -> None:
        features[tiles[:, 0, 0, 0] == RED[0], 2, 5] = torch.inf  # which the projector's tanh would hide

    model.on_features = spoil
    failing = [(prompt([1], image((GREEN[0] + 9, 3, 3)), [4]), GREEDY)] if alone else []  # so that jobs run singly
    expected = run(engine(TinyModel(), max_batch_tiles=tiles), *OTHERS)
    subject = engine(model, max_batch_tiles=tiles)
    *errors, error = outcomes(subject, *failing, (with_red(5), sampling), *OTHERS)[: 1 + len(failing)]
    assert type(error) is NumericalError
    assert "float64" in str(error)
    assert [type(each) for each in errors] == [LlavaServeError] * len(failing)
    assert run(subject, *OTHERS) == expected
    assert RED[0] not in kept(subject)
    subject.add(subject.validator.accept("again", with_red(5), sampling))
    (output,) = subject.step()
    assert isinstance(output.error, NumericalError)
    assert not subject.has_work


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    ],
    ids=repr,
)
def test_an_error_of_the_device_ends_the_engine(error: Exception) -> None:
    def fail(tiles: torch.Tensor) -> None:
        raise error

    model = Tower()
    subject = engine(model)
    model.on_tiles = fail
    subject.add(subject.validator.accept("r", with_red(), GREEDY))
    with pytest.raises(type(error)):
        subject.step()
