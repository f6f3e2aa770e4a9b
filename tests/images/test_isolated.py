"""Decoding in child processes: the same tiles, an end to what passes a limit, and nothing left behind."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from llava_serve.checkpoints import open_checkpoint
from llava_serve.config import ImageOptions
from llava_serve.deadline import check_deadline
from llava_serve.errors import DeadlineExceededError, InvalidImageError
from llava_serve.images import decode_process
from llava_serve.images.decode_process import WORKER
from llava_serve.images.decoder import InProcessDecoder
from llava_serve.images.isolated import IsolatedDecoder
from llava_serve.images.tile_cache import CachedTiles
from llava_serve.processor import Processor
from llava_serve.threaded_processor import ThreadedProcessor
from llava_serve.types import ImagePart, Message, TextPart
from support import odd_decoder
from support.api_server import wait_until
from support.broken_images import FILES, broken
from support.demo import DEMO_IMAGE
from support.paths import CHECKPOINTS, GOLDEN

SPEC = open_checkpoint("builtin")
ROOM = 100_000
GOOD = DEMO_IMAGE.read_bytes()
AT_ONCE_S = 30.0
"""Good pictures take some milliseconds, and a process a third of a second to start; a busy machine is given more. What
must not be waited for takes a minute."""

Decoders = Callable[..., IsolatedDecoder]


def processes() -> list[psutil.Process]:
    """The decoding processes of this one."""
    children = psutil.Process().children()
    return [child for child in children if "decode" in " ".join(child.cmdline())]


@pytest.fixture
def decoders() -> Iterator[Decoders]:
    """Makes decoders, and ends their processes."""
    made: list[IsolatedDecoder] = []

    def make(worker: str = odd_decoder.WORKER, **options: Any) -> IsolatedDecoder:
        made.append(IsolatedDecoder(ImageOptions(**options), SPEC.image, worker))
        return made[-1]

    yield make
    for each in made:
        each.close()
    assert not processes()


@cache
def large(mode: str, kind: str = "PNG", side: int = 6000, **options: Any) -> bytes:
    """A good picture, of 36 million pixels if nothing else is said, in a few kilobytes."""
    out = io.BytesIO()
    Image.new(mode, (side, side)).save(out, kind, **options)
    return out.getvalue()


def equal(one: CachedTiles, other: CachedTiles) -> bool:
    same = (one.size, one.count, one.digest) == (other.size, other.count, other.digest)
    return same and np.array_equal(one.tiles, other.tiles)


def check_good(decoder: IsolatedDecoder) -> None:
    """A good picture is answered at once, and rightly."""
    began = time.monotonic()
    assert equal(decoder.tiles_of(GOOD, ROOM), InProcessDecoder(ImageOptions(), SPEC.image).tiles_of(GOOD, ROOM))
    assert time.monotonic() - began < AT_ONCE_S


@pytest.mark.parametrize("name", ["llava-v1.5-tiny", "llava-v1.6-mistral-tiny", "llava-llama-2-tiny-chat"])
def test_tiles_are_those_of_this_process(name: str) -> None:
    options, processing = ImageOptions(), open_checkpoint(str(CHECKPOINTS / name)).image
    isolated, here = IsolatedDecoder(options, processing), InProcessDecoder(options, processing)
    for path in sorted((GOLDEN / "images").iterdir()):
        data = path.read_bytes()
        made = isolated.tiles_of(data, ROOM)
        assert equal(made, here.tiles_of(data, ROOM))
        assert made.tiles.flags.writeable  # as torch wants it
        assert equal(isolated.tiles_of(data, made.count), here.tiles_of(data, made.count))  # there is no room
    for data in (b"", b"not a picture", GOOD[:500]):
        refusals = []
        for each in (isolated, here):
            with pytest.raises(InvalidImageError) as refusal:
                each.tiles_of(data, ROOM)
            refusals.append(refusal.value.args)
        assert refusals[0] == refusals[1]
    isolated.close()


def test_decoders_do_not_print(decoders: Decoders, capfd: pytest.CaptureFixture[str]) -> None:
    """What libtiff finds wrong would be a line in the server's log for each row of each image."""
    data = FILES["tiff group 4"]
    for subject, is_quiet in ((decoders(WORKER), True), (InProcessDecoder(ImageOptions(), SPEC.image), False)):
        for bad in broken(data, 20, seed=3):
            with suppress(InvalidImageError):
                subject.tiles_of(bad, ROOM)
        assert (capfd.readouterr().err == "") is is_quiet


def test_a_picture_that_takes_too_long_is_ended(decoders: Decoders) -> None:
    subject = decoders(decode_timeout_s=2)
    check_good(subject)
    for slow in (b"ever", b"sleep 60"):
        began = time.monotonic()
        with pytest.raises(InvalidImageError, match="takes too long to decode"):
            subject.tiles_of(slow, ROOM)
        assert time.monotonic() - began < AT_ONCE_S
        check_good(subject)


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "PNG"},
        {"kind": "WEBP", "method": 0},  # these two decoders do not say why they give up
        {"kind": "JPEG", "progressive": True},
    ],
)
def test_a_picture_that_takes_too_much_memory_is_ended(options: Any, decoders: Decoders) -> None:
    side = 4000
    picture = large("RGB", side=side, **options)
    least = 3 * side**2  # of the pixels alone
    subject = decoders(decode_memory_bytes=least + (8 << 20) if "progressive" in options else least // 2)
    with pytest.raises(InvalidImageError, match="takes too much memory to decode"):
        subject.tiles_of(picture, ROOM)
    check_good(subject)
    assert decoders(decode_memory_bytes=10 * least).tiles_of(picture, ROOM).size == (side, side)


def test_little_memory_does_for_small_pictures(decoders: Decoders) -> None:
    check_good(decoders(decode_memory_bytes=16 << 20))


def test_the_deadline_ends_decoding(decoders: Decoders) -> None:
    subject = decoders()
    check_good(subject)
    began = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        subject.tiles_of(b"sleep 60", ROOM, partial(check_deadline, time.time() + 0.2))
    assert 0.2 <= time.monotonic() - began < AT_ONCE_S
    check_good(subject)


def test_unwanted_work_that_ends_soon_costs_no_process(decoders: Decoders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_process, "_GRACE_S", AT_ONCE_S)
    subject = decoders()
    check_good(subject)
    before = {process.pid for process in processes()}
    with pytest.raises(DeadlineExceededError):
        subject.tiles_of(b"sleep 0.2", ROOM, partial(check_deadline, 0.0))
    check_good(subject)
    assert {process.pid for process in processes()} == before


async def test_a_client_that_disconnects_gives_its_slot_back(decoders: Decoders) -> None:
    processor = Processor(SPEC, ImageOptions())
    processor._decoder = decoders()
    subject = ThreadedProcessor(processor, 1)  # one slot
    slow, good = ([Message("user", (ImagePart(data), TextPart("Hi")))] for data in (b"sleep 60", GOOD))
    await subject.prepare(lambda: good)
    disconnecting = asyncio.create_task(subject.prepare(lambda: slow))
    await asyncio.sleep(0.2)
    disconnecting.cancel()
    began = time.monotonic()
    prepared = await subject.prepare(lambda: good)
    assert time.monotonic() - began < AT_ONCE_S
    assert len(prepared.tiles) == 1


def test_a_process_that_is_killed_is_replaced_and_its_picture_decoded(decoders: Decoders, tmp_path: Path) -> None:
    subject, victim = decoders(), tmp_path / "pid"
    with ThreadPoolExecutor(2) as callers:
        killed = callers.submit(subject.tiles_of, odd_decoder.once(victim), ROOM)
        neighbour = callers.submit(subject.tiles_of, b"sleep 1", ROOM)
        wait_until(lambda: victim.exists() and bool(victim.read_text()), 30)
        os.kill(int(victim.read_text()), signal.SIGKILL)
        good = InProcessDecoder(ImageOptions(), SPEC.image).tiles_of(GOOD, ROOM)
        for future in (killed, neighbour):
            assert equal(future.result(30), good)
    check_good(subject)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV"])
def test_a_picture_that_ends_its_process_twice_is_refused(name: str, decoders: Decoders) -> None:
    subject = decoders()
    with pytest.raises(InvalidImageError, match="cannot be decoded"):
        subject.tiles_of(f"die {name}".encode(), ROOM)
    check_good(subject)


def test_processes_that_are_killed_while_idle_harm_nobody(decoders: Decoders) -> None:
    subject = decoders()
    with ThreadPoolExecutor(2) as callers:
        list(callers.map(lambda _: subject.tiles_of(b"sleep 0.5", ROOM), range(2)))
    killed = processes()
    assert len(killed) == 3
    for process in killed:
        process.kill()
    psutil.wait_procs(killed)
    check_good(subject)
    assert not {process.pid for process in processes()} & {process.pid for process in killed}


def test_a_fault_of_ours_is_reported_whole_and_ends_nothing(decoders: Decoders) -> None:
    subject = decoders()
    check_good(subject)
    before = {process.pid for process in processes()}
    with pytest.raises(RuntimeError, match=r"(?s)odd_decoder.*LookupError: a fault of ours"):
        subject.tiles_of(b"fail", ROOM)
    check_good(subject)
    assert {process.pid for process in processes()} == before


def test_processes_that_do_not_start_are_no_fault_of_the_picture(decoders: Decoders) -> None:
    with pytest.raises(RuntimeError, match="No decoding process starts"):
        decoders("no.such.module").tiles_of(GOOD, ROOM)


def test_a_request_of_sixteen_pictures(decoders: Decoders) -> None:
    out, pictures = io.BytesIO(), []
    for shade in range(16):
        out.seek(0)
        Image.new("RGB", (64, 48), (shade, 0, 0)).save(out, "PNG")
        pictures.append(ImagePart(out.getvalue()))
    messages = [Message("user", (*pictures, TextPart("What are these?")))]
    processing, options = open_checkpoint(str(CHECKPOINTS / "llava-v1.5-tiny")), ImageOptions()
    isolated, here = (Processor(processing, each).prepare(messages) for each in (options.isolated, options))
    assert isolated.digests == here.digests
    assert len(set(isolated.digests)) == 16
    assert all(map(np.array_equal, isolated.tiles, here.tiles))


def test_nothing_grows(decoders: Decoders) -> None:
    """Two hundred pictures from four callers; some are bad, some end their process."""
    subject, me = decoders(decode_timeout_s=30), psutil.Process()

    def one(number: int) -> None:
        if number % 100 == 1:
            with pytest.raises(InvalidImageError):
                subject.tiles_of(b"die SIGKILL", ROOM)
        elif number % 5 == 0:
            with pytest.raises(InvalidImageError):
                subject.tiles_of(b"not a picture", ROOM)
        else:
            assert len(subject.tiles_of(GOOD, ROOM).tiles) == 1

    with ThreadPoolExecutor(4) as callers:
        list(callers.map(one, range(20)))
        files, shared = me.num_fds(), set(os.listdir("/dev/shm"))
        before = len(processes())
        list(callers.map(one, range(200)))
    assert len(processes()) <= 5  # four callers and a spare
    wait_until(lambda: me.num_fds() - files <= 2 * (len(processes()) - before))
    wait_until(lambda: set(os.listdir("/dev/shm")) <= shared)  # those of other programs come and go
    assert all(process.memory_info().rss < 200 << 20 for process in processes())


def test_only_pictures_in_isolation_have_processes() -> None:
    text, picture = [Message("user", (TextPart("Hi"),))], [Message("user", (ImagePart(GOOD), TextPart("Hi")))]
    Processor(SPEC, ImageOptions()).prepare(picture)
    assert not processes()
    isolated = Processor(SPEC, ImageOptions(isolate=True))
    isolated.prepare(text)
    wait_until(lambda: len(processes()) == 1, 30)  # the spare
    isolated.prepare(picture)
    wait_until(lambda: len(processes()) == 2, 30)
    del isolated
    assert not processes()
