"""Scores of small cases that were worked out by hand, the benchmarks' oddities among them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llava_serve.errors import RequestError
from llava_serve.evaluation.consensus import consensus, textvqa_accuracy, vqav2_accuracy
from llava_serve.evaluation.files import Answer, Question
from llava_serve.evaluation.pope import says_yes
from llava_serve.evaluation.scores import Scores, as_text
from llava_serve.evaluation.tasks import TASKS, read_annotations, score
from llava_serve.evaluation.vqa_text import normalise, official

SHORT = "\nAnswer the question using a single word or phrase."


def scored(
    task: str, annotations: Path, answers: Sequence[tuple[Any, str, str]], questions: Sequence[Question] = ()
) -> Scores:
    """The scores of answers as (question_id, prompt, text)."""
    read = read_annotations(TASKS[task], annotations, questions)
    return score(TASKS[task], read, [Answer(*each) for each in answers])


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def write_lines(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("Yes", "yes"),
        ("The Red Car.", "red car"),
        ("a\nbus\tstop", "bus stop"),
        ("Two", "2"),
        ("none", "0"),
        ("ten thousand eleven", "10 thousand eleven"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("St. Louis.", "st louis"),
        (".5 mi.", ".5 mi"),
        ("really?", "really"),
        ("t-shirt", "t shirt"),  # a mark between letters becomes a space
        ("t- shirt-like", "t shirtlike"),  # beside a space anywhere, it vanishes everywhere
        ("red/blue", "red blue"),
        ('"stop"', "stop"),
        ("women's", "women 's"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("youre an oclock", "you're o'clock"),
        ("somebody'd", "somebodyd"),  # the benchmark's own table has it so
        ("its", "its"),
        ("the", ""),
        ("Ünïcode", "ünïcode"),
    ],
)
def test_answers_are_normalised(answer: str, normal: str) -> None:
    assert normalise(answer) == normal


@pytest.mark.parametrize(
    ("same", "accuracy"),
    [
        (0, 0.0),
        (1, 0.3),  # nine of ten times one other person has it: 9 * 1/3 / 10
        (2, 0.6),  # (2 * 1/3 + 8 * 2/3) / 10
        (3, 0.9),  # (3 * 2/3 + 7 * 1) / 10
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_an_answer_is_as_right_as_people_agree(same: int, accuracy: float) -> None:
    human = ["2"] * same + ["blue"] * (10 - same)
    assert consensus(human, "2") == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("women's", "women's"),  # the TextVQA evaluator makes two words of it
        ("red,white", "red white"),  # the TextVQA evaluator: redwhite
        ("yes, no", "yes no"),
        ("really?", "really"),
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),  # a comma between digits: every mark vanishes
        ("10-12", "10 12"),
        ("The Two.", "2"),
        ("\ta dog\n", "dog"),
    ],
)
def test_the_official_form_of_vqa(answer: str, form: str) -> None:
    assert official(answer) == form


def test_vqav2_and_textvqa_differ_as_their_scripts_do() -> None:
    mixed = ["women's"] * 9 + ["men's"]
    assert textvqa_accuracy(mixed, "Women's") == 1
    assert vqav2_accuracy(mixed, "Women's") == 0  # it is sent as "women 's"
    agreed = ["t-shirt"] * 10
    assert textvqa_accuracy(agreed, "T-shirt") == 1
    assert vqav2_accuracy(agreed, "T-shirt") == 0  # all agree: they stay "t-shirt", and "t shirt" is sent
    assert vqav2_accuracy([*agreed[:9], "shirt"], "T-shirt") == 1


def test_vqav2_is_scored_by_kind_of_answer(tmp_path: Path) -> None:
    def annotated(number: int, kind: str, *answers: str) -> dict[str, Any]:
        people = [{"answer": answer, "answer_id": at} for at, answer in enumerate(answers)]
        return {"question_id": number, "answer_type": kind, "answers": people}

    annotations = write(
        tmp_path / "a.json",
        {
            "annotations": [
                annotated(1, "yes/no", *["yes"] * 10),
                annotated(2, "number", *["2"] * 3, *["3"] * 7),
                annotated(3, "other", *["t-shirt"] * 9, "shirt"),
                annotated(4, "other", *["dog"] * 10),
                annotated(5, "other", *["not asked"] * 10),
            ]
        },
    )
    answers = [(1, "", "Yes"), (2, "", "Two"), (3, "", "T shirt"), (4, "", "cat")]
    scores = scored("vqav2", annotations, answers)
    assert scores.unanswered == 1
    assert {name: line["accuracy"] for name, line in scores.table.items()} == pytest.approx(
        {"yes/no": 100.0, "number": 90.0, "other": 50.0, "all": 72.5}
    )
    assert [line["questions"] for line in scores.table.values()] == [1, 1, 2, 4]
    printed = as_text(scores).splitlines()
    assert printed[0].split() == ["questions", "accuracy"]
    assert printed[4].split() == ["all", "4", "72.50"]
    assert printed[-1].startswith("1 annotated questions have no answer")


def test_textvqa_finds_questions_by_picture_and_text(tmp_path: Path) -> None:
    data = [
        {"image_id": "p1", "question_id": 7, "question": "What is the brand?", "answers": ["nous les gosses"] * 10},
        {"image_id": "p1", "question_id": 8, "question": "What Time is it?", "answers": ["5:41"] * 2 + ["08:10"] * 8},
        {"image_id": "p2", "question_id": 9, "question": "what is the brand?", "answers": ["dakota"] * 10},
    ]
    annotations = write(tmp_path / "a.json", {"data": data})
    answers = [
        ("p1", f"What is the brand?\nReference OCR token: NOUS, LES{SHORT}", "Nous les gosses."),
        ("p1", f"Reference OCR token: 5\nWhat time is it?{SHORT}", "5:41"),
        ("p2", f"what is the brand?{SHORT}", "nikon"),
        ("p2", f"what is the brand?{SHORT}", "Dakota"),  # asked twice: both count
    ]
    scores = scored("textvqa", annotations, answers)
    assert scores.table["all"] == {"questions": 4, "accuracy": pytest.approx(260 / 4)}
    assert scores.unanswered == 0


def test_gqa_and_own_sets_match_exactly(tmp_path: Path) -> None:
    gqa = write(tmp_path / "gqa.json", {"1": {"answer": "yes"}, "2": {"answer": "cat"}, "3": {"answer": "no"}})
    answers = [("1", "", "Yes."), ("2", "", "the cat"), ("3", "", "no"), ]  # fmt: skip
    assert scored("gqa", gqa, answers).table == {"all": {"questions": 3, "accuracy": pytest.approx(200 / 3)}}
    own = write_lines(
        tmp_path / "own.jsonl",
        {"question_id": 1, "answer": "B", "kind": "letter"},
        {"question_id": "2", "answer": "Blue.", "kind": "word"},
    )
    table = scored("exact", own, [(1, "", "b."), (2, "", "blue-ish")]).table
    assert {name: line["accuracy"] for name, line in table.items()} == {"letter": 100, "word": 0, "all": 50}


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("no.", False),
        ("No, there is none", False),
        ("There is not a dog. Yes", False),
        ("Yes. There is no cat", True),  # only the first sentence counts
        ("Nothing", True),  # whole words only
        ("NO", True),  # these spellings only
        ("", True),
    ],
)
def test_pope_reads_yes_and_no(text: str, yes: bool) -> None:
    assert says_yes(text) == yes


def pope_files(folder: Path) -> list[Question]:
    """Labels of eight questions, and the question file."""
    labels = {"random": "yes yes no no", "popular": "yes no", "adversarial": "yes no"}
    questions: list[Question] = []
    for split, values in labels.items():
        lines = [
            {"image": f"{split}{at}.jpg", "text": f"Is there a dog {at}?", "label": label}
            for at, label in enumerate(values.split(), 1)
        ]
        write_lines(folder / f"coco_pope_{split}.json", *lines)
        questions += [
            Question(len(questions) + at, line["text"] + SHORT, line["image"], split) for at, line in enumerate(lines)
        ]
    return questions


def test_pope_has_three_splits_and_their_mean(tmp_path: Path) -> None:
    questions = pope_files(tmp_path)
    texts = ["Yes", "No, there is no dog.", "Yes.", "no", "Yes", "yes", "Yes", "No"]
    answers = [(question.question_id, question.text, text) for question, text in zip(questions, texts, strict=True)]
    table = scored("pope", tmp_path, answers, questions).table
    assert table["random"] == pytest.approx(
        {"questions": 4, "accuracy": 50, "precision": 50, "recall": 50, "F1": 50, "yes": 50}
    )
    assert table["popular"] == pytest.approx(
        {"questions": 2, "accuracy": 50, "precision": 50, "recall": 100, "F1": 200 / 3, "yes": 100}
    )
    assert table["adversarial"]["F1"] == 100
    assert table["mean"] == pytest.approx({"accuracy": 200 / 3, "F1": (50 + 200 / 3 + 100) / 3, "yes": 200 / 3})
    # Nobody says yes: no precision, no recall, no F1.
    table = scored("pope", tmp_path, [(each.question_id, "", "No") for each in questions], questions).table
    assert table["random"] == pytest.approx(
        {"questions": 4, "accuracy": 50, "precision": 0, "recall": 0, "F1": 0, "yes": 0}
    )


def test_pope_refuses_other_questions(tmp_path: Path) -> None:
    questions = pope_files(tmp_path)
    with pytest.raises(RequestError, match="Question 1 is not the one"):
        read_annotations(TASKS["pope"], tmp_path, questions[1:])
    with pytest.raises(RequestError, match="more of POPE's category popular"):
        read_annotations(TASKS["pope"], tmp_path, [*questions, questions[4]])
    with pytest.raises(RequestError, match="No question has a category"):
        read_annotations(TASKS["pope"], tmp_path, [Question(1, "What?")])


@pytest.mark.parametrize("task", TASKS)
def test_other_annotations_are_refused_in_a_sentence(task: str, tmp_path: Path) -> None:
    for content in ("", "[1]", '{"data": [1]}', "{"):
        path = tmp_path / "a.json"
        path.write_text(content)
        with pytest.raises(RequestError):
            scored(task, path, [(1, "", "yes")], [Question(1, "What?", category="random")])
    with pytest.raises(RequestError):
        scored(task, tmp_path / "nowhere", [(1, "", "yes")])


def test_an_answer_that_nobody_asked_for_is_refused(tmp_path: Path) -> None:
    annotations = write(tmp_path / "gqa.json", {"1": {"answer": "yes"}})
    with pytest.raises(RequestError, match="The question 2 of an answer is not in the annotations"):
        scored("gqa", annotations, [("1", "", "Yes"), ("2", "", "Yes")])
    with pytest.raises(RequestError, match="no answers to score"):
        scored("gqa", annotations, [])
