"""`llava-serve batch` as a person runs it: a process, its files, its output, its exit status."""

from __future__ import annotations

import csv
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llava_serve.cli import main
from support.batch_rows import COLOURS, scene_rows
from support.paths import BUILTIN, ROOT

DEMO = BUILTIN / "demo.png"
GREEDY = ["--temperature", "0"]


def command(source: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "llava_serve.cli", "batch", str(source), str(out), *GREEDY]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ("id", "image", "question"))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.extended
def test_a_job_in_csv_is_stopped_and_goes_on(tmp_path: Path) -> None:
    count = 160  # more than run at once
    rows = scene_rows(tmp_path, count)
    two = json.dumps(["0.png", str(DEMO)])
    bad: list[dict[str, Any]] = [
        {"id": "two", "image": two, "question": "What colour is the circle?"},
        {"id": "gone", "image": "gone.png"},
    ]
    (tmp_path / "torn.png").write_bytes(DEMO.read_bytes()[:99])
    bad += [{"id": "torn", "image": "torn.png", "question": "What?"}, {"id": 3, "question": "Again?"}]
    source, out = write_csv(tmp_path / "rows.csv", rows + bad), tmp_path / "answers.jsonl"

    first = subprocess.Popen(command(source, out), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not out.exists() or out.read_bytes().count(b"\n") < 8:
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 130, said
    assert f"rows.csv has {count + 4} rows." in said
    assert f"of {count + 4} rows. The same command goes on there." in said
    assert "Traceback" not in said
    done = {line["id"]: line for line in lines(out) if "answer" in line}
    assert done

    second = subprocess.run(command(source, out), cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert second.returncode == 1
    assert second.stdout == ""
    assert f"{len(done)} of them have their answers in" in second.stderr
    assert f"answers.jsonl has {count + 4} rows, 3 errors." in second.stderr
    found = lines(out)
    assert [line["id"] for line in found] == [str(row["id"]) for row in rows + bad]
    assert all(line in found for line in done.values())
    for number, line in enumerate(found[:count]):
        assert line["answer"] == f"The circle is {COLOURS[number % 4]}."
        assert line["usage"]["image_tokens"] == 100
    assert found[count]["usage"]["image_tokens"] == 200
    assert [line.get("error", "")[:40] for line in found[count + 1 :]] == [
        f"Line {count + 3}: 'question' must be a text, and not empty."[:40],
        "The PNG image is damaged or cut off.",
        f"Line {count + 5}: its id is that of line 5."[:40],
    ]


def test_an_openai_batch_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from openai.types.chat import ChatCompletion

    content = [{"type": "image_url", "image_url": {"url": "demo.png"}}, {"type": "text", "text": "What colour?"}]
    body = {"model": "builtin", "messages": [{"role": "user", "content": content}], "temperature": 0, "n": 2}
    request = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    missing = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "gone.png"}}]}]
    (tmp_path / "demo.png").write_bytes(DEMO.read_bytes())
    rows = [request, request | {"custom_id": "b", "body": body | {"messages": missing}}]
    source, out = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert main(["batch", str(source), str(out)]) == 1
    good, bad = lines(out)
    completion = ChatCompletion.model_validate(good["response"]["body"])
    assert len({choice.message.content for choice in completion.choices}) == 1
    assert completion.usage is not None
    assert completion.usage.prompt_tokens_details is not None
    assert bad["response"]["status_code"] == 400
    assert bad["response"]["body"]["error"]["code"] == "invalid_image"
    written = out.read_bytes()
    assert main(["batch", str(write_jsonl(source, rows[:1])), str(out)]) == 0
    assert lines(out) == [good]
    assert written != out.read_bytes()
    assert "1 of them have their answers" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere.csv", "out.jsonl"], "nowhere.csv cannot be read: No such file"),
        (["in.jsonl", "nowhere/out.jsonl"], "nowhere/out.jsonl cannot be written: No such file"),
        (["in.jsonl", "in.jsonl"], "in.jsonl is not of an earlier run"),
        (["in.jsonl", "out.jsonl", "--model", "nowhere"], "nowhere"),
        (["in.jsonl", "out.jsonl", "--temperature", "-1"], "temperature must be between"),
        (["in.jsonl", "out.jsonl", "--workers", "2"], "--workers is 1 or more, and goes with --address"),
        (["in.jsonl", "out.jsonl", "--address", "127.0.0.1:1"], "There is no Ray cluster at 127.0.0.1:1"),
        (["in.jsonl", "out.jsonl", "--address", "nowhere"], "There is no Ray cluster at nowhere"),
    ],
)
def test_a_usage_error_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "in.jsonl", [{"id": 1, "question": "What?"}])
    assert main(["batch", *arguments]) == 2
    said = capfd.readouterr().err
    assert sentence in said
    assert said.startswith("llava-serve: ")
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_the_checks_import_no_torch(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"id": 1, "qestion": "What?"}])
    arguments = ["batch", str(source), str(tmp_path / "out.jsonl")]
    script = f"import sys; from llava_serve.cli import main; main({arguments!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert "perhaps 'question' is meant" in done.stderr
    assert done.stdout == "False\n"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_job_that_is_killed_ten_times_loses_no_answer_and_has_none_twice(tmp_path: Path) -> None:
    rows = scene_rows(tmp_path, 250)
    source, out, whole = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    assert subprocess.run(command(source, whole), cwd=ROOT, timeout=600).returncode == 0
    seed = random.randrange(2**32)
    print("seed", seed)
    draw = random.Random(seed)
    kept: set[bytes] = set()
    for _ in range(10):
        running = subprocess.Popen(command(source, out), cwd=ROOT, stderr=subprocess.DEVNULL)
        new = draw.randint(1, 20)  # answers, and some milliseconds, so that it is killed at any place
        while running.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < len(kept) + new):
            time.sleep(0.005)
        time.sleep(draw.random() / 10)
        running.kill()
        running.wait()
        found = [line for line in out.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        assert len({json.loads(line)["id"] for line in found}) == len(found)
        assert kept <= set(found)
        kept = set(found)
    assert subprocess.run(command(source, out), cwd=ROOT, timeout=600).returncode == 0
    assert out.read_bytes() == whole.read_bytes()
