"""Formats: those that are read, those that are refused by name, and what is judged from the header."""

from __future__ import annotations

import gzip
import io
import struct
import time

import numpy as np
import pytest

from llava_serve.config import ImageOptions
from llava_serve.errors import InvalidImageError
from llava_serve.images.decode import decode_image
from llava_serve.images.jpeg import MAX_SCANS
from support.good_images import GOOD
from support.odd_images import (
    GREY,
    SCENE,
    chunk,
    difference,
    encoded,
    jpeg_with,
    png_with,
    tiff,
)

OPTIONS = ImageOptions()


def with_markers(data: bytes, transform: int) -> bytes:
    return jpeg_with(data, (0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([transform])))


@pytest.mark.parametrize("name", GOOD)
def test_what_is_read(name: str) -> None:
    write, expected = GOOD[name]
    assert difference(decode_image(write(), OPTIONS), expected) < 2.5


def test_cmyk_of_every_marker() -> None:
    """As Chromium shows it: with and without Adobe's marker the inks are stored inverted."""
    plain = encoded(SCENE.convert("CMYK"), "JPEG", quality=95)
    assert difference(decode_image(plain, OPTIONS), SCENE) < 2.5
    ycck = with_markers(plain.replace(b"Adobe", b"Other"), 2)
    assert difference(decode_image(ycck, OPTIONS), SCENE) > 10  # the transform of the marker is obeyed


def test_heic() -> None:
    heif = pytest.importorskip("pillow_heif", reason="llava-serve[heic] is not installed")
    out = io.BytesIO()
    heif.from_pillow(SCENE).save(out, quality=90)
    assert difference(decode_image(out.getvalue(), OPTIONS), SCENE) < 2.5
    with pytest.raises(InvalidImageError, match="The HEIC image is damaged"):
        decode_image(out.getvalue()[:-500], OPTIONS)


def test_heic_where_the_extra_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as where it is not installed
    with pytest.raises(InvalidImageError, match=r"is HEIC, .* convert it to JPEG"):
        decode_image(struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + bytes(40), OPTIONS)


SVG = b"<?xml version='1.0'?>\n<!-- drawn -->\n<svg xmlns='http://www.w3.org/2000/svg'/>"
OTHER = {
    "JPEG 2000": encoded(SCENE, "JPEG2000"),
    "an icon .ICO.": encoded(SCENE, "ICO"),
    "an icon .ICNS.": encoded(SCENE.resize((128, 128)), "ICNS"),
    "TGA": encoded(SCENE, "TGA"),
    "DDS": encoded(SCENE, "DDS"),
    "PCX": encoded(SCENE, "PCX"),
    "SGI": encoded(SCENE, "SGI"),
    "QOI": encoded(SCENE, "QOI"),
    "a PDF document": encoded(SCENE, "PDF"),
    "a PostScript document": encoded(SCENE, "EPS"),
    "SVG": SVG,
    "an HTML page": b"\n<!DOCTYPE html><html><body>404</body></html>",
    "XML": b"<?xml version='1.0'?><a/>",
    "JSON": b'{"error": "not found"}',
    "plain text": b"not an image\n",
    "a video .MP4 or QuickTime.": struct.pack(">I", 24) + b"ftypisom\0\0\2\0isommp41" + bytes(40),
    "a camera's raw file": struct.pack(">I", 24) + b"ftypcrx \0\0\0\1crx isom" + bytes(40),
    "JPEG XL": b"\xff\x0a" + bytes(40),
    "JPEG XR": b"II\xbc\x01" + bytes(40),
    "a Photoshop document": b"8BPS\0\1" + bytes(40),
    "OpenEXR": b"v/1\1" + bytes(40),
    "Radiance HDR": b"#?RADIANCE\n" + bytes(40),
    "FITS": b"SIMPLE  =                    T" + bytes(40),
    "DICOM": bytes(128) + b"DICM" + bytes(40),
    "a Windows metafile": b"\xd7\xcd\xc6\x9a" + bytes(40),
    "a ZIP archive": b"PK\3\4" + bytes(40),
    "a gzip archive": gzip.compress(SVG),
    "an AVI video": b"RIFF\0\0\0\0AVI LIST",
    "WAVE audio": b"RIFF\0\0\0\0WAVEfmt ",
    "a Matroska or WebM video": b"\x1aE\xdf\xa3" + bytes(40),
    "MP3 audio": b"ID3\3" + bytes(40),
    "base64 text": b"iVBORw0KGgoAAAANSUhEUgAA",
    "a data: URL": b"data:image/png;base64,iVBORw0KGgo",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "a program": b"\x7fELF" + bytes(40),
    "not an image": b"\x93\x01\x02garbage\xff",
}


@pytest.mark.parametrize("name", OTHER)
def test_another_kind_is_named(name: str) -> None:
    with pytest.raises(InvalidImageError, match=rf"The data is {name}.*; send the image in one of PNG, JPEG"):
        decode_image(OTHER[name], OPTIONS)


REFUSED = {
    "P1": (b"P1\n3 2\n0 1 0 1 0 1\n", "PPM of kind P1"),
    "P2": (b"P2\n2 2\n255\n0 1 2 3\n", "PPM of kind P2"),
    "P3": (b"P3\n1 1\n255\n0 1 2\n", "PPM of kind P3"),
    "P4": (b"P4\n8 1\n\0", "PPM of kind P4"),
    "P7": (b"P7\nWIDTH 1\nHEIGHT 1\n", "PPM of kind P7"),
    "Pf": (b"Pf\n1 1\n-1.0\n\0\0\0\0", "PPM of kind Pf"),
    "P5 to 15": (b"P5\n1 1\n15\n\0", "P5 with values to 15;"),
    "P6 to 1023": (b"P6\n1 1\n1023\n\0\0\0\0\0\0", "P6 with values to 1023;"),
    "a PPM of comments": (b"P6\n" + b"#a\n" * 1_000_000 + b"1 1\n255\n\0\0\0", "PPM of kind P6"),
    "BMP RLE8": (b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 4, 4, 1, 8, 1) + bytes(90), "BMP with RLE"),
    "BMP RLE4": (b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 4, 4, 1, 4, 2) + bytes(90), "BMP with RLE"),
    "BMP PNG": (b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 4, 4, 1, 0, 5) + bytes(90), "BMP with PNG"),
    "JPEG lossless": (encoded(SCENE, "JPEG").replace(b"\xff\xc0\0\x11", b"\xff\xc3\0\x11"), "lossless"),
    "JPEG-LS": (encoded(SCENE, "JPEG").replace(b"\xff\xc0\0\x11", b"\xff\xf7\0\x11"), "lossless"),
    "JPEG of 12 bits": (
        encoded(SCENE, "JPEG").replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"),
        "JPEG of 12 bits",
    ),
    "Apple's PNG": (png_with(encoded(SCENE), chunk(b"CgBI", bytes(4)), before=b"IHDR"), "CgBI"),
    "a PNG of chunks": (png_with(encoded(SCENE), chunk(b"prVt", b"") * 200_000), "more than 100,000 chunks"),
    "a JPEG of segments": (jpeg_with(encoded(SCENE, "JPEG"), *[(0xFE, b"")] * 20_000), "more than 10,000 segments"),
    "a TIFF of one huge tile": (
        tiff(np.asarray(GREY)[..., None], tile=64).replace(
            struct.pack("<HHIHxx", 322, 3, 1, 64), struct.pack("<HHII", 322, 4, 1, 1 << 30)
        ),
        "tiles are larger",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_costs_too_much_is_refused_by_name(name: str) -> None:
    data, why = REFUSED[name]
    began = time.process_time()
    with pytest.raises(InvalidImageError, match=why):
        decode_image(data, OPTIONS)
    assert time.process_time() - began < 1


def test_scans_are_bounded() -> None:
    """A scan that is there again costs another pass over the image."""
    data = encoded(SCENE, "JPEG", quality=90, progressive=True)
    start, scans = data.rindex(b"\xff\xda"), data.count(b"\xff\xda")
    last = data[start:-2]
    whole = data[:-2] + last * (MAX_SCANS - scans) + data[-2:]
    assert difference(decode_image(whole, OPTIONS), SCENE) < 30  # each refines the last bit again
    with pytest.raises(InvalidImageError, match="more than 100 scans"):
        decode_image(data[:-2] + last * (MAX_SCANS + 1 - scans) + data[-2:], OPTIONS)
