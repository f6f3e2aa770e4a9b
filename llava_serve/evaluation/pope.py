"""POPE: is an object in the picture? Three splits differ in how the objects that are not there were chosen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava_serve.errors import RequestError
from llava_serve.evaluation.files import Answer, Question, read_lines
from llava_serve.evaluation.scores import Table, percent

SPLITS = ("random", "popular", "adversarial")

Gold = tuple[str, bool]
"""The split, and whether the object is there."""


def read(path: Path, questions: Sequence[Question]) -> dict[str, Gold]:
    """The official labels, by the ids of the original's question file, which has the questions of each split in the
    order of its labels.

    Raises:
        RequestError: they are not the labels of these questions.
    """
    golds: dict[str, Gold] = {}
    for split in SPLITS:
        labels = list(read_lines(path / f"coco_pope_{split}.json", "image", "text", "label"))
        asked = [question for question in questions if question.category == split]
        if len(asked) > len(labels):
            raise RequestError(f"The questions have more of POPE's category {split} than its labels.")
        for question, label in zip(asked, labels, strict=False):
            if question.image != label["image"] or not question.text.startswith(label["text"]):
                raise RequestError(f"Question {question.question_id} is not the one that POPE's labels have there.")
            golds[str(question.question_id)] = split, label["label"] == "yes"
    if not golds:
        raise RequestError("No question has a category of POPE: random, popular or adversarial.")
    return golds


def key(answer: Answer) -> str:
    return str(answer.question_id)


def says_yes(text: str) -> bool:
    """An answer is yes unless its first sentence has the word no or not."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def score(pairs: Sequence[tuple[Gold, str]]) -> Table:
    table: Table = {}
    for split in SPLITS:
        outcomes = [(there, says_yes(text)) for (name, there), text in pairs if name == split]
        if outcomes:
            table[split] = _line(outcomes)
    table["mean"] = {
        column: sum(line[column] for line in table.values()) / len(table) for column in ("accuracy", "F1", "yes")
    }
    return table


def _line(outcomes: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    """Outcomes are (is there, said yes)."""
    hits = sum(there and said for there, said in outcomes)
    said, there = sum(said for _, said in outcomes), sum(there for there, _ in outcomes)
    return {
        "questions": len(outcomes),
        "accuracy": percent(there == said for there, said in outcomes),
        "precision": 100 * hits / said if said else 0.0,
        "recall": 100 * hits / there if there else 0.0,
        "F1": 200 * hits / (said + there) if said + there else 0.0,
        "yes": 100 * said / len(outcomes),
    }
