"""Good images in odd forms, each with what a person sees in it: `GOOD`, and `TRANSPARENT`, which hide colours."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image

from support.odd_images import (
    GREY,
    MARKED,
    SCENE,
    chunk,
    encoded,
    exif_block,
    hidden,
    jpeg_with,
    png_of,
    tiff,
)

BILEVEL = GREY.convert("1", dither=Image.Dither.NONE)
INDEXED = SCENE.quantize(4)
BLANK = Image.new("RGB", SCENE.size, "lime")
P5 = b"P5\n%d %d\n255\n" % SCENE.size + GREY.tobytes()
P6 = b"P6\n%d %d\n255\n" % SCENE.size + SCENE.tobytes()
TIFF_COMPRESSIONS = ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd", "lzma")

RGBA = hidden()
BLACK = hidden("black")
ALPHA = Image.fromarray(MARKED.astype(np.uint8) * 255)


def lab() -> Image.Image:
    from PIL import ImageCms

    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    made = ImageCms.profileToProfile(SCENE, *profiles, outputMode="LAB")
    assert made is not None
    return made


GOOD: dict[str, tuple[Callable[[], bytes], Image.Image]] = {
    "PNG": (lambda: encoded(SCENE), SCENE),
    "PNG L": (lambda: encoded(GREY), GREY),
    "PNG 1": (lambda: encoded(BILEVEL), BILEVEL),
    "PNG P": (lambda: encoded(INDEXED), INDEXED),
    "PNG P of 2 bits": (lambda: encoded(INDEXED, bits=2), INDEXED),
    "PNG optimised": (lambda: encoded(SCENE, optimize=True), SCENE),
    "APNG": (lambda: encoded(SCENE, save_all=True, append_images=[BLANK]), SCENE),
    "APNG with a default image": (
        lambda: encoded(SCENE, save_all=True, default_image=True, append_images=[BLANK, SCENE]),
        SCENE,
    ),
    "JPEG": (lambda: encoded(SCENE, "JPEG", quality=90), SCENE),
    "JPEG grey": (lambda: encoded(GREY, "JPEG", quality=90), GREY),
    "JPEG progressive": (lambda: encoded(SCENE, "JPEG", quality=90, progressive=True), SCENE),
    "JPEG 4:4:4": (lambda: encoded(SCENE, "JPEG", quality=90, subsampling=0), SCENE),
    "JPEG 4:2:2": (lambda: encoded(SCENE, "JPEG", quality=90, subsampling=1), SCENE),
    "JPEG restarts": (lambda: encoded(SCENE, "JPEG", quality=90, restart_marker_blocks=3), SCENE),
    "JPEG CMYK": (lambda: encoded(SCENE.convert("CMYK"), "JPEG", quality=95), SCENE),
    "JPEG RGB": (lambda: encoded(SCENE, "JPEG", quality=95, keep_rgb=True), SCENE),
    "JPEG with comments": (lambda: jpeg_with(encoded(SCENE, "JPEG", quality=90), *[(0xFE, b"a" * 9)] * 500), SCENE),
    "MPO": (lambda: encoded(SCENE, "MPO", quality=90, save_all=True, append_images=[BLANK]), SCENE),
    "MPO turned": (
        lambda: encoded(SCENE, "MPO", quality=90, save_all=True, append_images=[BLANK], exif=exif_block(6)),
        SCENE.rotate(-90, expand=True),
    ),
    "WebP": (lambda: encoded(SCENE, "WEBP", quality=95), SCENE),
    "WebP lossless": (lambda: encoded(SCENE, "WEBP", lossless=True), SCENE),
    "WebP animated": (lambda: encoded(SCENE, "WEBP", quality=95, save_all=True, append_images=[BLANK] * 3), SCENE),
    "WebP with a profile": (lambda: encoded(SCENE, "WEBP", quality=95, icc_profile=b"garbage"), SCENE),
    "GIF": (lambda: encoded(INDEXED, "GIF"), INDEXED),
    "GIF 87a": (lambda: encoded(INDEXED, "GIF").replace(b"GIF89a", b"GIF87a", 1), INDEXED),
    "GIF interlaced": (lambda: encoded(INDEXED, "GIF", interlace=1), INDEXED),
    "GIF animated": (lambda: encoded(INDEXED, "GIF", save_all=True, append_images=[BLANK] * 3), INDEXED),
    "GIF with a comment": (lambda: encoded(INDEXED, "GIF", comment=b"a" * 100_000), INDEXED),
    "BMP": (lambda: encoded(SCENE, "BMP"), SCENE),
    "BMP grey": (lambda: encoded(GREY, "BMP"), GREY),
    "BMP 1": (lambda: encoded(BILEVEL, "BMP"), BILEVEL),
    "BMP P": (lambda: encoded(INDEXED, "BMP"), INDEXED),
    "BMP of 32 bits": (lambda: encoded(SCENE.convert("RGBA"), "BMP"), SCENE),
    "PPM P5": (lambda: P5, GREY),
    "PPM P6": (lambda: P6, SCENE),
    "PPM with comments": (lambda: P6.replace(b"P6\n", b"P6 # by hand\n# again\n", 1), SCENE),
    "PPM by Pillow": (lambda: encoded(SCENE, "PPM"), SCENE),
    "AVIF": (lambda: encoded(SCENE, "AVIF", quality=90), SCENE),
    "AVIF grey": (lambda: encoded(GREY, "AVIF", quality=90), GREY),
    "AVIF 4:4:4": (lambda: encoded(SCENE, "AVIF", quality=90, subsampling="4:4:4"), SCENE),
    "AVIF sequence": (lambda: encoded(SCENE, "AVIF", quality=90, save_all=True, append_images=[BLANK]), SCENE),
    **{f"TIFF {name}": (partial(encoded, SCENE, "TIFF", compression=name), SCENE) for name in TIFF_COMPRESSIONS},
    "TIFF group 3": (lambda: encoded(BILEVEL, "TIFF", compression="group3"), BILEVEL),
    "TIFF group 4": (lambda: encoded(BILEVEL, "TIFF", compression="group4"), BILEVEL),
    "TIFF L": (lambda: encoded(GREY, "TIFF"), GREY),
    "TIFF P": (lambda: encoded(INDEXED, "TIFF"), INDEXED),
    "TIFF CMYK": (lambda: encoded(SCENE.convert("CMYK"), "TIFF"), SCENE),
    "TIFF YCbCr": (lambda: encoded(SCENE.convert("YCbCr"), "TIFF"), SCENE),
    "TIFF LAB": (lambda: encoded(lab(), "TIFF"), SCENE),
    "TIFF of two pages": (lambda: encoded(SCENE.copy(), "TIFF", save_all=True, append_images=[BLANK.copy()]), SCENE),
    "TIFF big-endian": (lambda: tiff(np.asarray(SCENE), order=">"), SCENE),
    "TIFF tiles": (lambda: tiff(np.asarray(SCENE), tile=64), SCENE),
    "TIFF planes": (lambda: tiff(np.asarray(SCENE), planar=True), SCENE),
    "BigTIFF": (lambda: tiff(np.asarray(SCENE), big=True), SCENE),
    "BigTIFF, big-endian": (lambda: tiff(np.asarray(SCENE), big=True, order=">"), SCENE),
    "TIFF white is zero": (lambda: tiff(255 - np.asarray(GREY)[..., None], photometric=0), GREY),
}


def grey_with_alpha() -> Image.Image:
    hidden_grey = np.where(MARKED, np.asarray(GREY), 7).astype(np.uint8)
    return Image.merge("LA", (Image.fromarray(hidden_grey), ALPHA))


def indexed(clear: tuple[int, int, int] = (0, 255, 0)) -> tuple[Image.Image, int]:
    """The scene of 3 colours, of which the white one is transparent, and green where that is not looked at."""
    indices = np.zeros((SCENE.height, SCENE.width), np.uint8)
    pixels = np.asarray(SCENE)
    indices[(pixels == (220, 30, 40)).all(-1)] = 1
    indices[(pixels == (30, 60, 200)).all(-1)] = 2
    image = Image.fromarray(indices)
    image.putpalette([*clear, 220, 30, 40, 30, 60, 200])
    return image, 0


def keyed(depth: int, colour: bool) -> bytes:
    """The scene where white is black, and black is the transparent colour."""
    pixels = np.asarray(SCENE if colour else GREY).astype(np.uint16)
    most = 2**depth - 1
    samples = (pixels * most // 255) if depth < 16 else pixels * 257
    samples = np.where(MARKED if colour is False else MARKED[..., None], np.maximum(samples, 1), 0)
    key = chunk(b"tRNS", struct.pack(">3H", 0, 0, 0) if colour else struct.pack(">H", 0))
    return png_of(samples, depth, 2 if colour else 0, key)


def coarse(depth: int) -> Image.Image:
    most = 2**depth - 1
    shades = np.where(MARKED, np.maximum(np.asarray(GREY).astype(int) * most // 255, 1) * 255 // most, 255)
    return Image.fromarray(shades.astype(np.uint8))


def bmp_v4(image: Image.Image) -> bytes:
    """A bitmap whose header names a mask for alpha."""
    pixels = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).tobytes()
    masks = struct.pack("<4I", 0xFF, 0xFF00, 0xFF0000, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, *image.size, 1, 32, 3, len(pixels), 0, 0, 0, 0) + masks
    header = header.ljust(108, b"\0")
    return b"BM" + struct.pack("<IHHI", 122 + len(pixels), 0, 0, 122) + header + pixels


TRANSPARENT: dict[str, tuple[Callable[[], bytes], Image.Image]] = {
    "PNG RGBA": (lambda: encoded(RGBA), SCENE),
    "PNG RGBA over black": (lambda: encoded(BLACK), SCENE),
    "PNG LA": (lambda: encoded(grey_with_alpha()), GREY),
    "PNG P": (lambda: encoded(indexed()[0], transparency=0), SCENE),
    "PNG P of bytes": (lambda: encoded(indexed()[0], transparency=b"\0\xff\xff"), SCENE),
    "PNG P of 8 bits": (lambda: encoded(indexed()[0], transparency=0, bits=8), SCENE),
    "PNG grey key, 8 bits": (lambda: keyed(8, False), GREY),
    "PNG grey key, 4 bits": (lambda: keyed(4, False), coarse(4)),
    "PNG grey key, 2 bits": (lambda: keyed(2, False), coarse(2)),
    "PNG grey key, 16 bits": (lambda: keyed(16, False), GREY),
    "PNG RGB key, 8 bits": (lambda: keyed(8, True), SCENE),
    "PNG RGB key, 16 bits": (lambda: keyed(16, True), SCENE),
    "PNG RGBA, 16 bits": (lambda: png_of(np.asarray(RGBA).astype(np.uint16) * 257, 16, 6), SCENE),
    "PNG LA, 16 bits": (lambda: png_of(np.asarray(grey_with_alpha()).astype(np.uint16) * 257, 16, 4), GREY),
    "WebP lossless": (lambda: encoded(RGBA, "WEBP", lossless=True, exact=True), SCENE),
    "WebP lossy": (lambda: encoded(BLACK, "WEBP", quality=95), SCENE),
    "GIF": (lambda: encoded(indexed()[0], "GIF", transparency=0), SCENE),
    "TIFF RGBA": (lambda: encoded(RGBA, "TIFF"), SCENE),
    "TIFF LA": (lambda: encoded(grey_with_alpha(), "TIFF"), GREY),
    "TIFF RGBA, 16 bits": (lambda: tiff(np.asarray(RGBA).astype(np.uint16) * 257), SCENE),
    "TIFF RGBA, 16 bits, planes": (lambda: tiff(np.asarray(RGBA).astype(np.uint16) * 257, planar=True), SCENE),
    "TIFF RGBA, float": (lambda: tiff(np.asarray(RGBA).astype(np.float32) / 255), SCENE),
    "TIFF LA, 16 bits": (lambda: tiff(np.asarray(grey_with_alpha()).astype(np.uint16) * 257), GREY),
    "AVIF": (lambda: encoded(BLACK, "AVIF", quality=95), SCENE),
    "BMP with alpha": (lambda: bmp_v4(RGBA), SCENE),
}
