"""What data is, by its first bytes: the formats that are read, and the names of many that are not."""

from __future__ import annotations

import re

from llava_serve.errors import InvalidImageError

_ACCEPTED = "PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF and PPM"

_READ = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)
_NAMED = (
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"II\xbc", "JPEG XR"),
    (b"\0\0\1\0", "an icon (ICO)"),
    (b"\0\0\2\0", "a cursor (CUR)"),
    (b"icns", "an icon (ICNS)"),
    (b"DDS ", "DDS"),
    (b"8BPS", "a Photoshop document (PSD)"),
    (b"gimp xcf", "a GIMP document (XCF)"),
    (b"qoif", "QOI"),
    (b"farbfeld", "farbfeld"),
    (b"v/1\1", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"#?RGBE", "Radiance HDR"),
    (b"\x0a\5\1", "PCX"),
    (b"\1\xda", "SGI"),
    (b"\x59\xa6\x6a\x95", "a Sun raster"),
    (b"/* XPM */", "XPM"),
    (b"SIMPLE  =", "FITS"),
    (b"BPG\xfb", "BPG"),
    (b"FLIF", "FLIF"),
    (b"AT&TFORM", "DjVu"),
    (b"\xd7\xcd\xc6\x9a", "a Windows metafile (WMF)"),
    (b"\1\0\0\0", "a Windows metafile (EMF)"),
    (b"IIRO", "a camera's raw file"),
    (b"IIU\0", "a camera's raw file"),
    (b"FUJIFILMCCD", "a camera's raw file"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"PK\3\4", "a ZIP archive or an office document"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf", "a 7-Zip archive"),
    (b"Rar!", "a RAR archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive"),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (b"\0\0\1\xba", "an MPEG video"),
    (b"\0\0\1\xb3", "an MPEG video"),
    (b"FLV", "a Flash video"),
    (b"ID3", "MP3 audio"),
    (b"OggS", "an Ogg file"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a program"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file that it stands for"),
)
"""First bytes, name. What begins with another entry's bytes stands before it."""

_RIFF = {b"WEBP": "WebP", b"AVI ": "an AVI video", b"WAVE": "WAVE audio"}
_AVIF = {b"avif", b"avis"}
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}

_MARKUP = (
    (rb"<svg\b|<!doctype svg\b", "SVG, a drawing rather than pixels"),
    (rb"<html\b|<!doctype html\b|<head\b|<body\b", "an HTML page"),
    (rb"<\?xml\b|<[a-z!]", "XML"),
)


def identify(data: bytes) -> str:
    """The name of an accepted format: PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF, PPM or HEIC.

    Raises:
        InvalidImageError: another kind of data; the message names it where its first bytes tell it.
    """
    for magic, accepted in _READ:
        if data.startswith(magic):
            return accepted
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP"
    if re.match(rb"P[1-7Ff][\s#]", data):
        return "PPM"
    brands = _brands(data)
    if brands & _AVIF:
        return "AVIF"
    if brands & _HEIC:
        return "HEIC"
    name = _name(data)
    what = f"The data is {name}" if name else "The data is not an image that can be read"
    raise InvalidImageError(f"{what}; send the image in one of {_ACCEPTED}.")


def _brands(data: bytes) -> set[bytes]:
    """Of an ISO media file: the main brand, and those that it is compatible with."""
    if data[4:8] != b"ftyp":
        return set()
    brands = data[8 : min(int.from_bytes(data[:4]), 256)]
    return {brands[i : i + 4] for i in range(0, len(brands), 4) if i != 4}  # bytes 4 to 8 are a version


def _name(data: bytes) -> str | None:
    if data[-18:-2] == b"TRUEVISION-XFILE":
        return "TGA"
    for magic, name in _NAMED:
        if data.startswith(magic):
            return name
    if data.startswith(b"RIFF"):
        return _RIFF.get(data[8:12])
    if data[4:8] == b"ftyp":
        return "a camera's raw file" if data[8:11] == b"crx" else "a video (MP4 or QuickTime)"
    if data[128:132] == b"DICM":
        return "DICOM"
    if data[257:262] == b"ustar":
        return "a tar archive"
    return _name_of_text(data[:4096])


def _name_of_text(head: bytes) -> str | None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<"):
        return next((name for pattern, name in _MARKUP if re.search(pattern, text)), None)
    if re.match(rb"ivborw0kg|/9j/|r0lgod|uklgr", text):
        return "base64 text of an image: it was encoded twice"
    if text.startswith(b"data:"):
        return "a data: URL inside another one"
    if re.match(rb'\{\s*"|\[\s*[{"\d]', text):
        return "JSON"
    if text and not re.search(rb"[^\t\n\r\x20-\x7e]", head):
        return "plain text"
    return None
