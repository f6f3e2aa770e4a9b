"""What replicas report of their work: of a real processor and a real engine, without Ray."""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Mapping

import numpy as np
import pytest
from PIL import Image

from deployments.autoscaling import Figures
from deployments.model import LlavaModel
from deployments.preprocessor import ImagePreprocessor
from deployments.work import TEXT_MEGAPIXELS, ImageWork, ModelWork
from llava_serve import SamplingParams
from llava_serve.config import EngineOptions, ImageOptions, ModelOptions
from llava_serve.engine.online_load import OnlineLoad
from llava_serve.engine.stats import EngineStats
from llava_serve.types import Asked, ImagePart, Message, PreparedPrompt, Query, RawPrompt, TextPart


def picture(width: int, height: int) -> bytes:
    """A JPEG, blurred as a photograph is."""
    coarse = np.random.default_rng(0).integers(0, 255, (height // 25, width // 25, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height)).save(file, "JPEG")
    return file.getvalue()


def prepared(*sizes: tuple[int, int], seconds: float) -> PreparedPrompt:
    """As the processor returns it, after so much work."""
    stages = (
        ("queue", 99.0),
        ("fetch", 99.0),
        ("decode", seconds / 2),
        ("tile", seconds / 4),
        ("tokenize", seconds / 4),
    )
    return PreparedPrompt(np.zeros(1, np.int32), image_sizes=sizes, stages=stages)


def test_megapixels_are_measured_and_waiting_ones_are_estimated_by_their_bytes() -> None:
    work = ImageWork(num_threads=2)
    for _ in range(100):
        work.done(3_000_000, prepared((4000, 3000), seconds=0.5))
    figures = work.figures()
    assert figures.work_per_request == pytest.approx(12 + TEXT_MEGAPIXELS)
    assert figures.work_per_s == pytest.approx(2 * (12 + TEXT_MEGAPIXELS) / 0.5)  # two threads
    photograph = Query("What?", (ImagePart(bytes(3_000_000)),))
    text: Asked = [Message("user", (TextPart("Hello"),))]
    with work.queued(photograph), work.queued(text), work.queued(RawPrompt("Hello")):
        assert work.figures().queued_work == pytest.approx(12 + 3 * TEXT_MEGAPIXELS)
    assert work.figures().queued_work == 0


def test_the_speed_follows_what_is_prepared_now() -> None:
    work = ImageWork(num_threads=1)
    for _ in range(300):
        work.done(3_000_000, prepared((4000, 3000), seconds=0.25))
    for _ in range(300):
        work.done(10_000, prepared((200, 200), seconds=0.01))
    figures = work.figures()
    assert figures.work_per_s == pytest.approx((0.04 + TEXT_MEGAPIXELS) / 0.01, rel=0.3)
    assert figures.work_per_request == pytest.approx(0.04 + TEXT_MEGAPIXELS, rel=0.5)


def test_prompts_without_pictures_do_not_fade_what_is_known_of_pictures() -> None:
    work = ImageWork(num_threads=1)
    work.done(3_000_000, prepared((4000, 3000), seconds=0.25))
    for _ in range(50_000):
        work.done(0, prepared(seconds=0.001))
    with work.queued(Query("What?", (ImagePart(bytes(3_000_000)),))):
        assert work.figures().queued_work == pytest.approx(12 + TEXT_MEGAPIXELS)


def test_work_that_fails_does_not_wait_for_ever() -> None:
    work = ImageWork(num_threads=1)
    with pytest.raises(ZeroDivisionError), work.queued(RawPrompt("Hello")):
        raise ZeroDivisionError
    assert work.figures().queued_work == 0


def test_the_room_of_a_request_and_the_time_of_prefill_are_measured() -> None:
    work = ModelWork()
    prompt = PreparedPrompt(np.zeros(700, np.int32))
    for _ in range(3):
        work.arrived(prompt)
    state = EngineStats(0, 0, 64, 64, 0, 0, 0, 0, prefill_tokens_per_s=5000)
    idle = work.figures(state)
    assert (idle.queued_work, idle.work_per_s, idle.use, idle.use_per_request) == (0, 5000, 0, 0)
    assert idle.work_per_request == pytest.approx(700)
    busy = work.figures(dataclasses.replace(state, online=OnlineLoad(2100, sequences=3, room=0.75)))
    assert (busy.queued_work, busy.use) == (2100, 0.75)
    assert busy.use_per_request == pytest.approx(0.25)
    # All of the time since the last report went into prefill, and more: the clock has hardly moved.
    assert work.figures(dataclasses.replace(state, prefill_seconds=60.0)).use > 1


def check_report(stats: Mapping[str, float]) -> None:
    """Serve turns the reports of a replica off for good if one is of the wrong type."""
    assert stats.keys() == {each.name for each in dataclasses.fields(Figures)}
    assert all(type(value) in (int, float) for value in stats.values())


@pytest.mark.extended
async def test_a_replica_of_the_picture_tier_reports_what_it_has_done() -> None:
    tier = ImagePreprocessor(ModelOptions(), ImageOptions())
    check_report(await tier.record_autoscaling_stats())
    made = await tier.prepare(Query("What is this?", (ImagePart(picture(1000, 800)),)), None, time.time() + 60)
    assert isinstance(made, PreparedPrompt)
    stats = await tier.record_autoscaling_stats()
    check_report(stats)
    assert stats["work_per_request"] == pytest.approx(0.8 + TEXT_MEGAPIXELS)
    assert stats["work_per_s"] > 0
    assert stats["use"] > 0
    assert stats["queued_work"] == 0


async def test_a_model_replica_reports_what_it_has_done() -> None:
    tier = LlavaModel(ModelOptions(device="cpu"), EngineOptions(max_num_seqs=4, num_threads=1))
    check_report(await tier.record_autoscaling_stats())
    prompt = PreparedPrompt(np.arange(10, 74, dtype=np.int32))
    async for _ in tier.generate(prompt, SamplingParams(max_new_tokens=2), 0, "one", time.time() + 60):
        pass
    stats = await tier.record_autoscaling_stats()
    check_report(stats)
    assert stats["work_per_request"] == pytest.approx(64)
    assert stats["work_per_s"] > 0
    assert stats["queued_work"] == 0
