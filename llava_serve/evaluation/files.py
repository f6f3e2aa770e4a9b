"""The original's question files and answer files: JSON, one object a line."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from llava_serve.errors import RequestError

SUFFIXES = {
    "short": "\nAnswer the question using a single word or phrase.",
    "letter": "\nAnswer with the option's letter from the given choices directly.",
    "none": "",
}
"""What the original's training and evaluation put behind a question, by the form of the answer."""


@dataclass(frozen=True)
class Question:
    """A line of a question file.

    Attributes:
        question_id: not always one of a kind: TextVQA's is that of the picture.
        text: of the question, mostly with a suffix.
        image: its file's name in the folder of images; None has none.
        category: of POPE's questions.
    """

    question_id: str | int
    text: str
    image: str | None = None
    category: str | None = None

    def with_suffix(self, suffix: str) -> str:
        """The text that the model is asked. One that ends with a suffix gets no other."""
        if any(ending and self.text.rstrip().endswith(ending.strip()) for ending in SUFFIXES.values()):
            return self.text
        return self.text + suffix


@dataclass(frozen=True)
class Answer:
    """A line of an answer file.

    Attributes:
        prompt: the question with its suffix.
        text: of the answer.
    """

    question_id: str | int
    prompt: str
    text: str
    answer_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    model_id: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


def read_questions(path: Path) -> list[Question]:
    """The questions of a file.

    Raises:
        RequestError: it cannot be read, or a line is none.
    """
    return [
        Question(line["question_id"], line["text"], line.get("image"), line.get("category"))
        for line in read_lines(path, "question_id", "text")
    ]


def read_answers(path: Path) -> list[Answer]:
    """The answers of a file.

    Raises:
        RequestError: as `read_questions`.
    """
    return [
        Answer(line["question_id"], line.get("prompt", ""), line["text"], model_id=line.get("model_id", ""))
        for line in read_lines(path, "question_id", "text")
    ]


def write_answer(file: TextIO, answer: Answer) -> None:
    """Adds a line, whole."""
    file.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")


def answers_so_far(path: Path, questions: Sequence[Question], suffix: str, model_id: str) -> list[Answer]:
    """The answers that an interrupted run has left; half a last line is cut off the file.

    Raises:
        RequestError: the file has answers to other questions, or of another model.
    """
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        path.write_bytes(whole)
    answers = read_answers(path) if whole else []
    expected = [(question.question_id, question.with_suffix(suffix), model_id) for question in questions]
    found = [(answer.question_id, answer.prompt, answer.model_id) for answer in answers]
    if found != expected[: len(found)]:
        raise RequestError(f"{path} has answers to other questions, or of another model: choose another file.")
    return answers


def read_lines(path: Path, *keys: str) -> Iterator[dict[str, Any]]:
    """The objects of a file of lines, each with these keys.

    Raises:
        RequestError: the file cannot be read, or a line is no such object.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise RequestError(f"{path} cannot be read.") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            missing = [key for key in keys if key not in value]
        except (ValueError, TypeError):
            raise RequestError(f"{path}, line {number}: not a JSON object.") from None
        if missing:
            raise RequestError(f"{path}, line {number}: {' and '.join(missing)} must be there.")
        yield value
