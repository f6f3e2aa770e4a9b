"""The tasks: where the right answers are, which one belongs to an answer, and how they are scored."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_serve.errors import RequestError
from llava_serve.evaluation import consensus, exact, mme, pope
from llava_serve.evaluation.files import Answer, Question
from llava_serve.evaluation.scores import Scores, Table


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        annotations: what `--annotations` names.
        read: the right answers by key, from the annotations and the questions.
        key: that of an answer.
        score: over right answers and texts.
        note: how the figure that papers give is made.
        original: the original evaluates it; its scripts give the template `vicuna_v1`.
        needs_questions: the annotations alone do not tell which answer belongs to which question.
    """

    annotations: str
    read: Callable[[Path, Sequence[Question]], Mapping[Any, Any]]
    key: Callable[[Answer], Hashable]
    score: Callable[[Sequence[tuple[Any, str]]], Table]
    note: str
    original: bool = True
    needs_questions: bool = False


TASKS = {
    "vqav2": Task(
        "v2_mscoco_val2014_annotations.json",
        consensus.read_vqav2,
        consensus.vqav2_key,
        consensus.score_vqav2,
        "Papers give the accuracy of all on test-dev, whose answers are not public.",
    ),
    "textvqa": Task(
        "TextVQA_0.5.1_val.json",
        consensus.read_textvqa,
        consensus.textvqa_key,
        consensus.score_textvqa,
        "Papers give the accuracy on the validation set.",
    ),
    "gqa": Task(
        "testdev_balanced_questions.json",
        exact.read_gqa,
        exact.key,
        exact.score,
        "Papers give the accuracy on testdev-balanced.",
    ),
    "pope": Task(
        "the folder of coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json",
        pope.read,
        pope.key,
        pope.score,
        "Papers on LLaVA give the mean F1: that of the three splits, each with the same weight.",
        needs_questions=True,
    ),
    "mme": Task(
        "the folder MME_Benchmark_release_version",
        mme.read,
        mme.key,
        mme.score,
        "Papers give the points of perception; for LLaVA-1.6 also those of cognition.",
    ),
    "exact": Task(
        "lines of JSON with question_id, answer and perhaps kind",
        exact.read_own,
        exact.key,
        exact.score,
        "An answer is right if it is the same, but for case and a full stop at its end.",
        original=False,
    ),
}


def read_annotations(task: Task, path: Path, questions: Sequence[Question]) -> Mapping[Any, Any]:
    """The right answers by key.

    Raises:
        RequestError: the path has not what the task takes.
    """
    try:
        return task.read(path, questions)
    except RequestError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise RequestError(f"{path} is not what is taken as annotations: {task.annotations}.") from None


def score(task: Task, annotations: Mapping[Any, Any], answers: Sequence[Answer]) -> Scores:
    """Scores answers. Each counts, as in the original: TextVQA may ask the same about a picture twice.

    Raises:
        RequestError: there is no answer, or one is to a question that is not annotated.
    """
    if not answers:
        raise RequestError("There are no answers to score.")
    keys = [task.key(answer) for answer in answers]
    for key, answer in zip(keys, answers, strict=True):
        if key not in annotations:
            raise RequestError(f"The question {answer.question_id} of an answer is not in the annotations.")
    pairs = [(annotations[key], answer.text) for key, answer in zip(keys, answers, strict=True)]
    return Scores(task.score(pairs), len(annotations) - len(set(keys)), task.note)
