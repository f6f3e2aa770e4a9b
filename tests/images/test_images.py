"""Pictures: decoding within limits, the original's tiles, and how many positions they take."""

from __future__ import annotations

import io
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes, unquote_to_bytes

import numpy as np
import pytest
from PIL import Image

from llava_serve.checkpoints import open_checkpoint
from llava_serve.checkpoints.spec import ImageProcessing
from llava_serve.config import ImageOptions
from llava_serve.errors import InvalidImageError
from llava_serve.images.decode import decode_image
from llava_serve.images.fetch import read_local_source, read_request_source
from llava_serve.images.tiles import best_resolution, digest, kept_features, make_tiles, num_features
from support.paths import CHECKPOINTS

OPTIONS = ImageOptions()
TINY = open_checkpoint(str(CHECKPOINTS / "llava-v1.5-tiny")).image
RELEASED = replace(  # as llava-v1.6-*: 336 pixels, patches of 14
    TINY,
    aspect="anyres",
    merge="spatial_unpad",
    grid_pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
    crop_size=(336, 336),
    shortest_edge=336,
)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def gradient(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, (x + y) / 2], axis=-1).astype(np.uint8))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((336, 336), 1176),
        ((640, 480), 2340),
        ((480, 640), 2352),
        ((1024, 768), 2340),
        ((899, 1024), 2640),
        ((1920, 1080), 1948),
        ((1080, 1920), 1968),
        ((2000, 500), 1890),
        ((3000, 300), 1160),
        ((672, 672), 2928),
        ((4000, 4000), 2928),
    ],
)
def test_positions_of_anyres_pictures(size: tuple[int, int], expected: int) -> None:
    """Figures that the original's own arithmetic gave with the released grid."""
    assert num_features(size, RELEASED) == expected


def test_where_the_two_layouts_differ() -> None:
    # transformers reads the pinpoints as (height, width): equals come in another order, so it transposes small squares
    turned = replace(RELEASED, layout="transformers", grid_pinpoints=tuple((w, h) for h, w in RELEASED.grid_pinpoints))
    assert best_resolution((336, 336), RELEASED.grid_pinpoints) == (336, 672)
    assert best_resolution((336, 336), turned.grid_pinpoints) == (672, 336)
    # and rounds before it cuts
    assert kept_features((1672, 704), RELEASED) != kept_features((1672, 704), replace(RELEASED, layout="transformers"))


def test_merges_without_unpadding() -> None:
    assert num_features((640, 480), replace(RELEASED, merge="flat")) == 5 * 576
    assert num_features((640, 480), replace(RELEASED, merge="spatial")) == 576 + 48 * 48
    assert num_features((640, 480), replace(RELEASED, aspect="pad")) == 576
    assert num_features((640, 480), replace(RELEASED, aspect="pad", extra_features=1)) == 577


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (1, 120), (120, 1), (56, 56), (57, 55), (300, 20), (640, 480)])
@pytest.mark.parametrize("aspect", ["square", "pad", "anyres"])
def test_tiles_of_every_shape(size: tuple[int, int], aspect: Any) -> None:
    pinpoints = ((56, 112), (112, 56), (112, 112))
    processing = replace(TINY, aspect=aspect, merge="spatial_unpad", grid_pinpoints=pinpoints)
    tiles = make_tiles(gradient(*size), processing)
    assert tiles.dtype == np.uint8
    assert tiles.shape[1:] == (56, 56, 3)
    assert (tiles.shape[0] > 1) == (aspect == "anyres")
    assert num_features(size, processing) > 0


def test_padding_has_the_mean_colour_of_clip() -> None:
    tile = make_tiles(Image.new("RGB", (56, 20), "white"), TINY)[0]
    assert tile[0, 0].tolist() == [122, 116, 104]
    assert tile[28, 28].tolist() == [255, 255, 255]
    assert (tile[:, 0] == 255).all(axis=-1).sum() == pytest.approx(20, abs=4)


@pytest.mark.parametrize("shape", [{"shortest_edge": 56}, {"shortest_edge": None, "resize_to": (56, 56)}])
def test_padding_gives_the_pixels_of_the_whole_square(shape: dict[str, Any]) -> None:
    """It is made in another order, to save time and memory; the original's order is this one."""
    processing, rng = replace(TINY, **shape), np.random.default_rng(0)
    mean = tuple(int(channel * 255) for channel in processing.mean)
    for _ in range(100):
        width, height = rng.integers(1, 300, 2)
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        side = max(image.size)
        square = Image.new("RGB", (side, side), mean)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        expected = np.asarray(square.resize((56, 56), Image.Resampling(processing.resample)))
        np.testing.assert_array_equal(make_tiles(image, processing), expected[None])


@pytest.mark.parametrize("size", [(20_000, 20), (20, 20_000), (20_000, 2), (2, 65_500), (65_500, 700)])
def test_a_thin_image_is_answered(size: tuple[int, int]) -> None:
    """The strip is resized before it is padded, so that no large square is needed."""
    tile = make_tiles(Image.new("RGB", size, "white"), TINY)[0].astype(float)
    across = tile[:, 28, 0] if size[0] > size[1] else tile[28, :, 0]
    covered = ((across - 122) / (255 - 122)).sum()
    assert covered == pytest.approx(min(size) * 56 / max(size), abs=0.1)
    assert tile[0, 0].tolist() == [122, 116, 104]


def test_a_thin_image_has_the_pixels_of_the_whole_square() -> None:
    """Where there was no room for it, a shade may differ by one: rows and columns are resized in another order."""
    rng = np.random.default_rng(0)
    mean = tuple(int(channel * 255) for channel in TINY.mean)
    for size in ((10_001, 300), (300, 10_001)):
        image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        square = Image.new("RGB", (10_001, 10_001), mean)
        square.paste(image, ((10_001 - image.width) // 2, (10_001 - image.height) // 2))
        expected = np.asarray(square.resize((56, 56), Image.Resampling(TINY.resample))).astype(int)
        assert np.abs(make_tiles(image, TINY)[0] - expected).max() <= (0 if size[0] > size[1] else 1)


def test_a_strip_that_needs_a_large_image_is_refused() -> None:
    with pytest.raises(InvalidImageError, match="too long and thin"):
        make_tiles(Image.new("RGB", (65_000, 2)), replace(TINY, aspect="square"))


MODES = {
    "palette": gradient(40, 30).quantize(8),
    "cmyk": gradient(40, 30).convert("CMYK"),
    "grey": gradient(40, 30).convert("L"),
    "bilevel": gradient(40, 30).convert("1"),
    "alpha": gradient(40, 30).convert("RGBA"),
}


@pytest.mark.parametrize("name", MODES)
def test_modes_are_converted_as_the_original_converts(name: str) -> None:
    image = MODES[name]
    data = encoded(image, "TIFF" if name == "cmyk" else "PNG")
    np.testing.assert_array_equal(np.asarray(decode_image(data, OPTIONS)), np.asarray(image.convert("RGB")))


def test_sixteen_bits_are_scaled() -> None:
    values = np.linspace(0, 65535, 100).reshape(10, 10).astype(np.uint16)
    decoded = np.asarray(decode_image(encoded(Image.fromarray(values)), OPTIONS))
    np.testing.assert_array_equal(decoded[..., 0], np.round(values / 257).astype(np.uint8))


def test_limits_of_bytes() -> None:
    with pytest.raises(InvalidImageError, match="is empty"):
        decode_image(b"", OPTIONS)
    with pytest.raises(InvalidImageError, match="at most 10 are accepted"):
        decode_image(encoded(gradient(8, 8)), ImageOptions(max_bytes=10))


def test_a_request_reads_no_files_and_no_links(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded(gradient(8, 8)))
    for source in (str(secret), f"file://{secret}", "http://127.0.0.1/x.png", "HTTPS://example.org/x.png"):
        with pytest.raises(InvalidImageError, match="links are not accepted") as caught:
            read_request_source(source, OPTIONS)
        assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("source", ["s3://bucket/a.png", "file:///a.png"])
def test_a_link_of_another_kind_is_named(source: str) -> None:
    with pytest.raises(InvalidImageError, match=f"not read by {source.split('/')[0]}//: give a path, or an http: or"):
        read_local_source(source, OPTIONS)


def test_data_urls() -> None:
    for written in ("aGk=", "aGk%3D", "aGk%3d%0D%0A"):
        assert read_request_source(f"data:image/png;base64,{written}", OPTIONS) == b"hi"
    assert read_request_source("DATA:image/png;charset=x;BASE64,aG\nk=", OPTIONS) == b"hi"
    assert read_request_source("data:,a%20b", OPTIONS) == b"a b"
    for url in (
        "data:image/png;base64",
        "data:image/png;base64,a",
        "data:image/png;base64,%%%%",
        "data:;base64,é",
        "data:,\ud800",
    ):
        with pytest.raises(InvalidImageError, match="data: URL"):
            read_request_source(url, OPTIONS)


def test_percent_encoded_data_is_decoded_whole() -> None:
    every = bytes(range(256)) * 2
    for quoted in (quote_from_bytes(every), quote_from_bytes(every, safe="=?\t\r\n "), "é=_"):
        assert read_request_source("data:," + quoted, OPTIONS) == unquote_to_bytes(quoted)


@pytest.mark.parametrize("url", ["data:image/png," + "%41" * 3_000_000, "data:;base64," + "QUFB " * 2_000_000])
def test_data_urls_are_decoded_in_little_memory(url: str) -> None:
    """No object for each escape, nor for each piece between white space."""
    tracemalloc.start()
    data = read_request_source(url, OPTIONS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert set(data) == {0x41}
    assert peak < 5 * len(url)


def test_local_sources_are_equal(tmp_path: Path) -> None:
    image = gradient(20, 10)
    path = tmp_path / "a.png"
    path.write_bytes(encoded(image))
    for source in (path, str(path), path.read_bytes(), image, np.asarray(image)):
        decoded = decode_image(read_local_source(source, OPTIONS), OPTIONS)
        np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image))
    with pytest.raises(InvalidImageError, match=r"absent\.png cannot be read"):
        read_local_source(tmp_path / "absent.png", OPTIONS)
    with pytest.raises(InvalidImageError, match="uint8"):
        read_local_source(np.zeros((4, 4)), OPTIONS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "source",
    [5, None, ["a.png"], io.BytesIO(b"a"), "a\0b", "a\ud800", "~nobody-of-this-name/a.png", "a" * 9999, "", "http://"],
)
def test_what_is_no_source_of_a_picture_is_refused_in_a_sentence(source: Any) -> None:
    with pytest.raises(InvalidImageError, match=r"(?s)^(A|The) picture .*\.$"):
        read_local_source(source, OPTIONS)


def test_a_pil_image_without_pixels_is_refused_in_a_sentence() -> None:
    animation = io.BytesIO()
    gradient(9, 9).save(animation, "GIF", save_all=True, append_images=[gradient(9, 9).rotate(90)])
    cut = Image.open(io.BytesIO(animation.getvalue()[:-20]))
    cut.seek(1)
    closed = Image.open(io.BytesIO(encoded(gradient(9, 9))))
    closed.close()
    for image in (cut, closed, Image.new("RGB", (0, 5))):
        with pytest.raises(InvalidImageError, match="pixels of the PIL image cannot be read"):
            read_local_source(image, OPTIONS)


def test_a_digest_identifies_the_pixels_and_their_processing() -> None:
    def of(image: Image.Image, processing: ImageProcessing) -> str:
        return digest(make_tiles(image, processing), image.size, processing)

    image, other = gradient(40, 30), gradient(40, 30)
    other.putpixel((20, 15), (1, 2, 3))
    assert of(image, TINY) == of(gradient(40, 30), TINY)
    assert len({of(image, TINY), of(other, TINY), of(image, replace(TINY, aspect="square"))}) == 3
