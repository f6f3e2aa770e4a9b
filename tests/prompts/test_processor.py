"""The processor with several images: one decoded at a time, a check before each, and the cache of tiles."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deployments.preprocessor import ImagePreprocessor
from llava_serve import processor
from llava_serve.checkpoints import open_checkpoint
from llava_serve.config import ImageOptions, ModelOptions
from llava_serve.errors import DeadlineExceededError, PromptTooLongError
from llava_serve.images import decoder
from llava_serve.images.decode import decode_image
from llava_serve.images.tile_cache import CachedTiles, TileCache
from llava_serve.images.tiles import digest
from llava_serve.threaded_processor import ThreadedProcessor
from llava_serve.types import ImagePart, Message, TextPart
from support.api_server import wait_until
from support.demo import DEMO_IMAGE

PICTURES = 6


@pytest.fixture
def subject() -> processor.Processor:
    return processor.Processor(open_checkpoint("builtin"), ImageOptions(max_per_request=100, cache_bytes=0))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Image.Image]]:
    """References to the images that were decoded; those that are alive are still held."""
    pictures: list[weakref.ref[Image.Image]] = []

    def decode(*args: Any, **kwargs: Any) -> Image.Image:
        assert not any(picture() for picture in pictures), "another decoded picture is held"
        image = decode_image(*args, **kwargs)
        pictures.append(weakref.ref(image))
        return image

    monkeypatch.setattr(decoder, "decode_image", decode)
    return pictures


def about(count: int) -> list[Message]:
    pictures = [ImagePart(DEMO_IMAGE.read_bytes())] * count
    return [Message("user", (*pictures, TextPart("What are these?")))]


def test_one_decoded_picture_is_held_at_a_time(subject: processor.Processor, decoded: list[Any]) -> None:
    prepared = subject.prepare(about(PICTURES))
    assert len(decoded) == len(prepared.tiles) == len(prepared.image_sizes) == PICTURES


def test_a_prompt_too_long_says_its_whole_length(subject: processor.Processor, decoded: list[Any]) -> None:
    one = subject.prepare(about(1)).num_tokens
    each = subject.prepare(about(2)).num_tokens - one
    with pytest.raises(PromptTooLongError) as refusal:
        subject.prepare(about(30))
    assert refusal.value.got == one + 29 * each


def test_a_failed_check_ends_the_work_at_the_next_image(subject: processor.Processor, decoded: list[Any]) -> None:
    def check() -> None:
        if len(decoded) == 2:
            raise DeadlineExceededError("The time is up.")

    with pytest.raises(DeadlineExceededError):
        subject.prepare(about(PICTURES), check=check)
    assert len(decoded) == 2


@pytest.mark.parametrize("tier", ["in this process", "replica"])
async def test_a_cancelled_caller_ends_the_work_at_the_next_image(
    subject: processor.Processor, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[float] = []
    cancelled = threading.Event()

    def decode(*args: Any, **kwargs: Any) -> Image.Image:
        began.append(time.monotonic())
        cancelled.wait(60)
        return decode_image(*args, **kwargs)

    monkeypatch.setattr(decoder, "decode_image", decode)
    call: Any
    if tier == "replica":
        stage = ImagePreprocessor(ModelOptions(), ImageOptions())
        stage._processor.processor = subject  # which decodes here, where it can be watched
        call = stage.prepare(about(60), None, time.time() + 60)
    else:
        call = ThreadedProcessor(subject, 2).prepare(lambda: about(60), deadline=time.time() + 60)
    task = asyncio.create_task(call)
    await asyncio.to_thread(wait_until, lambda: bool(began))
    task.cancel()
    await asyncio.sleep(0)  # in which the call learns of it
    cancelled.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.5)
    assert len(began) <= 2


def test_a_cached_image_is_not_decoded_again(decoded: list[Any]) -> None:
    subject = processor.Processor(open_checkpoint("builtin"), ImageOptions(max_per_request=100))
    first, again = subject.prepare(about(2)), subject.prepare(about(3))
    assert len(decoded) == 1
    assert (
        set(again.digests) == set(first.digests) == {digest(first.tiles[0], first.image_sizes[0], subject.spec.image)}
    )
    assert again.image_sizes == (first.image_sizes[0],) * 3
    with pytest.raises(PromptTooLongError):  # cached images count like others
        subject.prepare(about(30))


def test_the_most_recent_tiles_are_cached_within_a_limit() -> None:
    def image(name: str, size: int) -> CachedTiles:
        return CachedTiles((1, 1), 1, np.zeros(size, np.uint8), name)

    subject = TileCache(10)
    subject.put(b"a", image("a", 4))
    subject.put(b"b", image("b", 4))
    subject.put(b"a", image("not again", 4))
    known = subject.get(b"a")
    assert known is not None
    assert known.digest == "a"
    subject.put(b"c", image("c", 4))
    assert subject.get(b"b") is None
    assert subject.get(b"a") is known
    subject.put(b"large", image("large", 11))
    assert subject.get(b"large") is None
    assert subject.get(b"a") is known  # an image that does not fit evicts nothing
    subject.put(b"d", image("d", 10))
    assert subject.get(b"d") is not None
    assert [subject.get(key) for key in (b"a", b"c")] == [None] * 2
