"""The questions of a job, read line by line from JSONL or CSV."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_serve.batch.job import digest
from llava_serve.errors import RequestError, shown

_CELL_BYTES = 1 << 30
"""A cell of a CSV may hold a picture in base64."""
_DELIMITERS = ",;\t"
"""Of a CSV: the one that its header has most often. Spreadsheets write semicolons where commas are decimal."""
_CSV_FAULTS = {"unexpected end of data": "a cell in quotes has no end", "line contains NUL": "it has a NUL character"}
"""By what the reader says; the rest is about quotes."""
_TEXTS = ("id", "image", "question", "conv_mode", "stop")
"""Columns of a CSV whose cells are texts. Those of `image` and `stop` may be JSON lists; all others are JSON values."""


@dataclass(frozen=True, slots=True)
class Item:
    """One line of the input.

    Attributes:
        position: in the input, from 0.
        line: where it ends in the file, from 1.
        fields: what it holds; None if that cannot be read.
        fault: why it cannot be used, where that is known without a look at its fields.
    """

    position: int
    line: int
    fields: dict[str, Any] | None
    fault: str = ""

    @property
    def digest(self) -> str:
        """Tells whether a line has changed; the order of its fields does not matter."""
        return digest([sorted((self.fields or {}).items()), self.fault])


class InputFile:
    """A file of questions.

    Attributes:
        is_openai: it is an OpenAI batch file.

    Raises:
        RequestError: it cannot be read, or has no questions.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_csv = path.suffix.lower() in (".csv", ".tsv")
        if path.is_dir():
            raise RequestError(f"{path} is a folder; give a file with a row for each question.")
        if self._is_array():
            raise RequestError(f"{path} is a JSON array; write one object a line, without brackets around all.")
        first = next((item for item in self if item.fields is not None), None)
        if first is None:
            fault = next((item.fault for item in self), None)
            hint = "" if self._is_csv or not fault else " Only a file that ends in .csv or .tsv is read as CSV."
            raise RequestError(f"{path} has no row; {fault or 'it is empty'}.{hint}")
        assert first.fields is not None
        self.is_openai = "custom_id" in first.fields

    def __iter__(self) -> Iterator[Item]:
        try:
            yield from self._csv() if self._is_csv else self._jsonl()
        except OSError as error:
            raise RequestError(f"{self.path} cannot be read: {error.strerror}.") from None
        except UnicodeDecodeError:
            raise RequestError(f"{self.path} is not UTF-8; save it as UTF-8.") from None

    def _is_array(self) -> bool:
        if self._is_csv or not self.path.exists():
            return False
        with self.path.open("rb") as file:
            return file.read(1 << 10).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")

    def _jsonl(self) -> Iterator[Item]:
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
            position = 0
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _json_item(position, number, line)
                    position += 1

    def _csv(self) -> Iterator[Item]:
        csv.field_size_limit(_CELL_BYTES)
        with self.path.open(encoding="utf-8-sig", newline="") as text:
            header = text.readline()
            text.seek(0)
            reader = csv.reader(text, delimiter=max(_DELIMITERS, key=header.count), strict=True)
            line = 0
            try:
                names = next(reader, [])
                line = reader.line_num
                if twice := [name for name, count in Counter(filter(None, names)).items() if count > 1]:
                    raise RequestError(
                        f"{self.path} has the column {twice[0]!r} twice; several images of a row stand in one cell, "
                        "as a JSON list."
                    )
                for position, cells in enumerate(filter(any, reader)):
                    line = reader.line_num
                    yield _csv_item(position, line, names, cells)
            except csv.Error as error:
                fault = _CSV_FAULTS.get(str(error), "a quote within a cell must be written twice, in a cell in quotes")
                raise RequestError(f"{self.path} cannot be read as CSV behind line {line}: {fault}.") from None


def _json_item(position: int, number: int, line: str) -> Item:
    try:
        line.encode()
        fields = json.loads(line, object_pairs_hook=_object)
    except UnicodeEncodeError:
        return Item(position, number, None, "it is not UTF-8")
    except _TwiceError as error:
        return Item(position, number, None, f"it has the field '{shown(error)}' twice")
    except (ValueError, RecursionError):
        return Item(position, number, None, "it is not valid JSON")
    if not isinstance(fields, dict):
        return Item(position, number, None, f"it is no JSON object, such as {{...}}: {shown(line.strip())}")
    return Item(position, number, fields)


class _TwiceError(ValueError):
    """A name stands twice in an object, so that one of its values would be lost."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _TwiceError(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return found


def _csv_item(position: int, number: int, names: list[str], cells: list[str]) -> Item:
    if len(cells) > len(names):
        return Item(position, number, None, "it has more cells than the header names")
    given = [(name, cell) for name, cell in zip(names, cells, strict=False) if cell]
    if any(not name for name, _ in given):
        return Item(position, number, None, "it has a cell in a column without a name")
    return Item(position, number, {name: _cell(name, cell) for name, cell in given})


def _cell(name: str, cell: str) -> Any:
    """The value of a cell that is not empty."""
    if name in _TEXTS and not (name in ("image", "stop") and cell.startswith("[")):
        return cell
    try:
        return json.loads(cell)
    except ValueError:
        return cell
