"""Directories of tags, as TIFF files and EXIF blocks hold them, and the orientation that a camera noted.

Sources: TIFF 6.0; the BigTIFF description of libtiff; Exif 2.32, section 4.6.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

from PIL import Image

_TYPES = {1: "B", 2: "c", 3: "H", 4: "I", 5: "II", 6: "b", 7: "c", 8: "h", 9: "i", 10: "ii", 11: "f", 12: "d"}
_TYPES |= {13: "I", 16: "Q", 17: "q", 18: "Q"}  # IFD, and those of BigTIFF
_LONG, _DOUBLE = 4, 12
_SIZES = {number: struct.calcsize("<" + code) for number, code in _TYPES.items()}

_MOST_NUMBERS = 16
"""Of a tag that are looked at: channels have one each."""

ORIENTATION = 0x0112

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class Directory:
    """The first directory of a file.

    Attributes:
        order: of bytes, `<` or `>`.
        entries: tag to (type, count, value as it lies in the file).
        cut: tags whose value lies outside the file.
    """

    order: str
    entries: dict[int, tuple[int, int, bytes]] = field(default_factory=dict)
    cut: set[int] = field(default_factory=set)

    def numbers(self, tag: int, most: int = _MOST_NUMBERS) -> tuple[float, ...]:
        """The first numbers of a tag; empty where it is absent, or holds none."""
        kind, count, value = self.entries.get(tag, (0, 0, b""))
        code = _TYPES.get(kind, "c")
        if len(code) > 1 or code == "c":
            return ()
        return struct.unpack_from(f"{self.order}{min(count, most)}{code}", value)

    def number(self, tag: int, default: int) -> int:
        """The first whole number of a tag."""
        numbers = self.numbers(tag)
        return numbers[0] if numbers and isinstance(numbers[0], int) else default


def read_directory(data: bytes, wanted: Iterable[int]) -> Directory:
    """Reads the first directory.

    Args:
        data: begins with a TIFF header.
        wanted: tags; all others are passed over, and so are those whose value lies outside the data.

    Raises:
        ValueError: there is no directory.
    """
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        raise ValueError("no TIFF header")
    big = data[2:4] in (b"+\0", b"\0+")
    offset_format, count_format, entry_format = ("Q", "Q", "HHQ") if big else ("I", "H", "HHI")
    inline = 8 if big else 4
    try:
        (start,) = struct.unpack_from(order + offset_format, data, 8 if big else 4)
        (length,) = struct.unpack_from(order + count_format, data, start)
    except (struct.error, OverflowError) as error:
        raise ValueError("no directory") from error
    directory = Directory(order)
    start += struct.calcsize("<" + count_format)
    step, wanted = struct.calcsize("<" + entry_format) + inline, frozenset(wanted)
    for at in range(start, min(start + min(length, 65535) * step, len(data) - step + 1), step):
        tag, kind, count = struct.unpack_from(order + entry_format, data, at)
        if tag not in wanted or kind not in _SIZES:
            continue
        size, where = count * _SIZES[kind], at + step - inline
        if size > inline:
            (where,) = struct.unpack_from(order + offset_format, data, where)
        if where + size <= len(data):
            directory.entries.setdefault(tag, (kind, count, data[where : where + size]))
        else:
            directory.cut.add(tag)
    return directory


def append_directory(data: bytes, directory: Directory) -> bytes:
    """The file with another first directory, which is written behind its end; all else stays where it is.

    It becomes a classic TIFF, since Pillow knows BigTIFF in one order of bytes only.
    """
    order, entries = directory.order, sorted(directory.entries.items())
    start = len(data) + len(data) % 2
    values_at = start + 2 + 12 * len(entries) + 4
    head, values = struct.pack(order + "H", len(entries)), b""
    for tag, (kind, count, value) in entries:
        if _SIZES[kind] == 8 and len(_TYPES[kind]) == 1 and kind != _DOUBLE:
            value = struct.pack(f"{order}{count}I", *struct.unpack(f"{order}{count}Q", value))
            kind = _LONG
        head += struct.pack(order + "HHI", tag, kind, count)
        if len(value) <= 4:
            head += value.ljust(4, b"\0")
        else:
            head += struct.pack(order + "I", values_at + len(values))
            values += value + b"\0" * (len(value) % 2)
    first = data[:2] + struct.pack(order + "HI", 42, start)
    return b"".join((first, memoryview(data)[len(first) :], b"\0" * (len(data) % 2), head, bytes(4), values))


def exif_orientation(exif: bytes) -> int:
    """The orientation that an EXIF block names, 1 to 8; whatever is wrong with the block, 1: upright."""
    while exif.startswith(b"Exif"):
        exif = exif[6:]
    try:
        return valid_orientation(read_directory(exif, (ORIENTATION,)))
    except ValueError:
        return 1


def valid_orientation(directory: Directory) -> int:
    """The orientation of a directory; 1 where it has none that is valid."""
    value = directory.number(ORIENTATION, 1)
    return value if 1 <= value <= 8 else 1


def turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    """Turns and mirrors an image as its orientation says."""
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image
