"""The output of a batch job, and what an earlier run leaves behind. Without a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_serve.batch.forms import LineError
from llava_serve.batch.input_file import InputFile
from llava_serve.batch.output_file import OutputFile
from llava_serve.batch.plan import Plan
from llava_serve.config import ModelOptions
from llava_serve.errors import RequestError
from support.batch_files import RESULT, answer_all, job, lines, row, rows


def test_a_second_run_asks_what_is_left_changed_or_failed(tmp_path: Path) -> None:
    text = rows(*(row(number) for number in range(5)))
    batch = job(tmp_path, text)
    plan = Plan(batch)
    for item in plan.items():
        if item.position in (4, 3, 1):
            plan.output.append(item.position, plan.form.line(item, RESULT if item.position != 3 else RequestError("x")))
    plan.output.close()
    assert [line["id"] for line in lines(batch)] == [1, 3, 4]
    changed = job(tmp_path, text.replace('{"id": 4, "question": "What?"}', '{"id": 4, "question": "Why?"}'))
    assert answer_all(changed) == ["0", "2", "3", "4"]
    assert [line["id"] for line in lines(batch)] == [0, 1, 2, 3, 4]
    assert all("answer" in line for line in lines(batch))
    assert answer_all(changed) == []


def test_answers_to_rows_that_went_are_kept_behind_the_others(tmp_path: Path) -> None:
    answer_all(job(tmp_path, rows(row("old"), row("a"))))
    batch = job(tmp_path, rows(row("b"), row("a")))
    plan = Plan(batch)
    assert (plan.total, plan.done) == (2, 1)
    plan.output.close()
    assert answer_all(batch) == ["b"]
    assert [line["id"] for line in lines(batch)] == ["b", "a", "old"]


def test_a_half_last_line_is_dropped(tmp_path: Path) -> None:
    batch = job(tmp_path, rows(row(1), row(2), row(3)))
    answer_all(batch)
    whole = batch.output.read_bytes()
    for cut in (1, 20, len(whole.splitlines()[2])):
        batch.output.write_bytes(whole[:-cut])
        assert answer_all(batch) == ["3"]
        assert batch.output.read_bytes() == whole


@pytest.mark.parametrize("text", ["A diary.\n", '{"id": 1}\n', '{"custom_id": "a", "response": null}\n', "[]\n"])
def test_a_file_of_something_else_is_not_touched(tmp_path: Path, text: str) -> None:
    batch = job(tmp_path, rows(row(1)))
    batch.output.write_text(text)
    with pytest.raises(RequestError, match="name another file"):
        Plan(batch)
    assert batch.output.read_text() == text


def test_answers_of_another_model_or_other_options_are_not_mixed(tmp_path: Path) -> None:
    batch = job(tmp_path, rows(row(1)))
    answer_all(batch)
    for change in ({"sampling": {"seed": 1}}, {"model": ModelOptions(model="other")}):
        with pytest.raises(RequestError, match="of another model or of other options"):
            Plan(batch.model_copy(update=change))
    assert answer_all(batch.model_copy(update={"model": ModelOptions(device="cpu")})) == []


def test_two_runs_do_not_write_to_one_file(tmp_path: Path) -> None:
    batch = job(tmp_path, rows(row(1)))
    plan = Plan(batch)
    with pytest.raises(RequestError, match="Another process writes"):
        Plan(batch)
    plan.output.close()
    Plan(batch).output.close()


def test_lines_are_put_in_the_order_of_their_positions(tmp_path: Path) -> None:
    output = OutputFile(tmp_path / "out.jsonl")
    for position in (2, 0, 3, 1):
        output.append(position, {"at": position, "text": "é" * position})
    output.sort()
    output.append(4, {"at": 4})
    output.close()
    found = [json.loads(line)["at"] for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert found == [0, 1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_an_error_of_a_line_survives_a_pickle(tmp_path: Path) -> None:
    import pickle

    item = next(iter(InputFile(job(tmp_path, rows(row(1))).input)))
    error = pickle.loads(pickle.dumps(LineError(item, "it is bad")))
    assert (str(error), type(error)) == ("Line 1: it is bad.", LineError)
