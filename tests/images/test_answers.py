"""The builtin model answers odd but good images as it answers the plain one."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from llava_serve import LLM, SamplingParams
from llava_serve.config import EngineOptions, ImageOptions
from llava_serve.images.decode import decode_image
from support.demo import DEMO_IMAGE, DEMO_QUESTION
from support.good_images import GOOD, TRANSPARENT
from support.odd_images import (
    SCENE,
    chunk,
    difference,
    encoded,
    exif_block,
    hidden,
    jpeg_with,
    png_of,
    png_with,
    tiff,
)

OPTIONS = ImageOptions()
BLANK = Image.new("RGB", SCENE.size, "lime")
DEMO = Image.open(DEMO_IMAGE).convert("RGB")


def on_transparent_ground() -> Image.Image:
    pixels = np.asarray(DEMO)
    return Image.fromarray(np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)]))


ASKED: dict[str, Callable[[], Any]] = {
    "AVIF": lambda: encoded(DEMO, "AVIF", quality=90),
    "CMYK JPEG": lambda: encoded(DEMO.convert("CMYK"), "JPEG", quality=95),
    "JPEG with broken EXIF": lambda: jpeg_with(encoded(DEMO, "JPEG", dpi=(72, 72)), (0xE1, b"Exif\0\0garbage!")),
    "JPEG without an end": lambda: encoded(DEMO, "JPEG")[:-2],
    "JPEG on its side": lambda: encoded(DEMO.rotate(90, expand=True), "JPEG", exif=exif_block(6)),
    "PIL image on its side": lambda: Image.open(
        io.BytesIO(encoded(DEMO.rotate(90, expand=True), "JPEG", exif=exif_block(6)))
    ),
    "PNG with large text": lambda: png_with(encoded(DEMO), chunk(b"zTXt", b"a\0\0" + bytes(9))),
    "16-bit planes": lambda: tiff(np.asarray(DEMO).astype(np.uint16) * 257, planar=True),
    "float TIFF": lambda: tiff(np.asarray(DEMO).astype(np.float32) / 255),
    "16-bit PNG": lambda: png_of(np.asarray(DEMO).astype(np.uint16) * 257, 16, 2),
    "MPO": lambda: encoded(DEMO, "MPO", save_all=True, append_images=[BLANK]),
    "RGBA": lambda: encoded(on_transparent_ground()),
}


def answers(images: list[Any]) -> list[str]:
    llm = LLM("builtin", device="cpu", engine=EngineOptions(num_threads=1))
    sampling = SamplingParams(temperature=0, max_new_tokens=16)
    return [each.text for each in llm.generate([DEMO_QUESTION] * len(images), images=images, sampling=sampling)]


def test_the_builtin_model_answers_odd_images() -> None:
    said = dict(zip(ASKED, answers([write() for write in ASKED.values()]), strict=True))
    assert all("red" in text for text in said.values()), said


def test_the_builtin_model_answers_every_form_of_an_image() -> None:
    """Of the same scene in colour and in grey."""
    forms = [*GOOD.items(), *((f"{name}, transparent", form) for name, form in TRANSPARENT.items())]
    assert len(forms) >= 80
    said = answers([write() for _, (write, _) in forms])
    wrong = {
        name: text
        for (name, (_, seen)), text in zip(forms, said, strict=True)
        if ("red" if is_coloured(seen) else "black") not in text
    }
    assert not wrong


def is_coloured(image: Image.Image) -> bool:
    return bool(np.ptp(np.asarray(image.convert("RGB")).astype(int), axis=-1).max() > 100)


def test_the_builtin_model_sees_what_a_person_sees() -> None:
    """A black drawing on transparent ground, whose hidden colour is black as well."""
    shapes = np.asarray(DEMO)
    ground = np.abs(shapes.astype(int) - shapes[0, 0]).sum(-1) < 30
    alpha = np.where(ground, 0, 255).astype(np.uint8)
    logo = np.dstack([np.where(ground[..., None], 0, shapes), alpha]).astype(np.uint8)
    seen = decode_image(encoded(Image.fromarray(logo)), OPTIONS)
    expected = Image.fromarray(np.where(ground[..., None], 255, shapes).astype(np.uint8))
    assert difference(seen, expected) == 0
    assert difference(decode_image(encoded(hidden()), OPTIONS), SCENE) == 0
