"""What `benchmarks.linear` measures by. The times themselves are in its results: a busy machine would fail a test."""

from __future__ import annotations

import json

from benchmarks.linear import KINDS, exponent
from support.paths import ROOT


def test_the_slope_of_a_square_is_found() -> None:
    assert exponent([[1, 5], [2, 20], [4, 80]]) == 2
    assert exponent([[1, 5], [2, 10], [4, 20]]) == 1


def test_the_results_that_are_kept_have_every_kind() -> None:
    kept = json.loads((ROOT / "benchmarks" / "results" / "linear.json").read_text())["kinds"]
    assert kept.keys() == KINDS.keys()
    assert not [name for name, kind in kept.items() if kind["status"] >= 500]
