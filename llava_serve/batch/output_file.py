"""The answers of a job, as lines of a file that a killed process leaves whole."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llava_serve.errors import LlavaServeError, RequestError

Span = tuple[int, int]
"""Where a line is: its offset and its length, in bytes."""


class OutputFile:
    """Lines that are appended whole, each with the position of its question in the input.

    One process at a time has it.

    Raises:
        RequestError: it cannot be written, or another process has it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._spans: dict[int, Span] = {}
        if path.exists() and not path.is_file():
            raise RequestError(f"{path} is not a file; name the file for the answers.")
        try:
            self._file = _locked(path, "a+b")
        except OSError as error:
            raise RequestError(f"{path} cannot be written: {error.strerror}.") from None

    def recover(self, position_of: Callable[[dict[str, Any]], int | None]) -> None:
        """Takes over the lines of an earlier run. A last line without its end is dropped.

        Args:
            position_of: called with each line; gives its position, or None if the line is to be dropped. What it
                raises leaves the file as it is.

        Raises:
            RequestError: a line is not JSON.
        """
        size = os.fstat(self._file.fileno()).st_size
        for number, span, line in self._lines():
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if not isinstance(value, dict):
                raise RequestError(
                    f"Line {number} of {self._path} is not of an earlier run, so nothing is written there; "
                    "name another file for the answers."
                )
            if (position := position_of(value)) is not None:
                self._spans[position] = span
        if sum(length for _, length in self._spans.values()) < size:
            self._rewrite(sorted(self._spans, key=lambda position: self._spans[position]))

    def append(self, position: int, value: dict[str, Any]) -> None:
        """Writes a line.

        Raises:
            LlavaServeError: there is no room, for example.
        """
        try:
            line = json.dumps(value, ensure_ascii=False).encode() + b"\n"
        except UnicodeEncodeError:  # half a surrogate pair, which only an escape can hold
            line = json.dumps(value).encode() + b"\n"
        try:
            offset = os.lseek(self._file.fileno(), 0, os.SEEK_END)
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._file.fileno(), rest) :]
        except OSError as error:
            raise LlavaServeError(f"{self._path} cannot be written: {error.strerror}.") from None
        self._spans[position] = offset, len(line)

    @property
    def positions(self) -> frozenset[int]:
        """Of the lines that there are."""
        return frozenset(self._spans)

    def sort(self) -> None:
        """Puts the lines in the order of their positions."""
        order = sorted(self._spans)
        if order != sorted(order, key=lambda position: self._spans[position]):
            self._rewrite(order)

    def close(self) -> None:
        """Lets another process have the file."""
        self._file.close()

    def _lines(self) -> Iterator[tuple[int, Span, bytes]]:
        self._file.seek(0)
        offset = 0
        for number, line in enumerate(self._file, 1):
            if line.endswith(b"\n"):
                yield number, (offset, len(line)), line
            offset += len(line)

    def _rewrite(self, order: list[int]) -> None:
        """Makes a file of these lines that takes the place of the old one at once."""
        part = self._path.with_name(self._path.name + ".part")
        try:
            new = _locked(part, "w+b")
            spans, offset = {}, 0
            for position in order:
                at, length = self._spans[position]
                self._file.seek(at)
                new.write(self._file.read(length))
                spans[position] = offset, length
                offset += length
            new.flush()
            os.fsync(new.fileno())
            os.replace(part, self._path)
        except OSError as error:
            raise LlavaServeError(f"{part} cannot be written: {error.strerror}.") from None
        self._file.close()
        self._file, self._spans = new, spans


def _locked(path: Path, mode: str) -> BinaryIO:
    file: BinaryIO = path.open(mode)  # type: ignore[assignment]
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RequestError(f"Another process writes to {path} now.") from None
    return file
