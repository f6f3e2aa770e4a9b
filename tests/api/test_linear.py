"""No input takes time that grows faster than its size."""

from __future__ import annotations

import pytest

from benchmarks.linear import KINDS, exponent, measure

STRAIGHT = 1.35
"""Of the slope between logarithms; a square would have 2. The rest is noise."""


def test_the_slope_of_a_square_is_found() -> None:
    assert exponent([[1, 5], [2, 20], [4, 80]]) == 2
    assert exponent([[1, 5], [2, 10], [4, 20]]) == 1


@pytest.mark.extended
def test_every_input_takes_time_in_proportion() -> None:
    found = measure(rounds=3)
    assert found.keys() == KINDS.keys()
    assert {name: kind for name, kind in found.items() if kind["exponent"] > STRAIGHT} == {}
    assert not [name for name, kind in found.items() if kind["status"] >= 500]
