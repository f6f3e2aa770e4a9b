"""What the forms of a job's lines have in common: each makes prompts of items, and output lines of results."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

from llava_serve.batch.input_file import Item
from llava_serve.batch.job import BatchJob
from llava_serve.errors import LlavaServeError, RequestError, shown
from llava_serve.inputs import Prompt
from llava_serve.results import GenerationResult

Result = GenerationResult | LlavaServeError


class LineError(RequestError):
    """A line cannot be used as it stands."""

    def __init__(self, item: Item, fault: str) -> None:
        super().__init__(f"Line {item.line}: {fault}.")
        self.args = (item, fault)


@dataclass(frozen=True, slots=True)
class Written:
    """What a line of an earlier run says.

    Attributes:
        key: the id of its question, as text.
        version: of the question and the job, when it was answered.
        failed: it has an error.
    """

    key: str | None
    version: str
    failed: bool


class Form(Protocol):
    """How lines are read and written.

    Attributes:
        id_field: the field that has the id, in the input and the output.
    """

    id_field: str

    def __init__(self, job: BatchJob) -> None: ...

    def prompt(self, item: Item) -> Prompt:
        """What an item asks.

        Raises:
            RequestError: it cannot be used; the sentence names the field.
        """
        ...

    def line(self, item: Item, result: Result) -> dict[str, Any]:
        """The output line of an item."""
        ...

    def written(self, line: Mapping[str, Any]) -> Written | None:
        """What an output line says; None if it is none of this form."""
        ...


def key_of(form: Form, item: Item) -> str | None:
    """The id of an item as text, by which rows are told from each other; None if it has none that can be used."""
    value = (item.fields or {}).get(form.id_field)
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) and value != "" else None


def version_of(job: BatchJob, item: Item) -> str:
    """Changes with the item, and with what changes answers."""
    return f"{job.settings}-{item.digest}"


def prompt_of(form: Form, item: Item) -> Prompt:
    """The prompt of an item; that of one that cannot be used raises its error when it is read."""
    try:
        return form.prompt(item)
    except LlavaServeError as error:
        return Prompt(_raiser(error))


def fields_of(item: Item, *known: str) -> dict[str, Any]:
    """The fields of an item that have a value.

    Raises:
        LineError: it cannot be used, or a field is unknown.
    """
    if item.fault or item.fields is None:
        raise LineError(item, item.fault)
    name = next((name for name in item.fields if name not in known), None)
    if name is not None:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"perhaps '{near[0]}' is meant" if near else f"there are {', '.join(known)}"
        raise LineError(item, f"the field '{shown(name)}' is unknown; {hint}")
    return {name: value for name, value in item.fields.items() if value is not None}


def image_source(source: str, folder: Path) -> str:
    """Where an image is: a link or a `data:` URL unchanged, and a path as it is seen from a folder."""
    if source[:5].lower() == "data:" or "://" in source:
        return source
    return str(folder / Path(source).expanduser())


def _raiser(error: LlavaServeError) -> Callable[[], NoReturn]:
    def fail() -> NoReturn:
        raise error

    return fail
