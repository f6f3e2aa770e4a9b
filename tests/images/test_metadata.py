"""Metadata never decides: EXIF is a hint, and what is no pixel can be broken, absent, or of any size."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from llava_serve.config import ImageOptions
from llava_serve.errors import InvalidImageError
from llava_serve.images.decode import decode_image
from support.odd_images import (
    SCENE,
    chunk,
    difference,
    encoded,
    exif_block,
    jpeg_with,
    png_chunks,
    png_with,
    tiff,
)

OPTIONS = ImageOptions()
PNG = encoded(SCENE)
JPEG = encoded(SCENE, "JPEG", quality=90, dpi=(72, 72))
PROGRESSIVE = encoded(SCENE, "JPEG", quality=90, progressive=True)
CMYK = encoded(SCENE.convert("CMYK"), "JPEG", quality=95)
EXIF, ADOBE, COMMENT = 0xE1, 0xEE, 0xFE

TAG = struct.Struct("<HHI4s")
ODD_TAGS = {
    "srational -1/0": TAG.pack(0x9204, 10, 1, b"\xff\0\0\0"),
    "short as text": TAG.pack(0x0100, 2, 4, b"abc\0"),
    "short as float nan": TAG.pack(0x0101, 11, 1, struct.pack("<f", float("nan"))),
    "long -5": TAG.pack(0x0100, 9, 1, struct.pack("<i", -5)),
    "gps pointer negative": TAG.pack(0x8825, 9, 1, struct.pack("<i", -1)),
    "value far away": TAG.pack(0x010F, 2, 1 << 30, b"\xff\xff\xff\x7f"),
    "unknown type": TAG.pack(0x010F, 99, 1, b"\0\0\0\0"),
    "its own directory": TAG.pack(0x8769, 4, 1, struct.pack("<I", 8)),
}
GARBAGE = {
    "letters": b"garbage!",
    "zeros": bytes(400),
    "ff": b"\xff" * 60,
    "spaces": b" " * 50,
    "header alone": b"II*\0",
    "far directory": b"II*\0\xff\xff\xff\x7f",
    "cut directory": b"MM\0*\0\0\0\x08\0\x05\x01\x12",
    "empty": b"",
    "bigtiff": b"II+\0\x08\0\0\0" + b"\xff" * 8,
    "orientation 0": exif_block(0)[6:],
    "orientation 9": exif_block(9)[6:],
    "orientation as text": exif_block(6)[6:].replace(b"\x12\x01\x03\0", b"\x12\x01\x02\0"),
}


def in_jpeg(exif: bytes) -> bytes:
    return jpeg_with(JPEG, (EXIF, b"Exif\0\0" + exif))


def in_png(exif: bytes) -> bytes:
    return png_with(PNG, chunk(b"eXIf", exif))


def in_webp(exif: bytes) -> bytes:
    return encoded(SCENE, "WEBP", quality=95, exif=b"Exif\0\0" + exif)


def in_avif(exif: bytes) -> bytes:
    good = encoded(SCENE, "AVIF", quality=90, exif=exif_block(1))
    return good.replace(exif_block(1)[6:], exif.ljust(len(exif_block(1)) - 6, b"\0")[: len(exif_block(1)) - 6])


WRITERS = [in_jpeg, in_png, in_webp, in_avif]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("name", GARBAGE)
def test_broken_exif_is_upright(name: str, write: object) -> None:
    assert callable(write)
    assert difference(decode_image(write(GARBAGE[name]), OPTIONS), SCENE) < 2


@pytest.mark.parametrize("name", ODD_TAGS)
@pytest.mark.parametrize("write", WRITERS[:3])
def test_an_odd_tag_beside_the_orientation(name: str, write: object) -> None:
    assert callable(write)
    data = write(exif_block(6, extra=ODD_TAGS[name])[6:])
    assert difference(decode_image(data, OPTIONS), SCENE.transpose(Image.Transpose.ROTATE_270)) < 2


TURNED = {
    1: SCENE,
    2: SCENE.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: SCENE.rotate(180),
    4: SCENE.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: SCENE.transpose(Image.Transpose.TRANSPOSE),
    6: SCENE.rotate(-90, expand=True),
    7: SCENE.transpose(Image.Transpose.TRANSVERSE),
    8: SCENE.rotate(90, expand=True),
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["JPEG", "JPEG big-endian", "JPEG doubled", "PNG", "WebP", "TIFF", "deep TIFF"])
def test_orientations(orientation: int, kind: str) -> None:
    block = exif_block(orientation)
    data = {
        "JPEG": lambda: in_jpeg(block[6:]),
        "JPEG big-endian": lambda: in_jpeg(exif_block(orientation, order=">")[6:]),
        "JPEG doubled": lambda: in_jpeg(block),
        "PNG": lambda: in_png(block[6:]),
        "WebP": lambda: in_webp(block[6:]),
        "TIFF": lambda: encoded(SCENE, "TIFF", tiffinfo={0x0112: orientation}),
        "deep TIFF": lambda: tiff(rgb16(), planar=True, extra={0x0112: (3, (orientation,))}),
    }[kind]()
    assert difference(decode_image(data, OPTIONS), TURNED[orientation]) < 2


def rgb16() -> NDArray[np.uint16]:
    return np.asarray(SCENE).astype(np.uint16) * 257


def test_orientation_of_an_avif_is_its_own_turn() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # Pillow writes it as the turn that AVIF has
    assert difference(decode_image(encoded(SCENE, "AVIF", quality=90, exif=exif), OPTIONS), TURNED[6]) < 2


def test_orientation_in_xmp_is_ignored_as_browsers_do() -> None:
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    assert difference(decode_image(jpeg_with(JPEG, (EXIF, xmp)), OPTIONS), SCENE) < 2
    assert difference(decode_image(encoded(SCENE, "WEBP", quality=95, xmp=xmp[29:]), OPTIONS), SCENE) < 2
    text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp[29:])
    assert difference(decode_image(png_with(PNG, text), OPTIONS), SCENE) == 0


LARGE = zlib.compress(b"x" * 1_500_000)
ODD_CHUNKS = {
    "zTXt of 1.5 MB": [chunk(b"zTXt", b"a\0\0" + LARGE)],
    "iTXt of 1.5 MB": [chunk(b"iTXt", b"a\0\1\0\0\0" + LARGE)],
    "iCCP of 1.5 MB": [chunk(b"iCCP", b"a\0\0" + LARGE)],
    "70 MB of text": [chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 1_000_000))] * 70,
    "text with a wrong checksum": [chunk(b"tEXt", b"a\0b", checksum=1)],
    "text without end": [chunk(b"tEXt", b"a" * 200)],
    "gAMA cut": [chunk(b"gAMA", b"\0")],
    "cHRM cut": [chunk(b"cHRM", b"\0" * 5)],
    "pHYs cut": [chunk(b"pHYs", b"\0" * 3)],
    "sRGB empty": [chunk(b"sRGB", b"")],
    "iCCP empty": [chunk(b"iCCP", b"")],
    "iCCP of method 7": [chunk(b"iCCP", b"a\0\7" + LARGE)],
    "zTXt of method 7": [chunk(b"zTXt", b"a\0\7" + LARGE)],
    "zTXt no stream": [chunk(b"zTXt", b"a\0\0garbage")],
    "bKGD odd": [chunk(b"bKGD", b"\0")],
    "tRNS too short": [chunk(b"tRNS", b"\0")],
    "exif as text": [chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  8\nnohex\n")],
    "unknown critical chunk": [chunk(b"ABCD", b"1234")],
    "PLTE in RGB": [chunk(b"PLTE", b"\0\0\0")],
    "animation control": [chunk(b"acTL", struct.pack(">II", 2, 0))],
    "animation control of 4 billion frames": [chunk(b"acTL", b"\xff" * 8)],
}


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"], ids=["before the pixels", "behind them"])
@pytest.mark.parametrize("name", ODD_CHUNKS)
def test_chunks_that_make_no_pixel_are_passed_over(name: str, before: bytes) -> None:
    assert difference(decode_image(png_with(PNG, *ODD_CHUNKS[name], before=before), OPTIONS), SCENE) == 0


def split_idat(data: bytes, size: int) -> bytes:
    pixels = b"".join(body for name, body in png_chunks(data) if name == b"IDAT")
    pieces = [pixels[i : i + size] for i in range(0, len(pixels), size)]
    return png_with(
        data[: data.index(b"IDAT") - 4] + chunk(b"IEND", b""), *(chunk(b"IDAT", p) for p in pieces), before=b"IEND"
    )


@pytest.mark.parametrize(
    "data",
    [
        PNG[:-12],  # no end
        PNG + b"behind the end",
        PNG.replace(chunk(b"IEND", b""), chunk(b"IDAT", b"") + chunk(b"IEND", b"")),
        split_idat(PNG, 7),
        split_idat(PNG, 1),
    ],
    ids=["no end", "bytes behind", "empty IDAT", "IDAT of 7 bytes", "IDAT of 1 byte"],
)
def test_pngs_with_odd_ends(data: bytes) -> None:
    assert difference(decode_image(data, OPTIONS), SCENE) == 0


def test_a_png_whose_checksums_of_pixels_are_wrong() -> None:
    [pixels] = [body for name, body in png_chunks(PNG) if name == b"IDAT"]
    before, behind = PNG.split(chunk(b"IDAT", pixels))
    wrong = pixels[:-4] + bytes(byte ^ 255 for byte in pixels[-4:])
    for written in (chunk(b"IDAT", wrong), chunk(b"IDAT", pixels, checksum=1)):
        assert difference(decode_image(before + written + behind, OPTIONS), SCENE) == 0
    with pytest.raises(InvalidImageError, match="damaged or cut off"):
        decode_image(before + chunk(b"IDAT", wrong[:-40]) + behind, OPTIONS)


ODD_SEGMENTS = {
    "ICC garbage": (0xE2, b"ICC_PROFILE\0\1\1garbage"),
    "MPF garbage": (0xE2, b"MPF\0garbage"),
    "Photoshop garbage": (0xED, b"Photoshop 3.0\08BIM\xff\xff"),
    "comment": (COMMENT, b"a" * 60_000),
    "EXIF without zeros": (EXIF, b"Exif"),
    "short Adobe": (ADOBE, b"Adobe\0"),
    "short JFIF": (0xE0, b"JFIF\0"),
    "JFXX thumbnail": (0xE0, b"JFXX\0\x10garbage"),
    "APP15": (0xEF, b"\xff\xd8\xff\xd9"),
}


@pytest.mark.parametrize("name", ODD_SEGMENTS)
def test_segments_that_make_no_pixel_are_passed_over(name: str) -> None:
    assert difference(decode_image(jpeg_with(JPEG, ODD_SEGMENTS[name]), OPTIONS), SCENE) < 2


@pytest.mark.parametrize("behind", [b"", b"garbage", JPEG, b"\xff\xd9\xff\xd9"])
def test_what_stands_behind_a_jpeg(behind: bytes) -> None:
    assert difference(decode_image(JPEG + behind, OPTIONS), SCENE) < 2


RESTARTS = encoded(SCENE, "JPEG", quality=90, restart_marker_rows=1)
GREY_JPEG = encoded(SCENE.convert("L"), "JPEG", quality=90)


@pytest.mark.parametrize(
    "data", [JPEG, PROGRESSIVE, RESTARTS, CMYK], ids=["baseline", "progressive", "restarts", "CMYK"]
)
@pytest.mark.parametrize("cut", [1, 2])
def test_a_jpeg_without_its_end_mark_is_whole(data: bytes, cut: int) -> None:
    assert difference(decode_image(data[:-cut], OPTIONS), decode_image(data, OPTIONS)) == 0


@pytest.mark.parametrize("cut", [3, 4, 6])
def test_a_jpeg_that_lacks_a_few_bytes_is_shown_as_browsers_do(cut: int) -> None:
    assert difference(decode_image(JPEG[:-cut], OPTIONS), SCENE) < 3


@pytest.mark.parametrize(
    "data", [JPEG, PROGRESSIVE, RESTARTS, GREY_JPEG], ids=["baseline", "progressive", "restarts", "grey"]
)
@pytest.mark.parametrize("percent", [97, 90, 75, 50, 30, 20])
@pytest.mark.parametrize("end", [b"", b"\xff", b"\xff\0"])
def test_a_jpeg_that_lacks_rows_is_refused(data: bytes, percent: int, end: bytes) -> None:
    scan = data.index(b"\xff\xda") + 14
    with pytest.raises(InvalidImageError, match="damaged or cut off"):
        decode_image(data[: scan + (len(data) - scan) * percent // 100] + end, OPTIONS)


def test_a_jpeg_cut_right_behind_a_restart_interval_is_refused() -> None:
    last = RESTARTS.rindex(b"\xff\xd1")
    with pytest.raises(InvalidImageError, match="damaged or cut off"):
        decode_image(RESTARTS[:last], OPTIONS)


@pytest.mark.parametrize("tag", [270, 305, 700, 34675, 34377, 33723, 34665, 34853, 37724, 42112, 50341, 282, 296])
def test_tags_that_make_no_pixel_are_passed_over(tag: int) -> None:
    """Descriptions, XMP, ICC, Photoshop, EXIF, GPS, resolution: each as numbers that mean nothing."""
    data = tiff(rgb16(), extra={tag: (4, (0xFFFFFFFF,) * 3)})
    assert difference(decode_image(data, OPTIONS), SCENE) < 1
