"""The input of a batch job: what is read, and what is refused. Without a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_serve.batch.forms import prompt_of
from llava_serve.batch.input_file import InputFile
from llava_serve.batch.plan import Plan
from llava_serve.errors import LlavaServeError, RequestError
from llava_serve.inputs import Prompt
from llava_serve.sampling_params import SamplingParams
from support.batch_files import answer_all, faults, job, lines, prompts, request, row, rows


def test_csv_and_jsonl_say_the_same(tmp_path: Path) -> None:
    link, other = "https://example.org/cat.png", "s3://bucket/cat.png"
    as_csv = (
        '\ufeffid,question,image,temperature,stop,max_tokens\n"1","What, and ""why""?\nSay.",a.png,0,,\n'
        f'2,What?,"[""sub/b.png"", ""{link}"", ""{other}""]",0.5,"[""x"", ""y""]",7\n3,What?,,,.,\n'
    )
    as_jsonl = rows(
        row("1", 'What, and "why"?\nSay.', image="a.png", temperature=0, max_tokens=None),
        row("2", image=["sub/b.png", link, other], temperature=0.5, stop=["x", "y"], max_tokens=7),
        row("3", stop="."),
    )
    found = prompts(job(tmp_path, as_csv, "in.csv"))
    assert found == prompts(job(tmp_path, as_jsonl))
    assert found == [
        Prompt('What, and "why"?\nSay.', [str(tmp_path / "a.png")], SamplingParams(temperature=0)),
        Prompt(
            "What?",
            [str(tmp_path / "sub/b.png"), link, other],
            SamplingParams(temperature=0.5, stop=("x", "y"), max_new_tokens=7),
        ),
        Prompt("What?", [], SamplingParams(temperature=0.2, stop=(".",))),
    ]


@pytest.mark.parametrize("mark", [";", "\t"])
def test_a_csv_has_the_separators_of_its_header(tmp_path: Path, mark: str) -> None:
    text = mark.join(("id", '"question"', "temperature")) + "\n" + mark.join(("1", '"A, or B;\tC?"', "0")) + "\n"
    found = prompts(job(tmp_path, text, "in.csv" if mark == ";" else "in.tsv"))
    assert found == [Prompt("A, or B;\tC?", [], SamplingParams(temperature=0))]


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
        row("j", max_tokens=3, max_new_tokens=4),
        row("k", max_tokens=True),
    )
    bad = '{"id": "i",\n["i"]\n{"id": 1, "question": "What?", "id": 2}\n'
    found = faults(job(tmp_path, text + bad))
    expected = [
        "Line 2: the field 'qestion' is unknown; perhaps 'question' is meant.",
        "Line 3: the field 'x' is unknown; there are id, image, question",
        "Line 4: 'question' must be a text, and not empty.",
        "Line 5: 'image' must be a path, a link, or a list of them.",
        "temperature must be between 0 and 100; got -1.",
        "stop must be a tuple of strings",
        "Line 8: 'conv_mode' must be the name of a template.",
        "Line 9: 'question' must be a text, and not empty.",
        "Line 10: its id is that of line 1.",
        *(f"Line {line}: 'id' must be a text or a whole number, and not empty." for line in (11, 12, 13)),
        "Line 14: 'max_tokens' and 'max_new_tokens' mean the same; give one of them.",
        "max_new_tokens must be a whole number, 1 or more",
        "Line 16: it is not valid JSON.",
        'Line 17: it is no JSON object, such as {...}: ["i"].',
        "Line 18: it has the field 'id' twice.",
    ]
    assert len(found) == len(expected)
    for sentence, begin in zip(found, expected, strict=True):
        assert sentence.startswith(begin)


def test_a_cell_without_a_column_fails_its_row_alone(tmp_path: Path) -> None:
    text = "id,question,,\n1,What?,,\n2,What?,a note,\n3,What?,,,4\n\n,,,\n4,What?\n"
    assert faults(job(tmp_path, text, "in.csv")) == [
        "Line 3: it has a cell in a column without a name.",
        "Line 4: it has more cells than the header names.",
    ]


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
        ("in.csv", "id,picture,question\n1,a.png,What?\n", "the field 'picture' is unknown"),
        ("in.csv", 'id,question\n1,What?\n2,"What?\n', "cannot be read as CSV behind line 2: a cell in quotes has no"),
        ("in.csv", 'id,question\n1,"A "b" c"\n', "behind line 1: a quote within a cell must be written twice"),
        ("in.csv", "id,image,image,question\n1,a.png,b.png,What?\n", "has the column 'image' twice"),
        ("in.csv", "image,question\na.png,What?\nb.png,What?\n", "2 rows cannot be used. Line 2: 'id' must be a text"),
        ("in.txt", "id,question\n1,What?\n", "Only a file that ends in .csv or .tsv is read as CSV"),
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
