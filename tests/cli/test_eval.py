"""`llava-serve eval`: real models answer question files, and the answers are scored."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_serve import LLM, SamplingParams
from llava_serve.cli import main
from llava_serve.evaluation.files import SUFFIXES
from support.paths import ROOT

GOLDEN = ROOT / "tests" / "golden"
TINY = GOLDEN / "checkpoints" / "llava-v1.5-tiny"
IMAGES = GOLDEN / "images"

Eval = Callable[..., tuple[int, str, str]]


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str]) -> Eval:
    """Runs the command; its status and what it printed."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = main(["eval", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    lines = [
        {"question_id": "1", "image": "landscape.png", "text": "What is it?" + SUFFIXES["short"]},
        {"question_id": "2", "image": "landscape.png", "text": "Is it red?"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_builtin_model_knows_the_builtin_set(evaluate: Eval, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    status, printed, _ = evaluate("builtin", "--limit", 24, "--answers", answers)
    assert status == 0
    lines = [line.split() for line in printed.splitlines()]
    assert ["template", "llava_v1"] in lines
    assert ["dtype", "float32", "on", "cpu"] in lines
    assert ["all", "24", "100.00"] in lines
    assert printed.splitlines()[-1].startswith("191 annotated questions have no answer")
    assert {"vision", "pictures", "transparency", "temperature", "num_beams"} <= {line[0] for line in lines}
    first = json.loads(answers.read_text().splitlines()[0])
    assert (first["text"], first["model_id"], first["metadata"]) == ("1", "builtin", {})


def test_answers_are_those_of_the_originals_protocol(evaluate: Eval, questions: Path, tmp_path: Path) -> None:
    answers, gqa = tmp_path / "answers.jsonl", tmp_path / "gqa.json"
    common = ["gqa", TINY, "--questions", questions, "--images", IMAGES, "--max-new-tokens", 8, "--dtype", "float32"]
    status, printed, _ = evaluate(*common, "--answers", answers, "--json")
    assert status == 0
    assert json.loads(printed)["scores"] is None
    settings = json.loads(printed)["settings"]
    assert (settings["template"], settings["temperature"], settings["suffix"]) == ("vicuna_v1", 0.0, "short")
    written = [json.loads(line) for line in answers.read_text().splitlines()]
    prompts = ["What is it?" + SUFFIXES["short"], "Is it red?" + SUFFIXES["short"]]
    assert [line["prompt"] for line in written] == prompts
    llm = LLM(str(TINY), dtype="float32", device="cpu")
    greedy = SamplingParams(temperature=0, max_new_tokens=8)
    images = [str(IMAGES / "landscape.png")] * 2
    expected, others = (
        [result.text.strip() for result in llm.generate(prompts, images, greedy, conv_mode=mode)]
        for mode in ("vicuna_v1", "llava_v1")
    )
    assert [line["text"] for line in written] == expected != others

    gqa.write_text(json.dumps({"1": {"answer": expected[0].lower().rstrip(".")}, "2": {"answer": "no such thing"}}))
    status, printed, _ = evaluate("gqa", "--score", answers, "--annotations", gqa)
    assert status == 0
    assert printed.splitlines()[0].split() == ["model", "llava-v1.5-tiny"]
    assert ["all", "2", "50.00"] in [line.split() for line in printed.splitlines()]

    named = json.loads(evaluate(*common, "--annotations", gqa, "--conv-mode", "llava_v1", "--json")[1])
    assert named["settings"]["template"] == "llava_v1"
    assert named["scores"]["table"]["all"]["accuracy"] == 0


def test_an_interrupted_run_goes_on(evaluate: Eval, questions: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    arguments = ["vqav2", TINY, "--questions", questions, "--images", IMAGES, "--max-new-tokens", 4]
    assert evaluate(*arguments, "--answers", answers)[0] == 0
    first, second = answers.read_text().splitlines(keepends=True)
    answers.write_text(first + second[:30])
    status, _, said = evaluate(*arguments, "--answers", answers)
    assert (status, said.count("\n")) == (2, 1)
    assert "--resume" in said
    assert evaluate(*arguments, "--answers", answers, "--resume")[0] == 0
    kept, again = answers.read_text().splitlines(keepends=True)
    assert kept == first
    changed = [json.loads(line) | {"answer_id": ""} for line in (again, second)]
    assert changed[0] == changed[1]


def test_a_picture_that_cannot_be_used_ends_the_run(evaluate: Eval, questions: Path, tmp_path: Path) -> None:
    (tmp_path / "landscape.png").write_text("This is no picture.")
    arguments = ["vqav2", TINY, "--questions", questions, "--images", tmp_path, "--answers", tmp_path / "a.jsonl"]
    status, _, said = evaluate(*arguments)
    assert status == 2
    assert re.search("Question [12]: The data is plain text", said)  # both have it, and either may be read first


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["gqa"], "Give --questions FILE"),
        (["gqa", "--questions", "{q}"], "Give --annotations PATH"),
        (["gqa", "--score", "{q}"], "Give --annotations PATH"),
        (["pope", "--score", "{q}", "--annotations", "."], "categories with --questions FILE only"),
        (["gqa", "--questions", "{q}", "--answers", "a"], "2 pictures are not in ., the first is landscape.png"),
        (["gqa", "--questions", "{q}", "--images", str(IMAGES), "--answers", "no/a"], "there is no such folder"),
        (["gqa", "--questions", "nowhere", "--answers", "a"], "nowhere cannot be read"),
        (
            ["gqa", "--questions", "{q}", "--annotations", "{q}", "--answers", "a"],
            "is not what is taken as annotations",
        ),
        (["gqa", "nowhere", "--questions", "{q}", "--images", str(IMAGES), "--answers", "a"], "nowhere"),
        (["builtin", "--questions", "{q}"], "takes no --questions"),
        (["gqa", "--questions", "{q}", "--annotations", "{q}", "--resume"], "--resume goes on with the answers in"),
        (["gqa", str(TINY), "--score", "{q}", "--answers", "a"], "asks no model: leave out the model, --answers."),
        (
            ["gqa", "--questions", "{q}", "--images", str(IMAGES), "--answers", "a", "--temperature", "-1"],
            "temperature",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:40],
)
def test_a_usage_error_is_one_sentence(
    evaluate: Eval,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, printed, said = evaluate(*(argument.format(q=questions) for argument in arguments))
    assert (status, printed, said.count("\n")) == (2, "", 1)
    assert sentence in said


def test_what_is_wrong_is_said_before_torch_is_imported(questions: Path) -> None:
    arguments = ["eval", "gqa", "nowhere", "--questions", str(questions), "--images", str(IMAGES), "--answers", "a"]
    script = f"import sys; from llava_serve.cli import main; print(main({arguments!r}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "2 False\n"
