"""Accuracy against ten human answers: VQAv2 and TextVQA. An answer that three people gave is right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_serve.evaluation.files import Answer, Question
from llava_serve.evaluation.scores import Table, grouped
from llava_serve.evaluation.vqa_text import normalise

_OCR = "Reference OCR token:"


@dataclass(frozen=True)
class HumanAnswers:
    """What people answered, and the kind of their answers."""

    answers: tuple[str, ...]
    kind: str = ""


def read_vqav2(path: Path, questions: Sequence[Question]) -> dict[str, HumanAnswers]:
    """The official annotations, by question."""
    return {
        str(each["question_id"]): HumanAnswers(
            tuple(human["answer"] for human in each["answers"]), each.get("answer_type", "")
        )
        for each in json.loads(path.read_text("utf-8"))["annotations"]
    }


def vqav2_key(answer: Answer) -> str:
    return str(answer.question_id)


def read_textvqa(path: Path, questions: Sequence[Question]) -> dict[tuple[str, str], HumanAnswers]:
    """The official annotations, by picture and question."""
    return {
        (str(each["image_id"]), each["question"].lower()): HumanAnswers(tuple(each["answers"]))
        for each in json.loads(path.read_text("utf-8"))["data"]
    }


def textvqa_key(answer: Answer) -> tuple[str, str]:
    """The original's question files name the picture, and put the question first or behind the OCR tokens."""
    first, *others = answer.prompt.split("\n")
    question = others[0] if first.startswith(_OCR) and others else first
    return str(answer.question_id), question.lower()


def consensus(human: Sequence[str], answer: str) -> float:
    """The mean, over leaving out each person in turn, of a third for each other person with that answer, at most 1."""
    given = normalise(answer)
    same = [normalise(each) == given for each in human]
    return sum(min(1.0, (sum(same) - each) / 3) for each in same) / len(same)


def score(pairs: Sequence[tuple[HumanAnswers, str]]) -> Table:
    return grouped((human.kind, consensus(human.answers, text)) for human, text in pairs)
