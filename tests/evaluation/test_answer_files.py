"""Question files and answer files: what is read, what is written, and what an interrupted run leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_serve.errors import RequestError
from llava_serve.evaluation.builtin_set import write_builtin_set
from llava_serve.evaluation.files import (
    SUFFIXES,
    Answer,
    Question,
    answers_so_far,
    read_answers,
    read_questions,
    write_answer,
)

SHORT = SUFFIXES["short"]
QUESTIONS = [Question(1, "What?", "a.png"), Question(2, "Who?" + SHORT, "a.png"), Question(3, "Why?")]


def write(path: Path, *answers: Answer) -> Path:
    with path.open("w") as file:
        for answer in answers:
            write_answer(file, answer)
    return path


def test_a_suffix_is_added_once() -> None:
    assert [question.with_suffix(SHORT) for question in QUESTIONS] == ["What?" + SHORT, "Who?" + SHORT, "Why?" + SHORT]
    letter = SUFFIXES["letter"]
    assert letter == "\nAnswer with the option's letter from the given choices directly."
    assert Question(1, "Which?\nA. x" + letter).with_suffix(SHORT) == "Which?\nA. x" + letter


def test_an_answer_file_is_the_originals(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", Answer(1, "What?" + SHORT, "ein Hündchen", model_id="llava"))
    line = json.loads(path.read_text())
    assert list(line) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert "Hündchen" in path.read_text()
    [answer] = read_answers(path)
    assert (answer.question_id, answer.prompt, answer.text, answer.model_id) == (
        1,
        "What?" + SHORT,
        "ein Hündchen",
        "llava",
    )


def test_questions_are_read_and_bad_lines_named(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"question_id": "x", "image": "a.png", "text": "What?", "category": "random"}\n\n')
    assert read_questions(path) == [Question("x", "What?", "a.png", "random")]
    for line, sentence in (
        ('{"question_id": 1}', "line 3: text must be there"),
        ("{", "line 3: not a JSON object"),
        ("7", "line 3: not a JSON object"),
    ):
        path.write_text('{"question_id": 1, "text": "What?"}\n\n' + line)
        with pytest.raises(RequestError, match=sentence):
            read_questions(path)
    with pytest.raises(RequestError, match="cannot be read"):
        read_questions(tmp_path)


def test_an_interrupted_run_goes_on_behind_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert answers_so_far(path, QUESTIONS, SHORT, "m") == []
    answers = [Answer(each.question_id, each.with_suffix(SHORT), "x", model_id="m") for each in QUESTIONS]
    whole = write(path, *answers[:2]).read_bytes()
    path.write_bytes(whole + b'{"question_id": 3, "pro')
    found = answers_so_far(path, QUESTIONS, SHORT, "m")
    assert [answer.question_id for answer in found] == [1, 2]
    assert path.read_bytes() == whole
    path.write_bytes(b'{"quest')
    assert answers_so_far(path, QUESTIONS, SHORT, "m") == []
    assert path.read_bytes() == b""
    write(path, *answers)
    assert len(answers_so_far(path, QUESTIONS, SHORT, "m")) == 3
    for questions, suffix, model in (
        (QUESTIONS, SHORT, "other"),
        (QUESTIONS, "", "m"),
        (QUESTIONS[:2], SHORT, "m"),
        (QUESTIONS[::-1], SHORT, "m"),
    ):
        with pytest.raises(RequestError, match="answers to other questions, or of another model"):
            answers_so_far(path, questions, suffix, model)


def test_the_builtin_set_is_whole(tmp_path: Path) -> None:
    files = write_builtin_set(tmp_path / "set")
    questions = read_questions(files.questions)
    assert len(questions) == 215
    assert all((files.images / str(question.image)).is_file() for question in questions)
    answers = [json.loads(line) for line in files.annotations.read_text().splitlines()]
    assert [answer["question_id"] for answer in answers] == [question.question_id for question in questions]
    presence = [answer["answer"] for answer in answers if answer["kind"] == "presence"]
    assert 0.2 < presence.count("yes") / len(presence) < 0.8
