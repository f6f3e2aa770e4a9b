"""What ends decoding beside a picture's own limits: the pixels of its request, and the end of what has started it."""

from __future__ import annotations

import io

import psutil
import pytest
from PIL import Image

from llava_serve.async_llm import AsyncLLM
from llava_serve.checkpoints import open_checkpoint
from llava_serve.config import EngineOptions, ImageOptions, ModelOptions
from llava_serve.errors import InvalidImageError
from llava_serve.images.isolated import IsolatedDecoder
from llava_serve.processor import Processor
from llava_serve.sampling_params import SamplingParams
from llava_serve.types import ImagePart, Message, TextPart
from support import odd_decoder
from support.demo import DEMO_IMAGE

SPEC = open_checkpoint("builtin")


def png(side: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), (side % 256, 0, 0)).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("isolate", [False, True])
def test_pixels_of_a_request_are_counted_by_headers(isolate: bool) -> None:
    """The second picture has a header and no pixels: only one that is decoded is damaged."""
    subject = Processor(SPEC, ImageOptions(max_total_pixels=100 * 100 + 50 * 50 - 1, isolate=isolate))
    for second in (png(50)[:60], png(50)):
        parts = (ImagePart(png(100)), ImagePart(second), TextPart("What are these?"))
        with pytest.raises(InvalidImageError, match=r"Image 2 of 2: .* more than 12,499 pixels in all") as refused:
            subject.prepare([Message("user", parts)])
        assert refused.value.param == "messages[0].content[1]"
    twice = (ImagePart(png(100)), ImagePart(png(100)), TextPart("What are these?"))
    with pytest.raises(InvalidImageError, match="in all"):  # from the cache
        subject.prepare([Message("user", twice)])
    subject.close()


def test_each_decoding_that_is_ended_is_counted() -> None:
    ended: list[None] = []
    subject = IsolatedDecoder(
        ImageOptions(decode_timeout_s=1), SPEC.image, odd_decoder.WORKER, lambda: ended.append(None)
    )
    subject.tiles_of(DEMO_IMAGE.read_bytes(), 1000)
    with pytest.raises(InvalidImageError):
        subject.tiles_of(b"not a picture", 1000)
    assert len(ended) == 0
    with pytest.raises(InvalidImageError, match="too long"):
        subject.tiles_of(b"sleep 60", 1000)
    assert len(ended) == 1
    with pytest.raises(InvalidImageError, match="cannot be decoded"):
        subject.tiles_of(b"die SIGKILL", 1000)
    assert len(ended) == 3  # it was tried twice
    subject.close()


async def test_closing_the_library_ends_its_processes() -> None:
    llm = AsyncLLM(ModelOptions(device="cpu"), EngineOptions(num_threads=1), image_options=ImageOptions(isolate=True))
    before = set(psutil.Process().children())
    await llm.generate("What is this?", DEMO_IMAGE, SamplingParams(temperature=0, max_tokens=2))
    started = set(psutil.Process().children()) - before
    assert started
    llm.close()
    assert not psutil.wait_procs(list(started), timeout=5)[1]
    AsyncLLM("builtin", EngineOptions(num_threads=1)).close()  # one that prepared nothing
