"""MME's points of small cases that were worked out by hand, and of random ones beside its own way of counting."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from llava_serve.evaluation.files import Answer
from llava_serve.evaluation.mme import read_answer
from llava_serve.evaluation.scores import Scores
from llava_serve.evaluation.tasks import TASKS, read_annotations, score

SHORT = "\nAnswer the question using a single word or phrase."
PERCEPTION = ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]


def scored(folder: Path, answers: Sequence[tuple[str, str, str]]) -> Scores:
    """The scores of answers as (question_id, prompt, text)."""
    return score(TASKS["mme"], read_annotations(TASKS["mme"], folder, ()), [Answer(*each) for each in answers])


@pytest.mark.parametrize(
    ("text", "read"),
    [("Yes", "yes"), ("no.", "no"), (" Yes, it is", "yes"), ("Not sure", "no"), ("maybe", "other"), ("It is", "other")],
)
def test_mme_reads_the_first_four_letters(text: str, read: str) -> None:
    assert read_answer(text) == read


def test_mme_adds_answers_and_pairs(tmp_path: Path) -> None:
    ask = " Please answer yes or no."
    beside, apart = tmp_path / "existence", tmp_path / "artwork" / "questions_answers_YN"
    code = tmp_path / "code_reasoning"
    for folder in (beside, apart, code):
        folder.mkdir(parents=True)
    (beside / "1.txt").write_text(f"Is there a bus?{ask}\tYes\nIs there a car?{ask}\tNo\n")
    (beside / "2.txt").write_text(f"Is there a bus?{ask}\tYes\nIs there a car?{ask}\tNo\n")
    (apart / "3.txt").write_text(f"Is it  old?{ask}\tYes\nIs it new?{ask}\tNo")
    (code / "4.txt").write_text(f"Is it 1?{ask}\tYes\nIs it 2?{ask}\tNo\n")
    answers = [
        ("existence/1.jpg", f"Is there a bus?{ask}{SHORT}", "Yes"),
        ("existence/1.jpg", f"Is there a car?{ask}{SHORT}", "No"),
        ("existence/2.jpg", f"Is there a bus?{ask}{SHORT}", "Yes"),
        ("existence/2.jpg", f"Is there a car?{ask}{SHORT}", "Yes"),
        ("artwork/3.jpg", f"Is it old?{ask}{SHORT}", "yes it is"),  # its second question has no answer
        ("code_reasoning/4.png", f"Is it 1?{ask}", "unclear"),
        ("code_reasoning/4.png", f"Is it 2?{ask}", "No"),
    ]
    scores = scored(tmp_path, answers)
    assert scores.unanswered == 1
    assert scores.table["existence"] == {"questions": 4, "accuracy": 75, "accuracy+": 50, "points": 125}
    assert scores.table["artwork"] == {"questions": 1, "accuracy": 100, "accuracy+": 0, "points": 100}
    assert scores.table["code_reasoning"]["points"] == 50
    assert scores.table["perception"] == {"points": 225}
    assert scores.table["cognition"] == {"points": 50}


def points_by_lines(lines: list[str]) -> float:
    """MME's own way: a category is a file of lines (picture, question, right answer, given answer), two a picture."""
    pairs = list(zip(lines[::2], lines[1::2], strict=True))
    right = both = 0
    for pair in pairs:
        hits = 0
        for line in pair:
            _, _, expected, given = line.lower().split("\t")
            hits += ("yes" if "yes" in given[:4] else "no" if "no" in given[:4] else "other") == expected
        right += hits
        both += hits == len(pair)
    return 100 * right / len(lines) + 100 * both / len(pairs)


def test_mme_gives_the_sums_that_its_own_counting_gives(tmp_path: Path) -> None:
    rng = random.Random(0)
    answers, expected = [], {}
    for category in (*PERCEPTION, *COGNITION):
        lines, folder = [], tmp_path / category / "questions_answers_YN"
        folder.mkdir(parents=True)
        for picture in range(rng.randint(1, 12)):
            golds = ["Yes", "No"]
            questions = [f"Is {each} in picture {picture}? Please answer yes or no." for each in "ab"]
            rows = [f"{question}\t{gold}" for question, gold in zip(questions, golds, strict=True)]
            (folder / f"{picture}.txt").write_text("\n".join(rows) + "\n")
            for row in rows:
                given = rng.choice(["Yes", "No", "yes, it is", "No.", "It is not", "Unknown", "Not", "I say yes"])
                lines.append(f"{picture}.jpg\t{row}\t{given}")
                answers.append((f"{category}/{picture}.jpg", row.partition("\t")[0] + SHORT, given))
        expected[category] = points_by_lines(lines)
    rng.shuffle(answers)
    table = scored(tmp_path, answers).table
    assert {name: table[name]["points"] for name in expected} == pytest.approx(expected)
    assert table["perception"]["points"] == pytest.approx(sum(expected[name] for name in PERCEPTION))
    assert table["cognition"]["points"] == pytest.approx(sum(expected[name] for name in COGNITION))
