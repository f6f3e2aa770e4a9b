"""MME: two questions with yes or no about each picture. Points are the share of right answers and that of pictures with
both right, in per cent, added."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava_serve.evaluation.files import SUFFIXES, Answer, Question
from llava_serve.evaluation.scores import Table, percent

COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
"""All other categories are perception."""

Key = tuple[str, str, str]
"""Category, the picture's name without its ending, and question."""

Gold = tuple[str, str, str, int]
"""Category, picture, the right answer, and the number of the picture's questions."""


def read(path: Path, questions: Sequence[Question]) -> dict[Key, Gold]:
    """The official folder: a text file beside each picture, or in `questions_answers_YN`, has its questions with their
    answers."""
    golds: dict[Key, Gold] = {}
    for category in sorted(folder for folder in path.iterdir() if folder.is_dir()):
        texts = category / "questions_answers_YN"
        for file in sorted((texts if texts.is_dir() else category).glob("*.txt")):
            lines = [line.split("\t") for line in file.read_text("utf-8").splitlines() if line.strip()]
            for question, answer in lines:
                golds[category.name, file.stem, _plain(question)] = (
                    category.name, file.stem, answer.strip().lower(), len(lines),
                )  # fmt: skip
    return golds


def key(answer: Answer) -> Key:
    """Ids are `category/picture.png`."""
    category, _, name = str(answer.question_id).partition("/")
    return category, Path(name).stem, _plain(answer.prompt)


def _plain(question: str) -> str:
    for ending in (SUFFIXES["short"], "Please answer yes or no."):
        question = question.strip().removesuffix(ending.strip())
    return " ".join(question.split())


def read_answer(text: str) -> str:
    """`yes`, `no` or `other`: by the first four letters, unless the answer is one of the words."""
    start = text.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def score(pairs: Sequence[tuple[Gold, str]]) -> Table:
    right: dict[str, dict[str, list[bool]]] = {}
    asked: dict[tuple[str, str], int] = {}
    for (category, image, answer, questions), text in pairs:
        right.setdefault(category, {}).setdefault(image, []).append(read_answer(text) == answer)
        asked[category, image] = questions
    table: Table = {}
    for category, images in right.items():
        accuracy = percent(one for each in images.values() for one in each)
        both = percent(all(each) and len(each) == asked[category, image] for image, each in images.items())
        table[category] = {
            "questions": sum(map(len, images.values())),
            "accuracy": accuracy,
            "accuracy+": both,
            "points": accuracy + both,
        }
    for total, cognition in (("perception", False), ("cognition", True)):
        points = [line["points"] for name, line in table.items() if (name in COGNITION) == cognition]
        table |= {total: {"points": sum(points)}} if points else {}
    return table
