"""Exact match after GQA's normalisation: GQA, and question sets of one's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from llava_serve.evaluation.files import Answer, Question, read_lines
from llava_serve.evaluation.scores import Table, grouped

Gold = tuple[str, str]
"""The right answer, and its kind."""


def read_gqa(path: Path, questions: Sequence[Question]) -> dict[str, Gold]:
    """The official questions with their answers, by question."""
    return {name: (each["answer"], "") for name, each in json.loads(path.read_text("utf-8")).items()}


def read_own(path: Path, questions: Sequence[Question]) -> dict[str, Gold]:
    """Lines with `question_id`, `answer` and perhaps `kind`."""
    return {
        str(line["question_id"]): (line["answer"], line.get("kind", ""))
        for line in read_lines(path, "question_id", "answer")
    }


def key(answer: Answer) -> str:
    return str(answer.question_id)


def score(pairs: Sequence[tuple[Gold, str]]) -> Table:
    return grouped((kind, float(_plain(text) == _plain(gold))) for (gold, kind), text in pairs)


def _plain(text: str) -> str:
    return text.strip().rstrip(".").lower()
