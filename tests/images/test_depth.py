"""Samples of 1 to 64 bits: scaled by what the file says, else by their range."""

from __future__ import annotations

import io
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from llava_serve.config import ImageOptions
from llava_serve.errors import InvalidImageError
from llava_serve.images.decode import decode_image
from llava_serve.images.fetch import read_local_source
from support.odd_images import GREY, HEIGHT, SCENE, WIDTH, difference, encoded, png_of, tiff

OPTIONS = ImageOptions()
SHADES = np.asarray(GREY).astype(np.float64)[..., None]
COLOURS = np.asarray(SCENE).astype(np.float64)


def scaled(to: float, dtype: str, *, low: float = 0, values: NDArray[Any] = SHADES) -> NDArray[Any]:
    """The scene in numbers from `low` to `to`."""
    return (low + values / 255 * (to - low)).astype(dtype)


def with_nan(values: NDArray[Any]) -> NDArray[Any]:
    values = values.copy()
    values[::37, ::41] = np.nan
    values[0, 0] = np.inf
    return values


GREY_TIFFS: dict[str, tuple[NDArray[Any], dict[str, Any]]] = {
    **{f"{bits} bits": (scaled(2**bits - 1, "u2"), {"bits": bits}) for bits in (9, 10, 11, 12, 13, 14, 15, 16)},
    **{f"{bits} bits, big-endian": (scaled(2**bits - 1, "u2"), {"bits": bits, "order": ">"}) for bits in (12, 16)},
    **{f"{bits} bits, tiles": (scaled(2**bits - 1, "u2"), {"bits": bits, "tile": 64}) for bits in (10, 12, 14, 16)},
    "12 bits, white is zero": (4095 - scaled(4095, "u2"), {"bits": 12, "photometric": 0}),
    "16 bits, white is zero": (65535 - scaled(65535, "u2"), {"photometric": 0}),
    "12 bits in 16": (scaled(4095, "u2"), {"extra": {281: (3, (4095,))}}),
    "12 bits in 16, both named": (scaled(4095, "u2"), {"extra": {340: (3, (0,)), 341: (3, (4095,))}}),
    "a named range that the values pass": (scaled(65535, "u2"), {"extra": {281: (3, (255,))}}),
    "a named range upside down": (scaled(65535, "u2"), {"extra": {280: (3, (9,)), 281: (3, (3,))}}),
    "signed 8": (scaled(127, "i1"), {}),
    "signed 16": (scaled(30000, "i2"), {}),
    "signed 16, computed tomography": (scaled(820, "i2", low=-1000), {}),
    "signed 32": (scaled(2_040_000_000, "i4"), {}),
    "signed 32 to 255": (scaled(255, "i4"), {}),
    "signed 32 below 0": (scaled(5000, "i4", low=-70000), {}),
    "signed 64": (scaled(2**40, "i8"), {}),
    "unsigned 32": (scaled(2**32 - 1, "u4"), {}),
    "unsigned 32 to 65535": (scaled(65535, "u4"), {"order": ">"}),
    "unsigned 64": (scaled(2.0**60, "u8"), {}),
    "float 16": (scaled(1, "f2"), {}),
    "float 32": (scaled(1, "f4"), {}),
    "float 32, white is zero": (1 - scaled(1, "f4"), {"photometric": 0}),
    "float 32 to 255": (scaled(255, "f4"), {}),
    "float 32 to 10,200": (scaled(10200, "f4"), {}),
    "float 32 below 0": (scaled(3, "f4", low=-7), {}),
    "float 32, named": (scaled(0.5, "f4"), {"extra": {340: (11, (0.0,)), 341: (11, (0.5,))}}),
    "float 64": (scaled(1, "f8"), {"order": ">"}),
    "with alpha": (np.dstack([scaled(65535, "u2"), np.full_like(scaled(65535, "u2"), 65535)]), {}),
}


def expected_of(name: str) -> Image.Image:
    """Where values lie below 0, or have no usual range, the darkest shade is black."""
    if "below 0" not in name and "tomography" not in name:
        return GREY
    shades = np.asarray(GREY).astype(float)
    darkest = shades.min()
    return Image.fromarray(((shades - darkest) / (255 - darkest) * 255).round().astype(np.uint8))


@pytest.mark.parametrize("name", GREY_TIFFS)
def test_grey_tiffs(name: str) -> None:
    samples, options = GREY_TIFFS[name]
    assert difference(decode_image(tiff(samples, **options), OPTIONS), expected_of(name)) < 1


@pytest.mark.parametrize("name", [name for name in GREY_TIFFS if "bits" not in name or name == "16 bits"])
@pytest.mark.parametrize(
    "layout",
    [{"compress": True}, {"compress": True, "tile": 64}, {"big": True}, {"compress": True, "order": ">"}],
    ids=["deflate", "deflate in tiles", "BigTIFF", "big-endian"],
)
def test_grey_tiffs_of_every_layout(name: str, layout: dict[str, Any]) -> None:
    samples, options = GREY_TIFFS[name]
    assert difference(decode_image(tiff(samples, **(options | layout)), OPTIONS), expected_of(name)) < 1


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("tile", [0, 64])
@pytest.mark.parametrize(
    ("dtype", "to", "predictor"),
    [
        ("u2", 65535, 2),
        ("u4", 2**32 - 1, 2),
        ("i2", 30000, 2),
        ("u8", 2**60, 2),
        ("f2", 1, 3),
        ("f4", 1, 3),
        ("f8", 1, 3),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_predictors(dtype: str, to: float, predictor: int, channels: int, tile: int, order: Literal["<", ">"]) -> None:
    values = scaled(to, dtype, values=SHADES if channels == 1 else COLOURS)
    data = tiff(values, compress=True, predictor=predictor, tile=tile, order=order)
    assert difference(decode_image(data, OPTIONS), GREY if channels == 1 else SCENE) < 1


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd", "raw"])
@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_compressions_of_libtiff(mode: str, compression: str) -> None:
    values = {"I;16": scaled(65535, "u2"), "I": scaled(65535, "i4"), "F": scaled(1, "f4")}[mode][..., 0]
    data = encoded(Image.fromarray(values), "TIFF", compression=compression)
    assert difference(decode_image(data, OPTIONS), GREY) < 1


@pytest.mark.parametrize("planar", [False, True], ids=["together", "planes"])
@pytest.mark.parametrize(
    "layout", [{}, {"compress": True, "tile": 32}, {"order": ">"}], ids=["strips", "tiles", "big-endian"]
)
@pytest.mark.parametrize(
    ("dtype", "to"), [("u1", 255), ("u2", 65535), ("u4", 65535), ("f2", 1), ("f4", 1), ("f8", 255)]
)
def test_colour_tiffs(dtype: str, to: float, planar: bool, layout: dict[str, Any]) -> None:
    data = tiff(scaled(to, dtype, values=COLOURS), planar=planar, **layout)
    assert difference(decode_image(data, OPTIONS), SCENE) < 1


def test_nan_is_black_and_counts_for_nothing() -> None:
    for to in (1, 10200):
        decoded = np.asarray(decode_image(tiff(with_nan(scaled(to, "f4"))), OPTIONS))
        assert difference(Image.fromarray(decoded), GREY) < (1 if to == 1 else 300)
        assert (decoded[37, 41] == 0).all()
    every = np.full((HEIGHT, WIDTH, 1), np.nan, np.float32)
    assert not np.asarray(decode_image(tiff(every), OPTIONS)).any()


def test_one_shade_all_over() -> None:
    for value, shade in ((0, 0), (40000, 255), (-5, 0)):
        decoded = decode_image(tiff(np.full((20, 30, 1), value, np.int32)), OPTIONS)
        assert decoded.getextrema() == ((shade, shade),) * 3 or value == 40000


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_pngs(bits: int) -> None:
    most = 2**bits - 1
    samples = (np.asarray(GREY).astype(np.float64) / 255 * most).round().astype(np.uint16)
    expected = Image.fromarray((samples * (255 / most)).round().astype(np.uint8))
    assert difference(decode_image(png_of(samples, bits, 0), OPTIONS), expected) < 0.01


def test_pngs_of_16_bits() -> None:
    assert difference(decode_image(png_of(np.asarray(SCENE).astype(np.uint16) * 257, 16, 2), OPTIONS), SCENE) == 0
    alpha = np.full((HEIGHT, WIDTH, 1), 65535, np.uint16)
    grey = np.dstack([np.asarray(GREY).astype(np.uint16)[..., None] * 257, alpha])
    assert difference(decode_image(png_of(grey, 16, 4), OPTIONS), GREY) == 0
    colour = np.dstack([np.asarray(SCENE).astype(np.uint16) * 257, alpha])
    assert difference(decode_image(png_of(colour, 16, 6), OPTIONS), SCENE) == 0


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (tiff(scaled(1, "f4", values=np.dstack([COLOURS] * 2))), "6 channels of 32 bits .float, no compression"),
        (tiff(scaled(1, "c8")), "64 bits .unusual"),
        (tiff(scaled(65535, "u2"), extra={259: (3, (34887,))}), "1 channel of 16 bits .unsigned, another compression"),
        (tiff(scaled(65535, "u2"), photometric=32844), "16 bits"),
        (tiff(scaled(65535, "u2", values=np.dstack([COLOURS, SHADES])), photometric=5, planar=True), "4 channels"),
        (tiff(scaled(255, "u1", values=np.dstack([COLOURS] * 3))), "9 channels of 8 bits"),
    ],
)
def test_a_kind_that_is_not_read_is_named(data: bytes, named: str) -> None:
    with pytest.raises(InvalidImageError, match=named):
        decode_image(data, OPTIONS)


PIL_IMAGES = {
    "F": Image.fromarray(scaled(1, "f4")[..., 0]),
    "F to 10,200": Image.fromarray(scaled(10200, "f4")[..., 0]),
    "F, NaN": Image.fromarray(with_nan(scaled(1, "f4"))[..., 0]),
    "I": Image.fromarray(scaled(65535, "i4")[..., 0]),
    "I to 255": Image.fromarray(scaled(255, "i4")[..., 0]),
    "I to 2 billion": Image.fromarray(scaled(2_040_000_000, "i4")[..., 0]),
    "I;16": Image.fromarray(scaled(65535, "u2")[..., 0]),
    "I;16B": Image.frombytes("I;16B", SCENE.size, scaled(65535, ">u2").tobytes()),
}


@pytest.mark.parametrize("name", PIL_IMAGES)
def test_a_deep_pil_image_is_scaled_as_its_file_is(name: str) -> None:
    given = decode_image(read_local_source(PIL_IMAGES[name], OPTIONS), OPTIONS)
    assert difference(given, GREY) < (3 if "NaN" in name else 1)
    if name != "I;16B":
        data = encoded(PIL_IMAGES[name], "TIFF")
        assert difference(given, decode_image(data, OPTIONS)) == 0


@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize("name", ["12 bits", "16 bits", "signed 32", "signed 32 to 255", "float 32 to 10,200"])
def test_an_opened_file_comes_out_as_its_path_does(name: str, is_loaded: bool) -> None:
    samples, options = GREY_TIFFS[name]
    data = tiff(samples, **options)
    with Image.open(io.BytesIO(data)) as image:
        if is_loaded and name != "12 bits":  # of a loaded image nobody knows how many bits the file named
            image.load()
        given = decode_image(read_local_source(image, OPTIONS), OPTIONS)
    assert difference(given, decode_image(data, OPTIONS)) < 1
