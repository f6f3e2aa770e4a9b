"""What a step computes: order, budgets, images, preemption. No tensors."""

from __future__ import annotations

import random

from llava_serve.engine.encoder_cache import EncoderCacheManager
from llava_serve.engine.kv_cache import KVCache
from llava_serve.engine.prefill_budget import StepBudget
from llava_serve.engine.scheduler import Schedule, Scheduler
from llava_serve.engine.sequence import EngineRequest, Sequence, SequenceGroup
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import PreparedPrompt
from support.tiny_engine import image, prompt


class Setup:
    """A scheduler with its caches, and steps without a model."""

    def __init__(self, blocks: int = 64, max_num_seqs: int = 8) -> None:
        self.kv = KVCache(blocks, 4)
        self.encoder_cache = EncoderCacheManager(8)
        self.scheduler = Scheduler(self.kv, self.encoder_cache, max_num_seqs)
        self.arrivals = 0

    def add(self, one: PreparedPrompt, *, most: int = 8, beams: int = 1, priority: int = 0) -> SequenceGroup:
        sampling = SamplingParams(temperature=0, num_beams=beams)
        request = EngineRequest(f"r{self.arrivals}", one, sampling, None, priority, 0, most, frozenset())
        sequences = [Sequence(request, 0, one.token_ids.tolist()) for _ in range(beams)]
        group = SequenceGroup(request, self.arrivals, sequences)
        self.arrivals += 1
        self.scheduler.add(group)
        return group

    def step(self, tokens: int = 100, tiles: int = 8) -> Schedule:
        """A step in which every sampled token is 1."""
        schedule = self.scheduler.schedule(StepBudget(tokens, tiles))
        for segment in schedule.segments:
            segment.sequence.num_computed = segment.end
            self.kv.commit(segment.sequence)
        for group in self.scheduler.running:
            if all(sequence.num_computed >= group.images_end for sequence in group.active):
                self.scheduler.unpin_images(group)
        for segment in schedule.segments:
            if segment.needs_sampling:
                segment.sequence.token_ids.append(1)
        return schedule


def parts(schedule: Schedule) -> list[tuple[str, int, int, bool]]:
    return [(one.sequence.request.request_id, one.start, one.end, one.needs_sampling) for one in schedule.segments]


def test_first_come_first_served_in_chunks() -> None:
    setup = Setup()
    setup.add(prompt([5] * 10))
    setup.add(prompt([6] * 5))
    assert parts(setup.step(tokens=8)) == [("r0", 0, 8, False)]
    assert parts(setup.step(tokens=8)) == [("r0", 8, 10, True), ("r1", 0, 5, True)]
    assert parts(setup.step(tokens=8)) == [("r0", 10, 11, True), ("r1", 5, 6, True)]


def test_decoding_sequences_advance_in_every_step() -> None:
    setup = Setup()
    setup.add(prompt([5] * 4))
    setup.step()
    setup.add(prompt([6] * 50))
    for at in range(4, 9):
        assert parts(setup.step(tokens=6))[0] == ("r0", at, at + 1, True)


def test_a_smaller_priority_is_admitted_first() -> None:
    setup = Setup(max_num_seqs=1)
    setup.add(prompt([5] * 4))
    setup.add(prompt([6] * 4), priority=-1)
    assert parts(setup.step()) == [("r1", 0, 4, True)]


def test_images_are_encoded_together_within_the_budget_and_before_their_positions_are_computed() -> None:
    setup = Setup()
    setup.add(prompt([5, 5], image((1, 1, 1), 2), [6]))
    setup.add(prompt([5, 5], image((2, 2, 2), 3), [6]))
    first = setup.step(tiles=4)
    assert [(job.first, len(job.tiles), job.total) for job in first.tile_jobs] == [(0, 2, 2), (0, 2, 3)]
    assert parts(first) == [("r0", 0, 15, True), ("r1", 0, 2, False)]
    second = setup.step(tiles=4)
    assert [(job.first, len(job.tiles)) for job in second.tile_jobs] == [(2, 1)]
    assert parts(second)[1] == ("r1", 2, 21, True)


def test_an_image_is_encoded_once_for_all_requests_and_kept() -> None:
    setup = Setup()
    setup.add(prompt([5, 5], image((1, 1, 1)), [6]))
    setup.add(prompt([7, 7], image((1, 1, 1)), [6]))
    assert len(setup.step().tile_jobs) == 1
    setup.add(prompt([8, 8], image((1, 1, 1)), [6]))
    assert setup.step().tile_jobs == ()


def test_the_least_recently_used_images_are_evicted_beyond_the_capacity() -> None:
    encoder_cache = EncoderCacheManager(3)
    for name in ("a", "b"):
        encoder_cache.pin(name, 2)
        encoder_cache.encode(name, 2)
    encoder_cache.unpin("a")
    assert encoder_cache.take_evicted() == ()
    encoder_cache.unpin("b")
    assert encoder_cache.take_evicted() == ("a",)
    encoder_cache.pin("b", 2)
    assert encoder_cache.missing("b") == 0
    encoder_cache.pin("a", 2)
    assert encoder_cache.missing("a") == 2


def test_a_discarded_image_goes_as_soon_as_nobody_needs_it() -> None:
    encoder_cache = EncoderCacheManager(3)
    for name in ("used", "idle", "good"):
        encoder_cache.pin(name, 1)
        encoder_cache.encode(name, 1)
    encoder_cache.unpin("idle")
    encoder_cache.unpin("good")
    for name in ("used", "idle", "unknown"):
        encoder_cache.discard(name)
    assert encoder_cache.take_evicted() == ("idle",)
    assert encoder_cache.missing("used") == 0
    encoder_cache.unpin("used")
    assert encoder_cache.take_evicted() == ("used",)
    encoder_cache.pin("used", 1)
    assert encoder_cache.missing("used") == 1
    encoder_cache.encode("used", 1)
    encoder_cache.unpin("used")
    assert encoder_cache.take_evicted() == ()  # it is kept again, and beside it there is room


def test_the_last_to_arrive_is_preempted_and_admitted_again_first() -> None:
    setup = Setup(blocks=6)
    setup.add(prompt([5] * 8), most=12)
    late = setup.add(prompt([6] * 8), most=12)
    setup.step()
    while late in setup.scheduler.running:
        setup.step()
    setup.add(prompt([7] * 4), most=2)
    assert setup.scheduler.waiting[0] is late
    assert all(sequence.extent is None for sequence in late.sequences)
    setup.scheduler.remove(setup.scheduler.running[0])
    again = setup.step()
    assert {one.sequence.request.request_id for one in again.segments} == {"r1", "r2"}
    assert late.sequences[0].num_computed == len(late.sequences[0].token_ids) - 1


def test_a_prompt_waits_for_a_shared_prefix_that_is_being_computed() -> None:
    setup = Setup()
    setup.add(prompt([5] * 12))
    same = setup.add(prompt([5] * 12))
    other = setup.add(prompt([6] * 4))
    assert parts(setup.step(tokens=8)) == [("r0", 0, 8, False)]
    setup.step()
    assert other in setup.scheduler.running
    setup.step()
    assert same.sequences[0].num_cached == 8


def test_beams_are_admitted_together_and_only_the_first_computes_the_prompt() -> None:
    setup = Setup(max_num_seqs=4)
    setup.add(prompt([5] * 6), beams=3)
    setup.add(prompt([6] * 6), beams=2)
    assert parts(setup.step()) == [("r0", 0, 6, True)]
    assert setup.scheduler.num_running == 3


def test_preempted_beams_are_sampled_in_the_same_step_again() -> None:
    setup = Setup()
    group = setup.add(prompt([5] * 7), beams=2)
    setup.step()
    group.forked = True
    group.sequences[1].token_ids[7:] = [7]
    setup.scheduler._preempt(group)
    assert parts(setup.step(tokens=5)) == [("r0", 4, 7, False), ("r0", 4, 6, False)]
    assert parts(setup.step()) == [("r0", 6, 7, False)]
    assert parts(setup.step()) == [("r0", 7, 8, True), ("r0", 7, 8, True)]


def test_beams_that_need_all_blocks_are_admitted_whatever_the_prefix_cache_holds() -> None:
    for seed in range(100):
        rng = random.Random(seed)
        setup = Setup(blocks=12)
        for _ in range(6):
            small = setup.add(prompt([rng.randrange(9) for _ in range(rng.randrange(1, 20))]), most=rng.choice((1, 9)))
            setup.step()
            setup.scheduler.remove(small)
        beams = setup.add(prompt([9] * 13), most=4, beams=3)
        setup.step()
        assert beams in setup.scheduler.running


def test_removed_groups_free_all_blocks() -> None:
    setup = Setup()
    groups = [setup.add(prompt([at] * 9, image((at, 0, 0), 2))) for at in range(3, 7)]
    setup.step(tokens=20, tiles=3)
    for group in groups:
        setup.scheduler.remove(group)
    assert setup.kv.num_available == setup.kv.num_blocks
    assert not setup.scheduler.running
    assert not setup.scheduler.waiting
