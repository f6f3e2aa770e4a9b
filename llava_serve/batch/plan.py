"""What is to be done of a job: its questions, less those that an earlier run has answered. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from llava_serve.batch.forms import Form, LineError, key_of, version_of
from llava_serve.batch.input_file import InputFile, Item
from llava_serve.batch.job import BatchJob
from llava_serve.batch.openai_batch import OpenAIForm
from llava_serve.batch.output_file import OutputFile
from llava_serve.batch.plain import PlainForm
from llava_serve.errors import LlavaServeError, RequestError

_LOOKED_AT = 20
"""Rows at the start, of which one at least can be used."""


def form_of(job: BatchJob, *, is_openai: bool) -> Form:
    """How the lines of a job are read and written."""
    return OpenAIForm(job) if is_openai else PlainForm(job)


class Plan:
    """A job that was looked at.

    Attributes:
        total: questions in the input.
        done: those of them that an earlier run answered.
        changed: those of them that an earlier run answered when they were others; they are asked again.
        output: where the answers are written. Lines of an earlier run are kept, but for errors and changed questions.

    Raises:
        RequestError: a file cannot be used, or the output is that of another job.
    """

    def __init__(self, job: BatchJob) -> None:
        self.job = job
        self._input = InputFile(job.input)
        self.is_openai = self._input.is_openai
        self.form = form_of(job, is_openai=self.is_openai)
        if self.is_openai and job.sampling:
            flags = ", ".join("--" + name.replace("_", "-") for name in job.sampling)
            raise RequestError(f"The requests of an OpenAI batch file say how they are sampled; leave out {flags}.")
        self._check_first()
        self.total = self.changed = self._others = 0
        self._known: dict[str, Item] = {}  # the first of each id, without its fields
        self._versions: dict[str, str] = {}
        for item in self._input:
            self.total += 1
            if (key := key_of(self.form, item)) is not None and key not in self._known:
                self._known[key] = replace(item, fields=None)
                self._versions[key] = version_of(job, item)
        self.output = OutputFile(job.output)
        try:
            self.output.recover(self._position_of)
        except LlavaServeError:
            self.output.close()
            raise
        self.done = self.num_written

    @property
    def num_written(self) -> int:
        """Questions that have their line in the output."""
        return len(self.output.positions) - self._others

    def items(self) -> Iterator[Item]:
        """The questions without an answer, one by one. Those that cannot be told from another have a fault."""
        kept = self.output.positions
        for item in self._input:
            if item.position in kept:
                continue
            key = key_of(self.form, item)
            if key is None and not item.fault:
                item = replace(item, fault=self._no_id)
            elif key is not None and (first := self._known[key]).position != item.position:
                item = replace(item, fault=f"its {self.form.id_field} is that of line {first.line}")
            yield item

    @property
    def _no_id(self) -> str:
        return f"'{self.form.id_field}' must be a text or a whole number, and not empty"

    def _check_first(self) -> None:
        """Refuses a file that is none of questions: it would be one of errors."""
        faults: list[str] = []
        for item in islice(self._input, _LOOKED_AT):
            try:
                self.form.prompt(item)
                if key_of(self.form, item) is None:
                    raise LineError(item, self._no_id)
                return
            except LlavaServeError as error:
                faults.append(error.message)
        what = "row" if len(faults) == 1 else f"{len(faults)} rows"
        raise RequestError(f"{self.job.input}: the first {what} cannot be used. {faults[0]}")

    def _position_of(self, line: dict[str, Any]) -> int | None:
        """The position of an output line; None if its question is asked again."""
        written = self.form.written(line)
        if written is None:
            raise RequestError(
                f"{self.job.output} is not of an earlier run over this kind of input, so nothing is written there; "
                "name another file for the answers."
            )
        if written.version.partition("-")[0] != self.job.settings:
            raise RequestError(
                f"{self.job.output} has answers of another model or of other options; name another file for the "
                "answers, or delete it."
            )
        if written.failed:
            return None
        if written.key not in self._known:
            self._others += 1
            return self.total + self._others
        if self._versions[written.key] != written.version:
            self.changed += 1
            return None
        return self._known[written.key].position
