"""The bookkeeping of the KV cache: free list, allocation, prefix cache. No tensors."""

from __future__ import annotations

import dataclasses
import random

import pytest

from llava_serve.engine.free_list import FreeList
from llava_serve.engine.kv_cache import KVCache
from llava_serve.engine.sequence import Copy, EngineRequest, Sequence
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import PreparedPrompt
from support.tiny_engine import image, prompt


def sequence(one: PreparedPrompt, most: int = 8, beams: int = 1) -> Sequence:
    sampling = SamplingParams(temperature=0, num_beams=beams)
    request = EngineRequest("r", one, sampling, None, 0, 0, most, frozenset())
    return Sequence(request, 0, one.token_ids.tolist())


def compute(cache: KVCache, one: Sequence) -> None:
    """As a step does."""
    one.num_computed = len(one.token_ids)
    cache.commit(one)


def extent(one: Sequence) -> tuple[int, int]:
    assert one.extent is not None
    return one.extent.start, one.extent.size


def test_free_runs_merge_and_split() -> None:
    free_list = FreeList(10)
    free_list.remove(3, 4)
    assert list(free_list) == [(0, 3), (7, 3)]
    free_list.remove(0, 3)
    free_list.add(4, 2)
    free_list.add(3, 1)
    assert list(free_list) == [(3, 3), (7, 3)]
    free_list.add(6, 1)
    free_list.add(0, 3)
    assert list(free_list) == [(0, 10)]
    assert free_list.total == 10


def test_the_free_list_is_like_a_list_of_flags() -> None:
    rng = random.Random(1)
    free_list, free = FreeList(40), [True] * 40
    for _ in range(2000):
        start, size = rng.randrange(40), rng.randrange(1, 6)
        run = range(start, min(40, start + size))
        if all(free[block] for block in run):
            free_list.remove(run.start, len(run))
        elif not any(free[block] for block in run):
            free_list.add(run.start, len(run))
        else:
            continue
        for block in run:
            free[block] = not free[block]
        assert [block for start, size in free_list for block in range(start, start + size)] == [
            block for block in range(40) if free[block]
        ]
        assert free_list.total == sum(free)


def places(most: int, seed: int) -> list[object]:
    """Where sequences lie, and what is copied, while they come, grow and go at random."""
    rng = random.Random(seed)
    cache, live, seen = KVCache(300, 16), list[tuple[Sequence, int]](), list[object]()
    for step in range(900):
        if rng.random() < 0.05:
            prefix = rng.choice(([1] * 64, [2] * 40))
            one = sequence(prompt(prefix + [rng.randrange(3, 90) for _ in range(20)]), most=most)
            if cache.admit(one):
                live.append((one, rng.randrange(1, 200)))
                seen.append((step, extent(one)))
        for one, length in list(live):
            compute(cache, one)
            one.token_ids.append(rng.randrange(3, 90))
            if one.num_output >= length or not cache.grow(one):
                cache.release(one)
                live.remove((one, length))
            else:
                seen.append(extent(one))
        seen += [cache.take_copies(), sorted(cache.cached_blocks)]
    return seen


@pytest.mark.parametrize("seed", range(3))
def test_an_answer_that_may_be_long_lies_as_one_of_the_expected_length(seed: int) -> None:
    assert places(512, seed) == places(100_000, seed)


def test_an_answer_that_passes_the_estimate_gets_more_room() -> None:
    cache = KVCache(1000, 4)
    long, other = sequence(prompt([1] * 4), most=5000), sequence(prompt([2] * 4), most=4)
    assert cache.admit(long)
    assert cache.admit(other)
    moves = 0
    for _ in range(1500):
        compute(cache, long)
        long.token_ids.append(3)
        assert cache.grow(long)
        moves += len(cache.take_copies())
    assert moves <= 2
    assert long.expected_length == 4 + 3000 - 1


def test_a_sequence_has_room_to_grow_beside_another() -> None:
    cache = KVCache(16, 4)
    first, second = sequence(prompt([1] * 4), most=13), sequence(prompt([2] * 4), most=5)
    assert cache.admit(first)
    assert cache.admit(second)
    assert extent(first) == (0, 1)
    assert extent(second) == (4, 1)  # behind the three blocks that the first may still need
    first.token_ids += [3] * 12
    assert cache.grow(first)
    assert extent(first) == (0, 4)
    assert cache.take_copies() == ()


def test_a_sequence_that_cannot_grow_in_place_is_moved_with_what_it_computed() -> None:
    cache = KVCache(4, 4, prefix_caching=False)
    first, second = sequence(prompt([1] * 4), most=9), sequence(prompt([2] * 4), most=9)
    assert cache.admit(first)
    assert cache.admit(second)
    assert (extent(first), extent(second)) == ((0, 1), (3, 1))
    compute(cache, second)
    second.token_ids.append(3)
    assert not cache.grow(second, move=False)
    assert cache.grow(second)
    assert extent(second) == (1, 2)
    assert cache.take_copies() == (Copy(12, 4, 4),)
    first.token_ids += [3]
    assert not cache.grow(first)
    assert extent(first) == (0, 1)


def test_what_will_be_entered_is_known_before() -> None:
    for one, beams, filled in ((prompt([1] * 11), 1, range(1, 3)), (prompt([1] * 7), 2, range(1, 1))):
        cache = KVCache(16, 4)
        held = sequence(one, beams=beams)
        assert cache.admit(held)
        held.num_computed = 5
        assert cache.new_full_blocks(held, 5) == range(1)
        cache.commit(held)
        held.token_ids += [2] * 5
        assert cache.new_full_blocks(held, 12) == filled
        held.num_computed = 12
        cache.commit(held)
        assert len(list(cache.cached_blocks)) == filled.stop
        assert not cache.new_full_blocks(held, 12)
    assert not KVCache(16, 4, prefix_caching=False).new_full_blocks(held, 12)


def test_a_prefix_hit_leaves_the_last_position_to_compute() -> None:
    cache = KVCache(16, 4)
    first = sequence(prompt(list(range(12))))
    assert cache.admit(first)
    assert first.num_cached == 0
    compute(cache, first)
    cache.release(first)
    assert cache.num_free == 13
    assert cache.num_available == 16
    again, longer = sequence(prompt(list(range(12)))), sequence(prompt([*range(12), 7, 8]))
    assert cache.admit(again)
    assert (again.num_computed, again.num_cached) == (8, 8)
    assert cache.admit(longer)
    assert longer.num_computed == 12


def test_a_hit_is_extended_in_place_where_possible_and_copied_elsewhere() -> None:
    cache = KVCache(16, 4)
    first = sequence(prompt([*range(8), 50]), most=2)
    assert cache.admit(first)
    compute(cache, first)
    cache.release(first)
    second, third = sequence(prompt([*range(8), 60]), most=2), sequence(prompt([*range(8), 70]), most=2)
    assert cache.admit(second)
    assert extent(second) == (0, 3)
    assert cache.take_copies() == ()
    assert cache.admit(third)
    assert third.extent is not None
    assert cache.take_copies() == (Copy(0, third.extent.start * 4, 8),)
    assert cache.ref_counts[:3] == [2, 2, 1]  # the second and the prefix cache


def test_images_are_distinguished_by_their_digests() -> None:
    cache = KVCache(32, 2)
    first = sequence(prompt(1, image((1, 2, 3)), [5, 6]))
    assert cache.admit(first)
    compute(cache, first)
    same, other = sequence(prompt(1, image((1, 2, 3)), [5, 6])), sequence(prompt(1, image((9, 9, 9)), [5, 6]))
    assert cache.admit(same)
    assert same.num_computed == 8
    assert cache.admit(other)
    assert other.num_computed == 0


def test_another_salt_gives_other_keys() -> None:
    keys = set()
    for salt in (b"a", b"b"):
        keys.add(KVCache(4, 2, salt=salt).next_missing(sequence(prompt([1, 2, 3]))))
    assert len(keys) == 2


def test_the_least_recently_used_is_evicted_first_and_its_end_before_its_beginning() -> None:
    cache = KVCache(4, 2)
    old, new = sequence(prompt([1, 2, 3, 4])), sequence(prompt([5, 6, 7, 8]))
    for one in (old, new):
        assert cache.admit(one)
        compute(cache, one)
        cache.release(one)
    assert cache.admit(sequence(prompt([11, 12]), most=1))
    assert cache.next_missing(sequence(prompt([5, 6, 7, 8, 9]))) is None
    assert cache.next_missing(sequence(prompt([1, 2, 9]))) is None
    assert cache.next_missing(sequence(prompt([1, 2, 3, 4, 9]))) is not None


def test_prompts_of_different_salts_share_no_block() -> None:
    cache = KVCache(32, 4)
    one = prompt([1] * 8, image((1, 1, 1)), [2] * 8)

    def cached(salt: str) -> int | None:
        subject = sequence(dataclasses.replace(one, cache_salt=salt))
        assert cache.admit(subject)
        compute(cache, subject)
        cache.release(subject)
        return subject.num_cached

    assert [cached(salt) for salt in ("", "a", "b")] == [0, 0, 0]
    assert [cached(salt) for salt in ("", "a", "b")] == [20, 20, 20]


def test_hits_are_evicted_if_their_blocks_are_needed() -> None:
    cache = KVCache(5, 2)
    first = sequence(prompt([1, 2]), most=1)
    blocker = sequence(prompt([7, 7]), most=1)
    assert cache.admit(blocker)
    assert cache.admit(first)
    compute(cache, first)
    cache.release(first)
    cache.release(blocker)
    whole = sequence(prompt([1, 2, 3, 4, 5, 6, 7, 8, 9, 10]), most=1)
    assert cache.admit(whole)
    assert extent(whole) == (0, 5)


def test_a_fork_of_a_beam_copies_what_differs() -> None:
    cache = KVCache(16, 2)
    beams = [sequence(prompt([1, 2, 3]), beams=2) for _ in range(2)]
    for beam in beams:
        assert cache.admit(beam)
    beams[0].num_computed = 3
    cache.commit(beams[0])
    cache.fork(*beams)
    assert beams[1].num_computed == 3
    assert [move.length for move in cache.take_copies()] == [3]
    beams[0].token_ids += [4, 5, 6]
    beams[1].token_ids += [4, 8, 9]
    for beam in beams:
        assert cache.grow(beam)
        beam.num_computed = 5
        cache.commit(beam)
    assert len(list(cache.cached_blocks)) == 1  # of the prompt: the output tokens of beams change
    cache.fork(*beams)
    assert beams[1].token_ids == beams[0].token_ids
    assert [move.length for move in cache.take_copies()] == [1]


@pytest.mark.parametrize("caching", [True, False])
def test_all_blocks_are_free_in_the_end(caching: bool) -> None:
    rng = random.Random(5)
    cache = KVCache(24, 2, prefix_caching=caching)
    live: list[Sequence] = []
    for _ in range(1500):
        one = sequence(prompt([rng.randrange(3) for _ in range(rng.randrange(1, 12))]))
        if rng.random() < 0.5 and cache.admit(one):
            compute(cache, one)
            live.append(one)
        elif live:
            one = rng.choice(live)
            one.token_ids.append(1)
            if rng.random() < 0.5 and cache.grow(one):
                compute(cache, one)
            else:
                one.token_ids.pop()
                cache.release(one)
                live.remove(one)
        held = {block for start, size in map(extent, live) for block in range(start, start + size)}
        assert cache.num_available == cache.num_blocks - len(held)
    for one in live:
        cache.release(one)
    assert cache.num_available == cache.num_blocks
    assert cache.num_free == cache.num_blocks - len(list(cache.cached_blocks))
