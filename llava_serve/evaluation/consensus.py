"""Accuracy against ten human answers: VQAv2 and TextVQA. An answer that three people gave is right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_serve.evaluation.files import Answer, Question
from llava_serve.evaluation.scores import Table, grouped
from llava_serve.evaluation.vqa_text import normalise, official, one_line

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


def consensus(people: Sequence[str], given: str) -> float:
    """The mean, over leaving out each person in turn, of a third for each other person with that answer, at most 1."""
    same = [each == given for each in people]
    return sum(min(1.0, (sum(same) - each) / 3) for each in same) / len(same)


def vqav2_accuracy(human: Sequence[str], answer: str) -> float:
    """The official script's, of an answer as the original sends it. Where all people agree nothing is normalised."""
    people, given = [one_line(each) for each in human], normalise(answer)
    if len(set(people)) > 1:
        people, given = [official(each) for each in people], official(given)
    return consensus(people, given)


def textvqa_accuracy(human: Sequence[str], answer: str) -> float:
    """The evaluator's that the original uses: both sides are normalised."""
    return consensus([normalise(each) for each in human], normalise(answer))


def score_vqav2(pairs: Sequence[tuple[HumanAnswers, str]]) -> Table:
    return grouped((human.kind, vqav2_accuracy(human.answers, text)) for human, text in pairs)


def score_textvqa(pairs: Sequence[tuple[HumanAnswers, str]]) -> Table:
    return grouped(("", textvqa_accuracy(human.answers, text)) for human, text in pairs)
