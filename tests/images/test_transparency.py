"""Transparent images lie over white, as a person sees them; `drop` shows what is hidden, as the original does."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_serve.checkpoints import open_checkpoint
from llava_serve.checkpoints.spec import Layout
from llava_serve.config import ImageOptions
from llava_serve.images.decode import decode_image
from llava_serve.images.fetch import read_local_source
from llava_serve.processor import Processor
from llava_serve.types import PreparedPrompt
from support.good_images import BLACK, RGBA, TRANSPARENT, bmp_v4, grey_with_alpha, indexed
from support.odd_images import GREY, SCENE, difference, encoded

WHITE, DROP = ImageOptions(), ImageOptions(transparency="drop")


@pytest.mark.parametrize("name", TRANSPARENT)
def test_what_is_hidden_is_not_seen(name: str) -> None:
    write, expected = TRANSPARENT[name]
    assert difference(decode_image(write(), WHITE), expected) < 1.5


@pytest.mark.parametrize("name", TRANSPARENT)
def test_drop_is_the_originals_way(name: str) -> None:
    """The original's `convert("RGB")`, but for 16-bit grey, which that saturates."""
    data = TRANSPARENT[name][0]()
    decoded = decode_image(data, DROP)
    assert difference(decoded, TRANSPARENT[name][1]) > 40
    if not name.startswith("TIFF") or name in ("TIFF RGBA", "TIFF LA"):
        with Image.open(io.BytesIO(data)) as image:
            if image.mode != "I;16":
                np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image.convert("RGB")))


def test_half_transparent() -> None:
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    assert decode_image(encoded(half), WHITE).getpixel((4, 4)) == (127, 127, 127)
    assert decode_image(encoded(half), DROP).getpixel((4, 4)) == (0, 0, 0)


def test_a_bitmap_whose_alpha_is_zero_all_over_has_none() -> None:
    clear = SCENE.convert("RGBA")
    clear.putalpha(0)
    assert difference(decode_image(bmp_v4(clear), WHITE), SCENE) == 0


@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_both_layouts_see_the_same(layout: Layout) -> None:
    spec = open_checkpoint("builtin")
    spec = replace(spec, image=replace(spec.image, layout=layout))

    def digests(options: ImageOptions, image: Image.Image) -> tuple[str, ...]:
        prepared: PreparedPrompt = Processor(spec, options).prepare_query("What is it?", [encoded(image)])
        return prepared.digests

    assert digests(WHITE, RGBA) == digests(WHITE, BLACK) == digests(WHITE, SCENE) == digests(DROP, SCENE)
    assert digests(DROP, RGBA) != digests(WHITE, RGBA)


PIL_IMAGES = {
    "RGBA": RGBA,
    "LA": grey_with_alpha(),
    "La": GREY.convert("LA").convert("La"),
    "P": indexed()[0],
    "PA": indexed()[0].convert("PA"),
    "CMYK": SCENE.convert("CMYK"),
    "YCbCr": SCENE.convert("YCbCr"),
    "1": GREY.convert("1"),
    "L": GREY,
    "HSV": SCENE.convert("HSV"),
}


@pytest.mark.parametrize("options", [WHITE, DROP], ids=["white", "drop"])
@pytest.mark.parametrize("name", PIL_IMAGES)
def test_a_pil_image_of_every_mode(name: str, options: ImageOptions) -> None:
    image = PIL_IMAGES[name].copy()
    if name == "P":
        image.info["transparency"] = 0
    given = decode_image(read_local_source(image, options), options)
    if options is WHITE and image.has_transparency_data:
        expected = Image.new("RGBA", image.size, "white")
        expected.alpha_composite((image.convert("LA") if name == "La" else image).convert("RGBA"))
    else:
        expected = image.convert("LA") if name == "La" else image
    assert difference(given, expected.convert("RGB")) == 0


@pytest.mark.parametrize("hint", [None, -1, 999, 10**30, b"\0" * 300, "none", (0, 0), (0, 0, 0, 0), (1, -2, "x"), 0.5])
@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1", "I;16", "F", "CMYK"])
def test_a_hint_at_transparency_that_means_nothing_changes_nothing(mode: str, hint: Any) -> None:
    image = SCENE.convert(mode) if mode != "I;16" else Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)
    plain = decode_image(read_local_source(image, WHITE), WHITE)
    image.info |= {"transparency": hint, "exif": hint}
    assert difference(decode_image(read_local_source(image, WHITE), WHITE), plain) == 0


@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize("options", [WHITE, DROP], ids=["white", "drop"])
@pytest.mark.parametrize("name", [name for name in TRANSPARENT if "float" not in name and "TIFF LA, 16" not in name])
def test_an_opened_file_comes_out_as_its_path_does(name: str, options: ImageOptions, is_loaded: bool) -> None:
    data = TRANSPARENT[name][0]()
    if is_loaded and "planes" in name:
        pytest.skip("Pillow itself reads planes of 16 bits wrongly")
    if is_loaded and name == "PNG grey key, 4 bits":
        pytest.skip("Pillow does not tell the depth of a loaded image")
    with Image.open(io.BytesIO(data)) as image:
        if is_loaded:
            image.load()
        given = decode_image(read_local_source(image, options), options)
    assert difference(given, decode_image(data, options)) == 0
