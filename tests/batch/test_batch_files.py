"""The files of a batch job: what is read, what is refused, and what an earlier run leaves behind. Without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_serve.batch.forms import LineError, key_of, prompt_of
from llava_serve.batch.input_file import InputFile
from llava_serve.batch.job import BatchJob
from llava_serve.batch.output_file import OutputFile
from llava_serve.batch.plan import Plan
from llava_serve.config import ModelOptions
from llava_serve.errors import LlavaServeError, RequestError
from llava_serve.inputs import Prompt
from llava_serve.results import Completion, GenerationResult
from llava_serve.sampling_params import SamplingParams

RESULT = GenerationResult("prompt", [1, -200], 17, (Completion(0, "Red.", (5, 2), "stop"),), num_image_tokens=16)


def job(tmp_path: Path, text: str, name: str = "in.jsonl", **options: Any) -> BatchJob:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return BatchJob(input=tmp_path / name, output=tmp_path / "out.jsonl", **options)


def prompts(batch: BatchJob) -> list[Prompt]:
    plan = Plan(batch)
    found = [plan.form.prompt(item) for item in plan.items()]
    plan.output.close()
    return found


def faults(batch: BatchJob) -> list[str]:
    """Why each line cannot be used; those that can are left out."""
    plan = Plan(batch)
    found = []
    for item in plan.items():
        try:
            plan.form.prompt(item)
        except LlavaServeError as error:
            found.append(error.message)
    plan.output.close()
    return found


def answer_all(batch: BatchJob, result: GenerationResult | LlavaServeError = RESULT) -> list[str]:
    """Writes an answer to all that is left, and gives the ids that were."""
    plan = Plan(batch)
    asked = []
    for item in plan.items():
        asked.append(str(key_of(plan.form, item)))
        plan.output.append(item.position, plan.form.line(item, result))
    plan.output.sort()
    plan.output.close()
    return asked


def lines(batch: BatchJob) -> list[dict[str, Any]]:
    return [json.loads(line) for line in batch.output.read_text("utf-8").splitlines()]


def rows(*values: dict[str, Any]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def row(name: object, question: str = "What?", **more: Any) -> dict[str, Any]:
    return {"id": name, "question": question} | more


def request(name: str, **body: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "What?"}]} | body
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


def test_csv_and_jsonl_say_the_same(tmp_path: Path) -> None:
    link = "https://example.org/cat.png"
    as_csv = (
        '\ufeffid,question,image,temperature,stop,max_tokens\n"1","What, and ""why""?\nSay.",a.png,0,,\n'
        f'2,What?,"[""sub/b.png"", ""{link}""]",0.5,"[""x"", ""y""]",7\n3,What?,,,.,\n'
    )
    as_jsonl = rows(
        row("1", 'What, and "why"?\nSay.', image="a.png", temperature=0, max_tokens=None),
        row("2", image=["sub/b.png", link], temperature=0.5, stop=["x", "y"], max_tokens=7),
        row("3", stop="."),
    )
    found = prompts(job(tmp_path, as_csv, "in.csv"))
    assert found == prompts(job(tmp_path, as_jsonl))
    assert found == [
        Prompt('What, and "why"?\nSay.', [str(tmp_path / "a.png")], SamplingParams(temperature=0)),
        Prompt(
            "What?",
            [str(tmp_path / "sub/b.png"), link],
            SamplingParams(temperature=0.5, stop=("x", "y"), max_new_tokens=7),
        ),
        Prompt("What?", [], SamplingParams(temperature=0.2, stop=(".",))),
    ]


def test_flags_are_the_rows_defaults(tmp_path: Path) -> None:
    batch = job(tmp_path, rows(row(1), row(2, num_beams=1)), sampling={"num_beams": 2, "max_new_tokens": 9})
    first, second = (prompt.sampling for prompt in prompts(batch))
    assert first == SamplingParams(temperature=0, num_beams=2, max_new_tokens=9)
    assert second == SamplingParams(temperature=0.2, max_new_tokens=9)


def test_each_bad_row_says_what_is_wrong(tmp_path: Path) -> None:
    text = rows(
        row("good"),
        row("a", qestion="What?"),
        row("b", x=1),
        row("c", ""),
        row("d", image=7),
        row("e", temperature=-1),
        row("f", stop=[""]),
        row("g", conv_mode=3),
        {"id": "h"},
        row("good", "Again?"),
        row(None),
        row(True),
        row(""),
    )
    bad = '{"id": "i",\n["i"]\n'
    found = faults(job(tmp_path, text + bad))
    expected = [
        "Line 2: the field 'qestion' is unknown; did you mean 'question'?",
        "Line 3: the field 'x' is unknown; there are id, image, question",
        "Line 4: 'question' must be a text, and not empty.",
        "Line 5: 'image' must be a path, a link, or a list of them.",
        "temperature must be between 0 and 100; got -1.",
        "stop must be a tuple of strings",
        "Line 8: 'conv_mode' must be the name of a template.",
        "Line 9: 'question' must be a text, and not empty.",
        "Line 10: its id is that of line 1.",
        *(f"Line {line}: 'id' must be a text or a whole number, and not empty." for line in (11, 12, 13)),
        "Line 14: it is not valid JSON.",
        'Line 15: it is no JSON object, such as {...}: ["i"].',
    ]
    assert len(found) == len(expected)
    for sentence, begin in zip(found, expected, strict=True):
        assert sentence.startswith(begin)


def test_a_line_that_is_not_utf8_fails_alone(tmp_path: Path) -> None:
    batch = job(tmp_path, rows(row(1)))
    with batch.input.open("ab") as file:
        file.write(b'{"id": 2, "question": "caf\xe9?"}\n' + rows(row(3)).encode())
    assert faults(batch) == ["Line 2: it is not UTF-8."]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("in.jsonl", "", "has no row; it is empty"),
        ("in.csv", "id,question\n", "has no row; it is empty"),
        ("in.jsonl", '"a"\n', "it is no JSON object"),
        ("in.jsonl", '[{"id": 1}]', "is a JSON array"),
        ("in.jsonl", '[\n{"id": 1, "question": "What?"}\n]', "without brackets around all"),
        ("in.jsonl", "not json\n", "it is not valid JSON"),
        ("in.csv", "id;image;question\n1;a.png;What?\n", "the field 'id;image;question' is unknown"),
        ("in.csv", "id,picture,question\n1,a.png,What?\n", "the field 'picture' is unknown"),
        ("in.csv", 'id,question\n1,"What?\n', "cannot be read as CSV"),
        ("in.jsonl", rows(row(1, temperature=-1), row(2, temperature=-1)), "the first 2 rows cannot be used. temp"),
        ("in.jsonl", rows(request("a", model="gpt-4o")), "the model 'gpt-4o', and this job's is 'builtin'"),
    ],
)
def test_a_file_without_questions_is_refused(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    batch = job(tmp_path, text, name)
    with pytest.raises(RequestError) as caught:
        Plan(batch)
    assert sentence in caught.value.message
    assert not batch.output.exists()


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="No such file"):
        InputFile(tmp_path / "nowhere.csv")
    with pytest.raises(RequestError, match="is a folder"):
        InputFile(tmp_path)
    batch = job(tmp_path, rows(row(1)))
    with pytest.raises(RequestError, match="cannot be written: No such file"):
        Plan(batch.model_copy(update={"output": tmp_path / "nowhere" / "out.jsonl"}))
    with pytest.raises(RequestError, match="is not a file"):
        Plan(batch.model_copy(update={"output": tmp_path}))


def test_openai_requests_become_prompts(tmp_path: Path) -> None:
    Path(tmp_path / "a.png").write_bytes(b"the bytes")
    content = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "What?"}]
    text = rows(
        request("a", model="builtin", temperature=0, max_tokens=5, messages=[{"role": "user", "content": content}]),
        request("b", stream=True),
        request("c", model="other"),
        request("d", temperature="hot"),
        request("e") | {"url": "/v1/embeddings"},
        {"custom_id": "f", "method": "POST", "url": "/v1/chat/completions"},
        request("g", request_id="not a word"),
        request("a"),
    )
    batch = job(tmp_path, text)
    plan = Plan(batch)
    items = list(plan.items())
    prompt = plan.form.prompt(items[0])
    assert prompt.sampling is not None
    assert (prompt.sampling.temperature, prompt.sampling.max_new_tokens) == (0, 5)
    assert callable(prompt.asked)
    assert "the bytes" in str(prompt.asked())
    out = []
    for item in items[1:]:
        asked = prompt_of(plan.form, item).asked
        assert callable(asked)
        with pytest.raises(LlavaServeError) as caught:
            asked()
        out.append(plan.form.line(item, caught.value))
    assert [line["custom_id"] for line in out] == ["b", "c", "d", "e", "f", "g", "a"]
    assert [line["response"] and line["response"]["status_code"] for line in out] == [
        400,
        404,
        400,
        None,
        None,
        400,
        None,
    ]
    assert out[2]["response"]["body"]["error"]["param"] == "temperature"
    assert [line["error"] and line["error"]["message"] for line in out] == [
        *(None,) * 3,
        "Line 5: 'url' must be /v1/chat/completions.",
        "Line 6: 'body' must be an object.",
        None,
        "Line 8: its custom_id is that of line 1.",
    ]
    plan.output.close()


def test_openai_responses_have_the_official_shape(tmp_path: Path) -> None:
    from openai.types.chat import ChatCompletion

    batch = job(tmp_path, rows(request("a"), request("b")))
    answer_all(batch)
    for line, name in zip(lines(batch), "ab", strict=True):
        assert line.keys() == {"id", "custom_id", "response", "error"}
        assert line["custom_id"] == name
        assert line["error"] is None
        assert line["response"].keys() == {"status_code", "request_id", "body"}
        assert line["response"]["status_code"] == 200
        body = ChatCompletion.model_validate(line["response"]["body"], strict=True)
        assert body.choices[0].message.content == "Red."
        assert body.usage is not None
        assert (body.usage.prompt_tokens, body.usage.completion_tokens, body.usage.total_tokens) == (17, 2, 19)
    assert len({line["id"] for line in lines(batch)}) == 2
    assert answer_all(batch) == []


def test_sampling_flags_are_refused_for_openai_files(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="leave out --max-new-tokens"):
        Plan(job(tmp_path, rows(request("a")), sampling={"max_new_tokens": 3}))


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
