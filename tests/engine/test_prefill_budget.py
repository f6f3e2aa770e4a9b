"""The prefill budget, by made-up clocks."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from llava_serve.engine.prefill_budget import CUDA_MIN_TOKENS, MIN_TOKENS, PrefillBudget, StepBudget


def test_the_prefill_budget_bounds_how_much_prefill_slows_decoding() -> None:
    prefill_budget = PrefillBudget(1000, 8)
    assert prefill_budget.step_budget(0).tokens == 1000
    assert prefill_budget.step_budget(4).tokens == 4  # the cost of a step that only decodes must be known first
    prefill_budget.observe(0.010, decoding=4, tokens=0, tiles=0)
    unknown = prefill_budget.step_budget(4)
    assert unknown.tokens == 4 + 64
    assert unknown.take_tiles(5) == 1
    prefill_budget.observe(0.010 + 0.020, decoding=4, tokens=200, tiles=0)
    budget = prefill_budget.step_budget(4)
    assert budget.tokens == 4 + 200  # 20 ms beside the 10 of a decode step
    prefill_budget.observe(0.010 + 0.016, decoding=4, tokens=0, tiles=1)
    budget = prefill_budget.step_budget(4)
    assert budget.take_tiles(5) == 1
    assert budget.tokens < 100


def test_the_prefill_budget_measures_decode_only_steps_again() -> None:
    prefill_budget = PrefillBudget(1000, 8)
    prefill_budget.observe(0.010, decoding=1, tokens=0, tiles=0)
    steps = 0
    while prefill_budget.step_budget(1).tokens > 1:
        prefill_budget.observe(0.020, decoding=1, tokens=100, tiles=0)
        steps += 1
    assert 1 < steps < 100
    prefill_budget.observe(0.010, decoding=1, tokens=0, tiles=0)
    assert prefill_budget.step_budget(1).tokens > 1


def test_a_few_sequences_are_not_measured_by_steps_of_many() -> None:
    """Online requests take turns with a large batch of other work, whose decode steps take ten times as long."""
    prefill_budget = PrefillBudget(1000, 8)
    for _ in range(7):
        prefill_budget.observe(0.010, decoding=2, tokens=0, tiles=0)
    prefill_budget.observe(0.010 + 0.020, decoding=2, tokens=200, tiles=0)
    for _ in range(7):
        prefill_budget.observe(0.100, decoding=24, tokens=0, tiles=0)
    assert prefill_budget.step_budget(2).tokens == 2 + 200  # 20 ms beside the 10 of their decode step
    assert prefill_budget.step_budget(24).tokens == 1000
    prefill_budget.observe(0.010 + 0.020, decoding=3, tokens=200, tiles=0)
    assert prefill_budget.step_budget(3).tokens == 3 + 200


def test_steps_that_were_faster_than_thought_leave_a_budget() -> None:
    prefill_budget = PrefillBudget(1000, 8)
    prefill_budget.observe(10.0, decoding=4, tokens=0, tiles=0)
    for tokens in (10, 20, 40, 80, 160):
        prefill_budget.observe(11.0 + 0.01 * tokens, decoding=4, tokens=tokens, tiles=0)
    prefill_budget.observe(1.0, decoding=4, tokens=2, tiles=0)  # prefill seems to take less than nothing
    budget = prefill_budget.step_budget(4)
    assert 4 + MIN_TOKENS <= budget.tokens <= 4 + 2 * 160


@dataclass
class Clock:
    """Made-up times of steps: decode steps, and steps with prefill, which have a constant and a cost per position."""

    decode: float
    mixed: float
    position: float
    noise: float = 0.0

    def pieces(self, prefill_budget: PrefillBudget, count: int, prompt: int = 620) -> list[int]:
        """Positions of the pieces in which `count` prompts are computed beside four decoding sequences."""
        rng = random.Random(0)
        pieces = []
        for _ in range(count):
            left = prompt
            while left:
                piece = min(left, prefill_budget.step_budget(4).tokens - 4)
                seconds = self.mixed + self.position * piece if piece else self.decode
                seconds *= 1 + rng.uniform(-self.noise, self.noise)
                prefill_budget.observe(seconds, decoding=4, tokens=piece, tiles=0)
                left -= piece
                pieces += [piece] * (piece > 0)
        return pieces


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("decode", [0.003, 0.005, 0.009])
def test_the_prefill_budget_does_not_collapse_where_steps_with_prefill_have_a_large_constant(
    decode: float, noise: float
) -> None:
    """As on a GPU: graphs of decode steps take 3 to 9 ms, steps with prefill 14 ms and 26 microseconds a position."""
    clock = Clock(decode, 0.014, 26e-6, noise)
    pieces = clock.pieces(PrefillBudget(2048, 8, CUDA_MIN_TOKENS), 20)
    assert len(pieces) <= 20 * 3
    # what the constant leaves is used, where it leaves anything: with 9 ms up to 240 positions, with 3 and 5 none
    plain = clock.pieces(PrefillBudget(2048, 8), 20)
    assert decode < 0.009 or sum(plain) / len(plain) > 100


@pytest.mark.parametrize("seed", range(5))
def test_the_prefill_budget_finds_the_constant(seed: int) -> None:
    rng = random.Random(seed)
    prefill_budget = PrefillBudget(2048, 8)
    prefill_budget.observe(0.010, decoding=4, tokens=0, tiles=0)
    for _ in range(7):
        tokens = rng.choice([60, 100, 300])
        prefill_budget.observe(0.014 + 50e-6 * tokens, decoding=4, tokens=tokens, tiles=0)
    assert prefill_budget.room(2.25, 4) == pytest.approx((0.0225 - 0.014) / 50e-6, abs=1)
    assert prefill_budget.room(1.25, 4) == 0


def test_the_prefill_budget_is_as_it_should_be_where_positions_cost_all() -> None:
    """As on a CPU, with noise: pieces take about two decode steps."""
    pieces = Clock(0.020, 0.020, 200e-6, noise=0.1).pieces(PrefillBudget(2048, 8), 40, prompt=2900)
    whole = [piece for piece in pieces[10:] if piece != MIN_TOKENS]
    assert 0.7 * 200 < sum(whole) / len(whole) < 1.3 * 200
    assert max(pieces) < 2.5 * 200


def test_a_tile_above_the_budget_is_computed_alone() -> None:
    budget = StepBudget(tokens=50, tiles=8, tile_cost=400)
    assert budget.take_tiles(3) == 1
    assert budget.tokens < 0
    spent = StepBudget(tokens=50, tiles=8, tile_cost=400)
    spent.take_tokens(10)
    assert spent.take_tiles(3) == 0
