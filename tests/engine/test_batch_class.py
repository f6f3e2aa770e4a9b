"""Batch work, of priorities above 0, takes nothing from online requests, never stands still, and loses no token."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from llava_serve.engine.batch_share import BatchShare, Running
from llava_serve.engine.engine import Engine
from llava_serve.engine.prefill_budget import MIN_TOKENS, PrefillBudget, StepBudget
from llava_serve.errors import CapacityError
from llava_serve.sampling_params import SamplingParams
from support.tiny_engine import TinyModel, check_blocks, engine, image, prompt, run

LONG = SamplingParams(temperature=0, max_new_tokens=60, ignore_eos=True)
SHORT = dataclasses.replace(LONG, max_new_tokens=20)
BATCH = 10


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return TinyModel()


def batch_prompt(number: int) -> list[int]:
    return [number + 3, 4, 5, 6, 7, 8, 9]


def add(subject: Engine, name: str, ids: list[int], sampling: SamplingParams, priority: int = 0) -> None:
    subject.add(subject.validator.accept(name, prompt(ids), sampling, priority=priority))


class Answers:
    """The ids of each request, gathered step by step."""

    def __init__(self, subject: Engine) -> None:
        self._subject = subject
        self.ids: dict[str, list[int]] = {}

    def step(self) -> dict[str, tuple[int, ...]]:
        """What the step has added."""
        added = {output.request_id: output.token_ids for output in self._subject.step()}
        check_blocks(self._subject)
        for name, ids in added.items():
            self.ids.setdefault(name, []).extend(ids)
        return added

    def finish(self) -> None:
        while self._subject.has_work:
            self.step()


@pytest.mark.parametrize(
    "limits", [{"max_num_seqs": 4}, {"max_num_seqs": 64, "blocks": 24}], ids=["sequences", "blocks"]
)
def test_an_online_request_is_answered_at_once_among_a_full_batch(model: TinyModel, limits: dict[str, Any]) -> None:
    batch = {f"b{number}": batch_prompt(number) for number in range(10)}
    online = [50, 51, 52, 53]
    alone = engine(model)
    expected = {name: run(alone, (prompt(ids), LONG))[0][0] for name, ids in batch.items()}
    expected["online"] = run(alone, (prompt(online), SHORT))[0][0]
    subject = engine(model, **limits)
    answers = Answers(subject)
    for name, ids in batch.items():
        add(subject, name, ids, LONG, BATCH)
    for _ in range(25):
        answers.step()
    assert subject.stats.waiting, "the engine is full"
    add(subject, "online", online, SHORT)
    steps = [answers.step().get("online", ()) for _ in range(2 + SHORT.max_new_tokens)]
    first = next(at for at, ids in enumerate(steps) if ids)
    assert first <= 1
    assert [len(ids) for ids in steps[first : first + SHORT.max_new_tokens]] == [1] * SHORT.max_new_tokens
    answers.finish()
    assert answers.ids == expected


def test_several_online_requests_take_the_places_at_once(model: TinyModel) -> None:
    subject = engine(model, max_num_seqs=4)
    answers = Answers(subject)
    for number in range(6):
        add(subject, f"b{number}", batch_prompt(number), LONG, BATCH)
    for _ in range(5):
        answers.step()
    for number in range(6):
        add(subject, f"o{number}", [40 + number, 41], SHORT)
    answers.step()  # one step computes all their prompts, and they wait for no more
    assert [len(answers.ids.get(f"o{number}", ())) > 0 for number in range(6)] == [True] * 4 + [False] * 2
    assert {group.batch for group in subject._scheduler.running} == {False}
    answers.finish()
    assert {len(ids) for name, ids in answers.ids.items() if name[0] == "b"} == {60}


@pytest.mark.parametrize("cheap", [False, True])
def test_a_first_token_waits_for_little_batch_work_whenever_it_is_asked(model: TinyModel, cheap: bool) -> None:
    """The work beside it is counted, in each of the 64 steps of the period, among pictures that wait for the tower."""
    subject = engine(model, max_num_seqs=4, blocks=128)
    answers, numbers = Answers(subject), itertools.count()
    share, prefill = subject._batch_share, subject._prefill_budget
    tiles_beside = 0
    for phase in range(64):
        while subject.stats.running + subject.stats.waiting < 8:
            number = next(numbers)
            picture = prompt([3, 4], image((number, phase, 7), tiles=8), [5] * 20)
            subject.add(subject.validator.accept(f"b{number}", picture, SHORT, priority=BATCH))
        answers.step()
        share._at = phase
        add(subject, f"o{phase}", [40] * 30, dataclasses.replace(SHORT, max_new_tokens=1))
        share._alone.extend([1.0] * 5)
        share._beside.extend([1.0 if cheap else 1e9] * 5)
        load = subject._scheduler.load
        most = max(MIN_TOKENS, *(prefill.room(1.25, number) or 0 for number in range(load.batch_decoding + 1)))
        tiles, tokens = model.encoded_tiles, subject.stats.computed_tokens
        assert answers.step().get(f"o{phase}"), "the first step has its first token"
        tiles_beside += model.encoded_tiles - tiles
        assert subject.stats.computed_tokens - tokens <= 30 + 3 + most  # its prompt, three that decode, and prompts
    assert tiles_beside <= 1, "batch work gets its minimum once in the period"
    answers.finish()


def test_batch_work_goes_on_beside_online_requests_without_end(model: TinyModel) -> None:
    subject = engine(model, max_num_seqs=4, blocks=128)
    answers = Answers(subject)
    forever = dataclasses.replace(LONG, max_new_tokens=240)
    subject._batch_share._beside.extend([1e9] * 5)  # steps with batch work beside cost much
    add(subject, "o", [40, 41], forever)
    picture = prompt([3, 4], image((9, 8, 7)), [5] * 40)
    subject.add(subject.validator.accept("b", picture, SHORT, priority=BATCH))
    for _ in range(230):
        answers.step()
        subject._batch_share._beside.extend([1e9] * 5)
    assert len(answers.ids["o"]) >= 228, "a token in every step but the first"
    assert 1 <= len(answers.ids["b"]) <= 10
    answers.finish()
    assert answers.ids["b"] == run(engine(model), (picture, SHORT))[0][0]


def test_online_requests_are_queued_as_if_there_were_no_batch_work(model: TinyModel) -> None:
    subject = engine(model, max_num_seqs=2, max_waiting=6)
    for number in range(4):
        add(subject, f"b{number}", batch_prompt(number), SHORT, BATCH)
    with pytest.raises(CapacityError):
        add(subject, "b4", batch_prompt(4), SHORT, BATCH)
    for number in range(8):
        add(subject, f"o{number}", [40 + number], SHORT)
    with pytest.raises(CapacityError):
        add(subject, "o8", [49], SHORT)
    answers = Answers(subject)
    answers.finish()
    assert {len(ids) for ids in answers.ids.values()} == {SHORT.max_new_tokens}
    assert len(answers.ids) == 12


def budgets(share: BatchShare, running: Running, beside_s: float, steps: int = 640) -> list[StepBudget]:
    """The budgets of decode-only steps that take 10 ms, and with batch work beside `beside_s`."""
    given = []
    for _ in range(steps):
        budget = share.step_budget(running)
        share.observe(beside_s if budget.batch else 0.01, running.online_decoding, budget.batch, 0)
        given.append(budget)
    return given


@pytest.mark.parametrize(("beside_s", "least", "most"), [(0.011, 0.9, 1.0), (0.02, 0.01, 0.05)])
def test_batch_work_runs_beside_online_requests_where_that_costs_little(
    beside_s: float, least: float, most: float
) -> None:
    share = BatchShare(PrefillBudget(1000, 8))
    budgets(share, Running(True, 2, 8), beside_s, steps=64)
    given = budgets(share, Running(True, 2, 8), beside_s)
    part = sum(budget.batch for budget in given) / len(given)
    assert least <= part <= most
    assert 0 < sum(budget.batch_tile for budget in given) <= 0.05 * len(given)
    assert share.step_budget(Running(False, 0, 8)).batch_tokens is None


def test_the_prefill_of_batch_work_slows_online_decoding_by_a_quarter_at_most() -> None:
    prefill = PrefillBudget(1000, 8)
    share = BatchShare(prefill)
    budgets(share, Running(True, 2, 8), 0.01, steps=64)
    prefill.observe(0.010, decoding=10, tokens=0, tiles=0)
    prefill.observe(0.010 + 0.020, decoding=10, tokens=200, tiles=0)
    prefill.observe(0.010 + 0.008, decoding=10, tokens=0, tiles=1)
    budget = next(each for _ in range(9) if (each := share.step_budget(Running(True, 2, 8))).batch)
    assert budget.tokens >= 8 + 2 + 100
    budget.limit_to_batch()
    assert budget.tokens == 25  # 2.5 ms beside the 10 of a decode step
    assert budget.take_tiles(3) == 0
