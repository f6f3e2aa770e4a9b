"""What a step takes on: order, budgets, pictures, who gives way. No tensors."""

from __future__ import annotations

import random

from llava_serve.engine.encoder_cache import EncoderCacheManager
from llava_serve.engine.kv_cache import KVCache
from llava_serve.engine.prefill_budget import Budget, PrefillBudget
from llava_serve.engine.scheduler import Schedule, Scheduler
from llava_serve.engine.sequence import EngineRequest, Group, Sequence
from llava_serve.types import PreparedPrompt, SamplingParams
from support.tiny_engine import picture, prompt


class House:
    """A scheduler with what it keeps its books in, and a way to play a step without a model."""

    def __init__(self, blocks: int = 64, rows: int = 8) -> None:
        self.kv = KVCache(blocks, 4)
        self.features = EncoderCacheManager(8)
        self.scheduler = Scheduler(self.kv, self.features, rows)
        self.arrivals = 0

    def add(self, one: PreparedPrompt, *, most: int = 8, beams: int = 1, priority: int = 0) -> Group:
        sampling = SamplingParams(temperature=0, num_beams=beams)
        request = EngineRequest(f"r{self.arrivals}", one, sampling, None, priority, 0, most, frozenset())
        rows = [Sequence(request, 0, one.token_ids.tolist()) for _ in range(beams)]
        group = Group(request, self.arrivals, rows)
        self.arrivals += 1
        self.scheduler.add(group)
        return group

    def step(self, tokens: int = 100, tiles: int = 8) -> Schedule:
        """A step in which every drawn token is 1."""
        schedule = self.scheduler.schedule(Budget(tokens, tiles))
        for segment in schedule.segments:
            segment.sequence.num_computed = segment.end
            self.kv.commit(segment.sequence)
        for group in self.scheduler.running:
            if all(row.num_computed >= group.last_picture for row in group.active):
                self.scheduler.prefilled(group)
        for segment in schedule.segments:
            if segment.draws:
                segment.sequence.token_ids.append(1)
        return schedule


def parts(schedule: Schedule) -> list[tuple[str, int, int, bool]]:
    return [(one.sequence.request.request_id, one.start, one.end, one.draws) for one in schedule.segments]


def test_first_come_first_served_in_chunks() -> None:
    house = House()
    house.add(prompt([5] * 10))
    house.add(prompt([6] * 5))
    assert parts(house.step(tokens=8)) == [("r0", 0, 8, False)]
    assert parts(house.step(tokens=8)) == [("r0", 8, 10, True), ("r1", 0, 5, True)]
    assert parts(house.step(tokens=8)) == [("r0", 10, 11, True), ("r1", 5, 6, True)]


def test_those_who_talk_go_on_whatever_comes() -> None:
    house = House()
    house.add(prompt([5] * 4))
    house.step()
    house.add(prompt([6] * 50))
    for at in range(4, 9):
        assert parts(house.step(tokens=6))[0] == ("r0", at, at + 1, True)


def test_priority_goes_first() -> None:
    house = House(rows=1)
    house.add(prompt([5] * 4))
    house.add(prompt([6] * 4), priority=-1)
    assert parts(house.step()) == [("r1", 0, 4, True)]


def test_pictures_are_encoded_together_within_the_budget_and_before_they_are_read() -> None:
    house = House()
    house.add(prompt([5, 5], picture((1, 1, 1), 2), [6]))
    house.add(prompt([5, 5], picture((2, 2, 2), 3), [6]))
    first = house.step(tiles=4)
    assert [(job.first, len(job.tiles), job.total) for job in first.tile_jobs] == [(0, 2, 2), (0, 2, 3)]
    assert parts(first) == [("r0", 0, 15, True), ("r1", 0, 2, False)]
    second = house.step(tiles=4)
    assert [(job.first, len(job.tiles)) for job in second.tile_jobs] == [(2, 1)]
    assert parts(second)[1] == ("r1", 2, 21, True)


def test_a_picture_is_encoded_once_for_all_and_kept() -> None:
    house = House()
    house.add(prompt([5, 5], picture((1, 1, 1)), [6]))
    house.add(prompt([7, 7], picture((1, 1, 1)), [6]))
    assert len(house.step().tile_jobs) == 1
    house.add(prompt([8, 8], picture((1, 1, 1)), [6]))
    assert house.step().tile_jobs == ()


def test_the_oldest_pictures_are_forgotten_beyond_the_capacity() -> None:
    ledger = EncoderCacheManager(3)
    for name in ("a", "b"):
        ledger.pin(name, 2)
        ledger.encode(name, 2)
    ledger.unpin("a")
    assert ledger.take_evicted() == ()
    ledger.unpin("b")
    assert ledger.take_evicted() == ("a",)
    ledger.pin("b", 2)
    assert ledger.missing("b") == 0
    ledger.pin("a", 2)
    assert ledger.missing("a") == 2


def test_a_discarded_picture_goes_as_soon_as_nobody_needs_it() -> None:
    ledger = EncoderCacheManager(3)
    for name in ("used", "idle", "good"):
        ledger.pin(name, 1)
        ledger.encode(name, 1)
    ledger.unpin("idle")
    ledger.unpin("good")
    for name in ("used", "idle", "unknown"):
        ledger.discard(name)
    assert ledger.take_evicted() == ("idle",)
    assert ledger.missing("used") == 0
    ledger.unpin("used")
    assert ledger.take_evicted() == ("used",)
    ledger.pin("used", 1)
    assert ledger.missing("used") == 1
    ledger.encode("used", 1)
    ledger.unpin("used")
    assert ledger.take_evicted() == ()  # it is kept again, and beside it there is room


def test_the_last_to_come_gives_way_and_comes_back_first() -> None:
    house = House(blocks=6)
    house.add(prompt([5] * 8), most=12)
    late = house.add(prompt([6] * 8), most=12)
    house.step()
    while late in house.scheduler.running:
        house.step()
    house.add(prompt([7] * 4), most=2)
    assert house.scheduler.waiting[0] is late
    assert all(row.extent is None for row in late.rows)
    house.scheduler.remove(house.scheduler.running[0])
    again = house.step()
    assert {one.sequence.request.request_id for one in again.segments} == {"r1", "r2"}
    assert late.rows[0].num_computed == len(late.rows[0].token_ids) - 1


def test_a_prompt_waits_for_one_that_begins_alike() -> None:
    house = House()
    house.add(prompt([5] * 12))
    twin = house.add(prompt([5] * 12))
    other = house.add(prompt([6] * 4))
    assert parts(house.step(tokens=8)) == [("r0", 0, 8, False)]
    house.step()
    assert other in house.scheduler.running
    house.step()
    assert twin.rows[0].num_cached == 8


def test_beams_enter_together_and_only_the_first_reads_the_prompt() -> None:
    house = House(rows=4)
    house.add(prompt([5] * 6), beams=3)
    house.add(prompt([6] * 6), beams=2)
    assert parts(house.step()) == [("r0", 0, 6, True)]
    assert house.scheduler.num_running == 3


def test_beams_that_gave_way_draw_together_again() -> None:
    house = House()
    group = house.add(prompt([5] * 7), beams=2)
    house.step()
    group.prompted = True
    group.rows[1].token_ids[7:] = [7]
    house.scheduler._preempt(group)
    assert parts(house.step(tokens=5)) == [("r0", 4, 7, False), ("r0", 4, 6, False)]
    assert parts(house.step()) == [("r0", 6, 7, False)]
    assert parts(house.step()) == [("r0", 7, 8, True), ("r0", 7, 8, True)]


def test_beams_that_need_all_memory_enter_whatever_the_prefix_cache_has_kept() -> None:
    for seed in range(100):
        rng = random.Random(seed)
        house = House(blocks=12)
        for _ in range(6):
            small = house.add(prompt([rng.randrange(9) for _ in range(rng.randrange(1, 20))]), most=rng.choice((1, 9)))
            house.step()
            house.scheduler.remove(small)
        beams = house.add(prompt([9] * 13), most=4, beams=3)
        house.step()
        assert beams in house.scheduler.running


def test_all_is_given_back() -> None:
    house = House()
    groups = [house.add(prompt([at] * 9, picture((at, 0, 0), 2))) for at in range(3, 7)]
    house.step(tokens=20, tiles=3)
    for group in groups:
        house.scheduler.remove(group)
    assert house.kv.num_available == house.kv.num_blocks
    assert not house.scheduler.running
    assert not house.scheduler.waiting


def test_the_pacer_gives_prefill_what_those_who_talk_can_bear() -> None:
    pacer = PrefillBudget(1000, 8)
    assert pacer.budget(0).tokens == 1000
    assert pacer.budget(4).tokens == 4  # what a step takes without prefill must be known first
    pacer.observe(0.010, decoding=4, tokens=0, tiles=0)
    unknown = pacer.budget(4)
    assert unknown.tokens == 4 + 64
    assert unknown.take_tiles(5) == 1
    pacer.observe(0.010 + 0.020, decoding=4, tokens=200, tiles=0)
    budget = pacer.budget(4)
    assert budget.tokens == 4 + 125  # 12.5 ms beside the 10 of a decode step
    pacer.observe(0.010 + 0.008, decoding=4, tokens=0, tiles=1)
    budget = pacer.budget(4)
    assert budget.take_tiles(5) == 1
    assert budget.tokens < 100


def test_the_pacer_looks_again_what_a_step_without_prefill_takes() -> None:
    pacer = PrefillBudget(1000, 8)
    pacer.observe(0.010, decoding=1, tokens=0, tiles=0)
    steps = 0
    while pacer.budget(1).tokens > 1:
        pacer.observe(0.020, decoding=1, tokens=100, tiles=0)
        steps += 1
    assert 1 < steps < 100
    pacer.observe(0.010, decoding=1, tokens=0, tiles=0)
    assert pacer.budget(1).tokens > 1


def test_a_tile_too_dear_is_taken_alone() -> None:
    budget = Budget(tokens=50, tiles=8, tile_cost=400)
    assert budget.take_tiles(3) == 1
    assert budget.tokens < 0
    spent = Budget(tokens=50, tiles=8, tile_cost=400)
    spent.take_tokens(10)
    assert spent.take_tiles(3) == 0
