"""The questions of a job, read line by line from JSONL or CSV."""

from __future__ import annotations

import csv
import json
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
            raise RequestError(f"{path} has no row; {next((item.fault for item in self), 'it is empty')}.")
        assert first.fields is not None
        self.is_openai = "custom_id" in first.fields

    def __iter__(self) -> Iterator[Item]:
        try:
            yield from self._csv() if self._is_csv else self._jsonl()
        except OSError as error:
            raise RequestError(f"{self.path} cannot be read: {error.strerror}.") from None
        except UnicodeDecodeError:
            raise RequestError(f"{self.path} is not UTF-8; save it as UTF-8.") from None
        except csv.Error as error:
            raise RequestError(f"{self.path} cannot be read as CSV: {error}.") from None

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
            reader = csv.DictReader(text, delimiter=max(_DELIMITERS, key=header.count), strict=True)
            for position, cells in enumerate(reader):
                if None in cells:
                    yield Item(position, reader.line_num, None, "it has more cells than the header names")
                    continue
                fields = {name: _cell(name, cell) for name, cell in cells.items() if cell not in ("", None)}
                yield Item(position, reader.line_num, fields)


def _json_item(position: int, number: int, line: str) -> Item:
    try:
        line.encode()
        fields = json.loads(line)
    except UnicodeEncodeError:
        return Item(position, number, None, "it is not UTF-8")
    except (ValueError, RecursionError):
        return Item(position, number, None, "it is not valid JSON")
    if not isinstance(fields, dict):
        return Item(position, number, None, f"it is no JSON object, such as {{...}}: {shown(line.strip())}")
    return Item(position, number, fields)


def _cell(name: str, cell: str) -> Any:
    """The value of a cell that is not empty."""
    if name in _TEXTS and not (name in ("image", "stop") and cell.startswith("[")):
        return cell
    try:
        return json.loads(cell)
    except ValueError:
        return cell
