"""How much online requests ask of an engine, and how fast it computes prompts."""

from __future__ import annotations

import pytest

from llava_serve.engine.engine import Engine
from llava_serve.engine.online_load import NO_LOAD, OnlineLoad
from llava_serve.engine.prefill_budget import PrefillBudget
from llava_serve.sampling_params import SamplingParams
from support.tiny_engine import FEATURES, TinyModel, engine, image, prompt

SAMPLING = SamplingParams(max_new_tokens=40, ignore_eos=True)


def add(subject: Engine, name: str, tokens: int, *, priority: int = 0, tiles: int = 0) -> None:
    picture = [image((hash(name) % 200, 0, 0), tiles)] if tiles else []
    asked = prompt(list(range(3, 3 + tokens)), *picture)
    subject.add(subject.validator.accept(name, asked, SAMPLING, priority=priority))


def test_prompts_that_wait_count_text_and_images_and_places() -> None:
    subject = engine(TinyModel(), max_num_seqs=4)
    assert subject.stats.online == NO_LOAD
    add(subject, "text", 10)
    add(subject, "picture", 5, tiles=2)
    assert subject.stats.online == OnlineLoad(10 + 5 + 2 * FEATURES, sequences=2, room=0.5)
    while subject.stats.online.waiting_tokens:
        subject.step()
    assert subject.stats.online.sequences == 2  # they generate
    for number in range(6):
        add(subject, f"more {number}", 7)
    assert subject.stats.online == OnlineLoad(42, sequences=8, room=2.0)
    while subject.has_work:
        subject.step()
    assert subject.stats.online == NO_LOAD


def test_batch_work_asks_for_nothing() -> None:
    subject = engine(TinyModel(), max_num_seqs=4)
    add(subject, "batch", 30, priority=1)
    assert subject.stats.online == NO_LOAD
    subject.step()
    assert subject.stats.online == NO_LOAD


def test_long_sequences_count_by_their_blocks() -> None:
    subject = engine(TinyModel(), blocks=16, block_size=8, max_num_seqs=64)
    add(subject, "long", 80)
    subject.step()
    first = subject.stats.online.room
    assert first >= 10 / 16
    add(subject, "another", 80)  # as large: it will not fit
    assert subject.stats.online.room == pytest.approx(2 * first)


def test_the_speed_of_prefill_is_that_of_the_last_steps_with_it() -> None:
    budget = PrefillBudget(2048, 8)
    budget.observe(60.0, 0, 0, 1)  # the warm-up
    assert budget.tokens_per_s == 0
    for _ in range(40):
        budget.observe(0.1, 0, 500, 0)
    assert budget.tokens_per_s == pytest.approx(5000)
    for _ in range(40):
        budget.observe(0.1, 0, 100, 2)  # the tower's time counts
    assert budget.tokens_per_s == pytest.approx(1000, rel=0.01)
    before = budget.prefill_seconds
    assert before == pytest.approx(8.0)
    for _ in range(7):
        budget.observe(0.02, 4, 0, 0)
    budget.observe(0.05, 4, 50, 0)
    assert budget.prefill_seconds - before == pytest.approx(0.03)  # decoding alone takes the rest
