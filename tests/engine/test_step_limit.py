"""How long a step may take before it counts as one that never ends."""

from __future__ import annotations

import pytest

from llava_serve.engine.step_limit import StepLimit

UNKNOWN_S, SHORTEST_S = 300, 5


def limit_of(steps: list[tuple[float, int, int, int]], decoding: int, prefill: int = 0, tiles: int = 0) -> float:
    """The limit of a step after others: (seconds, decoding, prefill, tiles)."""
    limit = StepLimit()
    for seconds, *work in steps:
        limit.begin(*work)
        limit.end(seconds)
    limit.begin(decoding, prefill, tiles)
    return limit.seconds


def test_nothing_is_known_at_first() -> None:
    assert StepLimit().seconds == limit_of([], 1) == UNKNOWN_S


def test_the_first_step_of_a_kind_sets_things_up() -> None:
    assert limit_of([(20, 1, 0, 0)], 1) == UNKNOWN_S
    assert limit_of([(20, 1, 0, 0), (0.01, 1, 0, 0)], 1) == SHORTEST_S


@pytest.mark.parametrize("work", [(0, 64, 0), (1, 64, 0), (0, 0, 1), (0, 64, 1), (1, 64, 1), (1, 0, 1)])
def test_a_step_of_another_kind_may_take_as_long_as_an_unknown_one(work: tuple[int, int, int]) -> None:
    assert limit_of([(0.01, 1, 0, 0)] * 50, *work) == UNKNOWN_S


def test_steps_of_milliseconds_may_take_seconds_at_most() -> None:
    steps = [(0.01, 4, 0, 0)] * 50 + [(0.03, 0, 200, 1), (0.03, 4, 200, 1)] * 2
    assert limit_of(steps, 4) == limit_of(steps, 0, 200, 1) == limit_of(steps, 4, 200, 1) == SHORTEST_S
    assert limit_of(steps, 4, 2048, 8) == pytest.approx(30 * 0.03 * 2048 / 200)


@pytest.mark.parametrize("prefill", [1, 16, 64, 128, 2048])
def test_a_step_with_more_work_may_take_longer_and_one_with_less_no_less(prefill: int) -> None:
    steps = [(0.5, 0, 64, 0)] * 2
    assert limit_of(steps, 0, prefill) == pytest.approx(min(UNKNOWN_S, 30 * 0.5 * max(1, prefill / 64)))


@pytest.mark.parametrize("steps", [100, 1000])
def test_a_long_prompt_after_many_short_ones_has_its_time(steps: int) -> None:
    """A model on a CPU that takes 30 ms for a position: short prompts do not make it forget what long ones take."""
    known = [(60.0, 0, 2048, 0)] * 2 + [(2.0, 0, 64, 0)] * steps
    assert limit_of(known, 0, 2048) == UNKNOWN_S
    assert limit_of(known, 0, 64) >= 30 * 2


def test_a_slow_step_is_forgotten() -> None:
    """One as where the machine was busy for a moment."""
    known = [(0.01, 1, 0, 0)] * 2
    assert limit_of([*known, (3.0, 1, 0, 0)], 1) == pytest.approx(90)
    assert limit_of([*known, (3.0, 1, 0, 0), *[(0.01, 1, 0, 0)] * 600], 1) == SHORTEST_S


@pytest.mark.parametrize("seconds", [0.001, 0.02, 0.2, 0.5, 2])
def test_other_programs_may_take_most_of_the_machine_at_once(seconds: float) -> None:
    assert limit_of([(seconds, 8, 0, 0)] * 2, 8) > 20 * seconds


def test_a_step_without_work_is_a_kind_of_its_own() -> None:
    """All its requests have expired."""
    assert limit_of([(0.001, 0, 0, 0)] * 2, 0) == SHORTEST_S
